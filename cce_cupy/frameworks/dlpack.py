"""Arrays of any other framework, through DLPack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..problem import ArraySpec
from .framework import Array, Framework

if TYPE_CHECKING:
    from .cupy import CupyMemory

_DEVICES = {1: "cpu", 2: "cuda", 3: "cuda_host", 8: "metal", 10: "rocm", 13: "cuda_managed"}
"""DLPack's device codes (dlpack.h, DLDeviceType)."""


class DlpackFramework(Framework):
    """Arrays that speak ``__dlpack__``.

    Results come back through ``from_dlpack`` of the arrays' own namespace; where they name none,
    as arrays of NumPy, or of CuPy for those on a CUDA device.
    """

    waits_on_device = True

    def __init__(self, array: Any) -> None:
        self.name = type(array).__module__.partition(".")[0]
        self.returns_numpy = not hasattr(array, "__array_namespace__")

    def takes(self, array: Any) -> bool:
        """Tell whether a gradient may be handed back as this object: what the results are of."""
        if isinstance(array, np.ndarray | np.generic):
            return self.returns_numpy
        root = type(array).__module__.partition(".")[0]
        if root == "cupy" and self.returns_numpy:
            return True
        return root == self.name and hasattr(array, "__dlpack__")

    def describe(self, name: str, array: Any) -> ArraySpec:
        """Return what an argument looks like."""
        code, number = array.__dlpack_device__()
        device = _DEVICES.get(int(code), f"DLPack device {int(code)}")
        if device == "cpu":
            host = self.to_host(array)
            return ArraySpec(host.shape, host.dtype.name)
        place = f"{device}:{int(number)}"
        if device != "cuda":
            shape = tuple(getattr(array, "shape", ()))
            return ArraySpec(shape, str(getattr(array, "dtype", "unknown")), place)
        seen = self.device_view(array)
        return ArraySpec(tuple(seen.shape), seen.dtype.name, place)

    def to_host(self, array: Any) -> Array:
        """Return a view of the array's memory."""
        try:
            return np.from_dlpack(array)
        except (BufferError, RuntimeError) as error:
            raise TypeError(
                f"NumPy cannot take this {type(array).__name__} over DLPack: {error}"
            ) from error

    def from_host(self, array: Array, like: Any) -> Any:
        """Return an array of the namespace of `like`."""
        return self._returned(array, like)

    def device_memory(self, like: Any) -> CupyMemory:
        """Return CuPy's view of the device: it allocates, and the results are handed on."""
        from .cupy import CupyMemory

        return CupyMemory(int(like.__dlpack_device__()[1]))

    def device_view(self, array: Any) -> Any:
        """Return a CuPy array over the same memory."""
        from .cupy import from_dlpack

        return from_dlpack(array)

    def from_device(self, array: Any, like: Any) -> Any:
        """Return an array of the namespace of `like`."""
        return self._returned(array, like)

    def _returned(self, array: Any, like: Any) -> Any:
        namespace = getattr(like, "__array_namespace__", None)
        return array if namespace is None else namespace().from_dlpack(array)
