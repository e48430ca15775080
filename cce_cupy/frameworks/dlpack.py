"""Host arrays of any other framework, through DLPack."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..problem import ArraySpec
from .numpy import Array, HostFramework

_DEVICES = {1: "cpu", 2: "cuda", 3: "cuda_host", 8: "metal", 10: "rocm", 13: "cuda_managed"}
"""DLPack's device codes (dlpack.h, DLDeviceType)."""


class DlpackFramework(HostFramework):
    """Arrays that speak ``__dlpack__``.

    Results come back through ``from_dlpack`` of the arrays' own namespace; where they name none,
    as NumPy arrays.
    """

    def __init__(self, array: Any) -> None:
        self.name = type(array).__module__.partition(".")[0]
        self.returns_numpy = not hasattr(array, "__array_namespace__")

    def takes(self, array: Any) -> bool:
        """Tell whether a gradient may be handed back as this object: what the results are of."""
        if isinstance(array, np.ndarray | np.generic):
            return self.returns_numpy
        return type(array).__module__.partition(".")[0] == self.name and hasattr(
            array, "__dlpack__"
        )

    def describe(self, name: str, array: Any) -> ArraySpec:
        """Return what an argument looks like."""
        code, number = array.__dlpack_device__()
        device = _DEVICES.get(int(code), f"DLPack device {int(code)}")
        if device != "cpu":
            shape = tuple(getattr(array, "shape", ()))
            dtype = str(getattr(array, "dtype", "unknown"))
            return ArraySpec(shape, dtype, f"{device}:{int(number)}")
        host = self.to_host(array)
        return ArraySpec(host.shape, host.dtype.name)

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
        namespace = getattr(like, "__array_namespace__", None)
        return array if namespace is None else namespace().from_dlpack(array)
