"""XLA's handlers on the CPU: the NumPy backend on XLA's buffers."""

from __future__ import annotations

import numpy as np

from ..plan import Wanted, make_plan
from ..problem import Problem
from .host import Arrays, HostCall
from .xla_call import XlaCall, read
from .xla_ffi import Call


def forward(call: Call) -> None:
    """Write the results that the attribute ``outputs`` names, in its order.

    ``saved`` among them is for a backward.
    """
    asked = read(call)
    outputs = asked.lists["outputs"]
    statistics = "argmax" in outputs
    host = _host_call(asked)
    host.run_forward(keep_columns="saved" in outputs, statistics=statistics)
    found = {}
    if statistics:
        names = ("log_prob", "lse", "entropy", "argmax")
        found = dict(zip(names, host.statistics(), strict=True))
    for name, result in zip(outputs, asked.results, strict=True):
        room = result.on_host()
        if name == "saved":
            packed = host.pack().view(np.uint8)
            room[: len(packed)] = packed
        elif name == "argmax":
            room.view(np.int64)[..., 0] = found[name]
        else:
            np.copyto(room, found[name] if statistics else getattr(host, name)())


def backward(call: Call) -> None:
    """Write the gradients that the attribute ``wanted`` names, in its order.

    Behind the arrays come what the forward saved, the gradient of the loss and, if there is one,
    that of lse.
    """
    asked = read(call)
    wanted = asked.lists["wanted"]
    saved, dloss, *dlse = (buffer.on_host() for buffer in asked.others)
    host = _host_call(asked)
    host.unpack(saved.view(np.int64))
    gradients = host.pullback(dloss, dlse[0] if dlse else None, Wanted.of(wanted))
    for name, result in zip(wanted, asked.results, strict=True):
        np.copyto(result.on_host(), getattr(gradients, name))


def check(problem: Problem) -> None:
    """Raise ValueError when the workspace does not suffice."""
    make_plan(problem)


def _host_call(asked: XlaCall) -> HostCall:
    arrays = Arrays(**{name: buffer.on_host() for name, buffer in asked.arrays.items()})
    return HostCall(asked.problem, make_plan(asked.problem), arrays)
