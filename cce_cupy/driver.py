"""Launches through the CUDA driver: a tenth of the time that CuPy takes for one with structs."""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from typing import Any

_BUFFER, _SIZE, _END = 1, 2, 0  # CU_LAUNCH_PARAM_*


@functools.cache
def library() -> ctypes.CDLL:
    """Return the driver's library."""
    cuda = ctypes.CDLL("libcuda.so.1")
    cuda.cuLaunchKernel.argtypes = [
        ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3
    ]  # fmt: skip
    return cuda


class _Arguments:
    """Room for the arguments of a launch, and how the driver is told of it."""

    def __init__(self, size: int) -> None:
        self.buffer = ctypes.create_string_buffer(max(size, 1))
        self._size = ctypes.c_size_t(size)
        told = (
            _BUFFER, ctypes.addressof(self.buffer), _SIZE, ctypes.addressof(self._size), _END
        )  # fmt: skip
        self.extra = (ctypes.c_void_p * len(told))(*told)


class _OfThread(threading.local):
    """The driver has copied the arguments when a launch returns: a thread's next may reuse them."""

    def __init__(self) -> None:
        self.rooms: dict[int, _Arguments] = {}


_of_thread = _OfThread()


def launch(
    function: int,
    grid: tuple[int, int],
    block: tuple[int, int],
    shared: int,
    stream: int,
    layout: struct.Struct,
    values: tuple[Any, ...],
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
    layout : struct.Struct
        Of the parameters, as the C compiler lays out a struct of them.
    values : tuple
        The arguments' scalars, one after the other.

    Raises
    ------
    RuntimeError
        When the driver refuses.
    """
    room = _of_thread.rooms.get(layout.size)
    if room is None:
        room = _of_thread.rooms[layout.size] = _Arguments(layout.size)
    layout.pack_into(room.buffer, 0, *values)
    status = library().cuLaunchKernel(
        function, grid[0], grid[1], 1, block[0], block[1], 1, shared, stream, None, room.extra
    )
    if status != 0:
        raise RuntimeError(f"the driver refused to launch a kernel: {_name(status)}")


def _name(status: int) -> str:
    text = ctypes.c_char_p()
    library().cuGetErrorName(status, ctypes.byref(text))
    return text.value.decode() if text.value else f"CUDA error {status}"
