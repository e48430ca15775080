"""XLA's handlers on a GPU: the kernels on XLA's buffers and on XLA's stream.

Nothing is allocated, waited for or read back, so that XLA may record a call in a CUDA graph.
Workspace is the last result of a call.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ..compiler import KERNELS, import_cupy, kernel, serves
from ..plan import GpuDevice, Wanted, make_gpu_plan
from ..problem import Problem
from .cupy import hardware_of
from .gpu import GpuCall
from .xla_call import read, saved_bytes
from .xla_ffi import Buffer, Call


def forward(call: Call) -> None:
    """Write the results that the attribute ``outputs`` names, in its order, then the workspace.

    ``saved`` among them is for a backward; without it what would be saved has its place in the
    workspace.
    """
    asked = read(call)
    *results, workspace = asked.results
    outputs = dict(zip(asked.lists["outputs"], results, strict=True))
    saved = outputs.pop("saved", None)
    memory = _XlaMemory(call, workspace, (workspace,) if saved is None else (saved, workspace))
    for name, result in outputs.items():
        memory.fill(result, -1 if name == "argmax" else 0)
    gpu = GpuCall(memory, asked.problem, asked.arrays)
    gpu.run_forward(keep_columns=saved is not None, outputs=outputs)


def backward(call: Call) -> None:
    """Write the gradients that the attribute ``wanted`` names, in its order, then the workspace.

    Behind the arrays come what the forward saved, the gradient of the loss and, if there is one,
    that of lse.
    """
    asked = read(call)
    wanted = asked.lists["wanted"]
    saved, dloss, *dlse = asked.others
    *results, workspace = asked.results
    named = dict(zip(wanted, results, strict=True))
    ordered = (named[name] for name in ("e", "c", "bias") if name in named)
    memory = _XlaMemory(call, workspace, (workspace, *ordered))
    gpu = GpuCall(memory, asked.problem, asked.arrays, saved)
    gpu.pullback(memory, dloss, dlse[0] if dlse else None, Wanted.of(wanted))


def forward_bytes(problem: Problem, devices: Iterable[int], outputs: tuple[str, ...]) -> int:
    """Return the workspace that a forward needs on any of some devices, and load its kernels."""
    needs = 0
    for device in devices:
        _load(device, problem.dtype)
        for aligned in (True, False):
            plan = make_gpu_plan(problem, hardware_of(device), aligned=aligned)
            room = plan.statistics if "argmax" in outputs else plan.forward
            needs = max(needs, room.bytes)
    return needs + (0 if "saved" in outputs else saved_bytes(problem))


def backward_bytes(problem: Problem, devices: Iterable[int]) -> int:
    """Return the workspace that a backward needs on any of some devices, and load its kernels."""
    needs = 0
    for device in devices:
        _load(device, problem.dtype)
        for aligned in (True, False):
            plan = make_gpu_plan(problem, hardware_of(device), aligned=aligned)
            needs = max(needs, plan.backward.bytes)
    return needs


def _load(device: int, dtype: str) -> None:
    """Compile and load the kernels now: while XLA records a graph it is too late."""
    for file, names in KERNELS.items():
        if serves(file, dtype, hardware_of(device).capability):
            for name in names:
                kernel(device, file, name, dtype)


class _XlaMemory:
    """A device in a call of XLA's, where all memory is there before: handed out in a fixed order.

    Parameters
    ----------
    call : Call
    workspace : Buffer
        Never empty, so that its address tells the device.
    prepared : sequence of Buffer
        What `full` is going to be asked for.
    """

    def __init__(self, call: Call, workspace: Buffer, prepared: Iterable[Buffer]) -> None:
        self._runtime = import_cupy().cuda.runtime
        self._prepared = iter(prepared)
        self.device: int = self._runtime.pointerGetAttributes(workspace.pointer).device
        self.stream = call.stream()

    def strides(self, array: Any) -> tuple[int, ...]:
        """Return how far apart a buffer's elements lie along each axis."""
        return tuple(math.prod(array.shape[i + 1 :]) for i in range(len(array.shape)))

    def address(self, array: Any) -> int:
        """Return where a buffer lies."""
        return array.pointer  # type: ignore[no-any-return]

    def contiguous(self, array: Any, dtype: str | None = None) -> Any:
        """Return the buffer itself: XLA's are contiguous, and JAX has converted them."""
        if dtype not in (None, array.dtype):
            raise TypeError(f"XLA hands over {array.dtype} where {dtype} was agreed on")
        return array

    def full(self, shape: tuple[int, ...], dtype: str, value: float | None) -> Any:
        """Return the next prepared buffer, filled if there is a value."""
        buffer = next(self._prepared)
        needs = Buffer(0, dtype, shape).nbytes
        if buffer.nbytes < needs:
            raise RuntimeError(
                f"a buffer of {needs} bytes was asked for, the program has one of {buffer.nbytes}: "
                "it was compiled for another kind of GPU"
            )
        if value is not None:
            self.fill(buffer, int(value))
        return buffer

    def fill(self, buffer: Buffer, value: int) -> None:
        """Set all bits of a buffer to those of 0 or of -1."""
        if buffer.nbytes:
            with import_cupy().cuda.Device(self.device):
                self._runtime.memsetAsync(buffer.pointer, value & 0xFF, buffer.nbytes, self.stream)

    def hardware(self) -> GpuDevice:
        """Return what the device is."""
        return hardware_of(self.device)

    def read_integer(self, array: Any, index: int) -> int:
        """Refuse: the host does not wait in a call of XLA's."""
        raise NotImplementedError("check_targets is settled before the call")

    def wait(self) -> None:
        """Do nothing: XLA orders its streams."""

    def outlives(self, array: Any) -> None:
        """Do nothing: XLA orders the use of its memory."""
