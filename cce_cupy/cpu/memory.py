"""Memory and threads of the CPU backend: reused buffers, conversions by block, worker threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Item = TypeVar("Item")
Result = TypeVar("Result")

_SMALLEST_SHARED_WORK = 2**19
"""Logits below which starting threads costs more than it saves."""


class Scratch:
    """Buffers that live as long as a call, each found by its name and as large as last needed.

    A block-sized array from the operating system costs a page fault for every 4 KiB each time.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._buffers: dict[str, Array] = {}

    def get(self, name: str, rows: int, columns: int) -> Array:
        """Return an uninitialised C-contiguous array of shape (rows, columns)."""
        size = rows * columns
        if name not in self._buffers or self._buffers[name].size < size:
            self._buffers[name] = np.empty(size, self._dtype)
        return self._buffers[name][:size].reshape(rows, columns)


class Workers:
    """Threads for elementwise work: NumPy runs that on one core, and releases the GIL for it."""

    def __init__(self, work: int) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = min(cores or 1, 8) if work >= _SMALLEST_SHARED_WORK else 1
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Apply a function to independent items; results come in the items' order."""
        if self._pool is None:
            return map(function, items)
        return self._pool.map(_quietly(function), items)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def _quietly(function: Callable[[Item], Result]) -> Callable[[Item], Result]:
    # A new thread starts with NumPy's default error state, not with its creator's.
    def run(item: Item) -> Result:
        with np.errstate(all="ignore"):
            return function(item)

    return run


def take_rows(array: Array, rows: Array) -> Array:
    """Return rows of an array of shape (..., D), counted along its flattened leading axes.

    A view where the rows follow each other, else a copy of those rows alone.
    """
    if array.ndim == 2:
        return np.asarray(array[as_index(rows)])
    if array.flags.c_contiguous:
        return np.asarray(array.reshape(-1, array.shape[-1])[as_index(rows)])
    return np.asarray(array[np.unravel_index(rows, array.shape[:-1])])


def as_index(rows: Array) -> slice | Array:
    """Return ascending indices as a slice where they follow each other."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def as_sums(block: Array, dtype: np.dtype[Any]) -> Array:
    """Convert a block to the dtype of the sums, C-contiguous so that BLAS sums in one order."""
    if block.dtype == dtype:
        return np.ascontiguousarray(block)
    if block.dtype.name == "bfloat16" and dtype == np.float32:
        # A bfloat16 is the upper half of a float32; NumPy's cast goes element by element.
        wide = np.ascontiguousarray(block).view(np.uint16).astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    return np.ascontiguousarray(block, dtype)
