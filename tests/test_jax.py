"""JAX on the CPU: arrays in, arrays out, the same bits as with NumPy.

JAX knows 64-bit numbers only where ``jax_enable_x64`` is on; without it its int64 is int32.
"""

from contextlib import AbstractContextManager
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cce_cupy

jax = pytest.importorskip("jax")
jnp = jax.numpy

SHAPE, DIM, VOCAB = (2, 70), 10, 37
FUNCTIONS = [
    "linear_cross_entropy",
    "linear_cross_entropy_value_and_grad",
    "linear_cross_entropy_vjp",
    "token_statistics",
]


def x64(on: bool) -> AbstractContextManager[None]:
    """Switch ``jax_enable_x64`` for the length of a with block."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(on)
    from jax.experimental import disable_x64, enable_x64  # where older versions keep it

    return enable_x64() if on else disable_x64()


def sample(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Return arguments as NumPy arrays; a fifth of the tokens is ignored."""
    rng = np.random.default_rng(1)
    targets = rng.integers(0, VOCAB, SHAPE).astype(np.int32)
    targets[rng.random(SHAPE) < 0.2] = -100
    return {
        "e": rng.standard_normal((*SHAPE, DIM)).astype(dtype),
        "c": rng.standard_normal((VOCAB, DIM)).astype(dtype),
        "targets": targets,
        "bias": rng.standard_normal(VOCAB).astype(dtype),
        "class_weight": rng.random(VOCAB, np.float32),
        "token_weight": rng.random(SHAPE, np.float32),
    }


def in_jax(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    converted = {name: jnp.asarray(array) for name, array in arrays.items()}
    assert all(converted[name].dtype == array.dtype for name, array in arrays.items())
    return converted


def flat(result: Any) -> list[Any]:
    """Return the arrays of a result, however nested, in order."""
    if isinstance(result, tuple):
        return [array for part in result for array in flat(part)]
    return [] if result is None else [result]


def call(function: str, arguments: dict[str, Any]) -> list[Any]:
    """Call a function, and its pullback where it returns one; return all arrays it makes."""
    if function == "token_statistics":
        arguments = {
            k: v for k, v in arguments.items() if k not in ("class_weight", "token_weight")
        }
        return flat(cce_cupy.token_statistics(**arguments))
    result = getattr(cce_cupy, function)(**arguments, return_lse=True, filter_eps=0.01)
    if function == "linear_cross_entropy_vjp":
        kind = jnp if isinstance(arguments["e"], jax.Array) else np
        upstream = kind.asarray(np.float32(0.7)), kind.ones(SHAPE, np.float32)
        result = result[0], result[1](*upstream)
    return flat(result)


def assert_same_bits(found: list[Any], expected: list[np.ndarray], int64: bool) -> None:
    for array, plain in zip(found, expected, strict=True):
        assert isinstance(array, jax.Array)
        assert {device.platform for device in array.devices()} == {"cpu"}
        assert array.shape == plain.shape
        if plain.dtype == np.int64 and not int64:
            plain = plain.astype(np.int32)
        assert array.dtype == plain.dtype
        assert np.asarray(array).tobytes() == plain.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_same_bits_as_numpy(function: str, dtype: Any) -> None:
    arrays = sample(dtype)
    assert_same_bits(call(function, in_jax(arrays)), call(function, arrays), int64=False)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_same_bits_as_numpy_with_x64(function: str, dtype: Any) -> None:
    arrays = sample(dtype)
    arrays["targets"] = arrays["targets"].astype(np.int64)
    with x64(True):
        assert_same_bits(call(function, in_jax(arrays)), call(function, arrays), int64=True)


@pytest.mark.parametrize("options", [{}, {"filter_eps": 1e-3}, {"z_loss": 0.1, "shift": 1}])
def test_same_bits_as_numpy_for_a_larger_problem(options: dict[str, Any]) -> None:
    """Several row tiles, and several blocks of rows and columns."""
    rng = np.random.default_rng(3)
    arrays = {
        "e": rng.standard_normal((1500, 20)).astype(np.float32),
        "c": rng.standard_normal((9000, 20)).astype(np.float32),
        "targets": rng.integers(0, 9000, 1500).astype(np.int32),
    }
    plain = cce_cupy.linear_cross_entropy_value_and_grad(**arrays, **options)
    found = cce_cupy.linear_cross_entropy_value_and_grad(**in_jax(arrays), **options)
    assert_same_bits(flat(found), flat(plain), int64=False)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("options", [{}, {"gradient_filter": None}, {"filter_c_grad": False}])
def test_one_gradient_alone_has_the_same_bits(options: dict[str, Any], dtype: Any) -> None:
    rng = np.random.default_rng(4)
    e, c, bias = (
        jnp.asarray(rng.standard_normal(shape).astype(dtype))
        for shape in ((1500, 20), (9000, 20), (9000,))
    )
    targets = jnp.asarray(rng.integers(0, 9000, 1500).astype(np.int32))

    def loss(e: Any, c: Any, bias: Any) -> Any:
        return cce_cupy.linear_cross_entropy(e, c, targets, bias, **options)

    together = jax.grad(loss, (0, 1, 2))(e, c, bias)
    for argument in range(3):
        alone = jax.grad(loss, argument)(e, c, bias)
        assert np.asarray(alone).tobytes() == np.asarray(together[argument]).tobytes()


def test_agrees_with_jax() -> None:
    arrays = in_jax(sample())
    e, c, bias, targets = (arrays[name] for name in ("e", "c", "bias", "targets"))

    def mean_loss(e: Any, c: Any, bias: Any) -> Any:
        log_prob = jax.nn.log_softmax(e @ c.T + bias)
        picked = jnp.take_along_axis(log_prob, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
        return -jnp.mean(picked, where=targets != -100)

    expected, expected_gradients = jax.value_and_grad(mean_loss, (0, 1, 2))(e, c, bias)
    loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(e, c, targets, bias)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for found, gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, gradient, rtol=1e-3, atol=1e-6)


def test_results_are_usable() -> None:
    """In jitted code, and as pytrees."""
    arrays = in_jax(sample())
    loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(
        arrays["e"], arrays["c"], arrays["targets"]
    )
    stepped = jax.jit(lambda c, gradient: c - 0.1 * gradient)(arrays["c"], gradients.c)
    assert float(cce_cupy.linear_cross_entropy(arrays["e"], stepped, arrays["targets"])) < loss
    doubled = jax.tree.map(lambda array: 2 * array, gradients)
    assert isinstance(doubled, cce_cupy.Gradients)
    assert doubled.bias is None


def test_results_outlive_the_call() -> None:
    """They are not views of memory that a later call uses again."""
    arrays = in_jax(sample())
    _, pullback = cce_cupy.linear_cross_entropy_vjp(**arrays)
    first = pullback(jnp.float32(1))
    bits = [np.asarray(array).tobytes() for array in first]
    for factor in (2, 3):
        pullback(jnp.float32(factor))
    assert [np.asarray(array).tobytes() for array in first] == bits


def test_no_tokens_and_one_token() -> None:
    c = jnp.ones((VOCAB, DIM))
    loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(
        jnp.ones((0, DIM)), c, jnp.ones(0, int)
    )
    assert float(loss) == 0
    assert gradients.e.shape == (0, DIM)
    assert not gradients.c.any()
    loss = cce_cupy.linear_cross_entropy(jnp.ones(DIM), c, jnp.int32(3), reduction="none")
    assert loss.shape == ()
    np.testing.assert_allclose(loss, np.log(VOCAB), rtol=1e-6)


REFUSED = [
    ("e", lambda array: array.astype(np.complex64), TypeError, "complex64"),
    ("e", lambda array: array.astype(ml_dtypes.float8_e4m3fn), TypeError, "float8_e4m3fn"),
    ("c", lambda array: array.astype(np.int32), TypeError, "int32"),
    ("c", lambda array: array.astype(np.float16), TypeError, "float16"),
    ("c", np.asarray, TypeError, "NumPy"),
    ("c", lambda array: array[:, 1:], ValueError, r"\(37, 9\)"),
    ("targets", lambda array: array.astype(bool), TypeError, "bool"),
    ("targets", lambda array: array.at[1, 2].set(VOCAB), ValueError, r"got 37 at .*1, 2"),
    ("token_weight", lambda array: array.at[1, 2].set(np.nan), ValueError, r"nan at .*1, 2"),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("name", "spoil", "error", "given"), REFUSED, ids=[f"{row[0]} {row[3]}" for row in REFUSED]
)
def test_refused(function: str, name: str, spoil: Any, error: Any, given: str) -> None:
    if function == "token_statistics" and name == "token_weight":
        pytest.skip("token_statistics has no such argument")
    arrays = in_jax(sample())
    arrays[name] = spoil(arrays[name])
    with pytest.raises(error, match=rf"(?s)(?=.*\b{name}\b).*{given}"):
        call(function, arrays)
