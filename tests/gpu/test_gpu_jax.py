"""JAX's transformations, once more, on a GPU: compiled to launches of the kernels on XLA's stream.

The tests of the CPU run as they are, since they use JAX's default devices.
"""

import re
from functools import partial

import numpy as np
import pytest
import test_jax_sharding
import test_jax_transforms
from devices import FRAMEWORKS, Jax
from test_gpu_frameworks import x64
from test_jax_transforms import DTYPES, Expected, named, sample, scalar

import cce_cupy


@pytest.fixture(autouse=True)
def gpu():
    """Skip where JAX sees no GPU; it must be its default."""
    if Jax().module.default_backend() != "gpu":
        pytest.skip("the GPU is not JAX's default device")


def _tests_of(module):
    return {name: test for name, test in vars(module).items() if name.startswith("test_")}


globals().update(_tests_of(test_jax_transforms))
globals().update(_tests_of(test_jax_sharding))

jax = test_jax_transforms.jax
jnp = jax.numpy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("function", test_jax_transforms.FUNCTIONS)
def test_same_bits_as_other_frameworks(function, dtype):
    """Compiled or eager, the kernels are the same, and so is what they are given."""
    cupy = FRAMEWORKS["cupy"].module
    rng = np.random.default_rng(2)
    kind = DTYPES[dtype]
    e = rng.standard_normal((3, 300, 64)).astype(kind)
    c = rng.standard_normal((5000, 64)).astype(kind)
    bias = rng.standard_normal(5000).astype(kind)
    targets = rng.integers(0, 5000, (3, 300)).astype(np.int32)
    call = {
        "linear_cross_entropy": cce_cupy.linear_cross_entropy,
        "..._value_and_grad": cce_cupy.linear_cross_entropy_value_and_grad,
        "..._vjp": lambda *a: cce_cupy.linear_cross_entropy_vjp(*a)[1](0.5),
        "token_statistics": cce_cupy.token_statistics,
    }[function]
    plain = jax.tree.leaves(call(*map(cupy.asarray, (e, c, targets, bias))))
    arrays = list(map(jnp.asarray, (e, c, targets, bias)))
    for run in (call, jax.jit(call), jax.jit(call)):
        for found, expected in zip(jax.tree.leaves(run(*arrays)), plain, strict=True):
            expected = expected.get()
            found = np.asarray(found)
            if expected.dtype == np.int64:
                expected = expected.astype(found.dtype)
            assert found.tobytes() == expected.tobytes()


def test_many_runs_of_one_program():
    """Also those that replay a recorded CUDA graph, with other data at other addresses."""
    loss = jax.jit(jax.value_and_grad(partial(scalar, "linear_cross_entropy"), (0, 1, 2)))
    for k in range(12):
        arrays = list(map(jnp.asarray, sample(seed=k)))
        value, gradients = loss(*arrays)
        expected = Expected(*map(np.asarray, arrays))
        expected.check_scalar(value)
        expected.check_gradients(*gradients)


def test_a_chain_of_calls_in_one_program():
    """Six calls, each on what the one before left, as XLA may record them in one graph."""
    e, c, bias, targets = map(jnp.asarray, sample())

    def steps(e, c):
        for _ in range(6):
            _, gradients = cce_cupy.linear_cross_entropy_value_and_grad(
                e, c, targets, bias, gradient_filter=None
            )
            e, c = e - 0.1 * gradients.e, c - 0.1 * gradients.c
        return e, c

    compiled = jax.jit(steps)
    first = [np.asarray(x) for x in compiled(e, c)]
    for _ in range(5):
        again = compiled(e + 0, c + 0)
        assert [np.asarray(x).tobytes() for x in again] == [x.tobytes() for x in first]
    for x, y in zip(first, steps(e, c), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_wrong_targets_are_not_numbers():
    e, c, bias, targets = sample()
    targets[1, 2] = test_jax_transforms.VOCAB
    losses = jax.jit(partial(cce_cupy.linear_cross_entropy, reduction="none"))(e, c, targets, bias)
    assert np.isnan(losses[1, 2])
    assert np.isnan(np.asarray(losses)).sum() == 1


def test_check_targets():
    """Eagerly the host looks at them; in compiled code it would have to wait, and is not asked."""
    e, c, bias, targets = map(jnp.asarray, sample())
    wrong = targets.at[1, 2].set(-5)
    with pytest.raises(ValueError, match=r"got -5 at targets\[1, 2\]"):
        cce_cupy.linear_cross_entropy(e, c, wrong, bias, check_targets=True)
    checked = partial(cce_cupy.linear_cross_entropy, check_targets=True)
    with pytest.raises(ValueError, match="check_targets=True cannot be kept"):
        jax.jit(checked)(e, c, targets, bias)
    # Targets that are constants of the program are there to be looked at.
    found = jax.jit(lambda e: checked(e, c, targets, bias))(e)
    np.testing.assert_allclose(found, checked(e, c, targets, bias), rtol=1e-6)


def test_float64():
    with x64():
        arrays = sample("float64")
        Expected(*arrays, dtype="float64").check(
            "..._vjp", jax.jit(partial(named, "..._vjp"))(*arrays)
        )


def test_workspace_belongs_to_xla():
    """A small workspace_bytes makes a smaller program, and CuPy's pool has no part in it."""
    cupy = FRAMEWORKS["cupy"].module
    rng = np.random.default_rng(0)
    e = jnp.asarray(rng.standard_normal((4096, 64)), jnp.bfloat16)
    c = jnp.asarray(rng.standard_normal((32768, 64)), jnp.bfloat16)
    targets = jnp.asarray(rng.integers(0, 32768, 4096).astype(np.int32))

    def compiled(size):
        call = partial(cce_cupy.linear_cross_entropy, workspace_bytes=size)
        return jax.jit(jax.grad(call, (0, 1))).lower(e, c, targets).compile()

    sizes = [compiled(size).memory_analysis().temp_size_in_bytes for size in (2**24, 2**27)]
    assert sizes[0] < 2**26
    assert sizes[0] < sizes[1] < 2**28
    used = cupy.get_default_memory_pool().used_bytes()
    jax.block_until_ready(compiled(2**24)(e, c, targets))
    assert cupy.get_default_memory_pool().used_bytes() == used


def test_trait_for_command_buffers():
    """XLA may put the calls into command buffers, if its version and flags do so at all."""
    arrays = list(map(jnp.asarray, sample()))
    program = jax.jit(jax.grad(partial(scalar, "linear_cross_entropy"))).lower(*arrays).compile()
    text = program.as_text()
    assert re.search(r"cce_cupy_forward", text)
    if "command_buffer" not in text:
        pytest.skip("this XLA does not show its command buffers in the program")
