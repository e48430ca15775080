"""Concrete JAX arrays on the CPU and on GPUs, as plain data."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from ..problem import ArraySpec
from .cupy import CupyMemory, from_dlpack
from .framework import Array, Framework

_PLATFORMS = {"gpu": "cuda"}
"""JAX's names of platforms where ours differ."""


class JaxFramework(Framework):
    """Concrete arrays; traced ones are refused."""

    name = "JAX"
    waits_on_device = True

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
        places = sorted(_place(device) for device in array.devices())
        if len(places) > 1 and places[0] != "cpu":
            raise ValueError(
                f"{name} is spread over {', '.join(places)}: arrays on one GPU are accepted"
            )
        return ArraySpec(tuple(array.shape), array.dtype.name, places[0])

    def to_host(self, array: Any) -> Array:
        """Return a read-only view of the array's memory."""
        return np.asarray(array)

    def from_host(self, array: Array, like: Any) -> Any:
        """Return an array on the device of `like`."""
        # Without x64 JAX has no 64-bit integers.
        canonical = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
        devices = like.devices()
        return jax.device_put(canonical, next(iter(devices)) if len(devices) == 1 else None)

    def device_memory(self, like: Any) -> CupyMemory:
        """Return CuPy's view of the device: it allocates, and the results are handed on."""
        (device,) = like.devices()
        return CupyMemory(device.local_hardware_id)

    def device_view(self, array: Any) -> Any:
        """Return a CuPy array over the same memory."""
        return from_dlpack(array)

    def from_device(self, array: Any, like: Any) -> Any:
        """Return a JAX array over the same memory."""
        canonical = jax.dtypes.canonicalize_dtype(array.dtype)
        return jax.dlpack.from_dlpack(array.astype(canonical, copy=False))


def _place(device: Any) -> str:
    platform = _PLATFORMS.get(device.platform, device.platform)
    return platform if platform == "cpu" else f"{platform}:{device.local_hardware_id}"
