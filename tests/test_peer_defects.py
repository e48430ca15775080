"""Defects found in other implementations of this loss: one named test for each.

Those that need a GPU or several processes (a shard's padding, smoothing per shard, a rank without
tokens) have the test of what a single process on the CPU can get wrong in the same way.
"""

import numpy as np
import pytest
from oracle import Oracle
from strategies import NO_FILTER, Case
from tolerances import DTYPES, Tolerances, assert_within

from cce_cupy import (
    linear_cross_entropy,
    linear_cross_entropy_value_and_grad,
    linear_cross_entropy_vjp,
    token_statistics,
)

UNFILTERED = NO_FILTER[0]
FUNCTIONS = [
    linear_cross_entropy,
    linear_cross_entropy_value_and_grad,
    linear_cross_entropy_vjp,
    token_statistics,
]
FILTERS = [UNFILTERED, {"filter_eps": 1e-3}, {"filter_eps": 1e-3, "gradient_filter": "threshold"}]


def problem(n, v, d=8, dtype="float64", seed=0, **options):
    rng = np.random.default_rng([seed, n, v])
    e, c = rng.standard_normal((n, d)), rng.standard_normal((v, d)) / np.sqrt(d)
    targets = rng.integers(0, v, n)
    return Case(dtype, e.astype(DTYPES[dtype]), c.astype(DTYPES[dtype]), targets, options, seed)


def check_gradients(case, found, dloss=1.0, dlse=None):
    oracle = case.oracle()
    expected = oracle.gradients(dloss, dlse)
    allowed = case.tolerances(oracle).gradients(dloss, dlse)
    for name, actual, exact, bound in zip(
        ("e", "c", "bias"), found, expected, allowed, strict=True
    ):
        if exact is not None:
            assert_within(actual, exact, bound, f"gradient of {name}")


@pytest.mark.parametrize("cap", [1.0, 30.0])
def test_softcap_does_not_bring_removed_entries_back(cap):
    """Softcap after the -inf mask turns every padded column into exp(-cap) of lse."""
    v = 100
    bias = np.zeros(v)
    bias[50:] = -np.inf
    case = problem(33, v, softcap=cap, reduction="none")
    case.targets[:] %= 50
    lse = linear_cross_entropy(*case.arrays, bias, return_lse=True, **case.options)[1]
    compact = Oracle(case.e, case.c[:50], case.targets, softcap=cap)
    assert_within(lse, compact.lse, Tolerances(compact, "float64").scattered_lse(), "lse")
    gradients = linear_cross_entropy_value_and_grad(*case.arrays, bias, **case.options)[1]
    assert not gradients.c[50:].any()
    assert not gradients.bias[50:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("filtering", FILTERS)
@pytest.mark.parametrize("entry", [0, 2500, 4999])
def test_nan_of_one_entry_reaches_every_token(dtype, softcap, filtering, entry):
    """A log-add-exp through min and max loses a NaN, in whichever block of the vocabulary it is."""
    for name in ("c", "bias"):
        case = problem(130, 5000, dtype=dtype, softcap=softcap, reduction="none")
        bias = np.zeros(5000, DTYPES[dtype])
        if name == "c":
            case.c[entry, 3] = np.nan
        else:
            bias[entry] = np.nan
        (loss, lse), gradients = linear_cross_entropy_value_and_grad(
            *case.arrays, bias, **case.options, **filtering, return_lse=True
        )
        assert np.isnan(loss).all()
        assert np.isnan(lse).all()
        for gradient in gradients:
            assert np.isnan(gradient).all()
        statistics = token_statistics(*case.arrays, bias, softcap=softcap)
        for values in statistics[:3]:
            assert np.isnan(values).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filtering", FILTERS)
def test_nan_of_one_token_stays_with_it(dtype, filtering):
    """Its loss, its row of dE and all of dC: the other tokens are as they were."""
    case = problem(260, 1000, dtype=dtype, reduction="none")
    bias = np.zeros(1000, DTYPES[dtype])
    plain = linear_cross_entropy_value_and_grad(*case.arrays, bias, **case.options, **filtering)
    case.e[200, 3] = np.nan
    loss, gradients = linear_cross_entropy_value_and_grad(
        *case.arrays, bias, **case.options, **filtering
    )
    others = np.arange(260) != 200
    assert np.isnan(loss[200])
    assert np.isnan(gradients.e[200]).all()
    assert np.isnan(gradients.c).all()
    assert np.isnan(gradients.bias).all()
    np.testing.assert_array_equal(loss[others], plain[0][others])
    # The filter looks at a tile: in the NaN's own it keeps everything, in the other one as before.
    rows = slice(0, 128) if filtering is not UNFILTERED else others
    np.testing.assert_array_equal(gradients.e[rows], plain[1].e[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("infinity", [np.inf, -np.inf])
@pytest.mark.parametrize("signs", ["mixed", "positive"])
def test_infinity_does_not_become_a_number(dtype, softcap, infinity, signs):
    """An infinite input is a NaN in all that depends on it, whatever the signs of its logits.

    A logit of -inf by itself would vanish from lse like a removed entry, and softcap would make a
    number of either sign.
    """
    plain = problem(130, 1000, dtype=dtype, softcap=softcap, reduction="none")
    if signs == "positive":
        plain = Case(dtype, abs(plain.e), abs(plain.c), plain.targets, plain.options)
    options = plain.options | UNFILTERED
    others = np.arange(130) != 7
    e = plain.e.copy()
    e[7, 2] = infinity
    loss, gradients = linear_cross_entropy_value_and_grad(e, plain.c, plain.targets, **options)
    assert np.isnan(loss[7])
    assert np.isfinite(loss[others]).all()
    assert np.isnan(gradients.e[7]).all()
    assert np.isfinite(gradients.e[others]).all()
    assert np.isnan(gradients.c).any(axis=1).all()

    c = plain.c.copy()
    c[999, 2] = infinity
    loss, gradients = linear_cross_entropy_value_and_grad(plain.e, c, plain.targets, **options)
    assert np.isnan(loss).all()
    assert np.isnan(gradients.e).any(axis=1).all()

    if infinity > 0:
        bias = np.zeros(1000, DTYPES[dtype])
        bias[999] = infinity
        loss = linear_cross_entropy(*plain.arrays, bias, **plain.options)
        assert np.isnan(loss).all()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("target", "integer"), [(1000, "int64"), (-1, "int32"), (-1000, "int16")])
@pytest.mark.parametrize("position", [0, 129, 199])
def test_target_outside_the_vocabulary_is_an_error(function, target, integer, position):
    """target >= V silently became loss = lse; a negative one read in front of the array."""
    case = problem(200, 1000)
    targets = case.targets.astype(integer)
    targets[position] = target
    with pytest.raises(ValueError, match=rf"{target} at targets\[{position}\]"):
        function(case.e, case.c, targets)


@pytest.mark.parametrize("dim", [255, 256, 257, 1000])
def test_bias_counts_once_at_any_dim(dim):
    """The bias was added to the target's logit once for every chunk of D."""
    case = problem(33, 129, d=dim, dtype="float32", reduction="none")
    case.options["bias"] = np.linspace(-5, 5, 129).astype(np.float32)
    loss, gradients = linear_cross_entropy_value_and_grad(*case.arrays, **case.options)
    oracle = case.oracle()
    assert_within(loss, oracle.loss, case.tolerances(oracle).loss(), "loss")
    check_gradients(case, gradients)


@pytest.mark.parametrize("filtering", FILTERS)
def test_bias_gradient_is_filtered_like_that_of_the_classifier(filtering):
    """The filter lost the bias gradient: it must be that of a column of ones in e."""
    case = problem(300, 1000, d=9)
    case.e[:, 0] = 1.0
    bias = np.zeros(1000)
    gradients = linear_cross_entropy_value_and_grad(
        *case.arrays, bias, reduction="sum", **filtering
    )[1]
    case.options |= {"bias": bias, "reduction": "sum"}
    allowed = case.tolerances(case.oracle()).gradients()
    # Weights of the unbiased filter are at most eps / m, and m >= p: at most 1e-3 / 1e-6 here.
    assert case.oracle().p.max(axis=0).min() > 1e-6
    growth = 1e3 if "gradient_filter" not in filtering else 1
    assert_within(gradients.bias, gradients.c[:, 0], growth * (allowed[1][:, 0] + allowed[2]), "db")


@pytest.mark.parametrize("integer", ["int8", "uint8", "int16", "uint16", "int32"])
def test_narrow_targets_do_not_overflow(integer):
    """Row and target made one index in a narrow integer; here its product passes each dtype's."""
    v = {1: 120, 2: 32000, 4: 100_000}[np.dtype(integer).itemsize]
    case = problem(400 if v < 1000 else 5, v, d=3, reduction="none")
    narrow = Case("float64", case.e, case.c, case.targets.astype(integer), case.options)
    loss, gradients = linear_cross_entropy_value_and_grad(*narrow.arrays, **case.options)
    assert_within(loss, case.oracle().loss, case.tolerances(case.oracle()).loss(), "loss")
    check_gradients(case, gradients)


def test_offsets_beyond_32_bits():
    """V * D and N * D beyond 2^31: views of a small buffer, c[v, d] = buffer[v + d].

    All tokens but the last one are ignored.
    """
    vocab, dim = 2**21 + 1, 1024
    step = np.dtype(np.float32).itemsize
    buffer = np.zeros(vocab + dim, np.float32)
    buffer[vocab - 1] = 1.0
    c = np.lib.stride_tricks.as_strided(buffer, (vocab, dim), (step, step), writeable=False)
    e = np.lib.stride_tricks.as_strided(buffer, (vocab, dim), (step, step), writeable=False)
    targets = np.full(vocab, -1, np.int32)
    targets[-1] = vocab - 1
    # The last row is (1, 0, 0, ...): its product with row v is c[v, 0].
    loss, lse = linear_cross_entropy(
        e, c, targets, ignore_index=-1, reduction="sum", return_lse=True
    )
    expected = np.log(vocab - 1 + np.e)
    # A sum of 2^21 terms in float32, by the random-walk model of tolerances.py: about 5e-4.
    np.testing.assert_allclose(lse[-1], expected, rtol=0, atol=6 * np.sqrt(vocab) * 2.0**-24)
    np.testing.assert_allclose(loss, lse[-1] - 1, rtol=0, atol=1e-5)
    assert not lse[:-1].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_tokens_ignored(dtype, reduction):
    """NaN from 0 / 0 in the loss, ZeroDivisionError in the backward."""
    case = problem(300, 1000, dtype=dtype)
    targets = np.full(300, -100)
    loss, pullback = linear_cross_entropy_vjp(case.e, case.c, targets, reduction=reduction)
    assert not loss.any()
    for gradient in pullback(np.ones_like(loss))[:2]:
        assert not gradient.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["unbiased", "threshold"])
def test_filter_sees_a_large_upstream_dlse(dtype, kind):
    """Of a certain token the loss alone leaves dz = 0 everywhere, and dlse leaves dlse * p."""
    n, v, d = 130, 1000, 16
    targets = np.random.default_rng(0).integers(0, v, n)
    c = np.random.default_rng(1).standard_normal((v, d))
    c /= np.linalg.norm(c, axis=1, keepdims=True)
    e, c = (200 * c[targets]).astype(DTYPES[dtype]), c.astype(DTYPES[dtype])
    case = Case(dtype, e, c, targets)
    # Powers of two, exact in every dtype; float16 ends at 65504.
    dlse = np.full(n, 2.0**10 if dtype == "float16" else 2.0**20)
    pullback = linear_cross_entropy_vjp(e, c, targets, gradient_filter=kind, filter_eps=0.01)[1]
    oracle = case.oracle()
    tail = np.where(oracle.p < 0.01, oracle.p, 0).sum(axis=1).max()
    assert tail < 1e-3
    de = pullback(np.zeros(()), dlse).e
    exact = oracle.gradients(0.0, dlse)[0]
    allowed = case.tolerances(oracle).gradients(0.0, dlse)[0] + 0.01 * dlse[:, None]
    assert_within(de, exact, allowed, "de")
    assert np.linalg.norm(de.astype(np.float64)) > 0.9 * np.linalg.norm(exact)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_classifier_gradient_does_not_stall_over_tiles(dtype):
    """A sum of dC in bfloat16 stops growing at 256 equal terms, and training diverges.

    2048 tokens of e = 1 that share a target at p = 1/2: its dC is -1024 for a sum.
    """
    n = 2048
    kind = DTYPES[dtype]
    e, c = np.ones((n, 1), kind), np.zeros((2, 1), kind)
    gradients = linear_cross_entropy_value_and_grad(
        e, c, np.zeros(n, np.int64), np.zeros(2, kind), reduction="sum"
    )[1]
    np.testing.assert_array_equal(gradients.c.astype(float), [[-n / 2], [n / 2]])
    np.testing.assert_array_equal(gradients.bias.astype(float), [-n / 2, n / 2])


@pytest.mark.parametrize("v", [1000, 1024, 1025, 2047, 5000])
@pytest.mark.parametrize("sentinel", ["V", "V + 1", "-1"])
def test_ignore_index_just_outside_the_vocabulary(v, sentinel):
    """A sentinel for foreign targets met a padded column behind the vocabulary: infinite loss."""
    ignore_index = {"V": v, "V + 1": v + 1, "-1": -1}[sentinel]
    case = problem(33, v, d=5, ignore_index=ignore_index, reduction="none")
    case.targets[::2] = ignore_index
    loss, gradients = linear_cross_entropy_value_and_grad(*case.arrays, **case.options)
    assert not loss[::2].any()
    assert np.isfinite(loss).all()
    check_gradients(case, gradients)


@pytest.mark.parametrize("shape", [(300,), (2, 3, 50)])
def test_gradients_without_reduction(shape):
    """Gradients were wrong or zero with reduction="none", where each token has its own upstream."""
    case = problem(300, 1000, reduction="none")
    case = Case(
        case.dtype,
        case.e.reshape(*shape, -1),
        case.c,
        case.targets.reshape(shape),
        case.options,
    )
    dloss = np.random.default_rng(1).standard_normal(shape)
    pullback = linear_cross_entropy_vjp(*case.arrays, **case.options)[1]
    check_gradients(case, pullback(dloss), dloss)
    one = np.zeros(shape)
    one.reshape(-1)[17] = 1.0
    de = pullback(one).e.reshape(300, -1)
    assert de[17].any()
    assert not de[np.arange(300) != 17].any()


@pytest.mark.parametrize("removed", [0, 3000])
def test_label_smoothing_runs_over_the_whole_vocabulary(removed):
    """It was computed for every shard of the vocabulary by itself; here, for every block."""
    bias = np.zeros(5000)
    bias[5000 - removed :] = -np.inf
    case = problem(33, 5000, label_smoothing=0.3, bias=bias)
    case.targets[:] %= 2000
    loss, gradients = linear_cross_entropy_value_and_grad(*case.arrays, **case.options)
    assert_within(loss, case.oracle().loss, case.tolerances(case.oracle()).loss(), "loss")
    check_gradients(case, gradients)


@pytest.mark.parametrize("filtering", FILTERS)
def test_pullback_can_be_called_again(filtering):
    """A second backward failed; here it gives the same bits, also after one of something else."""
    case = problem(300, 1000)
    pullback = linear_cross_entropy_vjp(*case.arrays, **filtering)[1]
    first = pullback(np.ones(()))
    before = [gradient.tobytes() for gradient in first[:2]]
    other = pullback(np.zeros(()), np.ones(300))
    again = pullback(np.ones(()))
    assert [gradient.tobytes() for gradient in again[:2]] == before
    # Earlier results are the caller's: no later call writes to them.
    assert [gradient.tobytes() for gradient in first[:2]] == before
    assert other.e.tobytes() != before[0]


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_tokens(shape, reduction):
    """A batch that was left without tokens crashed."""
    c = np.ones((1000, 8), np.float32)
    loss, gradients = linear_cross_entropy_value_and_grad(
        np.ones((*shape, 8), np.float32), c, np.zeros(shape, np.int64), reduction=reduction
    )
    assert not loss.any()
    assert gradients.e.shape == (*shape, 8)
    assert gradients.c.shape == c.shape
    assert not gradients.c.any()
