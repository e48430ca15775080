"""Kept-column bits and random thresholds: the parts of the column plan that have no public face."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import threadpoolctl
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case
from tolerances import assert_within

import cce_cupy
from cce_cupy.cpu import columns as kept
from cce_cupy.cpu.tokens import Arrays
from cce_cupy.frameworks.host import HostCall
from cce_cupy.plan import COLUMN_CHUNK, ROW_TILE, make_plan
from cce_cupy.problem import ArraySpec, Options, Problem


def host_call(arrays: Arrays, plan_changes: dict | None = None, **options) -> HostCall:
    given = {name: array for name, array in arrays._asdict().items() if array is not None}
    specs = {name: ArraySpec(array.shape, array.dtype.name) for name, array in given.items()}
    problem = Problem.check(specs, Options(**options))
    plan = dataclasses.replace(make_plan(problem), **(plan_changes or {}))
    call = HostCall(problem, plan, arrays)
    call.run_forward(keep_columns=True)
    return call


def peaked_arrays(tokens: int, vocab: int, dim: int = 16, dtype=np.float32, seed: int = 0):
    """Return logits between about -20 and 20, the targets among the larger ones."""
    rng = np.random.default_rng(seed)
    e = rng.normal(size=(tokens, dim)).astype(dtype)
    c = 1.5 * rng.normal(size=(vocab, dim)).astype(dtype)
    targets = np.argmax(e.astype(np.float64) @ c.T.astype(np.float64), axis=1)
    return Arrays(e, c, targets, bias=np.zeros(vocab, dtype))


@given(st.data())
def test_bits_come_back(data):
    vocab = data.draw(st.integers(1, 200))
    first = COLUMN_CHUNK * data.draw(st.integers(0, (vocab - 1) // COLUMN_CHUNK))
    last = data.draw(st.integers(first, vocab))
    keep = np.array(
        data.draw(st.lists(st.booleans(), min_size=vocab, max_size=vocab)), dtype=np.bool_
    )
    bits = kept.new_bits(ROW_TILE + 1, vocab)
    assert bits.shape == (2, 4 * -(-vocab // COLUMN_CHUNK))
    kept.put_bits(bits, 1, 0, keep)
    expected = [column for column in range(first, last) if keep[column]]
    assert kept.kept_columns(bits, 1, first, last).tolist() == expected
    assert not bits[0].any()


def test_thresholds_are_in_range_and_pure():
    u = kept.uniforms(2**63 + 5, 3, 0, 4096)
    assert u.dtype == np.float32
    assert (u > 0).all()
    assert (u <= 1).all()
    assert (u * 2.0**24 == np.round(u * 2.0**24)).all()
    # A part of the range is the same numbers: there is no state.
    np.testing.assert_array_equal(kept.uniforms(2**63 + 5, 3, 1000, 1010), u[1000:1010])


def test_thresholds_of_record():
    """Every device must compute these: a change here changes every seeded result."""
    u = kept.uniforms(12345678901234567890, 7, 100, 104)
    expected = [0.30373942852020264, 0.8735796809196472, 0.4434199929237366, 0.013260304927825928]
    np.testing.assert_array_equal(u, np.array(expected, np.float32))
    assert kept.seed_from_targets(np.arange(10)) == 14887653494589264190


def test_thresholds_are_independent_from_seed_to_seed():
    count = 20_000
    u = np.concatenate([kept.uniforms(seed, 0, 5, 6) for seed in range(count)])
    # Kolmogorov-Smirnov at 1e-6: sqrt(count) * distance stays below 2.69.
    assert np.sqrt(count) * _distance_from_uniform(u) < 2.69
    # Neighbours are not correlated: a sum of products has a standard deviation of 1/12/sqrt(n).
    for lag in (1, 2, 32):
        covariance = np.mean((u[lag:] - 0.5) * (u[:-lag] - 0.5))
        assert abs(covariance) < 5 / 12 / np.sqrt(count)


SPOTS = [(0, 0, 0), (1, 1000, 77), (2**64 - 1, 5, 3_000_000)]
"""Seeds, row tiles and chunks from which neighbours are counted."""


@pytest.mark.parametrize("count", [64, 1000, 20_000])
@pytest.mark.parametrize("counter", ["chunks", "tiles"])
def test_neighbouring_thresholds_keep_their_distance(counter, count):
    """On a circle; of independent ones some pair is about 1 / count^2 apart."""
    for seed, tile, first in SPOTS:
        if counter == "chunks":
            u = kept.uniforms(seed, tile, first, first + count)
        else:
            u = thresholds(seed, tile, first, count, 1)
        distances = np.diff(np.sort(u.astype(np.float64)), append=u.min() + 1.0)
        assert distances.min() > 0.1 / count
        assert distances.max() < 5 / count


@pytest.mark.parametrize("side", [31, 141])
def test_thresholds_of_neighbouring_tiles_and_chunks_are_spread_evenly(side):
    for spot in SPOTS:
        u = thresholds(*spot, side, side)
        # Independent ones are about side / 2 places from where an even spread has them: 15, 70.
        assert u.size * _distance_from_uniform(u) < 8


def thresholds(seed, tile, first, tiles, chunks):
    """Those of some row tiles and chunks, in one array."""
    rows = range(tile, tile + tiles)
    return np.concatenate([kept.uniforms(seed, row, first, first + chunks) for row in rows])


def _distance_from_uniform(u):
    """Return the largest distance of the distribution of numbers from the uniform one."""
    return np.abs(np.sort(u) - (np.arange(len(u)) + 0.5) / len(u)).max()


def test_seed_depends_on_each_target_and_its_place():
    targets = np.array([5, 9, 2**33])
    seed = kept.seed_from_targets(targets)
    assert 0 <= seed < 2**64
    assert kept.seed_from_targets(targets) == seed
    for other in ([9, 5, 2**33], [5, 9, 2**33 + 2**32], [5, 9], [5, 8, 2**33]):
        assert kept.seed_from_targets(np.array(other)) != seed


@pytest.mark.parametrize("gradient_filter", ["unbiased", "threshold"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bits_hold_all_that_the_exact_test_keeps(gradient_filter, dtype):
    arrays = peaked_arrays(300, 3000, dtype=dtype)
    eps = 2.0**-8
    call = host_call(
        arrays, gradient_filter=gradient_filter, filter_eps=eps, seed=1, workspace_bytes=2**27
    )
    z = arrays.e.astype(np.float64) @ arrays.c.T.astype(np.float64)
    p = np.exp(z - np.logaddexp.reduce(z, axis=1, keepdims=True))
    held = exact = 0
    for tile, first in enumerate(range(0, 300, ROW_TILE)):
        largest = p[first : first + ROW_TILE].max(axis=0)
        largest[arrays.targets[first : first + ROW_TILE]] = 1.0
        threshold = np.full(3000, eps)
        if gradient_filter == "unbiased":
            u = kept.uniforms(1, tile, 0, -(-3000 // COLUMN_CHUNK))
            threshold *= np.repeat(u, COLUMN_CHUNK)[:3000]
        needed = np.flatnonzero(largest >= threshold)
        bits = kept.kept_columns(call.saved.bits, tile, 0, 3000)
        assert np.isin(needed, bits).all()
        held += len(bits)
        exact += len(needed)
    # They are a superset, and a close one: else the test would say nothing.
    assert exact < held < 1.5 * exact
    assert exact < 0.5 * 3 * 3000


BLOCKS = [
    {},
    {"row_block": 128, "column_block": 32, "segments": 3},
    {"row_block": 384, "column_block": 1024, "segments": 1},
    {"column_range": 96, "gather_block": 32},
]


@pytest.mark.parametrize("gradient_filter", ["unbiased", "threshold"])
def test_kept_set_does_not_depend_on_blocks(gradient_filter):
    arrays = peaked_arrays(300, 3000, dtype=np.float64)
    options = {"gradient_filter": gradient_filter, "filter_eps": 2.0**-10, "seed": 3}
    reference = None
    for changes in BLOCKS:
        call = host_call(arrays, changes, **options)
        gradients = call.pullback(np.ones(()), None)
        touched = gradients.c.any(axis=1)
        if reference is None:
            reference = touched, gradients
        assert gradients.kept == reference[1].kept
        np.testing.assert_array_equal(touched, reference[0])
        # Sums of up to 3000 terms of either sign, in another order.
        np.testing.assert_allclose(gradients.e, reference[1].e, rtol=0, atol=1e-15)
        np.testing.assert_allclose(gradients.c, reference[1].c, rtol=0, atol=1e-15)
    assert 0 < reference[1].kept < reference[1].pairs


@pytest.mark.parametrize("options", [{}, {"filter_eps": 1e-3}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_do_not_change_a_bit(dtype, options):
    arrays = peaked_arrays(700, 9000)

    cast = np.dtype(getattr(ml_dtypes, dtype, dtype))
    arrays = arrays._replace(
        e=arrays.e.astype(cast), c=arrays.c.astype(cast), bias=arrays.bias.astype(cast)
    )
    results = []
    for threads in (1, 2, 3):
        with threadpoolctl.threadpool_limits(threads, user_api="blas"):
            call = host_call(arrays, **options)
            gradients = call.pullback(np.ones(()), None)
            blas = [
                x["num_threads"] for x in threadpoolctl.threadpool_info() if x["user_api"] == "blas"
            ]
            # The limit that the call sets is gone afterwards.
            assert set(blas) == {threads}
        results.append((call.loss(), *gradients[:3]))
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert mine.tobytes() == theirs.tobytes()


def test_second_sweep_of_narrow_dtypes_gives_the_same_bits():
    """Where the float32 sums of dE do not fit the workspace, dE and dC are formed in turn."""

    arrays = peaked_arrays(500, 2000)
    arrays = Arrays(
        arrays.e.astype(ml_dtypes.bfloat16), arrays.c.astype(ml_dtypes.bfloat16), arrays.targets
    )
    for eps in (0.0, 1e-3):
        one = host_call(arrays, filter_eps=eps)
        assert len(one.call.plan.sweeps) == 1
        sweep = one.call.plan.sweeps[0]
        split = tuple(dataclasses.replace(sweep, e=e, c=not e) for e in (True, False))
        two = host_call(arrays, {"sweeps": split}, filter_eps=eps)
        first, second = (call.pullback(np.ones(()), None) for call in (one, two))
        assert first.e.tobytes() == second.e.tobytes()
        assert first.c.tobytes() == second.c.tobytes()
        assert first.kept == second.kept


def test_a_failing_worker_ends_the_call(monkeypatch):
    """Others that wait for its turn must not wait for ever, and BLAS gets its threads back."""
    arrays = peaked_arrays(700, 9000)
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        call = host_call(arrays)
        whole = type(call.call).classifier

        def failing(self, columns):
            if isinstance(columns, slice) and columns.start == 0:
                raise MemoryError("no memory for the first range")
            return whole(self, columns)

        monkeypatch.setattr(type(call.call), "classifier", failing)
        with pytest.raises(MemoryError, match="first range"):
            call.pullback(np.ones(()), None)
        blas = [
            x["num_threads"] for x in threadpoolctl.threadpool_info() if x["user_api"] == "blas"
        ]
        assert set(blas) == {2}


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "label_smoothing": 0.1, "shift": 1}])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("tokens", "dim"), [(90, 130), (128, 128), (450, 300), (1500, 150)])
def test_what_was_stored_gives_the_bits_of_what_is_recomputed(tokens, dim, dtype, options):
    e, c, targets = peaked_arrays(tokens, 3000, dim, dtype)[:3]
    bias = np.linspace(-1, 1, 3000).astype(dtype)
    bias[7] = -np.inf
    targets = np.where(np.arange(tokens) % 5 == 0, -100, targets)
    targets[targets == 7] = 8
    arrays = (e, c, targets, bias)
    (loss, gradients) = cce_cupy.linear_cross_entropy_value_and_grad(*arrays, **options)
    again, pullback = cce_cupy.linear_cross_entropy_vjp(*arrays, **options)
    assert loss == again
    for _ in range(2):  # what a pullback leaves must serve the next one
        for stored, recomputed in zip(gradients, pullback(1.0), strict=True):
            np.testing.assert_array_equal(stored, recomputed)


@pytest.mark.parametrize("eps", [None, 1e-3])
def test_a_store_without_a_row_leaves_zeros(eps):
    e, c, targets = peaked_arrays(256, 3000, dim=256)[:3]
    _, gradients = cce_cupy.linear_cross_entropy_value_and_grad(
        e, c, np.full_like(targets, -100), filter_eps=eps
    )
    assert not gradients.e.any()
    assert not gradients.c.any()


@pytest.mark.parametrize(
    ("tokens", "dim", "fits"), [(200, 120, True), (300, 130, True), (900, 16, False)]
)
@pytest.mark.parametrize("gradient_filter", ["unbiased", "threshold"])
def test_stored_kept_columns_are_those_recomputed(tokens, dim, fits, gradient_filter):
    """Including a row that makes all gradients NaN, of the third call."""
    arrays = peaked_arrays(tokens, 5000, dim, np.float64)
    bias = np.linspace(-1, 1, 5000)
    bias[7] = -np.inf
    arrays = arrays._replace(bias=bias, targets=np.where(arrays.targets == 7, 8, arrays.targets))
    options = {"gradient_filter": gradient_filter, "filter_eps": 1e-4, "seed": 5}
    for kind, label_smoothing, lost in (("f8", 0.0, False), ("f4", 0.1, False), ("f8", 0.0, True)):
        cast = Arrays(*(a if a is None or a.dtype.kind == "i" else a.astype(kind) for a in arrays))
        if lost:
            cast.e[tokens // 2, 3] = np.nan
        call = host_call(cast, label_smoothing=label_smoothing, **options)
        recomputed = call.pullback(np.ones(()), None)
        call.run_forward(keep_columns=True, once=True)
        used = call.saved.stored_columns.sizes > 0
        assert used.any() or not fits
        assert used.all() == (fits and not lost)
        stored = call.pullback(np.ones(()), None)
        if kind == "f8":
            assert stored.kept == recomputed.kept
            np.testing.assert_array_equal(stored.c == 0, recomputed.c == 0)
        for found, expected in zip(stored[:3], recomputed[:3], strict=True):
            scale = 1 if lost else np.abs(expected).max()
            rounding = 1e-12 if kind == "f8" else 2e-4
            np.testing.assert_allclose(found, expected, rtol=0, atol=rounding * scale)


@pytest.mark.parametrize(
    "options", [{}, {"z_loss": 1e-3, "softcap": 50.0}, {"label_smoothing": 0.1}]
)
def test_stored_rows_far_from_the_first_bound(options):
    """Sums overflow relative to it, or lose what the backward needs."""
    rng = np.random.default_rng(3)
    e, c = rng.normal(size=(300, 256)) / 16, rng.normal(size=(4000, 256))
    e[::3] *= 40
    e[1::3] *= 150
    targets = rng.integers(0, 4000, 300)
    e, c = e.astype(np.float32), c.astype(np.float32)
    case = Case("float32", e, c, targets, options, 0)
    oracle = case.oracle()
    loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(e, c, targets, **options)
    tolerances = case.tolerances(oracle)
    assert_within(loss, oracle.loss, tolerances.loss(), "loss")
    bounds = tolerances.gradients()
    for name, found, exact, allowed in zip(
        "ec", gradients[:2], oracle.gradients()[:2], bounds[:2], strict=True
    ):
        assert_within(found, exact, allowed, name)


def test_ranges_without_a_kept_column():
    arrays = peaked_arrays(200, 20_000, 64)
    arrays.bias[9000:] = -np.inf
    arrays = arrays._replace(targets=arrays.targets % 5000)
    options = {"gradient_filter": "threshold", "filter_eps": 1e-3}
    loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(*arrays[:4], **options)
    assert np.isfinite(loss)
    assert not gradients.c[9000:].any()
    assert gradients.c[:9000].any()
