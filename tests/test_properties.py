"""The public functions, unfiltered, against the oracle over everything that `strategies` draws."""

from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import Oracle
from strategies import NO_FILTER, TOKENS, VOCABS, Case, cases, upstream
from tolerances import DTYPES, accumulator, assert_within

from cce_cupy import (
    Gradients,
    TokenStatistics,
    linear_cross_entropy,
    linear_cross_entropy_value_and_grad,
    linear_cross_entropy_vjp,
    token_statistics,
)

STATISTICS_OPTIONS = ("bias", "ignore_index", "softcap", "shift", "logit_scale")


@contextmanager
def unchanged(*arrays):
    """Inputs are never written to: every byte is what it was."""
    arrays = [array for array in arrays if isinstance(array, np.ndarray)]
    before = [array.tobytes() for array in arrays]
    yield
    assert [array.tobytes() for array in arrays] == before


def inputs(case):
    return (*case.arrays, *case.options.values())


def check_forward(case, oracle, found, with_lse):
    """Loss (and lse): kind, shape, dtype and value."""
    sums = DTYPES[accumulator(case.dtype)]
    tolerances = case.tolerances(oracle)
    loss, lse = found if with_lse else (found, None)
    assert isinstance(loss, np.ndarray)
    assert loss.dtype == sums
    assert_within(loss, oracle.loss, tolerances.loss(), "loss")
    if with_lse:
        assert isinstance(lse, np.ndarray)
        assert lse.dtype == sums
        assert_within(lse, oracle.scatter(oracle.lse), tolerances.scattered_lse(), "lse")


def check_gradients(case, oracle, found, dloss=1.0, dlse=None):
    """Gradients: kind, shapes, dtypes and values."""
    assert isinstance(found, Gradients)
    expected = oracle.gradients(dloss, dlse)
    allowed = case.tolerances(oracle).gradients(dloss, dlse)
    for name, actual, exact, bound in zip(Gradients._fields, found, expected, allowed, strict=True):
        if exact is None:
            assert actual is None
            continue
        assert isinstance(actual, np.ndarray)
        assert actual.dtype == DTYPES[case.dtype]
        assert_within(actual, exact, bound, f"gradient of {name}")


@given(cases(), st.booleans())
def test_loss(case, return_lse):
    with unchanged(*inputs(case)):
        found = linear_cross_entropy(*case.arrays, **case.options, return_lse=return_lse)
    check_forward(case, case.oracle(), found, return_lse)


@given(cases(), st.sampled_from(NO_FILTER), st.booleans())
def test_value_and_grad(case, no_filter, return_lse):
    with unchanged(*inputs(case)):
        found, gradients = linear_cross_entropy_value_and_grad(
            *case.arrays, **case.options, **no_filter, return_lse=return_lse
        )
    oracle = case.oracle()
    check_forward(case, oracle, found, return_lse)
    check_gradients(case, oracle, gradients)


@given(
    cases(),
    st.sampled_from(NO_FILTER),
    st.booleans(),
    st.sampled_from(list(DTYPES)),
    st.sampled_from([None, *DTYPES]),
)
def test_vjp(case, no_filter, return_lse, dloss_dtype, dlse_dtype):
    oracle, rng = case.oracle(), case.rng()
    dloss = upstream(
        rng, oracle.loss.shape if case.options["reduction"] == "none" else (), dloss_dtype
    )
    dlse = None if dlse_dtype is None else upstream(rng, case.targets.shape, dlse_dtype)
    with unchanged(*inputs(case), dloss, dlse):
        found, pullback = linear_cross_entropy_vjp(
            *case.arrays, **case.options, **no_filter, return_lse=return_lse
        )
        gradients = pullback(dloss) if dlse is None else pullback(dloss, dlse)
    check_forward(case, oracle, found, return_lse)
    check_gradients(case, oracle, gradients, dloss, dlse)


@given(cases(dtypes=["float32", "float64"]))
def test_full_precision_is_unfiltered_by_default(case):
    _, gradients = linear_cross_entropy_value_and_grad(*case.arrays, **case.options)
    check_gradients(case, case.oracle(), gradients)


@given(cases())
def test_token_statistics(case):
    options = {k: v for k, v in case.options.items() if k in STATISTICS_OPTIONS}
    with unchanged(*inputs(case)):
        found = token_statistics(*case.arrays, **options)
    assert isinstance(found, TokenStatistics)
    oracle = Oracle(*case.arrays, **options)
    *expected, argmax = oracle.statistics()
    allowed = case.tolerances(oracle).statistics()
    for name, actual, exact, bound in zip(
        TokenStatistics._fields[:3], found[:3], expected, allowed, strict=True
    ):
        assert isinstance(actual, np.ndarray)
        assert actual.dtype == DTYPES[accumulator(case.dtype)]
        assert_within(actual, exact, bound, name)

    # The largest logits may be closer to each other than their errors.
    assert found.argmax.dtype == np.int64
    assert found.argmax.shape == case.targets.shape
    assert (found.argmax[oracle.scatter(np.ones(len(oracle.lse), bool)) == 0] == -1).all()
    chosen = found.argmax.reshape(-1)[oracle.t_rows]
    rows = np.arange(len(chosen))
    best = argmax.reshape(-1)[oracle.t_rows]
    errors = case.tolerances(oracle).z
    below = oracle.z[rows, best] - oracle.z[rows, chosen]
    assert (below <= errors[rows, best] + errors[rows, chosen]).all()


@given(
    st.sampled_from(list(DTYPES)),
    st.sampled_from([n for n in TOKENS if n]),
    st.sampled_from([v for v in VOCABS if v]),
    st.integers(0, 2**32 - 1),
)
def test_argmax_is_the_first_of_equals(dtype, n, v, seed):
    """Small integers: every sum is exact in every dtype, so equal logits are equal bits."""
    n = min(n, 300_000 // v)
    rng = np.random.default_rng(seed)
    e, c = (rng.integers(-2, 3, (rows, 4)).astype(DTYPES[dtype]) for rows in (n, v))
    targets = rng.integers(0, v, n)
    expected = np.argmax(e.astype(np.float64) @ c.astype(np.float64).T, axis=1)
    np.testing.assert_array_equal(token_statistics(e, c, targets).argmax, expected)


# What the strategies leave out: targets whose entry is removed


@given(cases(bias=True))
def test_target_on_a_removed_entry_costs_infinity(case):
    """Its loss is infinite, its gradient that of the lse part alone; the rest is as it was."""
    vocab, tokens = case.c.shape[0], case.targets.size
    options = case.options | {"reduction": "none", "label_smoothing": 0.0}
    # A weight of zero times infinity has no defined value.
    options = {k: v for k, v in options.items() if k not in ("class_weight", "token_weight")}
    if vocab < 2 or not tokens:
        return
    targets = np.where(case.targets == options["ignore_index"], -100, case.targets.astype(int))
    options["ignore_index"] = -100
    removed, kept = case.rng().permutation(vocab)[:2]
    bias = np.array(options["bias"])
    bias[removed], bias[kept] = -np.inf, 0.0
    options["bias"] = bias
    on_removed = (targets >= 0) & np.isneginf(bias.astype(np.float64))[np.maximum(targets, 0)]
    targets[on_removed] = removed
    targets.reshape(-1)[case.rng().integers(tokens)] = removed

    changed = Case(case.dtype, case.e, case.c, targets, options, case.seed)
    oracle = changed.oracle()
    dloss, dlse = case.rng().standard_normal((2, *targets.shape))
    found, pullback = linear_cross_entropy_vjp(
        *changed.arrays, **options, gradient_filter=None, return_lse=True
    )
    check_forward(changed, oracle, found, with_lse=True)
    check_gradients(changed, oracle, pullback(dloss, dlse), dloss, dlse)
    hit = oracle.t_rows[oracle.target == removed]
    assert (found[0].reshape(-1)[hit] == np.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_every_entry_removed(dtype, softcap):
    """p = 0 and zero gradients everywhere; the targets' loss is infinite."""
    kind = DTYPES[dtype]
    e, c, bias = np.ones((130, 4), kind), np.ones((33, 4), kind), np.full(33, -np.inf, kind)
    loss, gradients = linear_cross_entropy_value_and_grad(
        e, c, np.zeros(130, int), bias, softcap=softcap, reduction="none"
    )
    assert (loss == np.inf).all()
    for gradient in gradients:
        assert not gradient.any()


# Corners of the shapes, by name


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("options", [{}, {"filter_eps": 1e-6}])
def test_without_dimensions_the_logits_are_the_biases(shape, options):
    """D = 0, at every rank of the batch, and with a filter that keeps all of these columns."""
    bias = np.linspace(-1, 1, 33)
    case = Case(
        "float64",
        np.zeros((*shape, 0)),
        np.zeros((33, 0)),
        np.full(shape, 5),
        {"bias": bias, "reduction": "none"},
    )
    loss, gradients = linear_cross_entropy_value_and_grad(*case.arrays, **case.options, **options)
    check_forward(case, case.oracle(), loss, with_lse=False)
    check_gradients(case, case.oracle(), gradients)


def test_a_single_strided_token():
    """A batch of shape () whose embedding is a column of something."""
    e = np.random.default_rng(0).standard_normal((16, 3))[:, 1]
    c = np.random.default_rng(1).standard_normal((33, 16))
    case = Case("float64", e, c, np.array(5), {"reduction": "none"})
    loss, gradients = linear_cross_entropy_value_and_grad(*case.arrays, **case.options)
    check_forward(case, case.oracle(), loss, with_lse=False)
    check_gradients(case, case.oracle(), gradients)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("by", ["classifier", "bias"])
@pytest.mark.parametrize("far", [-90.0, -1e4, -6e4])
def test_targets_far_from_likely(far, by, dtype):
    """What is exact relative to a target's logit says nothing of logits thousands above it."""
    n, v, d = 130, 1000, 40
    rng = np.random.default_rng(0)
    e, c, bias = rng.standard_normal((n, d)), rng.standard_normal((v, d)) / 6, np.zeros(v)
    e[:, 0], c[:, 0] = 10.0, 0.0
    c[7] = 0.0
    if by == "bias":
        bias[7] = far
    else:
        c[7, 0] = far / 10
    targets = np.where(rng.random(n) < 0.5, 7, rng.integers(0, v, n))
    number = DTYPES[dtype]
    options = {"reduction": "none"} | ({"bias": bias.astype(number)} if by == "bias" else {})
    case = Case(dtype, e.astype(number), c.astype(number), targets, options)
    found, gradients = linear_cross_entropy_value_and_grad(
        *case.arrays, **options, gradient_filter=None, return_lse=True
    )
    oracle = case.oracle()
    check_forward(case, oracle, found, True)
    check_gradients(case, oracle, gradients)
