"""Launches through the CUDA driver, with arguments packed here: CuPy looks at each of them anew."""

from __future__ import annotations

import ctypes
import functools
import re
import struct
import threading
from collections.abc import Sequence
from typing import Any


class Layout:
    """Where the arguments of a kernel lie, as the C compiler lays out a struct of them.

    Parameters
    ----------
    parameters : sequence of str
        A format of `struct` for each.

    Attributes
    ----------
    whole : struct.Struct
        Packs the scalars of all parameters, one after the other.
    sizes, offsets : list of int
        Bytes of each parameter, and where it starts.
    scalars : list of (str, int)
        The format of each scalar, and where it starts.
    """

    def __init__(self, parameters: Sequence[str]) -> None:
        self.whole = struct.Struct("@" + "".join(parameters))
        self.sizes = [struct.calcsize("@" + parameter) for parameter in parameters]
        ends = [struct.calcsize("@" + "".join(parameters[: k + 1])) for k in range(len(parameters))]
        self.offsets = [end - size for end, size in zip(ends, self.sizes, strict=True)]
        self.scalars: list[tuple[str, int]] = []
        before = "@"
        for count, code in re.findall(r"(\d*)([a-zA-Z])", "".join(parameters)):
            # The number before an s is the length of one scalar.
            scalar, times = (count + code, 1) if code == "s" else (code, int(count or 1))
            before += "0" + code
            for _ in range(times):
                self.scalars.append((scalar, struct.calcsize(before)))
                before += scalar


@functools.cache
def library() -> ctypes.CDLL:
    """Return the driver's library."""
    cuda = ctypes.CDLL("libcuda.so.1")
    cuda.cuLaunchKernel.argtypes = [
        ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3
    ]  # fmt: skip
    cuda.cuLaunchCooperativeKernel.argtypes = [
        ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 2
    ]  # fmt: skip
    return cuda


class _Arguments:
    """Room for the arguments of a launch, and pointers to each."""

    def __init__(self, layout: Layout) -> None:
        self.buffer = ctypes.create_string_buffer(layout.whole.size)
        start = ctypes.addressof(self.buffer)
        # One buffer would do by the driver's documents, but descriptors did not arrive that way.
        pointers = [start + offset for offset in layout.offsets]
        self.pointers = (ctypes.c_void_p * len(pointers))(*pointers)


class _OfThread(threading.local):
    """The driver has copied the arguments when a launch returns: a thread's next may reuse them."""

    def __init__(self) -> None:
        self.rooms: dict[Layout, _Arguments] = {}


_of_thread = _OfThread()


def launch(
    function: int,
    grid: tuple[int, int],
    block: tuple[int, int],
    shared: int,
    stream: int,
    layout: Layout,
    values: tuple[Any, ...],
    *,
    cooperative: bool = False,
) -> None:
    """Launch a kernel on a stream of the current device.

    Parameters
    ----------
    function : int
        The driver's handle.
    grid, block : tuple of int
        Blocks and their threads, along x and y.
    shared : int
        Bytes of dynamic shared memory.
    stream : int
        The raw handle.
    layout : Layout
    values : tuple
        The arguments' scalars, one after the other.
    cooperative : bool
        Whether its blocks wait for each other, and must all be there at once.

    Raises
    ------
    RuntimeError
        When the driver refuses.
    """
    room = _of_thread.rooms.get(layout)
    if room is None:
        room = _of_thread.rooms[layout] = _Arguments(layout)
    layout.whole.pack_into(room.buffer, 0, *values)
    place = function, grid[0], grid[1], 1, block[0], block[1], 1, shared, stream, room.pointers
    if cooperative:
        status = library().cuLaunchCooperativeKernel(*place)
    else:
        status = library().cuLaunchKernel(*place, None)
    check(status)


def check(status: int) -> None:
    """Raise RuntimeError where the driver has refused to launch a kernel."""
    if status != 0:
        raise RuntimeError(f"the driver refused to launch a kernel: {_name(status)}")


def _name(status: int) -> str:
    text = ctypes.c_char_p()
    library().cuGetErrorName(status, ctypes.byref(text))
    return text.value.decode() if text.value else f"CUDA error {status}"
