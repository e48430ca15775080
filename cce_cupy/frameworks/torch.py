"""PyTorch tensors on the CPU, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch

from ..problem import ArraySpec
from .numpy import Array, HostFramework


class TorchFramework(HostFramework):
    """Tensors; results share memory with nothing of the caller's."""

    name = "torch"

    @staticmethod
    def owns(array: Any) -> bool:
        """Tell whether an object is an array of this framework."""
        return isinstance(array, torch.Tensor)

    def describe(self, name: str, array: Any) -> ArraySpec:
        """Return what an argument looks like."""
        if array.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {array.layout}")
        dtype = str(array.dtype).removeprefix("torch.")
        return ArraySpec(tuple(array.shape), dtype, str(array.device))

    def to_host(self, array: Any) -> Array:
        """Return a view of the tensor's memory."""
        plain = array.detach().resolve_neg()
        try:
            if plain.dtype == torch.bfloat16:
                # NumPy has no bfloat16 of its own; the bits travel as integers.
                return np.asarray(plain.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
            return np.asarray(plain.numpy())
        except RuntimeError as error:
            raise TypeError(
                "tensors must hold data of their own; this one stands for others, as within "
                f"torch.func transformations: {error}"
            ) from error

    def from_host(self, array: Array, like: Any) -> Any:
        """Return a tensor over the array's memory."""
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def refuse_autodiff(self, arrays: Mapping[str, Any]) -> None:
        """Raise for tensors that require grad: autograd would find no way back through the loss."""
        if not torch.is_grad_enabled():
            return
        for name, array in arrays.items():
            if array.requires_grad:
                raise ValueError(
                    f"{name} requires grad, but this version does not take part in autograd: "
                    "use linear_cross_entropy_value_and_grad or linear_cross_entropy_vjp, "
                    f"or pass {name}.detach()"
                )
