"""JAX arrays on the CPU, as plain data."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from ..problem import ArraySpec
from .numpy import Array, HostFramework


class JaxFramework(HostFramework):
    """Concrete arrays; traced ones are refused."""

    name = "JAX"

    @staticmethod
    def owns(array: Any) -> bool:
        """Tell whether an object is an array of this framework."""
        return isinstance(array, jax.Array)

    def describe(self, name: str, array: Any) -> ArraySpec:
        """Return what an argument looks like."""
        if isinstance(array, jax.core.Tracer):
            raise TypeError(
                f"{name} is traced by jit, grad, vmap or another transformation, which this "
                "version does not take part in: call it on concrete arrays, and use "
                "linear_cross_entropy_value_and_grad for gradients"
            )
        devices = sorted({device.platform for device in array.devices()})
        return ArraySpec(tuple(array.shape), array.dtype.name, devices[0])

    def to_host(self, array: Any) -> Array:
        """Return a read-only view of the array's memory."""
        return np.asarray(array)

    def from_host(self, array: Array, like: Any) -> Any:
        """Return an array on the device of `like`."""
        # Without x64 JAX has no 64-bit integers.
        canonical = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
        devices = like.devices()
        return jax.device_put(canonical, next(iter(devices)) if len(devices) == 1 else None)
