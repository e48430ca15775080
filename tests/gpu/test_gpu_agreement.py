"""The CPU backend and the CUDA kernels: the same thresholds, seeds, kept columns and results.

Both lie within a bound of the exact result, so they differ by twice that at most. What is kept
shows in dbias, as `test_filter.py` explains.
"""

import numpy as np
import pytest
from devices import FRAMEWORKS, ROADS
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle
from strategies import INTEGERS, NO_FILTER, Case, cases
from suites import EXAMPLES
from test_filter import OPTIONS as FILTER_OPTIONS
from test_filter import (
    SIZES,
    importance,
    largest,
    one_tile_at_a_time,
    optioned,
    problem,
    undecided,
    with_weights,
)
from test_properties import STATISTICS_OPTIONS
from tolerances import DTYPES, assert_within

import cce_cupy
from cce_cupy.compiler import compile_options
from cce_cupy.cpu import columns

road = pytest.fixture(params=ROADS)(lambda request: ROADS[request.param])

ROW_TILE, CHUNK = 128, 32


def agree(ours, theirs, allowed, what):
    """Both NaN and infinity included."""
    assert ours.dtype == theirs.dtype, what
    assert_within(ours, np.asarray(theirs).astype(np.float64), 2 * np.asarray(allowed), what)


def kept_columns(library, case, oracle, **filtering):
    """Kept columns of each row tile."""
    pullback = library.linear_cross_entropy_vjp(*case.arrays, **case.options, **filtering)[1]
    found = [pullback(dloss).bias for dloss in one_tile_at_a_time(oracle)]
    return np.stack(found).astype(np.float64) != 0


# thresholds and seeds

UNIFORM = r"""
#include "columns.cuh"

extern "C" __global__ void uniforms(unsigned long long seed, long long tile, long long first,
                                    long long count, float* out) {
  const long long i = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
  if (i < count) out[i] = cce::uniform(seed, tile, first + i);
}
"""


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**32 - 1, 2**32, 2**63, 2**64 - 1])
@pytest.mark.parametrize("tile", [0, 1, 63, 2**16, 2**31, 2**32 - 1])
def test_thresholds_are_those_of_the_cpu(seed, tile):
    """Bit for bit: every chunk of a large vocabulary, and the last ones that 32 bits can number."""
    cupy = FRAMEWORKS["cupy"].module
    module = cupy.RawModule(code=UNIFORM, options=compile_options("portable/tokens.cu", "float32"))
    uniforms = module.get_function("uniforms")
    for first, count in [(0, 10_000), (2**26 - 100, 200), (2**32 - 1000, 999)]:
        out = cupy.full(count, np.nan, np.float32)
        arguments = (np.uint64(seed), np.int64(tile), np.int64(first), np.int64(count), out)
        uniforms((-(-count // 256),), (256,), arguments)
        expected = columns.uniforms(seed, tile, first, first + count)
        assert out.get().tobytes() == expected.tobytes()


@pytest.mark.parametrize("n", [1, 127, 256, 257, 3000, 8192, 8193, 20_000])
@pytest.mark.parametrize("integer", INTEGERS)
def test_derived_seed_is_that_of_the_cpu(road, n, integer):
    """The bits of seed=None are those of the seed that the CPU derives, and of no other."""
    v = 100
    rng = np.random.default_rng([n, len(integer)])
    targets = rng.integers(0, v - 1, (n,))
    targets[rng.random(n) < 0.3] = v - 1  # ignored, and within every dtype
    targets[n // 2] = 7
    valid = targets[targets != v - 1]
    e, c = rng.standard_normal((n, 4)), rng.standard_normal((v, 4))
    options = {"ignore_index": v - 1, "filter_eps": 0.5}

    def bits(seed):
        found = road.linear_cross_entropy_value_and_grad(
            e, c, targets.astype(integer), seed=seed, **options
        )
        return [gradient.tobytes() for gradient in found[1][:2]]

    derived = columns.seed_from_targets(valid.astype(np.int64))
    assert bits(None) == bits(derived)
    assert bits(None) != bits(derived ^ 1)


def test_derived_seed_with_a_shift(road):
    v = 100
    rng = np.random.default_rng(0)
    targets = rng.integers(0, v, (3, 200))
    targets[rng.random(targets.shape) < 0.3] = -100
    paired = targets[:, 5:].reshape(-1)
    derived = columns.seed_from_targets(paired[paired != -100])
    e, c = rng.standard_normal((3, 200, 4)), rng.standard_normal((v, 4))

    def bits(seed):
        found = road.linear_cross_entropy_value_and_grad(
            e, c, targets, seed=seed, shift=5, filter_eps=0.5
        )
        return [gradient.tobytes() for gradient in found[1][:2]]

    assert bits(None) == bits(derived)
    assert bits(None) != bits(derived ^ 1)


# what is kept, and the results


@pytest.mark.parametrize("options", FILTER_OPTIONS)
@pytest.mark.parametrize(("n", "v"), SIZES)
@pytest.mark.parametrize("kind", ["unbiased", "threshold"])
@pytest.mark.parametrize("seed", [None, 11])
def test_float64_keeps_the_same_columns(options, n, v, kind, seed):
    """And weighs them alike: gradients within twice their bound, dropped columns the same."""
    eps = 3e-3
    case = optioned(n, v, "float64", options)
    oracle = case.oracle()
    m = largest(oracle)
    filtering = {"gradient_filter": kind, "filter_eps": eps, "seed": seed}
    bare = Case(case.dtype, *case.arrays, case.options | {"label_smoothing": 0.0})
    assert not borderline(bare, bare.oracle(), m, eps, filtering).any()
    kept = kept_columns(ROADS["cupy"], bare, bare.oracle(), **filtering)
    np.testing.assert_array_equal(kept, kept_columns(cce_cupy, bare, bare.oracle(), **filtering))
    if v >= 1000:
        assert 0 < kept.mean() < 1

    weights = np.where(kept, importance(np.maximum(m, 1e-300), eps), 0.0)
    if kind == "threshold":
        weights = np.where(kept, 1.0, 0.0)
    if oracle.softcap and oracle.label_smoothing:
        weights = np.ones_like(m)
    dloss, dlse = case.rng().standard_normal((2, n))
    found = [
        library.linear_cross_entropy_vjp(*case.arrays, **case.options, **filtering)[1](dloss, dlse)
        for library in (ROADS["cupy"], cce_cupy)
    ]
    allowed = with_weights(case, oracle, weights, dloss, dlse)[1]
    for name, ours, theirs, bound in zip(["e", "c", "bias"], *found, allowed, strict=True):
        agree(ours, theirs, bound, name)


def borderline(case, oracle, m, eps, filtering):
    """Columns whose m is as close to their threshold as its error."""
    if filtering["gradient_filter"] == "threshold":
        return undecided(case, oracle, m, eps)
    seed = filtering["seed"]
    if seed is None:
        seed = columns.seed_from_targets(oracle.target)
    chunks = -(-m.shape[1] // CHUNK)
    u = np.stack([columns.uniforms(seed, tile, 0, chunks) for tile in range(len(m))])
    thresholds = eps * u.repeat(CHUNK, axis=1)[:, : m.shape[1]].astype(np.float64)
    errors = case.tolerances(oracle).p
    tiles = range(0, len(errors), ROW_TILE)
    error = np.stack([errors[k : k + ROW_TILE].max(axis=0) for k in tiles])
    return np.abs(m - thresholds) <= error


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("options", FILTER_OPTIONS[:4])
@pytest.mark.parametrize("kind", ["unbiased", "threshold"])
def test_lower_precision_keeps_the_same_columns(road, dtype, options, kind):
    """But for those that rounding can put on either side of their threshold."""
    eps = 2e-3
    case = optioned(300, 1025, dtype, options)
    oracle = case.oracle()
    filtering = {"gradient_filter": kind, "filter_eps": eps, "seed": None}
    decided = ~borderline(case, oracle, largest(oracle), eps, filtering)
    assert decided.mean() > 0.99
    ours = kept_columns(road, case, oracle, **filtering)
    theirs = kept_columns(cce_cupy, case, oracle, **filtering)
    np.testing.assert_array_equal(ours[decided], theirs[decided])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["unbiased", "threshold"])
def test_hopeless_targets_lose_no_column(road, dtype, kind):
    """Where each target's probability is below any float, sums relative to it overflow."""
    n, v, d, eps = 256, 30000, 64, 1e-3
    rng = np.random.default_rng(0)
    e, c = rng.standard_normal((n, d)), 0.4 * rng.standard_normal((v, d))
    e[:, 0], c[:, 0] = 10.0, 0.0
    c[5] = 0.0
    c[5, 0] = -10.0
    number = DTYPES[dtype]
    options = {"reduction": "none", "bias": np.zeros(v, number)}
    case = Case(dtype, e.astype(number), c.astype(number), np.full(n, 5), options)
    oracle = case.oracle()
    assert (oracle.lse - oracle.z[:, 5]).min() > 100
    filtering = {"gradient_filter": kind, "filter_eps": eps, "seed": None}
    decided = ~borderline(case, oracle, largest(oracle), eps, filtering)
    assert decided.mean() > 0.99
    ours = kept_columns(road, case, oracle, **filtering)
    theirs = kept_columns(cce_cupy, case, oracle, **filtering)
    assert 0.01 < theirs.mean() < 0.9
    np.testing.assert_array_equal(ours[decided], theirs[decided])


def test_row_tiles_count_valid_tokens_across_the_batch(road):
    """Ignored tokens and shifted positions make the same tiles, with the same thresholds."""
    v = 1000
    rng = np.random.default_rng(3)
    targets = rng.integers(0, v, (3, 5, 40))
    targets[rng.random(targets.shape) < 0.4] = -1
    case = Case(
        "float64",
        1.5 * rng.standard_normal((3, 5, 40, 8)),
        rng.standard_normal((v, 8)),
        targets,
        {"bias": np.zeros(v), "reduction": "none", "ignore_index": -1, "shift": 2},
    )
    oracle = case.oracle()
    for kind in ("unbiased", "threshold"):
        filtering = {"gradient_filter": kind, "filter_eps": 1e-3, "seed": None}
        assert not borderline(case, oracle, largest(oracle), 1e-3, filtering).any()
        ours = kept_columns(road, case, oracle, **filtering)
        np.testing.assert_array_equal(ours, kept_columns(cce_cupy, case, oracle, **filtering))


@settings(max_examples=2 * EXAMPLES)
@given(cases(), st.sampled_from(NO_FILTER), st.sampled_from(list(ROADS)))
def test_results_agree(case, no_filter, name):
    """Loss, lse, gradients and statistics over everything that the strategies draw."""
    oracle = case.oracle()
    tolerances = case.tolerances(oracle)
    (loss, lse), gradients = ROADS[name].linear_cross_entropy_value_and_grad(
        *case.arrays, **case.options, **no_filter, return_lse=True
    )
    (their_loss, their_lse), theirs = cce_cupy.linear_cross_entropy_value_and_grad(
        *case.arrays, **case.options, **no_filter, return_lse=True
    )
    agree(loss, their_loss, tolerances.loss(), "loss")
    agree(lse, their_lse, tolerances.scattered_lse(), "lse")
    for which, ours, other, bound in zip(
        gradients._fields, gradients, theirs, tolerances.gradients(), strict=True
    ):
        if other is None:
            assert ours is None
        else:
            agree(ours, other, bound, which)

    options = {k: v for k, v in case.options.items() if k in STATISTICS_OPTIONS}
    oracle = Oracle(*case.arrays, **options)
    ours = ROADS[name].token_statistics(*case.arrays, **options)
    other = cce_cupy.token_statistics(*case.arrays, **options)
    bounds = case.tolerances(oracle).statistics()
    for which, *arrays in zip(ours._fields[:3], ours[:3], other[:3], bounds, strict=True):
        agree(*arrays, which)


@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax_agrees_where_it_is_decided(road, dtype):
    """Exact products of small integers; ties are the first of equals on both sides."""
    rng = np.random.default_rng(0)
    e, c = (rng.integers(-3, 4, (rows, 5)).astype(DTYPES[dtype]) for rows in (300, 5001))
    targets = rng.integers(0, 5001, 300)
    ours = road.token_statistics(e, c, targets)
    np.testing.assert_array_equal(ours.argmax, cce_cupy.token_statistics(e, c, targets).argmax)


def test_automatic_filter_is_the_same(road):
    """bfloat16 filters by default: as many columns on both sides, but for borderline ones."""
    case = problem(300, 5000, dtype="bfloat16")
    oracle = case.oracle()
    ours, theirs = (kept_columns(library, case, oracle) for library in (road, cce_cupy))
    filtering = {"gradient_filter": "unbiased", "seed": None}
    decided = ~borderline(case, oracle, largest(oracle), 16 / 5000, filtering)
    assert decided.mean() > 0.99
    np.testing.assert_array_equal(ours[decided], theirs[decided])
