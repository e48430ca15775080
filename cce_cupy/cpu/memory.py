"""Memory and threads of the CPU backend: reused buffers, conversions by block, worker threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import threadpoolctl

Array = npt.NDArray[Any]
Item = TypeVar("Item")
Result = TypeVar("Result")

_SMALLEST_SHARED_WORK = 2**20
"""Logits below which threads cost more than they save."""


class Scratch:
    """Buffers that live as long as a call, one set for each thread, each found by its name.

    A block-sized array from the operating system costs a page fault for every 4 KiB each time.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._of_thread = threading.local()

    def get(self, name: str, rows: int, columns: int) -> Array:
        """Return an uninitialised C-contiguous array of shape (rows, columns)."""
        buffers: dict[str, Array] = self._of_thread.__dict__
        size = rows * columns
        if name not in buffers or buffers[name].size < size:
            buffers[name] = np.empty(size, self._dtype)
        return buffers[name][:size].reshape(rows, columns)


class Workers:
    """Threads that each run whole products, with a BLAS that runs on one thread meanwhile.

    The elementwise work between the products then runs on all cores too, and no idle thread of
    BLAS spins on a core that it needs. As many threads as BLAS was allowed: limits that a user
    sets for BLAS hold. Which thread does what has no influence on any result.

    Parameters
    ----------
    work : int
        Logits to compute; little work is done on the calling thread.
    most : int
        Upper limit on the threads.
    """

    def __init__(self, work: int, most: int) -> None:
        self.threads = 1
        self._pool: ThreadPoolExecutor | None = None
        self._work, self._most = work, most

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Apply a function to independent items; results come in the items' order."""
        if self._pool is None:
            return map(function, items)
        return self._pool.map(_quietly(function), items)

    def __enter__(self) -> Workers:
        if self._work >= _SMALLEST_SHARED_WORK:
            self.threads = min(_BLAS.enter(), self._most)
            if self.threads > 1:
                self._pool = _new_pool(self.threads)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._work >= _SMALLEST_SHARED_WORK:
            _BLAS.leave()


def _new_pool(threads: int) -> ThreadPoolExecutor | None:
    """Return worker threads, None where there can be none.

    An interpreter that is shutting down starts no more, and XLA's threads may still call it.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        pool.submit(int)
    except RuntimeError:
        return None
    return pool


class _SingleThreadedBlas:
    """The limit of one BLAS thread, held while any call of any of the user's threads needs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._controller: threadpoolctl.ThreadpoolController | None = None
        self._limit: Any = None
        self._holders = 0
        self._threads = 1

    def enter(self) -> int:
        """Hold the limit; return how many threads BLAS had before it."""
        with self._lock:
            if self._controller is None:
                self._controller = threadpoolctl.ThreadpoolController().select(user_api="blas")
            if self._holders == 0:
                counts = [library.num_threads for library in self._controller.lib_controllers]
                # A BLAS that cannot be limited keeps its threads, and is called from one.
                self._threads = max(counts, default=1)
                self._limit = self._controller.limit(limits=1)
            self._holders += 1
            return self._threads

    def leave(self) -> None:
        """Release the limit; the last to leave restores what was there before."""
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                self._limit.restore_original_limits()


_BLAS = _SingleThreadedBlas()


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
    if array.ndim == 1:
        array = array[None]
    if array.ndim == 2:
        return np.asarray(array[as_index(rows)])
    if array.flags.c_contiguous:
        flat = array.reshape(math.prod(array.shape[:-1]), array.shape[-1])
        return np.asarray(flat[as_index(rows)])
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
