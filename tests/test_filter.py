"""The gradient filters against what they promise, from the oracle's probabilities.

A row tile is 128 consecutive valid tokens. Its part of dbias shows what was kept: upstream
gradients that are zero outside the tile leave sum_r dz[r, v], and exactly 0 where column v was
dropped. The filter looks at probabilities alone, so these do not change what is kept.
Given the kept columns and their weights, every gradient is the oracle's with dz multiplied by them.
"""

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import Oracle
from strategies import Case, cases
from tolerances import DTYPES, assert_within, unit_roundoff

from cce_cupy import (
    filter_statistics,
    linear_cross_entropy_value_and_grad,
    linear_cross_entropy_vjp,
)

ROW_TILE = 128
CHUNK = 32


def problem(n=128, v=1000, d=8, dtype="float64", seed=0, spread=1.5, **options):
    """Probabilities over several orders of magnitude, on both sides of 1 / V."""
    rng = np.random.default_rng([seed, n, v])
    kind = DTYPES[dtype]
    options = {"bias": rng.standard_normal(v).astype(kind), "reduction": "none"} | options
    e = (spread * rng.standard_normal((n, d))).astype(kind)
    c = rng.standard_normal((v, d)).astype(kind)
    return Case(dtype, e, c, rng.integers(0, v, n), options, seed)


def biased(log_p, n=128, d=4, dtype="float64", seed=0, **options):
    """The same probabilities in every row: those of the bias alone, as e is zero."""
    rng = np.random.default_rng([seed, n])
    kind, v = DTYPES[dtype], len(log_p)
    options = {"bias": np.asarray(log_p).astype(kind), "reduction": "none"} | options
    targets = np.full(n, v - 1)
    c = rng.standard_normal((v, d)).astype(kind)
    return Case(dtype, np.zeros((n, d), kind), c, targets, options, seed)


def tiles(oracle):
    """Slices of the valid tokens."""
    return [slice(k, k + ROW_TILE) for k in range(0, len(oracle.target), ROW_TILE)]


def largest(oracle):
    """m, (row tiles, V): the largest p of the tile's rows, 1 for their targets."""
    m = np.stack([oracle.p[rows].max(axis=0) for rows in tiles(oracle)])
    for k, rows in enumerate(tiles(oracle)):
        m[k, oracle.target[rows]] = 1.0
    return m


def undecided(case, oracle, m, eps):
    """Columns whose m is as close to eps as its error."""
    errors = case.tolerances(oracle).p
    error = np.stack([errors[rows].max(axis=0) for rows in tiles(oracle)])
    return np.abs(m - eps) <= error


def one_tile_at_a_time(oracle):
    """Upstream gradients of 1 in one row tile and 0 elsewhere."""
    for rows in tiles(oracle):
        dloss = np.zeros(len(oracle.target))
        dloss[rows] = 1.0
        yield oracle.scatter(dloss)


def exact_dbias(oracle):
    """What each row tile contributes to dbias, (row tiles, V)."""
    return np.stack([oracle.gradients(dloss)[2] for dloss in one_tile_at_a_time(oracle)])


def found_dbias(case, oracle, **filtering):
    """The same from the library: exactly 0 where a column was dropped."""
    pullback = linear_cross_entropy_vjp(*case.arrays, **case.options, **filtering)[1]
    found = [pullback(dloss).bias for dloss in one_tile_at_a_time(oracle)]
    return np.stack(found).astype(np.float64)


def kept_columns(case, oracle, **filtering):
    """The library's kept columns, (row tiles, V)."""
    return found_dbias(case, oracle, **filtering) != 0


def with_weights(case, oracle, weights, dloss=1.0, dlse=None):
    """The oracle's gradients and their bounds, the softmax part of dz times weights[tile, v]."""
    each_row = np.repeat(weights, ROW_TILE, axis=0)[: len(oracle.target)]
    softmax, constant = oracle.dlogits(dloss, dlse)
    gradients = oracle.products(softmax * each_row + constant)
    tolerances = case.tolerances(oracle)
    error, magnitude = tolerances.dlogits(dloss, dlse)
    # The weight 1 / q = eps / m has the relative error of m.
    relative = np.max(np.expm1(tolerances.exponent), initial=0.0)
    constant = np.abs(constant)
    grown = error * np.maximum(each_row, 1) + relative * magnitude * (each_row > 1) * each_row
    sizes = (magnitude - constant) * each_row + constant
    return gradients, tolerances.products(grown, sizes, gradients)


def check(found, expected, allowed):
    for name, *arrays in zip(("de", "dc", "dbias"), found, expected, allowed, strict=True):
        assert_within(*arrays, name)


def importance(m, eps):
    """1 / q: the weight of a column that the unbiased filter keeps."""
    return 1 / np.minimum(1, m / eps)


# threshold

OPTIONS = [
    {},
    {"softcap": 4.0},
    {"logit_scale": -0.7},
    {"z_loss": 0.05},
    {"label_smoothing": 0.2},
    {"label_smoothing": 1.0, "class_weight": True},
    {"class_weight": True, "token_weight": True, "z_loss": 0.05, "label_smoothing": 0.1},
    {"removed": True, "label_smoothing": 0.1},
    {"removed": True, "softcap": 4.0, "z_loss": 0.05, "logit_scale": 1.3, "class_weight": True},
]
SIZES = [(1, 1000), (128, 1000), (129, 33), (300, 1025), (40, 5000)]


def optioned(n, v, dtype, options):
    """`problem` with the weights and removed entries that an entry of OPTIONS asks for."""
    case, rng = problem(n, v, dtype=dtype), np.random.default_rng(7)
    options = dict(options)
    if options.pop("removed", False):
        removed = np.setdiff1d(rng.choice(v, v // 3, replace=False), case.targets)
        case.options["bias"][removed] = -np.inf
    for name, size in (("class_weight", v), ("token_weight", n)):
        if options.get(name):
            options[name] = rng.random(size) + 0.1
    case.options.update(options)
    return case


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("n", "v"), SIZES)
@pytest.mark.parametrize("eps", [1e-2, 1e-3, 1e-4])
def test_threshold_keeps_what_reaches_eps_and_the_targets(n, v, eps, options):
    """Every dropped |p| is below eps, the kept columns are exactly those with m >= eps."""
    case = optioned(n, v, "float64", options)
    oracle = case.oracle()
    m = largest(oracle)
    keep = m >= eps
    assert not undecided(case, oracle, m, eps).any()
    filtering = {"gradient_filter": "threshold", "filter_eps": eps}
    if not oracle.label_smoothing:
        # With it every dbias is dense, and what was kept shows in the gradients' values below.
        found = kept_columns(case, oracle, **filtering)
        np.testing.assert_array_equal(found, keep & (exact_dbias(oracle) != 0))
    pullback = linear_cross_entropy_vjp(*case.arrays, **case.options, **filtering)[1]
    dloss, dlse = case.rng().standard_normal((2, n))
    check(pullback(dloss, dlse), *with_weights(case, oracle, keep, dloss, dlse))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS[:4])
def test_threshold_in_lower_precision(dtype, options):
    """As in float64, but for the columns that rounding can put on either side."""
    eps = 2e-3
    case = optioned(300, 1025, dtype, options)
    oracle = case.oracle()
    m = largest(oracle)
    open_questions = undecided(case, oracle, m, eps)
    assert open_questions.mean() < 1e-3
    found = kept_columns(case, oracle, gradient_filter="threshold", filter_eps=eps)
    np.testing.assert_array_equal(found[~open_questions], (m >= eps)[~open_questions])


def test_threshold_keeps_targets_of_no_probability():
    """The -1 of a target is the largest entry of its column, however unlikely the target is."""
    v = 1000
    log_p = np.full(v, -20.0)
    log_p[0] = 0.0
    case = biased(log_p)
    case.targets[:] = np.arange(128) + 5
    oracle = case.oracle()
    kept = kept_columns(case, oracle, gradient_filter="threshold", filter_eps=0.5)
    np.testing.assert_array_equal(np.flatnonzero(kept), [0, *range(5, 133)])


@pytest.mark.parametrize("kind", ["threshold", "unbiased"])
def test_ignored_tokens_keep_no_column(kind):
    """An ignored token's likely column is dropped; the rest forms tiles of 128 valid tokens."""
    v, d = 2000, 2000
    kind_of = {"gradient_filter": kind, "filter_eps": 1e-6 if kind == "threshold" else 0.5}
    targets = np.full(256, -100)
    targets[::2] = 7
    # Each token is certain of a column of its own; p elsewhere is exp(-60).
    e, c = np.zeros((256, d)), 60.0 * np.eye(v, d)
    e[np.arange(256), 500 + np.arange(256)] = 1.0
    case = Case("float64", e, c, targets, {"bias": np.zeros(v), "reduction": "none"})
    oracle = case.oracle()
    assert len(tiles(oracle)) == 1
    kept = kept_columns(case, oracle, seed=1, **kind_of)
    np.testing.assert_array_equal(np.flatnonzero(kept), [7, *range(500, 756, 2)])


def test_row_tiles_count_valid_tokens_across_the_batch():
    """Tiles run over rows of the batch, over ignored tokens and over shifted positions."""
    v, eps = 1000, 1e-3
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
    assert len(tiles(oracle)) == 3
    m = largest(oracle)
    found = kept_columns(case, oracle, gradient_filter="threshold", filter_eps=eps)
    np.testing.assert_array_equal(found, m >= eps)


# unbiased


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("n", "v"), SIZES)
@pytest.mark.parametrize("eps", [1e-1, 1e-3])
def test_unbiased_weights_what_it_keeps_by_its_probability(n, v, eps, options):
    """Kept columns weigh 1 / q; those of a chunk share u, so they are the most likely ones."""
    case = optioned(n, v, "float64", options)
    oracle = case.oracle()
    m = largest(oracle)
    filtering = {"gradient_filter": "unbiased", "filter_eps": eps, "seed": 11}
    # What is kept depends on p alone; with smoothing dbias is dense and does not show it.
    bare = Case(case.dtype, *case.arrays, case.options | {"label_smoothing": 0.0})
    keep, exact = kept_columns(bare, bare.oracle(), **filtering), exact_dbias(bare.oracle())
    assert keep[(m >= eps) & (exact != 0)].all()
    for k, left in np.ndindex(len(m), -(-v // CHUNK)):
        chunk = np.s_[k, left * CHUNK : (left + 1) * CHUNK]
        dropped = m[chunk][~keep[chunk] & (exact[chunk] != 0)]
        assert dropped.max(initial=0.0) <= m[chunk][keep[chunk]].min(initial=np.inf)

    if oracle.softcap and oracle.label_smoothing:
        weights = np.ones_like(m)
    else:
        weights = np.where(keep, importance(np.maximum(m, 1e-300), eps), 0)
    pullback = linear_cross_entropy_vjp(*case.arrays, **case.options, **filtering)[1]
    dloss, dlse = case.rng().standard_normal((2, n))
    check(pullback(dloss, dlse), *with_weights(case, oracle, weights, dloss, dlse))


P_OPTIONS = ("bias", "ignore_index", "softcap", "shift", "logit_scale")


@given(
    cases(dtypes=["float64"], bias=True),
    st.sampled_from(["threshold", "unbiased"]),
    st.sampled_from([0.5, 2.0**-8, 1.1e-3, 1e-5]),
    st.integers(0, 2**64 - 1),
)
def test_filters_over_everything(case, kind, eps, seed):
    """Every shape and option that the strategies draw, with the weights that p alone decides."""
    oracle = case.oracle()
    assume(len(oracle.target))
    m = largest(oracle)
    # Probabilities may be equal by construction, and then equal to eps.
    assume(not undecided(case, oracle, m, eps).any())
    filtering = {"gradient_filter": kind, "filter_eps": eps, "seed": seed}
    keep, weights = m >= eps, np.ones_like(m)
    if kind == "unbiased":
        options = {k: case.options[k] for k in P_OPTIONS if k in case.options}
        bare = Case(case.dtype, *case.arrays, options | {"reduction": "none"})
        keep |= kept_columns(bare, bare.oracle(), **filtering)
        weights = importance(np.maximum(m, 1e-300), eps)
    weights = np.where(keep, weights, 0.0)
    if oracle.softcap and oracle.label_smoothing:
        weights = np.ones_like(m)
    dloss = case.rng().standard_normal(oracle.loss.shape if oracle.reduction == "none" else ())
    dlse = case.rng().standard_normal(case.targets.shape)
    pullback = linear_cross_entropy_vjp(*case.arrays, **case.options, **filtering)[1]
    check(pullback(dloss, dlse), *with_weights(case, oracle, weights, dloss, dlse))


def places(row_tiles, v):
    """Where each column's threshold lies on a circle of length 1, but for the seed's shift."""
    tile_step, chunk_step = np.uint32(0xC13FA9A9), np.uint32(0x91E10DA5)
    tile = np.arange(row_tiles, dtype=np.uint32)[:, None] * tile_step
    return (tile + np.arange(v, dtype=np.uint32) // np.uint32(CHUNK) * chunk_step) / 2.0**32


def pair_factors(q, place, other_q, other_place):
    """Covariance of B / q and B' / q', B = [q >= u]: (both kept) / (q q') - 1.

    u runs over the circle with the shift, and u' with it: both are kept where the arcs of length
    q and q' that begin at their places' distance overlap.
    """
    begin = (place - other_place) % 1.0
    both = np.maximum(np.minimum(q, begin + other_q) - begin, 0)
    both += np.maximum(np.minimum(q, begin + other_q - 1), 0)
    return both / (q * other_q) - 1


def exact_variance(oracle, eps):
    """E ||filtered - exact||^2 of de and of dc, from the definition of the unbiased filter."""
    dz = oracle.dlogits()[0] * oracle.slope
    gram_c = oracle.logit_scale**2 * (oracle.c @ oracle.c.T)
    every = np.minimum(1, largest(oracle) / eps)
    at = places(*every.shape)
    # What each row tile brings to dc.
    parts = np.stack([oracle.logit_scale * (dz[rows].T @ oracle.e[rows]) for rows in tiles(oracle)])
    of_e = of_c = 0.0
    for k, rows in enumerate(tiles(oracle)):
        q, place = every[k], at[k]
        factors = pair_factors(q[:, None], place[:, None], q, place)
        of_e += ((dz[rows].T @ dz[rows]) * gram_c * factors).sum()
        # A column of dc errs by B/q - 1 times its part from this tile.
        factors = pair_factors(q, place, every, at)
        of_c += ((parts[k] * parts).sum(axis=2) * factors).sum()
    return of_e, of_c


@pytest.mark.parametrize(("n", "v", "eps"), [(128, 1000, 1e-2), (300, 1025, 3e-2)])
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "z_loss": 0.05}, {"logit_scale": -0.7}])
def test_mean_over_seeds_approaches_the_unfiltered_gradient(n, v, eps, options):
    """The error of a mean over K seeds has the exact variance / K: tested at K = 1 and K = 64.

    The squared norm sums the errors of hundreds of chunks, so it lies near its mean;
    a factor of 3 either way is far outside what they vary by (over the 64 single seeds this is
    measured: see the first assertion). A biased filter fails at K = 64: the last assertion.
    """
    case = optioned(n, v, "float64", {"reduction": "sum"} | options)
    oracle = case.oracle()
    exact = oracle.gradients()[:2]
    found = [
        linear_cross_entropy_value_and_grad(
            *case.arrays, **case.options, gradient_filter="unbiased", filter_eps=eps, seed=seed
        )[1][:2]
        for seed in range(64)
    ]
    biased_gradients = linear_cross_entropy_value_and_grad(
        *case.arrays, **case.options, gradient_filter="threshold", filter_eps=eps
    )[1][:2]
    for side, variance in enumerate(exact_variance(oracle, eps)):
        errors = np.stack([gradients[side] - exact[side] for gradients in found])
        single = (errors**2).reshape(64, -1).sum(axis=1)
        # The mean of 64 squared errors, each of mean `variance`, within 5 of its standard errors.
        assert abs(single.mean() - variance) <= 5 * single.std(ddof=1) / np.sqrt(64)
        assert variance / 3 <= single[0] <= variance * 3
        of_mean = (errors.mean(axis=0) ** 2).sum()
        assert variance / 64 / 3 <= of_mean <= variance / 64 * 3
        assert ((biased_gradients[side] - exact[side]) ** 2).sum() > variance / 64 * 3


@pytest.mark.parametrize(("n", "v", "eps"), [(128, 1000, 1e-2), (300, 1025, 3e-2)])
def test_single_columns_are_unbiased(n, v, eps):
    """dbias of a column is Bernoulli(q) / q times its exact value: counted over 64 seeds."""
    case = problem(n, v)
    oracle = case.oracle()
    q = np.minimum(1, largest(oracle) / eps)
    counts = sum(
        kept_columns(case, oracle, gradient_filter="unbiased", filter_eps=eps, seed=seed)
        for seed in range(64)
    )
    # Bernstein's bound at 1e-9 for each of the columns.
    t = np.log(2e9)
    allowed = np.sqrt(2 * 64 * q * (1 - q) * t) + t
    assert (np.abs(counts - 64 * q) <= allowed).all()
    assert (counts[q == 1] == 64).all()


@pytest.mark.parametrize(
    ("n", "v", "eps"), [(128, 1000, 1e-2), (300, 1025, 3e-2), (300, 5000, 0.1)]
)
def test_kept_fraction_is_the_sum_of_the_probabilities(n, v, eps):
    """E[kept] = sum q, with a variance from all pairs of columns."""
    case = problem(n, v)
    oracle = case.oracle()
    q = np.minimum(1, largest(oracle) / eps)
    at = places(*q.shape)
    variance = sum(
        (q[k] * q[j, :, None] * pair_factors(q[j, :, None], at[j, :, None], q[k], at[k])).sum()
        for k, j in itertools.product(range(len(q)), repeat=2)
    )
    seeds = range(16)
    kept = sum(
        kept_columns(case, oracle, gradient_filter="unbiased", filter_eps=eps, seed=seed).sum()
        for seed in seeds
    )
    assert abs(kept - len(seeds) * q.sum()) <= 5 * np.sqrt(len(seeds) * variance)


def pattern(v=32 * 64, n=128, seed=None, targets=None, **changes):
    """Kept chunks of equal probabilities with q = 1/4: u <= 1/4 per (row tile, chunk)."""
    case = biased(np.zeros(v), n=n, **changes)
    if targets is not None:
        case.targets[:] = targets
    oracle = case.oracle()
    kept = kept_columns(case, oracle, gradient_filter="unbiased", filter_eps=4 / v, seed=seed)
    for k, rows in enumerate(tiles(oracle)):
        kept[k, oracle.target[rows]] = False
    return kept


def test_columns_of_a_chunk_share_their_number():
    v = 32 * 64 + 5
    kept = pattern(v, n=300, seed=0)
    kept[:, v - 1] = kept[:, v - 2]  # the target
    chunks = np.split(kept, range(CHUNK, v, CHUNK), axis=1)
    assert all((chunk == chunk[:, :1]).all() for chunk in chunks)


def test_numbers_are_uniform_and_spread_evenly():
    """u <= 1/4 in a quarter of all (seed, tile, chunk), along chunks and tiles nearly exactly."""
    shows = np.stack([pattern(n=2048, seed=seed)[:, ::CHUNK] for seed in range(8)])
    assert shows.shape == (8, 16, 64)
    # Of independent ones the standard deviations are 3.5 and 1.7.
    assert (abs(shows.sum(axis=2) - 16) <= 3).all()
    assert (abs(shows.sum(axis=1) - 4) <= 2).all()
    assert len({one.tobytes() for one in shows}) == 8


def test_seed_decides():
    case = problem(300, 1025)

    def gradients(seed):
        return linear_cross_entropy_value_and_grad(
            *case.arrays, **case.options, filter_eps=1e-2, seed=seed
        )[1]

    seeds = [0, 1, 2, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    first = [gradients(seed) for seed in seeds]
    for seed, expected in zip(seeds, first, strict=True):
        for found, bits in zip(gradients(seed), expected, strict=True):
            assert found.tobytes() == bits.tobytes()
    assert len({found.bias.tobytes() for found in first}) == len(seeds)


def test_seed_of_none_is_a_function_of_the_targets():
    """Other embeddings and classifiers of the same probabilities keep the same; targets decide."""
    base = pattern()
    np.testing.assert_array_equal(pattern(seed=None), base)
    np.testing.assert_array_equal(pattern(d=7), base)
    log_p = np.zeros(32 * 64)
    other = biased(log_p + 3.0)
    found = kept_columns(
        other, other.oracle(), gradient_filter="unbiased", filter_eps=4 / len(log_p)
    )
    found[:, -1] = False
    np.testing.assert_array_equal(found, base)
    chunks = [base[:, ::CHUNK].tobytes()]
    for changed in (0, 1, 2):
        targets = np.full(128, len(log_p) - 1)
        targets[changed] = len(log_p) - 2
        chunks.append(pattern(targets=targets)[:, ::CHUNK].tobytes())
    assert len(set(chunks)) == 4


# Both filters

KINDS = [
    {"gradient_filter": "threshold", "filter_eps": 1e-3},
    {"gradient_filter": "unbiased", "filter_eps": 1e-2, "seed": 5},
]


@pytest.mark.parametrize("filtering", KINDS)
@pytest.mark.parametrize("options", OPTIONS[:6])
def test_each_side_can_do_without(filtering, options):
    """filter_e_grad=False leaves dE unfiltered, filter_c_grad=False dC and dbias."""
    case = optioned(300, 1025, "float64", options)
    oracle = case.oracle()

    def gradients(**changes):
        return linear_cross_entropy_value_and_grad(*case.arrays, **case.options, **changes)[1]

    exact, allowed = oracle.gradients(), case.tolerances(oracle).gradients()
    both = gradients(**filtering)
    for name in ("e", "c"):
        side = ["e", "c"].index(name)
        assert np.abs(both[side] - exact[side]).max() > 100 * allowed[side].max()
    e_exact = gradients(**filtering, filter_e_grad=False)
    c_exact = gradients(**filtering, filter_c_grad=False)
    neither = gradients(**filtering, filter_e_grad=False, filter_c_grad=False)
    check(neither, exact, allowed)
    check((e_exact.e, c_exact.c, c_exact.bias), exact, allowed)
    # The filtered side is what it is with both filtered: a weight of up to eps / m grows its error.
    growth = 1 if filtering["gradient_filter"] == "threshold" else 20
    check((c_exact.e, e_exact.c, e_exact.bias), both, [growth * x for x in allowed])


@pytest.mark.parametrize("filtering", KINDS)
def test_softcap_with_smoothing_is_not_filtered(filtering):
    case = problem(300, 1025, softcap=4.0, label_smoothing=0.1)
    oracle = case.oracle()
    found = linear_cross_entropy_value_and_grad(*case.arrays, **case.options, **filtering)[1]
    check(found, oracle.gradients(), case.tolerances(oracle).gradients())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_full_precision_is_not_filtered_by_default(dtype):
    case = problem(300, 1025, dtype=dtype)
    found = linear_cross_entropy_value_and_grad(*case.arrays, **case.options)[1]
    plain = linear_cross_entropy_value_and_grad(*case.arrays, **case.options, filter_eps=None)[1]
    for a, b in zip(found, plain, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("v", [1000, 5000, 40000])
@pytest.mark.parametrize(
    ("dtype", "kind", "numerator"),
    [
        ("bfloat16", "unbiased", 16),
        ("bfloat16", "threshold", 1),
        ("float16", "unbiased", 2),
        ("float16", "threshold", 1 / 8),
    ],
)
def test_automatic_eps(dtype, kind, numerator, v):
    """numerator / V, at most 2^-8: seen in what "threshold" drops and in "unbiased"'s weights."""
    eps = min(numerator / v, 2.0**-8)
    log_p = np.linspace(-12, 0, v)
    case = biased(np.where(np.arange(v) % 2, log_p, -14.0), n=3, dtype=dtype)
    oracle = case.oracle()
    m = largest(oracle)
    open_questions = undecided(case, oracle, m, eps)
    assert open_questions.mean() < 0.01
    found, exact = found_dbias(case, oracle, gradient_filter=kind, seed=3), exact_dbias(oracle)
    decided = ~open_questions & (exact > 0)
    if kind == "threshold":
        np.testing.assert_array_equal(found[decided] != 0, (m >= eps)[decided])
        return
    kept = decided & (found != 0) & (m < eps)
    assert kept.sum() > 20
    weight = found[kept] / exact[kept]
    error = 4 * unit_roundoff(dtype) + case.tolerances(oracle).exponent.max()
    if dtype == "float16":
        # Subnormal numbers are rounded to multiples of 2^-24.
        error = error + 2.0**-24 / exact[kept]
    assert (np.abs(weight / (eps / m[kept]) - 1) <= error).all()


@pytest.mark.parametrize("filtering", KINDS)
def test_large_upstream_dlse_is_honoured(filtering):
    """The filter bounds p, so dE errs by at most eps |dlse| sum of the dropped |c|, at any dlse."""
    case = problem(300, 1025)
    oracle = case.oracle()
    dlse = 1e6 * case.rng().standard_normal(300)
    pullback = linear_cross_entropy_vjp(*case.arrays, **case.options, **filtering)[1]
    found = pullback(np.zeros(300), dlse)
    eps = filtering["filter_eps"]
    dropped = np.repeat(largest(oracle) < eps, ROW_TILE, axis=0)[:300]
    exact, rounding = oracle.gradients(0.0, dlse), case.tolerances(oracle).gradients(0.0, dlse)
    error = eps * np.abs(dlse)[:, None] * dropped
    allowed = error @ np.abs(case.c), error.T @ np.abs(case.e), error.sum(axis=0)
    check(found, exact, [x + y for x, y in zip(allowed, rounding, strict=True)])
    # And it is there: large parts of it are not dropped.
    assert np.linalg.norm(found.e) > 0.5 * np.linalg.norm(exact[0])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("filtering", KINDS)
def test_loss_scaling_scales_the_gradients(dtype, filtering):
    """The same columns, the same bits but for the exponent."""
    case = problem(300, 1025, dtype=dtype, z_loss=0.01)
    pullback = linear_cross_entropy_vjp(*case.arrays, **case.options, **filtering)[1]
    dloss, dlse = case.rng().standard_normal((2, 300))
    plain, scaled = pullback(dloss, dlse), pullback(1024 * dloss, 1024 * dlse)
    for a, b in zip(plain, scaled, strict=True):
        np.testing.assert_array_equal(b.astype(np.float64), 1024 * a.astype(np.float64))


@pytest.mark.parametrize("filtering", KINDS)
def test_nan_is_not_filtered_away(filtering):
    """p of a row with a NaN is NaN in every column, and no comparison with it is true."""
    case = problem(300, 1025)
    case.e[5, 3] = np.nan
    loss, gradients = linear_cross_entropy_value_and_grad(*case.arrays, **case.options, **filtering)
    others = np.arange(300) != 5
    assert np.isnan(loss[5])
    assert np.isfinite(loss[others]).all()
    assert np.isnan(gradients.e[5]).all()
    assert np.isfinite(gradients.e[others]).all()
    assert np.isnan(gradients.c).all()
    assert np.isnan(gradients.bias).all()


def to_bfloat16(values):
    return np.asarray(values).astype(ml_dtypes.bfloat16).astype(np.float64)


def test_automatic_filter_stays_near_the_rounding_of_bfloat16():
    """Peaked data: filter and rounding together err by at most twice the rounding alone.

    The rounding alone is that of an unfiltered program that keeps dz and its results in bfloat16.
    The data is peaked as a trained model's is: a Zipf head, and targets that lead it.
    """
    n, v, d = 64, 65536, 64
    rng = np.random.default_rng(0)
    c = to_bfloat16(rng.standard_normal((v, d)) / np.sqrt(d))
    bias = to_bfloat16(-1.5 * np.log1p(np.arange(v)))
    targets = rng.choice(v, n, p=np.exp(bias) / np.exp(bias).sum())
    e = to_bfloat16(12 * c[targets] + 3 * rng.standard_normal((n, d)))
    oracle = Oracle(e, c, targets, bias)
    assert np.minimum(1, largest(oracle) * v / 16).mean() < 0.1, "peaked: few columns are kept"
    exact = oracle.gradients()
    rounded = [to_bfloat16(x) for x in oracle.products(to_bfloat16(sum(oracle.dlogits())))]
    arrays = [x.astype(ml_dtypes.bfloat16) for x in (e, c, bias)]
    for kind in ("threshold", "unbiased"):
        found = linear_cross_entropy_value_and_grad(
            arrays[0], arrays[1], targets, arrays[2], gradient_filter=kind
        )[1]
        for side in (0, 1):
            noise = np.linalg.norm(rounded[side] - exact[side])
            error = np.linalg.norm(found[side].astype(np.float64) - exact[side])
            assert error <= 2 * noise, (kind, side, error / noise)


def filter_statistics_of(case, **filtering):
    plain = {k: v for k, v in case.options.items() if k in ("bias", "softcap", "ignore_index")}
    return filter_statistics(*case.arrays, **plain, **filtering)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}, {"bias": None}])
@pytest.mark.parametrize("eps", [1e-3, 1e-2])
def test_statistics_of_a_threshold(dtype, options, eps):
    """The pairs that reach eps, and the probability of all others; targets are kept."""
    case = problem(n=300, v=2000, dtype=dtype, **options)
    case.targets[::5] = -100
    if case.options["bias"] is None:
        del case.options["bias"]
    found = filter_statistics_of(case, gradient_filter="threshold", filter_eps=eps)
    oracle = case.oracle()
    m = largest(oracle)
    sure = ~undecided(case, oracle, m, eps)
    keep = m >= eps
    assert (found.gradient_filter, found.filter_eps) == ("threshold", eps)
    unsure = keep.size - np.count_nonzero(sure)
    assert abs(found.kept * keep.size - np.count_nonzero(keep)) <= unsure + 0.5
    if "softcap" in options:
        assert found.missing is None
        return
    dropped = [oracle.p[rows][:, ~kept] for rows, kept in zip(tiles(oracle), keep, strict=True)]
    missing = sum(part.sum() for part in dropped) / len(oracle.target)
    # A pair that may be kept or not has at most eps of each token; sums are rounded to the dtype.
    allowed = 2 * unit_roundoff(dtype) + unsure * eps * ROW_TILE / len(oracle.target)
    assert abs(found.missing - missing) <= allowed


def test_statistics_of_the_unbiased_filter():
    """Weights make up for what is dropped, in expectation."""
    case = problem(n=300, v=2000)
    found = [filter_statistics_of(case, filter_eps=1e-2, seed=seed) for seed in range(48)]
    missing = np.array([each.missing for each in found])
    error = missing.std(ddof=1) / np.sqrt(len(found))
    assert error > 0
    assert abs(missing.mean()) <= 4 * error
    oracle = case.oracle()
    expected = np.minimum(largest(oracle) / 1e-2, 1.0).mean()
    assert abs(np.mean([each.kept for each in found]) - expected) <= 0.02


def test_statistics_without_a_filter():
    case = problem()
    for filtering in ({}, {"gradient_filter": None}, {"filter_eps": None}):
        assert filter_statistics_of(case, **filtering) == (None, 0.0, 1.0, 0.0)
    case.targets[:] = -100
    assert filter_statistics_of(case, filter_eps=0.1) == ("unbiased", 0.1, 0.0, 0.0)
