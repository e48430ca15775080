"""Arrays of frameworks that the library does not know, through the DLPack protocol.

`array_api_strict` stands for those with an array namespace, whose arrays come back; the classes
below for those that have the protocol's two methods and nothing else, which get NumPy arrays.
"""

import re
import sys
from typing import Any

import numpy as np
import pytest

import cce_cupy

SHAPE, DIM, VOCAB = (2, 70), 10, 37
FUNCTIONS = [
    "linear_cross_entropy",
    "linear_cross_entropy_value_and_grad",
    "linear_cross_entropy_vjp",
    "token_statistics",
]


class Producer:
    """The protocol as of 2023.12, around a NumPy array."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


class OldProducer(Producer):
    """The protocol before versions: no arguments but the stream."""

    def __dlpack__(self, stream: None = None) -> Any:
        return self._array.__dlpack__()


class ElsewhereProducer(Producer):
    """An array that says it is on the second ROCm device; its memory must not be touched."""

    def __dlpack__(self, **options: Any) -> Any:
        raise AssertionError("asked for memory of a device that cannot be computed on")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (10, 1)


class DescribedElsewhereProducer(ElsewhereProducer):
    """The same with the attributes that arrays usually have besides."""

    shape = property(lambda self: self._array.shape)
    dtype = property(lambda self: self._array.dtype)


def sample(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Return arguments as NumPy arrays; a fifth of the tokens is ignored."""
    rng = np.random.default_rng(1)
    targets = rng.integers(0, VOCAB, SHAPE)
    targets[rng.random(SHAPE) < 0.2] = -100
    return {
        "e": rng.standard_normal((*SHAPE, DIM)).astype(dtype),
        "c": rng.standard_normal((VOCAB, DIM)).astype(dtype),
        "targets": targets,
        "bias": rng.standard_normal(VOCAB).astype(dtype),
        "class_weight": rng.random(VOCAB, np.float32),
        "token_weight": rng.random(SHAPE, np.float32),
    }


def flat(result: Any) -> list[Any]:
    """Return the arrays of a result, however nested, in order."""
    if isinstance(result, tuple):
        return [array for part in result for array in flat(part)]
    return [] if result is None else [result]


def call(function: str, arrays: dict[str, np.ndarray], kind: Any = np.asarray) -> list[Any]:
    """Call a function with arrays of a kind, and its pullback where it returns one."""
    arguments = {name: kind(array) for name, array in arrays.items()}
    if function == "token_statistics":
        del arguments["class_weight"], arguments["token_weight"]
        return flat(cce_cupy.token_statistics(**arguments))
    result = getattr(cce_cupy, function)(**arguments, return_lse=True, filter_eps=0.01)
    if function == "linear_cross_entropy_vjp":
        upstream = kind(np.array(0.7, np.float32)), kind(np.ones(SHAPE, np.float32))
        result = result[0], result[1](*upstream)
    return flat(result)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_array_namespace(function: str, dtype: Any) -> None:
    strict = pytest.importorskip("array_api_strict")
    found = call(function, sample(dtype), strict.asarray)
    for array, expected in zip(found, call(function, sample(dtype)), strict=True):
        assert type(array) is type(strict.asarray(0))
        assert array.device == strict.Device("CPU_DEVICE")
        assert array.shape == expected.shape
        assert np.from_dlpack(array).dtype == expected.dtype
        assert np.from_dlpack(array).tobytes() == expected.tobytes()


def test_array_namespace_results_are_usable() -> None:
    strict = pytest.importorskip("array_api_strict")
    arrays = {name: strict.asarray(array) for name, array in sample().items()}
    loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(**arrays)
    stepped = arrays["c"] - gradients.c
    assert cce_cupy.linear_cross_entropy(**{**arrays, "c": stepped}) < loss


@pytest.mark.parametrize("kind", [Producer, OldProducer])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_bare_protocol(function: str, dtype: Any, kind: type[Producer]) -> None:
    arrays = sample(dtype)
    before = {name: array.tobytes() for name, array in arrays.items()}
    found = call(function, arrays, kind)
    for array, expected in zip(found, call(function, sample(dtype)), strict=True):
        assert type(array) is np.ndarray
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
        assert array.tobytes() == expected.tobytes()
        assert array.flags.writeable
    assert {name: array.tobytes() for name, array in arrays.items()} == before


@pytest.mark.parametrize("function", FUNCTIONS)
def test_bare_protocol_strided(function: str) -> None:
    plain = sample()
    odd = {**plain, "c": np.asfortranarray(plain["c"]), "e": np.repeat(plain["e"], 2, 1)[:, ::2]}
    for array, expected in zip(call(function, odd, Producer), call(function, plain), strict=True):
        assert array.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", [ElsewhereProducer, DescribedElsewhereProducer])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("names", [("e", "c", "targets", "bias"), ("c",), ("targets",)])
def test_another_device_is_refused(
    names: tuple[str, ...], function: str, kind: type[Producer]
) -> None:
    arguments = {
        name: (kind if name in names else Producer)(array)
        for name, array in sample().items()
        if name in ("e", "c", "targets", "bias")
    }
    with pytest.raises(ValueError, match=rf"\b{names[0]}\b.*rocm:1") as caught:
        getattr(cce_cupy, function)(**arguments)
    assert "cpu" in str(caught.value)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_cuda_without_cupy_says_what_to_install(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CudaProducer(ElsewhereProducer):
        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 0)

    monkeypatch.setitem(sys.modules, "cupy", None)
    arguments = {name: CudaProducer(array) for name, array in sample().items()}
    arguments = {name: arguments[name] for name in ("e", "c", "targets")}
    with pytest.raises(ImportError, match=r"CuPy.*pip install 'cce-cupy\[cuda13x\]'"):
        getattr(cce_cupy, function)(**arguments)


def frameworks() -> dict[str, tuple[Any, str]]:
    """Return a converter from NumPy for each framework, and a pattern of its name in messages."""
    torch = pytest.importorskip("torch")
    jnp = pytest.importorskip("jax.numpy")
    strict = pytest.importorskip("array_api_strict")
    return {
        "numpy": (np.asarray, "numpy"),
        "torch": (torch.asarray, "torch"),
        "jax": (jnp.asarray, "jax"),
        "array_api_strict": (strict.asarray, "array_api_strict"),
        "bare": (Producer, f"{__name__}|producer"),  # no framework: its module or its own name
    }


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", ["c", "targets", "bias"])
@pytest.mark.parametrize("first", ["numpy", "torch", "jax", "array_api_strict", "bare"])
@pytest.mark.parametrize("second", ["numpy", "torch", "jax", "array_api_strict", "bare"])
def test_mixed_frameworks_are_refused(first: str, second: str, name: str, function: str) -> None:
    (kind, called), (other, also_called) = frameworks()[first], frameworks()[second]
    arguments = {name: kind(array) for name, array in sample().items() if "weight" not in name}
    arguments[name] = other(sample()[name])
    if first == second:
        getattr(cce_cupy, function)(**arguments)
        return
    with pytest.raises(TypeError) as caught:
        getattr(cce_cupy, function)(**arguments)
    message = str(caught.value).lower()
    for pattern in (rf"\b{name}\b", called, also_called):
        assert re.search(pattern, message), f"{pattern!r} not found in: {message}"


@pytest.mark.parametrize("name", ["dloss", "dlse"])
@pytest.mark.parametrize("first", ["numpy", "torch", "jax", "array_api_strict"])
@pytest.mark.parametrize("second", ["numpy", "torch", "jax", "array_api_strict", "bare"])
def test_pullback_refuses_other_frameworks(first: str, second: str, name: str) -> None:
    (kind, called), (other, also_called) = frameworks()[first], frameworks()[second]
    arguments = {argument: kind(array) for argument, array in sample().items()}
    _, pullback = cce_cupy.linear_cross_entropy_vjp(**arguments, reduction="none")
    ones = np.ones(SHAPE, np.float32)
    upstream = {"dloss": kind(ones), "dlse": kind(ones), name: other(ones)}
    if first == second:
        pullback(**upstream)
        return
    with pytest.raises(TypeError) as caught:
        pullback(**upstream)
    message = str(caught.value).lower()
    for pattern in (rf"\b{name}\b", called, also_called):
        assert re.search(pattern, message), f"{pattern!r} not found in: {message}"


@pytest.mark.parametrize("upstream", [Producer, np.asarray])
def test_bare_protocol_takes_back_what_it_was_given(upstream: Any) -> None:
    """The loss came as a NumPy array, so its gradient may be one as well."""
    arguments = {name: Producer(array) for name, array in sample().items()}
    _, pullback = cce_cupy.linear_cross_entropy_vjp(**arguments)
    _, plain = cce_cupy.linear_cross_entropy_vjp(**sample())
    half = np.array(0.5, np.float32)
    for gradient, expected in zip(pullback(upstream(half)), plain(half), strict=True):
        assert gradient.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["e", "c", "targets"])
def test_half_of_the_protocol_is_no_array(name: str) -> None:
    """An object without __dlpack_device__ (or the other method) is refused, not half used."""

    class Half:
        def __dlpack__(self) -> Any:
            raise AssertionError("asked for memory of unknown place")

    with pytest.raises(TypeError, match=rf"\b{name}\b.*Half"):
        cce_cupy.linear_cross_entropy(**{**sample(), name: Half()})
