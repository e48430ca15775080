"""A vocabulary over JAX's devices by shard_map: the same as on one device."""

from functools import partial

import numpy as np
import pytest
from oracle import Oracle
from tolerances import Tolerances, assert_within, terms

import cce_cupy
from cce_cupy import distributed

jax = pytest.importorskip("jax")
jnp = jax.numpy
P = jax.sharding.PartitionSpec

TOKENS, DIM = (8, 21), 12


def shard(rows):
    return distributed.Shard(
        first=jax.lax.axis_index("vocab") * rows,
        largest=lambda x: jax.lax.pmax(jax.lax.stop_gradient(x), "vocab"),
        total=lambda x: jax.lax.psum(x, "vocab"),
    )


def sample(vocab, weights):
    rng = np.random.default_rng(vocab)
    targets = rng.integers(0, vocab, TOKENS).astype(np.int32)
    targets[rng.random(TOKENS) < 0.2] = -100
    arrays = {
        "e": rng.standard_normal((*TOKENS, DIM)).astype(np.float32),
        "c": rng.standard_normal((vocab, DIM)).astype(np.float32),
        "targets": targets,
        "bias": rng.standard_normal(vocab).astype(np.float32),
    }
    if weights:
        arrays["class_weight"] = rng.random(vocab, np.float32)
        arrays["token_weight"] = rng.random(TOKENS, np.float32)
    return arrays


def padded(arrays, rows):
    """Fill the vocabulary up to whole shards: with a bias of -inf, and with anything else."""
    fill = {"c": 7.0, "bias": -np.inf, "class_weight": 1.0}
    return {
        name: np.concatenate(
            [x, np.full((rows - len(x), *x.shape[1:]), fill[name], x.dtype)]
        ) if name in fill else x
        for name, x in arrays.items()
    }  # fmt: skip


OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2, "z_loss": 0.01, "shift": 1, "logit_scale": 1.3},
    "softcap": {"softcap": 5.0, "reduction": "sum"},
}


@pytest.mark.parametrize(
    ("vocab", "options", "weights"),
    [
        (160, "plain", False),
        (160, "smoothing", True),
        (93, "softcap", True),
        (17, "smoothing", False),
        (17, "softcap", False),
    ],
)
def test_vocabulary_over_devices(vocab, options, weights):
    """160 divides among eight devices; of 93 the last has two; of 17 two have none at all."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("vocab",))
    rows = -(-vocab // mesh.size)
    arrays, given = sample(vocab, weights), OPTIONS[options]
    whole = padded(arrays, rows * mesh.size)
    over = {"c": P("vocab"), "bias": P("vocab"), "class_weight": P("vocab")}
    specs = {name: over.get(name, P()) for name in whole}
    oracle = Oracle(**arrays, **given)
    allowed = Tolerances(oracle, "float32")
    more = 1 + terms(mesh.size + 20)

    def check(loss, de, dc, dbias):
        assert_within(loss, oracle.loss, more * allowed.loss(), "loss")
        found = de, dc[:vocab], dbias[:vocab]
        bounds = allowed.gradients()
        for name, x, y, bound in zip("ecb", found, oracle.gradients(), bounds, strict=True):
            assert_within(x, y, more * bound, f"d{name}")
        assert not np.asarray(dc[vocab:]).any()
        assert not np.asarray(dbias[vocab:]).any()

    def loss(e, c, bias, rest):
        return distributed.linear_cross_entropy(shard(rows), e, c, bias=bias, **rest, **given)

    def both(e, c, bias, rest):
        return distributed.linear_cross_entropy_value_and_grad(
            shard(rows), e, c, bias=bias, **rest, **given
        )

    e, c, bias = (whole.pop(name) for name in ("e", "c", "bias"))
    into = (P(), P("vocab"), P("vocab"), {name: specs[name] for name in whole})
    for checked in (True, False):
        spread = partial(jax.shard_map, mesh=mesh, in_specs=into, check_vma=checked)
        total = spread(loss, out_specs=P())
        value, gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(e, c, bias, whole)
        check(value, *gradients)
        gradients = cce_cupy.Gradients(P(), P("vocab"), P("vocab"))
        value, gradients = jax.jit(spread(both, out_specs=(P(), gradients)))(e, c, bias, whole)
        check(value, *gradients)
    inside = jax.shard_map(
        jax.value_and_grad(loss, (0, 1, 2)),
        mesh=mesh,
        in_specs=into,
        out_specs=(P(), (P(), P("vocab"), P("vocab"))),
    )
    value, gradients = jax.jit(inside)(e, c, bias, whole)
    check(value, *gradients)


def test_tokens_and_vocabulary_over_devices():
    """A mesh of two axes: each device has some tokens and some of the vocabulary."""
    if jax.device_count() % 4:
        pytest.skip("needs a multiple of four devices")
    vocab = 160
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(-1, 4), ("tokens", "vocab"))
    arrays = sample(vocab, False)
    oracle = Oracle(**arrays, reduction="sum")

    def loss(e, c, targets, bias):
        local = distributed.linear_cross_entropy(
            shard(vocab // 4), e, c, targets, bias, reduction="sum"
        )
        return jax.lax.psum(local, "tokens")

    specs = P("tokens"), P("vocab"), P("tokens"), P("vocab")
    total = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P())
    found = jax.jit(jax.grad(total, (0, 1, 3)))(*arrays.values())
    bounds = Tolerances(oracle, "float32").gradients()
    more = 1 + terms(mesh.size + 20)
    for name, x, y, bound in zip("ecb", found, oracle.gradients(), bounds, strict=True):
        assert_within(x, y, more * bound, f"d{name}")


def test_a_target_of_no_device_is_not_a_number():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("vocab",))
    arrays = sample(16 * mesh.size, False)
    arrays["targets"][0, 0] = 16 * mesh.size
    losses_of = jax.shard_map(
        lambda *a: distributed.linear_cross_entropy(shard(16), *a, reduction="none"),
        mesh=mesh,
        in_specs=(P(), P("vocab"), P(), P("vocab")),
        out_specs=P(),
    )
    _, c, targets, bias = map(jnp.asarray, arrays.values())
    losses, pull = jax.vjp(lambda e: losses_of(e, c, targets, bias), jnp.asarray(arrays["e"]))
    (de,) = pull(jnp.ones_like(losses))
    assert np.isnan(de[0, 0]).all()
    assert np.isnan(np.asarray(de)).sum() == DIM
    assert np.isnan(losses[0, 0])
    assert np.isnan(np.asarray(losses)).sum() == 1


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded_arrays_outside_shard_map(kind):
    """They are gathered and every device computes everything; gradients go back as they came."""
    devices = np.array(jax.devices())
    mesh = jax.sharding.Mesh(devices, ("x",))
    if kind == "explicit":
        mesh = jax.make_mesh(devices.shape, ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    arrays = sample(160, False)
    oracle = Oracle(**arrays)
    placed = {
        name: jax.device_put(array, jax.sharding.NamedSharding(mesh, P("x")))
        for name, array in arrays.items()
    }

    def loss(e, c, bias):
        return cce_cupy.linear_cross_entropy(e, c, placed["targets"], bias)

    given = [placed[name] for name in ("e", "c", "bias")]
    value, found = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*given)
    allowed = Tolerances(oracle, "float32")
    assert_within(value, oracle.loss, allowed.loss(), "loss")
    bounds = allowed.gradients()
    for name, x, y, bound in zip("ecb", found, oracle.gradients(), bounds, strict=True):
        assert_within(x, y, bound, f"d{name}")
    _, eager = cce_cupy.linear_cross_entropy_value_and_grad(**placed)
    for x, y in zip(eager, found, strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
