"""CuPy arrays; and, seen through CuPy, the device arrays of every framework that speaks DLPack."""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np

from ..compiler import import_cupy
from ..plan import GpuDevice
from ..problem import ArraySpec
from .framework import Framework


class CupyFramework(Framework):
    """CuPy arrays."""

    name = "CuPy"

    @staticmethod
    def owns(array: Any) -> bool:
        """Tell whether an object is an array of this framework."""
        return isinstance(array, import_cupy().ndarray)

    def describe(self, name: str, array: Any) -> ArraySpec:
        """Return what an argument looks like."""
        return ArraySpec(tuple(array.shape), array.dtype.name, f"cuda:{array.device.id}")

    def device_memory(self, like: Any) -> CupyMemory:
        """Return what the kernels need of CuPy on the device of `like`."""
        return CupyMemory(like.device.id)


def from_dlpack(array: Any) -> Any:
    """Return a CuPy array over another framework's device memory, ordered after its work."""
    try:
        return import_cupy().from_dlpack(array)
    except (BufferError, RuntimeError, TypeError) as error:
        raise TypeError(
            f"CuPy cannot take this {type(array).__name__} over DLPack: {error}"
        ) from error


class CupyMemory:
    """A CUDA device as CuPy sees it: its memory pool and its current stream."""

    def __init__(self, device: int) -> None:
        self._cupy = import_cupy()
        self.device = device
        with self._cupy.cuda.Device(device):
            self.stream: int = self._cupy.cuda.get_current_stream().ptr

    def strides(self, array: Any) -> tuple[int, ...]:
        """Return how far apart an array's elements lie along each axis, in elements."""
        return tuple(stride // array.itemsize for stride in array.strides)

    def address(self, array: Any) -> int:
        """Return where an array lies."""
        return int(array.data.ptr)

    def contiguous(self, array: Any, dtype: str | None = None) -> Any:
        """Return an array's elements contiguous, in a dtype."""
        with self._cupy.cuda.Device(self.device):
            chosen = array.dtype if dtype is None else np.dtype(dtype)
            return self._cupy.ascontiguousarray(array.astype(chosen, copy=False))

    def full(self, shape: tuple[int, ...], dtype: str, value: float | None) -> Any:
        """Return a new array; uninitialised where value is None."""
        chosen = np.dtype(getattr(ml_dtypes, dtype, dtype))
        with self._cupy.cuda.Device(self.device):
            array = self._cupy.empty(shape, chosen)
            if value == 0:
                array.data.memset_async(0, array.nbytes)
            elif value is not None:
                array.fill(value)
        return array

    def hardware(self) -> GpuDevice:
        """Return what the device is."""
        return hardware_of(self.device)

    def read_integer(self, array: Any, index: int) -> int:
        """Return one element, waiting for it."""
        return int(array[index])

    def wait(self) -> None:
        """Wait for the stream."""
        self._cupy.cuda.get_current_stream(self.device).synchronize()

    def outlives(self, array: Any) -> None:
        """Do nothing: in CuPy whoever uses several streams orders their use of memory."""


@functools.cache
def hardware_of(device: int) -> GpuDevice:
    """Return what a device is."""
    # Each look at the properties asks the driver for all of them.
    found = import_cupy().cuda.runtime.getDeviceProperties(device)
    return GpuDevice(found["multiProcessorCount"], (found["major"], found["minor"]))
