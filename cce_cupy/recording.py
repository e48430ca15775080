"""Launches that are formed once and made for every call alike, with the addresses of each.

Forming the arguments of a launch takes the host longer than the driver takes to launch it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from . import tensor_map
from .driver import Layout, check, library
from .tensor_map import TensorMap

_ADDRESS_BITS = 56  # of what a GPU addresses; the bits above say which array
_WORD = 8
_ALIGNMENT = 64  # between the arguments of one launch and those of the next


class Launch(NamedTuple):
    """A launch of a kernel; see `driver.launch`. A value may be a `TensorMap`."""

    function: int
    grid: tuple[int, int]
    block: tuple[int, int]
    shared: int
    layout: Layout
    values: tuple[Any, ...]
    cooperative: bool = False


def stand_in(index: int) -> int:
    """Return what stands for the address of an array while launches are recorded.

    As with an address, the sum of it and an offset lies within the array.
    """
    return (index + 1) << _ADDRESS_BITS


def _array_of(address: int) -> tuple[int, int]:
    """Return which array an address lies in, and where in it."""
    above, offset = divmod(address, 1 << _ADDRESS_BITS)
    if above == 0:
        raise ValueError(f"{address:#x} is not within an array whose address is told at each call")
    return above - 1, offset


class Recording:
    """Launches whose addresses differ from call to call.

    Parameters
    ----------
    launches : sequence of Launch
        With the addresses of `stand_in`; 0 is no address.
    """

    def __init__(self, launches: Sequence[Launch]) -> None:
        self.launches = launches
        ends = np.cumsum([0, *(-(-x.layout.whole.size // _ALIGNMENT) for x in launches)])
        self.starts = [int(end) * _ALIGNMENT for end in ends]
        self.words = np.zeros(self.starts.pop() // _WORD, np.uint64)
        # Of each array, the words that hold an address within it, and where in it.
        self.places: list[list[tuple[int, int]]] = []
        maps: list[tuple[slice, int, int, TensorMap]] = []
        for launch, start in zip(launches, self.starts, strict=True):
            values = []
            scalars = zip(launch.layout.scalars, launch.values, strict=True)
            for (scalar, offset), given in scalars:
                word, value = (start + offset) // _WORD, given
                if scalar == "P" and given:
                    array, within = _array_of(given)
                    self.places += [[] for _ in range(len(self.places), array + 1)]
                    self.places[array].append((word, within))
                    value = 0
                elif isinstance(given, TensorMap):
                    words = slice(word, word + tensor_map.BYTES // _WORD)
                    maps.append((words, *_array_of(given.pointer), given))
                    value = b""
                values.append(value)
            launch.layout.whole.pack_into(self.words.data, start, *values)
        self.maps = maps
        self._rooms: list[_Room] = []

    def replay(self, addresses: tuple[int, ...], stream: int) -> None:
        """Make the launches on a stream of the current device.

        Parameters
        ----------
        addresses : tuple of int
            Of the arrays, by the index that `stand_in` was given.
        stream : int
            The raw handle.

        Raises
        ------
        RuntimeError
            When the driver refuses.
        """
        # Each call that is under way has a room of its own: taking and giving back are atomic.
        try:
            room = self._rooms.pop()
        except IndexError:
            room = _Room(self, len(addresses))
        try:
            room.launch(addresses, stream)
        finally:
            self._rooms.append(room)


class _Room:
    """Arguments of a recording's launches, as the driver takes them."""

    def __init__(self, recording: Recording, arrays: int) -> None:
        self.recording = recording
        self.words = recording.words.copy()
        self.nowhere = (-1,) * arrays
        self.addresses: tuple[int, ...] = self.nowhere
        self.mapped = [0] * len(recording.maps)
        self.stream = ctypes.c_void_p()
        # A function that was not told its types takes arguments that have one as they are.
        plain, cooperative = library()["cuLaunchKernel"], library()["cuLaunchCooperativeKernel"]
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []
        for launch, start in zip(recording.launches, recording.starts, strict=True):
            place = self._place(launch, start)
            call = (cooperative, place) if launch.cooperative else (plain, (*place, None))
            self.calls.append(call)

    def _place(self, launch: Launch, start: int) -> tuple[Any, ...]:
        at = self.words.ctypes.data + start
        pointers = [at + offset for offset in launch.layout.offsets]
        sizes = (*launch.grid, 1, *launch.block, 1, launch.shared)
        return (
            ctypes.c_void_p(launch.function),
            *(ctypes.c_uint(size) for size in sizes),
            self.stream,
            (ctypes.c_void_p * len(pointers))(*pointers),
        )

    def launch(self, addresses: tuple[int, ...], stream: int) -> None:
        # An allocator that keeps memory hands out the same addresses again and again.
        if addresses != self.addresses:
            self._write(addresses)
        self.stream.value = stream
        for function, arguments in self.calls:
            status = function(*arguments)
            if status != 0:
                check(status)

    def _write(self, addresses: tuple[int, ...]) -> None:
        recording, words = self.recording, self.words.data
        before, self.addresses = self.addresses, self.nowhere  # until all are written
        # One by one: few are others than before, and NumPy needs longer to begin with any.
        for address, old, places in zip(addresses, before, recording.places, strict=False):
            if address != old:
                for word, within in places:
                    words[word] = address + within
        for k, (where, array, offset, matrix) in enumerate(recording.maps):
            pointer = addresses[array] + offset
            if pointer != self.mapped[k]:
                encoded = tensor_map.encode(matrix._replace(pointer=pointer))
                self.words[where] = np.frombuffer(encoded, np.uint64)
                self.mapped[k] = pointer
        self.addresses = addresses
