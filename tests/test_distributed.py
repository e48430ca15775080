"""A vocabulary over shards: the same loss and gradients as on one device.

The shards are threads that meet in the collectives; JAX's own are in `test_jax_sharding.py`.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from oracle import Oracle
from tolerances import DTYPES, Tolerances, assert_within, terms, unit_roundoff

import cce_cupy
from cce_cupy import distributed
from cce_cupy.distributed import Shard

TOKENS, DIM, VOCAB = (3, 50), 12, 90
CUTS = {
    "one": [VOCAB],
    "even": [30, 30, 30],
    "uneven": [1, 60, 29],
    "an empty one": [0, 50, 0, 40],
    "one an entry": [1] * VOCAB,
}


class Meeting:
    """Threads that wait for each other and leave with the maximum or the sum of what they bring."""

    def __init__(self, number):
        self.brought = [None] * number
        self.barrier = threading.Barrier(number, timeout=60)

    def collective(self, k, combine):
        def meet(array):
            self.brought[k] = array
            self.barrier.wait()
            found = combine(np.stack(self.brought)).astype(np.asarray(array).dtype)
            self.barrier.wait()
            return found

        return meet

    def shard(self, k, first):
        return Shard(
            first,
            self.collective(k, lambda x: x.max(axis=0)),
            self.collective(k, lambda x: x.sum(axis=0)),
        )


def on_shards(sizes, function, e, c, targets, bias=None, class_weight=None, **options):
    """Call a function of `distributed` on every shard; return the results in order."""
    firsts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    meeting = Meeting(len(sizes))

    def run(k):
        rows = slice(firsts[k], firsts[k + 1])
        try:
            return function(
                meeting.shard(k, firsts[k]), e, c[rows], targets,
                None if bias is None else bias[rows],
                class_weight=None if class_weight is None else class_weight[rows], **options,
            )  # fmt: skip
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(len(sizes)) as pool:
        return list(pool.map(run, range(len(sizes))))


def sample(dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    kind = DTYPES[dtype]
    targets = rng.integers(0, VOCAB, TOKENS)
    targets[rng.random(TOKENS) < 0.2] = -100
    bias = rng.standard_normal(VOCAB).astype(kind)
    bias[[3, 40, 88]] = -np.inf
    targets[np.isin(targets, [3, 40, 88])] = 7
    return {
        "e": rng.standard_normal((*TOKENS, DIM)).astype(kind),
        "c": rng.standard_normal((VOCAB, DIM)).astype(kind),
        "targets": targets,
        "bias": bias,
    }


OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum", "logit_scale": 0.7},
    "by token": {"reduction": "none", "shift": 2, "softcap": 5.0},
    "smoothing": {"label_smoothing": 0.2, "z_loss": 0.01, "shift": 1, "logit_scale": 1.3},
    "weights": {"class_weight": True, "token_weight": True, "label_smoothing": 0.1},
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cut", CUTS)
def test_same_as_the_oracle(cut, options, dtype):
    rng = np.random.default_rng(1)
    arrays, given = sample(dtype), dict(OPTIONS[options])
    if "class_weight" in given:
        given["class_weight"] = rng.random(VOCAB)
        given["token_weight"] = rng.random(TOKENS)
    oracle = Oracle(**arrays, **given)
    allowed = Tolerances(oracle, dtype)
    # Besides what one call errs by: a sum over the shards, and a few operations in its place.
    shards = 1 + terms(len(CUTS[cut]) + 20)
    results = on_shards(
        CUTS[cut],
        distributed.linear_cross_entropy_value_and_grad,
        **arrays,
        **given,
        return_lse=True,
    )
    losses = on_shards(CUTS[cut], distributed.linear_cross_entropy, **arrays, **given)
    for ((loss, lse), gradients), alone in zip(results, losses, strict=True):
        assert_within(loss, oracle.loss, shards * allowed.loss(), "loss")
        assert np.array_equal(loss, alone)
        assert_within(lse, oracle.scatter(oracle.lse), shards * allowed.scattered_lse(), "lse")
        found_e = gradients.e
        bounds = allowed.gradients()
        assert_within(found_e, oracle.gradients()[0], shards * bounds[0], "dE")
    for name, at in (("c", 1), ("bias", 2)):
        whole = np.concatenate([getattr(gradients, name) for _, gradients in results])
        assert_within(whole, oracle.gradients()[at], shards * bounds[at], f"d{name}")


def test_a_certain_token_keeps_its_tiny_loss():
    """The others are on another shard, and exp(-40) of the whole."""
    e, c = np.array([[1.0]]), np.array([[40.0], [0.0]])
    for found in on_shards([1, 1], distributed.linear_cross_entropy, e, c, np.array([0])):
        np.testing.assert_allclose(found, np.log1p(np.exp(-40.0)), rtol=1e-12)
    hopeless = on_shards([1, 1], distributed.linear_cross_entropy, 100 * e, c, np.array([1]))
    np.testing.assert_allclose(hopeless, 4000.0)


def test_bfloat16_without_filter():
    arrays = sample("bfloat16")
    oracle = Oracle(**arrays)
    allowed = Tolerances(oracle, "bfloat16")
    results = on_shards(
        [20, 70],
        distributed.linear_cross_entropy_value_and_grad,
        **arrays,
        gradient_filter=None,
    )
    # dE is a sum of two numbers of this dtype: rounded once more, and each part before.
    parts = sum(np.abs(np.asarray(g.e, np.float64)) for _, g in results)
    rounded = 8 * unit_roundoff("bfloat16") * (parts + np.abs(oracle.gradients()[0]).max())
    assert_within(results[0][1].e, oracle.gradients()[0], allowed.gradients()[0] + rounded, "dE")
    whole = np.concatenate([g.c for _, g in results])
    assert_within(whole, oracle.gradients()[1], 2 * allowed.gradients()[1], "dC")


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.int64])
def test_integer_targets(kind):
    arrays = sample()
    arrays["targets"] = np.where(arrays["targets"] < 0, 100, arrays["targets"]).astype(kind)
    expected = cce_cupy.linear_cross_entropy(**arrays, ignore_index=100)
    for found in on_shards([50, 40], distributed.linear_cross_entropy, **arrays, ignore_index=100):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_target_of_no_shard_is_not_a_number():
    arrays = sample()
    arrays["targets"][0, 0] = VOCAB
    for found in on_shards([50, 40], distributed.linear_cross_entropy, **arrays, reduction="none"):
        assert np.isnan(found[0, 0])
        assert np.isfinite(found).sum() == found.size - 1
    for _, gradients in on_shards(
        [50, 40], distributed.linear_cross_entropy_value_and_grad, **arrays, reduction="sum"
    ):
        assert np.isnan(gradients.e[0, 0]).all()
        assert np.isfinite(gradients.e).sum() == gradients.e.size - DIM


def test_no_features():
    """D = 0: every class has its bias alone."""
    arrays = sample() | {"e": np.zeros((*TOKENS, 0), "f"), "c": np.zeros((VOCAB, 0), "f")}
    expected = cce_cupy.linear_cross_entropy(**arrays, label_smoothing=0.1)
    for found in on_shards(
        [50, 40], distributed.linear_cross_entropy, **arrays, label_smoothing=0.1
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_nothing_to_average():
    arrays = sample()
    arrays["targets"][...] = -100
    for loss, gradients in on_shards(
        [50, 40], distributed.linear_cross_entropy_value_and_grad, **arrays
    ):
        assert loss == 0
        assert not gradients.e.any()
        assert not gradients.c.any()


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    arrays = sample()
    expected = cce_cupy.linear_cross_entropy_value_and_grad(**arrays, label_smoothing=0.1)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    alone = Shard(0, lambda x: x, lambda x: x)
    found = distributed.linear_cross_entropy_value_and_grad(alone, **tensors, label_smoothing=0.1)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for gradient, same in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(gradient, same, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"label_smoothing": 0.1, "softcap": 3.0}, ValueError, "label_smoothing with softcap"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be"),
        ({"reduction": "median"}, ValueError, "reduction must be"),
        ({"temperature": 2.0}, TypeError, "temperature"),
    ],
)
def test_refused(options, error, text):
    alone = Shard(0, lambda x: x, lambda x: x)
    with pytest.raises(error, match=text):
        distributed.linear_cross_entropy(alone, **sample(), **options)
