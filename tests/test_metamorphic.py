"""Relations between results of the library that hold whatever the right values are.

Two results that must agree beyond rounding are compared within the sum of the bounds that
`tolerances` has for each of them.
"""

import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import Oracle
from strategies import Case, cases, upstream
from tolerances import DTYPES, Tolerances, assert_within, unit_roundoff

from cce_cupy import (
    linear_cross_entropy,
    linear_cross_entropy_value_and_grad,
    linear_cross_entropy_vjp,
    token_statistics,
)

UNFILTERED = {"gradient_filter": None}
SIZES = [(1, 1), (3, 2), (127, 33), (129, 1000), (257, 1025), (31, 5000)]


def problem(n, v, d=16, dtype="float64", seed=0, spread=1.0, bias=False):
    """A plain call without options."""
    rng = np.random.default_rng([seed, n, v])
    e, c = rng.standard_normal((n, d)) * spread, rng.standard_normal((v, d)) / np.sqrt(d)
    options = {"bias": rng.standard_normal(v).astype(DTYPES[dtype])} if bias else {}
    targets = rng.integers(0, v, n)
    return Case(dtype, e.astype(DTYPES[dtype]), c.astype(DTYPES[dtype]), targets, options, seed)


def value_and_grad(case, **changes):
    return linear_cross_entropy_value_and_grad(
        *case.arrays, **(case.options | UNFILTERED | changes)
    )


def assert_same_bits(left, right):
    for a, b in zip(left, right, strict=True):
        if a is None:
            assert b is None
        else:
            assert a.dtype == b.dtype
            assert a.tobytes() == b.tobytes()


# What the loss cannot be


@given(cases())
def test_loss_is_never_negative_without_smoothing(case):
    """Exactly: the target's logit comes from the same sums as lse."""
    options = case.options | {"label_smoothing": 0.0, "reduction": "none"}
    assert (linear_cross_entropy(*case.arrays, **options) >= 0).all()
    options["reduction"] = "mean"
    assert linear_cross_entropy(*case.arrays, **options) >= 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [1, 8, 15, 17, 30, 90])
def test_loss_of_a_certain_token_is_never_negative(dtype, gap):
    """The target's logit is the largest by a gap on both sides of where its rest vanishes."""
    n, v, d = 33, 1025, 64
    rng = np.random.default_rng(gap)
    c = rng.standard_normal((v, d))
    c /= np.linalg.norm(c, axis=1, keepdims=True)
    targets = rng.integers(0, v, n)
    e = (2 * gap * c[targets]).astype(DTYPES[dtype])
    loss = linear_cross_entropy(e, c.astype(DTYPES[dtype]), targets, reduction="none")
    assert (loss >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_entry_costs_nothing(dtype):
    """V = 1: p = 1, whatever the logit."""
    case = problem(130, 1, dtype=dtype, spread=100, bias=True)
    loss, gradients = value_and_grad(case, reduction="none", softcap=20.0)
    assert not loss.any()
    for gradient in gradients:
        assert not gradient.any()
    statistics = token_statistics(*case.arrays, **case.options)
    assert not statistics.log_prob.any()
    assert not statistics.argmax.any()
    entropy_allowed = case.tolerances(case.oracle()).statistics()[2]
    assert_within(statistics.entropy, np.zeros(130), entropy_allowed, "entropy")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1e2, 1e4])
def test_large_logits_do_not_overflow(dtype, spread):
    """Logits beyond 1e4, where exp of anything but a difference overflows in every dtype."""
    case = problem(130, 1025, d=8, dtype=dtype, spread=spread)
    # "mean", as a sum of such embeddings leaves float16.
    oracle = case.oracle()
    assert spread < 1e4 or np.abs(oracle.z).max() > 2e4
    tolerances = case.tolerances(oracle)
    loss, gradients = value_and_grad(case)
    assert np.isfinite(loss).all()
    assert_within(loss, oracle.loss, tolerances.loss(), "loss")
    for found, exact, allowed in zip(
        gradients[:2], oracle.gradients()[:2], tolerances.gradients()[:2], strict=True
    ):
        assert_within(found, exact, allowed, "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [400.0, 1000.0])
@pytest.mark.parametrize("gradient_filter", [None, "unbiased", "threshold"])
def test_logits_far_above_every_target_do_not_overflow(dtype, gap, gradient_filter):
    """Bounds from the targets alone are then so low that exponentials relative to them overflow."""
    case = problem(200, 3000, d=8, dtype=dtype)
    case.c[3] = -gap * case.e[0]
    case.c[[2500, 2501]] = gap * case.e[0]
    case.e[:] = case.e[0]
    case.targets[:] = 3
    oracle = case.oracle()
    assert (oracle.lse - oracle.z[:, 3]).min() > 2 * gap
    loss, gradients = value_and_grad(case, gradient_filter=gradient_filter, filter_eps=1e-4)
    tolerances = case.tolerances(oracle)
    assert_within(loss, oracle.loss, tolerances.loss(), "loss")
    for found, exact, allowed in zip(
        gradients[:2], oracle.gradients()[:2], tolerances.gradients()[:2], strict=True
    ):
        # What a filter drops is too small for any dtype.
        assert_within(found, exact, allowed, "gradient")


# Symmetries


@pytest.mark.parametrize(("n", "v"), SIZES)
@pytest.mark.parametrize("constant", [-40.0, 0.5, 300.0])
def test_a_constant_added_to_every_bias_changes_nothing(n, v, constant):
    case = problem(n, v, bias=True)
    moved = Case(case.dtype, *case.arrays, {"bias": case.options["bias"] + constant})
    # bias + constant is itself rounded once, which moves that logit by as much.
    rounding = unit_roundoff("float64") * (np.abs(case.options["bias"]) + abs(constant)).max()
    before, after = (value_and_grad(x, reduction="sum", return_lse=True) for x in (case, moved))
    left, right = (x.tolerances(x.oracle(reduction="sum")) for x in (case, moved))
    loss_allowed = left.loss() + right.loss() + 2 * n * rounding
    assert_within(after[0][0], before[0][0], loss_allowed, "loss")
    lse_allowed = (
        left.scattered_lse() + right.scattered_lse() + 2 * rounding + np.spacing(abs(constant))
    )
    assert_within(after[0][1], before[0][1] + constant, lse_allowed, "lse")
    sizes = left.products(*[2 * rounding * left.oracle.p] * 2, left.oracle.gradients())
    for a, b, x, y, extra in zip(
        before[1], after[1], left.gradients(), right.gradients(), sizes, strict=True
    ):
        assert_within(b, a, x + y + extra, "gradient")


@given(cases(bias=True), st.integers(0, 2**32 - 1))
def test_permuting_the_vocabulary_permutes_dc_and_leaves_the_rest(case, seed):
    vocab = case.c.shape[0]
    order = np.random.default_rng(seed).permutation(vocab)
    place = np.argsort(order)
    ignored = case.targets == case.options["ignore_index"]
    # ignore_index must not name an entry, which would move; targets need a dtype with room.
    safe = np.where(ignored, 0, case.targets.astype(np.int64))
    targets = np.where(ignored, -100, safe)
    permuted = np.where(ignored, -100, place[safe] if vocab else safe)
    per_entry = ("bias", "class_weight")
    options = case.options | {"ignore_index": -100}
    moved = options | {k: options[k][order] for k in per_entry if k in options}

    plain = linear_cross_entropy_value_and_grad(
        case.e, case.c, targets, **options, **UNFILTERED, return_lse=True
    )
    other = linear_cross_entropy_value_and_grad(
        case.e, case.c[order], permuted, **moved, **UNFILTERED, return_lse=True
    )
    tolerances = Tolerances(Oracle(case.e, case.c, targets, **options), case.dtype)
    assert_within(other[0][0], plain[0][0], 2 * tolerances.loss(), "loss")
    assert_within(other[0][1], plain[0][1], 2 * tolerances.scattered_lse(), "lse")
    de, dc, dbias = tolerances.gradients()
    assert_within(other[1].e, plain[1].e, 2 * de, "de")
    assert_within(other[1].c, plain[1].c[order], 2 * dc[order], "dc")
    assert_within(other[1].bias, plain[1].bias[order], 2 * dbias[order], "dbias")


@pytest.mark.parametrize("v", [1, 2, 33, 1025, 5000])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.3}, {"logit_scale": -2.0}])
def test_dlogits_of_a_token_sum_to_zero(v, options):
    """Moving all logits together changes no probability; dbias of one token is its dlogits."""
    case = problem(1, v, bias=True)
    gradients = value_and_grad(case, **options)[1]
    allowed = case.tolerances(case.oracle(**options)).gradients()[2]
    assert_within(gradients.bias.sum(), 0.0, 2 * allowed.sum(), "sum of dlogits")


# Tokens are independent


@given(cases())
def test_ignored_tokens_are_as_if_they_were_not_there(case):
    """Their embeddings may even be NaN, their weights and upstream gradients anything."""
    options = case.options | {"reduction": "sum"}
    oracle = Oracle(*case.arrays, **options)
    # shift = 0 below: remove the pairing too.
    tokens = case.targets.size
    flat_e = case.e.reshape(tokens, -1) if tokens else case.e.reshape(0, case.e.shape[-1])
    fewer = {k: v for k, v in options.items() if k not in ("shift", "token_weight")}
    if "token_weight" in options:
        fewer["token_weight"] = options["token_weight"].reshape(-1)[oracle.t_rows]
    kept_e, kept_targets = flat_e[oracle.e_rows], case.targets.reshape(-1)[oracle.t_rows]

    e = np.array(case.e)
    used = np.zeros(tokens, bool)
    used[oracle.e_rows] = True
    e.reshape(tokens, e.shape[-1])[~used] = np.nan
    dlse = np.full(case.targets.shape, np.nan)
    dlse.reshape(-1)[oracle.t_rows] = kept_dlse = case.rng().standard_normal(len(oracle.t_rows))

    loss, pullback = linear_cross_entropy_vjp(e, case.c, case.targets, **options, **UNFILTERED)
    gradients = pullback(np.ones(()), dlse)
    other, pullback = linear_cross_entropy_vjp(kept_e, case.c, kept_targets, **fewer, **UNFILTERED)
    expected = pullback(np.ones(()), kept_dlse)

    tolerances = Tolerances(oracle, case.dtype)
    assert_within(loss, other, 2 * tolerances.loss(), "loss")
    de, dc, dbias = tolerances.gradients(1.0, np.nan_to_num(dlse))
    rows = gradients.e.reshape(tokens, e.shape[-1])
    assert not rows[~used].any()
    allowed = de.reshape(tokens, e.shape[-1])[oracle.e_rows]
    assert_within(rows[oracle.e_rows], expected.e, 2 * allowed, "de")
    assert_within(gradients.c, expected.c, 2 * dc, "dc")
    if dbias is not None:
        assert_within(gradients.bias, expected.bias, 2 * dbias, "dbias")


@pytest.mark.parametrize(("n", "v"), SIZES)
@pytest.mark.parametrize("split", [0, 1, 100, 128])
def test_concatenating_batches_adds_sums(n, v, split):
    split = min(split, n)
    case = problem(n, v, bias=True)
    whole = value_and_grad(case, reduction="sum", return_lse=True)
    parts = [
        value_and_grad(
            Case(case.dtype, case.e[rows], case.c, case.targets[rows], case.options),
            reduction="sum",
            return_lse=True,
        )
        for rows in (slice(0, split), slice(split, n))
    ]
    tolerances = case.tolerances(case.oracle(reduction="sum"))
    de, dc, dbias = (2 * x for x in tolerances.gradients())
    (loss, lse), gradients = whole
    (first_loss, first_lse), first = parts[0]
    (second_loss, second_lse), second = parts[1]
    assert_within(first_loss + second_loss, loss, 2 * tolerances.loss(), "loss")
    assert_within(
        np.concatenate([first_lse, second_lse]), lse, 2 * tolerances.scattered_lse(), "lse"
    )
    assert_within(np.concatenate([first.e, second.e]), gradients.e, de, "de")
    assert_within(first.c + second.c, gradients.c, dc, "dc")
    assert_within(first.bias + second.bias, gradients.bias, dbias, "dbias")


@pytest.mark.parametrize("shape", [(7,), (3, 50), (2, 3, 40)])
@pytest.mark.parametrize("shift", [1, 2, 6])
def test_shift_is_slicing(shape, shift):
    """The same pairs in the same order, so the same bits; results stand at the targets' places."""
    rng = np.random.default_rng(shift)
    e, c = rng.standard_normal((*shape, 8)), rng.standard_normal((1025, 8))
    targets = rng.integers(-1, 1025, shape)
    options = {"ignore_index": -1, "reduction": "none", "gradient_filter": None}
    cut_e, cut_targets = e[..., :-shift, :], targets[..., shift:]
    dloss, dlse = rng.standard_normal(shape), rng.standard_normal(shape)

    (loss, lse), pullback = linear_cross_entropy_vjp(
        e, c, targets, **options, shift=shift, return_lse=True
    )
    gradients = pullback(dloss, dlse)
    (cut_loss, cut_lse), pullback = linear_cross_entropy_vjp(
        cut_e, c, cut_targets, **options, return_lse=True
    )
    expected = pullback(dloss[..., shift:], dlse[..., shift:])
    np.testing.assert_array_equal(loss[..., shift:], cut_loss)
    np.testing.assert_array_equal(lse[..., shift:], cut_lse)
    np.testing.assert_array_equal(gradients.e[..., :-shift, :], expected.e)
    np.testing.assert_array_equal(gradients.c, expected.c)
    assert not gradients.e[..., -shift:, :].any()
    assert not loss[..., :shift].any()
    assert not lse[..., :shift].any()

    statistics = token_statistics(e, c, targets, ignore_index=-1, shift=shift)
    cut = token_statistics(cut_e, c, cut_targets, ignore_index=-1)
    for whole, part, fill in zip(statistics, cut, (0, 0, 0, -1), strict=True):
        np.testing.assert_array_equal(whole[..., shift:], part)
        assert (whole[..., :shift] == fill).all()


# Nothing to compute

EMPTY = [
    ((0, 4), (7, 4)),
    ((0, 4), (0, 4)),
    ((2, 0, 4), (7, 4)),
    ((0, 0), (7, 0)),
    ((5, 4), (7, 4)),
    ((2, 3, 0), (7, 0)),
    ((5, 4), (0, 4)),
    ((4,), (7, 4)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("e_shape", "c_shape"), EMPTY)
def test_nothing_left_gives_zeros(e_shape, c_shape, reduction, dtype):
    """No tokens, or only ignored ones: zeros of the right shapes, filter or not."""
    e, c = np.ones(e_shape, DTYPES[dtype]), np.ones(c_shape, DTYPES[dtype])
    targets = np.full(e_shape[:-1], -100)
    bias = np.ones(c_shape[0], DTYPES[dtype])
    (loss, lse), pullback = linear_cross_entropy_vjp(
        e, c, targets, bias, reduction=reduction, return_lse=True, z_loss=0.1
    )
    shape = targets.shape if reduction == "none" else ()
    gradients = pullback(np.ones(shape, np.float32), np.ones(targets.shape, np.float32))
    found = (loss, lse, *gradients)
    assert [x.shape for x in found] == [shape, targets.shape, e.shape, c.shape, bias.shape]
    assert not any(x.any() for x in found)
    statistics = token_statistics(e, c, targets, bias)
    assert [x.shape for x in statistics] == [targets.shape] * 4
    assert not statistics.log_prob.any()
    assert not statistics.entropy.any()
    assert (statistics.argmax == -1).all()


def test_mean_over_weights_of_zero_is_zero():
    """The tokens are there, but nothing is left to average."""
    case = problem(130, 33, bias=True)
    loss, pullback = linear_cross_entropy_vjp(
        *case.arrays, **case.options, token_weight=np.zeros(130)
    )
    assert loss == 0
    for gradient in pullback(np.ones(())):
        assert not gradient.any()


# The same computation in another way


def smallest_workspace(call):
    """The minimum that the library itself names when it is given a single byte."""
    with pytest.raises(ValueError, match="workspace_bytes") as refusal:
        call(workspace_bytes=1)
    return max(int(number) for number in re.findall(r"\d+", str(refusal.value)))


WORKSPACE_OPTIONS = [
    {},
    {"softcap": 10.0, "logit_scale": 1.5},
    {"label_smoothing": 0.1, "z_loss": 1e-3},
    {"gradient_filter": "threshold", "filter_eps": 1e-3},
    {"gradient_filter": "unbiased", "filter_eps": 1e-2},
    {"gradient_filter": "unbiased", "filter_eps": 1e-2, "filter_e_grad": False},
    {"gradient_filter": "threshold", "filter_eps": 1e-3, "filter_c_grad": False},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", WORKSPACE_OPTIONS)
def test_workspace_does_not_change_a_bit(dtype, options):
    case = problem(300, 5000, dtype=dtype, spread=2.0, bias=True)
    case.targets[::7] = -100

    def call(**changes):
        (loss, lse), gradients = linear_cross_entropy_value_and_grad(
            *case.arrays, **(case.options | UNFILTERED | options | changes), return_lse=True
        )
        return loss, lse, *gradients

    expected = call()
    least = smallest_workspace(call)
    for workspace in (least, least + 1, 2 * least, 3 * least + 12345, 2**27, 2**33):
        assert_same_bits(call(workspace_bytes=workspace), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_workspace_does_not_change_a_bit_of_the_statistics(dtype):
    case = problem(300, 5000, dtype=dtype, spread=2.0)

    def call(**changes):
        return token_statistics(*case.arrays, **changes)

    least = smallest_workspace(call)
    for workspace in (least, 2 * least, 2**33):
        assert_same_bits(call(workspace_bytes=workspace), call())


@given(cases(), st.sampled_from([{}, {"gradient_filter": "threshold"}, UNFILTERED]))
def test_same_call_same_bits(case, filtering):
    def call():
        (loss, lse), gradients = linear_cross_entropy_value_and_grad(
            *case.arrays, **case.options, **filtering, return_lse=True
        )
        return loss, lse, *gradients

    assert_same_bits(call(), call())


@given(cases())
def test_value_and_grad_is_vjp_at_one(case):
    """With "none" the gradients are those of the sum of the losses."""
    loss, gradients = linear_cross_entropy_value_and_grad(*case.arrays, **case.options)
    other, pullback = linear_cross_entropy_vjp(*case.arrays, **case.options)
    assert_same_bits((loss, *gradients), (other, *pullback(np.ones_like(other))))


@given(cases(), st.sampled_from([0.5, -4.0, 1024.0]))
def test_pullback_is_linear_in_powers_of_two(case, factor):
    """Only exponents change, as long as nothing leaves the range of normal numbers."""
    assume(case.dtype != "float16")
    rng = case.rng()
    options = case.options | UNFILTERED
    loss, pullback = linear_cross_entropy_vjp(*case.arrays, **options)
    dloss, dlse = upstream(rng, loss.shape, "float64"), upstream(rng, case.targets.shape, "float64")
    plain, scaled = pullback(dloss, dlse), pullback(factor * dloss, factor * dlse)
    for a, b in zip(plain, scaled, strict=True):
        if a is not None:
            tiny = np.abs(a.astype(np.float64)) < 1e-30
            np.testing.assert_array_equal((a * a.dtype.type(factor))[~tiny], b[~tiny])


# Finite differences

DIFFERENCE_OPTIONS = [
    {},
    {"softcap": 3.0},
    {"logit_scale": -0.8, "z_loss": 0.05},
    {"label_smoothing": 0.2},
    {"label_smoothing": 0.2, "softcap": 3.0, "z_loss": 0.05, "logit_scale": 1.3, "shift": 1},
]


@pytest.mark.parametrize("options", DIFFERENCE_OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["e", "c", "bias"])
def test_gradient_is_the_slope_of_the_loss(name, reduction, options):
    """Central differences of the library's own loss and lse along a random direction.

    Their truncation error falls like h^2, so halving h shows three quarters of it: the difference
    of the two slopes, and again as much for higher orders, bounds that of the smaller step.
    Rounding of the two values, divided by 2 h, is the rest.
    """
    n, v = 37, 1025
    case = problem(n, v, d=8, bias=True, seed=5)
    case.targets[::5] = -100
    rng = case.rng()
    given_options = {
        "reduction": reduction,
        "class_weight": rng.random(v),
        "token_weight": rng.random(n),
        **options,
    }
    point = {"e": case.e, "c": case.c, "bias": case.options["bias"]}
    direction = rng.standard_normal(point[name].shape)
    dloss = rng.standard_normal((n,) if reduction == "none" else ())
    dlse = rng.standard_normal(n)

    def objective(step):
        moved = point | {name: point[name] + step * direction}
        loss, lse = linear_cross_entropy(
            moved["e"], moved["c"], case.targets, moved["bias"], **given_options, return_lse=True
        )
        return (dloss * loss).sum() + (dlse * lse).sum()

    def slope(step):
        return (objective(step) - objective(-step)) / (2 * step)

    pullback = linear_cross_entropy_vjp(*case.arrays, point["bias"], **given_options)[1]
    gradient = getattr(pullback(dloss, dlse), name)

    step = 1e-4
    coarse, fine = slope(step), slope(step / 2)
    oracle = Oracle(*case.arrays, point["bias"], **given_options)
    tolerances = Tolerances(oracle, "float64")
    rounding = (np.abs(dloss) * tolerances.loss()).sum() + np.abs(dlse) @ tolerances.scattered_lse()
    exact = tolerances.gradients(dloss, dlse)[["e", "c", "bias"].index(name)]
    allowed = 2 * abs(coarse - fine) + 2 * rounding / step + (exact * np.abs(direction)).sum()
    assert allowed < 1e-5 * np.linalg.norm(gradient) * np.linalg.norm(direction)
    assert_within((gradient * direction).sum(), fine, allowed, "slope")
