"""Device arrays of each framework, and the library seen through them by tests that speak NumPy.

Arrays are sent with the memory they lie in, so that strides, gaps and alignment arrive as they are.
`Road` has the public functions: NumPy arrays go in and come out, and in between they are arrays of
a framework on a GPU.
"""

import contextlib
import ctypes
import functools

import ml_dtypes
import numpy as np
import pytest

import cce_cupy


def memory_of(array, pad):
    """The bytes that an array lies in, gaps included and `pad` elements before; its own offset."""
    before = pad * array.itemsize
    if not array.size:
        return np.zeros(before, np.uint8), before
    reach = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
    below = -sum(r for r in reach if r < 0)
    above = sum(r for r in reach if r > 0) + array.itemsize
    raw = (ctypes.c_uint8 * (below + above)).from_address(array.ctypes.data - below)
    padding = np.zeros(before, np.uint8)
    return np.concatenate([padding, np.frombuffer(raw, np.uint8)]), before + below


class Cupy:
    """CuPy arrays."""

    name = "cupy"

    @functools.cached_property
    def module(self):
        return pytest.importorskip("cupy")

    def send(self, array, pad=0):
        """An array's twin on the device, and the buffer of bytes that it is a view of."""
        cupy = self.module
        host, offset = memory_of(array, pad)
        buffer = cupy.asarray(host)
        if not array.size:
            return cupy.empty(array.shape, array.dtype), buffer
        view = cupy.ndarray(
            array.shape, array.dtype, memptr=buffer.data + offset, strides=array.strides
        )
        return view, buffer

    def get(self, array):
        return array.get()

    def empty(self, nbytes):
        """Uninitialised bytes of the framework's pool."""
        return self.module.empty(nbytes, np.uint8)

    def owns(self, array):
        return isinstance(array, self.module.ndarray)

    def device_of(self, array):
        return array.device.id

    def copy(self, to, values):
        """Overwrite an array, on the current stream."""
        to[...] = values

    def fill(self, to, value):
        to.fill(value)

    def stream(self):
        return self.module.cuda.Stream(non_blocking=True)

    def on(self, stream):
        return stream

    def handle(self, stream):
        return stream.ptr

    def used(self):
        """Bytes that the pool has handed out."""
        return self.module.get_default_memory_pool().used_bytes()

    def release(self):
        """Give the pool's free memory back to the device."""
        self.module.get_default_memory_pool().free_all_blocks()

    @contextlib.contextmanager
    def device(self, number):
        with self.module.cuda.Device(number):
            yield


class Torch:
    """PyTorch tensors."""

    name = "torch"

    def __init__(self, where="cuda"):
        self.where = where

    @functools.cached_property
    def module(self):
        torch = pytest.importorskip("torch")
        if self.where == "cuda" and not torch.cuda.is_available():
            pytest.skip("this torch has no CUDA")
        return torch

    def send(self, array, pad=0):
        torch = self.module
        if any(stride < 0 for stride in array.strides):  # which tensors cannot have
            array = array.copy()
        host, offset = memory_of(array, pad)
        buffer = torch.from_numpy(host).to(self.where)
        if not array.size:
            dtype = getattr(torch, array.dtype.name)
            return torch.empty(array.shape, dtype=dtype, device=self.where), buffer
        strides = [stride // array.itemsize for stride in array.strides]
        elements = buffer.view(getattr(torch, array.dtype.name))
        return elements.as_strided(array.shape, strides, offset // array.itemsize), buffer

    def get(self, array):
        host = array.detach().cpu().contiguous()
        if host.dtype == self.module.bfloat16:
            return host.view(self.module.int16).numpy().view(ml_dtypes.bfloat16)
        return host.numpy()

    def empty(self, nbytes):
        return self.module.empty(nbytes, dtype=self.module.uint8, device=self.where)

    def owns(self, array):
        return isinstance(array, self.module.Tensor)

    def device_of(self, array):
        assert array.device.type == self.where
        return array.device.index

    def copy(self, to, values):
        to.copy_(values)

    def fill(self, to, value):
        to.fill_(value)

    def stream(self):
        return self.module.cuda.Stream()

    def on(self, stream):
        return self.module.cuda.stream(stream)

    def handle(self, stream):
        return stream.cuda_stream

    def used(self):
        return self.module.cuda.memory_allocated()

    def release(self):
        self.module.cuda.empty_cache()

    @contextlib.contextmanager
    def device(self, number):
        with self.module.cuda.device(number):
            yield


class Jax:
    """JAX arrays, with 64-bit numbers switched on by the tests that use them."""

    name = "jax"

    @functools.cached_property
    def module(self):
        jax = pytest.importorskip("jax")
        import cupy

        try:
            # Which device is current is XLA's to change when it starts, and the test's to keep.
            with cupy.cuda.Device():
                jax.devices("gpu")
        except RuntimeError as error:
            pytest.skip(f"this JAX has no GPU: {error}")
        return jax

    def send(self, array, pad=0):
        sent = self.module.device_put(np.array(array), self.module.devices("gpu")[0])
        assert sent.dtype == array.dtype
        return sent, sent

    def get(self, array):
        return np.asarray(array)

    def owns(self, array):
        return isinstance(array, self.module.Array)

    def device_of(self, array):
        (device,) = array.devices()
        assert device.platform == "gpu"
        return device.id


class Bare:
    """A producer of ``__dlpack__`` that is nothing else, around a CuPy array and its stream."""

    def __init__(self, array, stream=None):
        self.array, self.stream = array, stream

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options):
        with self.stream or contextlib.nullcontext():
            return self.array.__dlpack__(**options)


class Dlpack(Cupy):
    """`Bare` producers; results are CuPy arrays."""

    name = "dlpack"

    def send(self, array, pad=0):
        view, buffer = super().send(array, pad)
        return Bare(view), buffer


class Road:
    """The public functions over the arrays of a framework, from NumPy to NumPy."""

    def __init__(self, framework):
        self.framework = framework

    def linear_cross_entropy(self, *arguments, **options):
        return self._call("linear_cross_entropy", arguments, options)

    def linear_cross_entropy_value_and_grad(self, *arguments, **options):
        return self._call("linear_cross_entropy_value_and_grad", arguments, options)

    def token_statistics(self, *arguments, **options):
        return self._call("token_statistics", arguments, options)

    def filter_statistics(self, *arguments, **options):
        with self._sent(arguments, options) as sent:
            return cce_cupy.filter_statistics(*sent[0], **sent[1])

    def linear_cross_entropy_vjp(self, *arguments, **options):
        with self._sent(arguments, options) as sent:
            found, pullback = cce_cupy.linear_cross_entropy_vjp(*sent[0], **sent[1])
            loss = self.receive(found)

        def pull(*upstream):
            with self._sent(upstream, {}) as sent:
                return self.receive(pullback(*sent[0]))

        return loss, pull

    def receive(self, found):
        """Results as NumPy arrays, checked to be of the framework and on its device."""
        if found is None:
            return None
        if isinstance(found, tuple):
            parts = [self.receive(part) for part in found]
            return type(found)(*parts) if hasattr(found, "_fields") else tuple(parts)
        assert self.framework.owns(found), type(found)
        assert self.framework.device_of(found) == 0
        return self.framework.get(found)

    def _call(self, function, arguments, options):
        with self._sent(arguments, options) as sent:
            return self.receive(getattr(cce_cupy, function)(*sent[0], **sent[1]))

    @contextlib.contextmanager
    def _sent(self, arguments, options):
        """Arguments on the device; afterwards each of their bytes must be what it was."""
        buffers = []

        def send(value):
            if not isinstance(value, np.ndarray | np.generic):
                return value
            array = np.asarray(value)
            # Every second array starts one element off the alignment of an allocation.
            view, buffer = self.framework.send(array, pad=len(buffers) % 2)
            buffers.append((buffer, self.framework.get(buffer).tobytes()))
            return view

        yield [send(x) for x in arguments], {name: send(x) for name, x in options.items()}
        for buffer, before in buffers:
            assert self.framework.get(buffer).tobytes() == before


FRAMEWORKS = {framework.name: framework for framework in (Cupy(), Torch())}
"""Those that have streams and a pool of their own to be tested."""

ROADS = {name: Road(framework) for name, framework in FRAMEWORKS.items()}
EVERY_ROAD = ROADS | {"jax": Road(Jax()), "dlpack": Road(Dlpack())}


_SPIN = r"""
extern "C" __global__ void spin(long long nanoseconds) {
  long long start, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
  do {
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  } while (now - start < nanoseconds);
}
"""


@functools.cache
def _spin():
    import cupy

    return cupy.RawKernel(_SPIN, "spin")


class _Handle:
    """A raw stream, for CuPy to take."""

    def __init__(self, handle):
        self.handle = handle

    def __cuda_stream__(self):
        return 0, self.handle


def occupy(handle, seconds):
    """Keep a stream busy; returns an event that is done once it is free again."""
    import cupy

    stream = cupy.cuda.Stream.from_external(_Handle(handle))
    _spin()((1,), (1,), (np.int64(seconds * 1e9),), stream=stream)
    event = cupy.cuda.Event()
    event.record(stream)
    return event
