"""PyTorch tensors on the CPU and on GPUs, as plain data."""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np
import torch

from ..plan import GpuDevice
from ..problem import ArraySpec
from .framework import Array, Framework


class TorchFramework(Framework):
    """Tensors; results share memory with nothing of the caller's."""

    name = "torch"

    @staticmethod
    def owns(array: Any) -> bool:
        """Tell whether an object is an array of this framework."""
        return isinstance(array, torch.Tensor)

    def describe(self, name: str, array: Any) -> ArraySpec:
        """Return what an argument looks like."""
        if hasattr(array, "full_tensor"):
            raise TypeError(
                f"{name} is a DTensor ({array.placements}), and whether its gradient is a sum over "
                f"ranks is for the caller to say: pass {name}.full_tensor() where every rank has "
                f"the same tokens, {name}.full_tensor(grad_placements=[Partial()]) where each has "
                f"its own and gradients are summed, or {name}.to_local(). Within the forward of a "
                "module that fully_shard wraps, parameters are plain tensors"
            )
        if array.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {array.layout}")
        try:
            return _spec(array.shape, array.dtype, array.device)
        except TypeError:  # sizes that are symbolic: no cache can hold them
            return _spec.__wrapped__(array.shape, array.dtype, array.device)

    def to_host(self, array: Any) -> Array:
        """Return a view of the tensor's memory."""
        plain = array.detach().resolve_neg()
        try:
            # Not by Tensor.numpy: it forbids to resize the memory, which FSDP does to parameters.
            if plain.dtype == torch.bfloat16:
                # NumPy has no bfloat16 of its own; the bits travel as integers.
                return np.from_dlpack(plain.view(torch.int16)).view(ml_dtypes.bfloat16)
            return np.from_dlpack(plain)
        except (BufferError, RuntimeError) as error:
            raise TypeError(
                "tensors must hold data of their own; this one stands for others, as within "
                f"torch.func transformations: {error}"
            ) from error

    def from_host(self, array: Array, like: Any) -> Any:
        """Return a tensor over the array's memory."""
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def device_memory(self, like: Any) -> TorchMemory:
        """Return what the kernels need of torch on the device of `like`."""
        return TorchMemory(like.device)

    def device_total(self, array: Any) -> float:
        """Return the sum of a tensor."""
        return float(array.sum(dtype=torch.float64))


@functools.lru_cache(maxsize=1024)
def _spec(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> ArraySpec:
    return ArraySpec(tuple(shape), str(dtype).removeprefix("torch."), str(device))


@functools.cache
def _hardware(device: int) -> GpuDevice:
    properties = torch.cuda.get_device_properties(device)
    return GpuDevice(properties.multi_processor_count, (properties.major, properties.minor))


class TorchMemory:
    """A CUDA device as torch sees it: its caching allocator and its current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.device: int = device.index
        # What torch.cuda.current_stream asks too, before it makes an object of it.
        self.stream: int = torch._C._cuda_getCurrentRawStream(device.index)

    # How far apart a tensor's elements lie along each axis, and where it lies: torch's own, which
    # are asked for each tensor of each call.
    strides = staticmethod(torch.Tensor.stride)
    address = staticmethod(torch.Tensor.data_ptr)

    def contiguous(self, array: Any, dtype: str | None = None) -> Any:
        """Return a tensor's elements contiguous, in a dtype."""
        chosen = array.dtype if dtype is None else getattr(torch, dtype)
        if array.dtype == chosen and array.is_contiguous():
            return array
        return array.detach().to(chosen).contiguous()

    def full(self, shape: tuple[int, ...], dtype: str, value: float | None) -> Any:
        """Return a new tensor; uninitialised where value is None."""
        chosen = getattr(torch, dtype)
        if value is None:
            return torch.empty(shape, dtype=chosen, device=self._device)
        return torch.full(shape, value, dtype=chosen, device=self._device)

    def hardware(self) -> GpuDevice:
        """Return what the device is."""
        return _hardware(self.device)

    def read_integer(self, array: Any, index: int) -> int:
        """Return one element, waiting for it."""
        return int(array[index].item())

    def wait(self) -> None:
        """Wait for the stream."""
        torch.cuda.current_stream(self._device).synchronize()

    def outlives(self, array: Any) -> None:
        """Tell the allocator that the current stream uses a tensor too."""
        array.record_stream(torch.cuda.current_stream(self._device))
