"""NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..problem import ArraySpec
from .framework import Framework

Array = npt.NDArray[Any]


class NumpyFramework(Framework):
    """NumPy arrays and scalars."""

    name = "NumPy"

    @staticmethod
    def owns(array: Any) -> bool:
        """Tell whether an object is an array of this framework."""
        # Not a union of types, which compilers of torch cannot follow.
        return isinstance(array, (np.ndarray, np.generic))

    def describe(self, name: str, array: Any) -> ArraySpec:
        """Return what an argument looks like."""
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(
                f"{name} is a masked array, whose mask would be lost: mark tokens to leave out "
                "by ignore_index in targets and pass plain arrays"
            )
        return ArraySpec(array.shape, array.dtype.name)

    def to_host(self, array: Any) -> Array:
        """Return the array itself, in native byte order."""
        plain = np.asarray(array)
        return np.require(plain, plain.dtype.newbyteorder("="), "A")

    def from_host(self, array: Array, like: Any) -> Any:
        """Return the array itself."""
        return array
