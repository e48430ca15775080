"""What only the backward on Hopper can get wrong: chunks, passes, copies of rows, and waiting."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from devices import FRAMEWORKS, Road
from test_gpu_behaviour import FILTERS, UNFILTERED, bits, check, problem, sent
from test_properties import check_forward

import cce_cupy
from cce_cupy.frameworks import gpu
from cce_cupy.plan import GpuDevice, dense, make_gpu_plan
from cce_cupy.problem import ArraySpec, Options, Problem

H100 = GpuDevice(132, (9, 0))
HALF = ("bfloat16", "float16")


@pytest.fixture
def cupy():
    """CuPy's arrays, on a device of compute capability 9.0."""
    each = FRAMEWORKS["cupy"]
    if each.module.cuda.Device().compute_capability != "90":
        pytest.skip("not a GPU of compute capability 9.0")
    return each


@pytest.fixture
def forget_plans():
    """Has calls make theirs anew; those of later tests too, however this one ends."""

    def forget():
        make_gpu_plan.cache_clear()
        gpu._alike.cache_clear()

    yield forget
    forget()


def plan_of(case, **options):
    """The plan of a case on an H100."""
    specs = {
        "e": ArraySpec(case.e.shape, case.dtype),
        "c": ArraySpec(case.c.shape, case.dtype),
        "targets": ArraySpec(case.targets.shape, "int64"),
    }
    if "bias" in case.options:
        specs["bias"] = ArraySpec(case.options["bias"].shape, case.dtype)
    plain = {k: v for k, v in case.options.items() if not isinstance(v, np.ndarray)}
    return make_gpu_plan(Problem.check(specs, Options(**(plain | options))), H100)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["unbiased", "threshold"])
def test_bits_of_chunks(cupy, dtype, kind):
    """Neither what the forward keeps besides, which depends on timing, nor chunks change a bit."""
    case = problem(n=2500, v=20000, d=72, dtype=dtype)
    arguments = sent(cupy, case)
    filtering = {"gradient_filter": kind, "filter_eps": 1e-3, "seed": 1}
    workspaces = (None, 2**25, 3 * 2**22)
    plans = [plan_of(case, workspace_bytes=size, **filtering) for size in workspaces]
    assert len({plan.hopper_backward.pairs for plan in plans}) == len(workspaces)
    assert {plan.hopper_backward.together for plan in plans} == {True}
    found = set()
    for size, _ in itertools.product(workspaces, range(4)):
        results = cce_cupy.linear_cross_entropy_value_and_grad(
            **arguments, **filtering, workspace_bytes=size
        )
        found.add(tuple(bits(cupy, results)))
    assert len(found) == 1


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["unbiased", "threshold"])
@pytest.mark.parametrize("ignored", [False, True])
def test_bits_where_unfinished_sums_wait_in_dc(cupy, dtype, kind, ignored):
    """Rows of dC that nobody keeps hold sums of dE between chunks, and are zeros in the end."""
    case = problem(n=300, v=40000, d=72, dtype=dtype, bias=False)
    # Peaked, so that columns are left which nobody keeps.
    case = replace(case, e=2 * case.e)
    arguments = sent(cupy, case)
    if ignored:
        arguments["targets"] = arguments["targets"].copy()
        arguments["targets"][1::3] = -100
    logits = case.e.astype(np.float64) @ case.c.astype(np.float64).T
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    largest = np.stack([p[first : first + 128].max(axis=0) for first in range(0, 300, 128)])
    eps = float(np.quantile(largest, 0.7))
    filtering = {"gradient_filter": kind, "filter_eps": eps, "seed": 1}
    plan = plan_of(case, workspace_bytes=2**22, **filtering)
    assert plan.hopper_backward.together
    assert (largest >= eps).sum() > 2 * plan.hopper_backward.pairs_in_one
    found = set()
    for size, _ in itertools.product((None, 2**22, 3 * 2**21), range(3)):
        results = cce_cupy.linear_cross_entropy_value_and_grad(
            **arguments, **filtering, workspace_bytes=size
        )
        found.add(tuple(bits(cupy, results)))
    assert len(found) == 1


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["unbiased", "threshold"])
@pytest.mark.parametrize("share", [0.9, 0.0])
def test_bits_of_passes_and_of_the_attempt_at_one(cupy, dtype, kind, share):
    """Whether rows of dC have room for unfinished sums is known on the device only: either way."""
    case = problem(n=1000, v=12000, d=1024, dtype=dtype, bias=False)
    case = replace(case, e=2 * case.e)
    arguments = sent(cupy, case)
    logits = case.e.astype(np.float64) @ case.c.astype(np.float64).T
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    largest = np.stack([p[first : first + 128].max(axis=0) for first in range(0, 1000, 128)])
    eps = float(np.quantile(largest.max(axis=0), share))
    # Every column is kept, or by chance more are not than there are tokens.
    unkept = np.prod(1 - np.minimum(largest / eps, 1), axis=0).sum()
    assert unkept == 0 if share == 0.0 else unkept > 2000
    filtering = {"gradient_filter": kind, "filter_eps": eps, "seed": 1}
    plan = plan_of(case, workspace_bytes=2**21, **filtering)
    assert plan.hopper_backward.attempts
    found = set()
    for size, _ in itertools.product((None, 2**21), range(3)):
        results = cce_cupy.linear_cross_entropy_value_and_grad(
            **arguments, **filtering, workspace_bytes=size
        )
        found.add(tuple(bits(cupy, results)))
    assert len(found) == 1


@pytest.mark.parametrize("dtype", HALF)
def test_passes_over_some_row_tiles(cupy, dtype):
    """Where unfinished sums of dE leave no room, it is formed for some row tiles at a time."""
    case = problem(n=1000, v=5000, d=1024, dtype=dtype)
    small = {"workspace_bytes": 2**21}
    hopper = plan_of(case, **UNFILTERED, **small).hopper_backward
    assert hopper is not None
    assert hopper.row_tiles < 8
    road = Road(cupy)
    found = road.linear_cross_entropy_value_and_grad(
        *case.arrays, **case.options, **UNFILTERED, **small
    )
    check(case, found)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("filtering", FILTERS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_token_counts(cupy, dtype, filtering, smoothing):
    case = problem(n=300, v=5000, d=64, dtype=dtype, label_smoothing=smoothing)
    case.targets[:] = -100
    loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(
        **sent(cupy, case), **filtering, workspace_bytes=2**22
    )
    for array in (loss, *gradients):
        assert not cupy.get(array).any()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("filtering", [UNFILTERED, FILTERS[1]])
@pytest.mark.parametrize("counted", [1, 127, 128, 129, 200])
def test_rows_of_ignored_tokens_may_hold_anything(cupy, dtype, filtering, counted):
    """They lie among the rows that count, and behind the last: no zero times infinity."""
    case = problem(n=300, v=2000, d=64, dtype=dtype)
    rng = case.rng()
    case.targets[:] = rng.integers(0, 2000, 300)
    ignored = np.r_[np.arange(counted, 300)] if counted % 2 else rng.permutation(300)[counted:]
    case.targets[ignored] = -100
    plain = sent(cupy, case)
    expected = cce_cupy.linear_cross_entropy_value_and_grad(**plain, **filtering)
    case.e[ignored] = np.asarray(np.nan, case.e.dtype)
    case.e[ignored[::2]] = np.asarray(np.inf, case.e.dtype)
    found = cce_cupy.linear_cross_entropy_value_and_grad(**sent(cupy, case), **filtering)
    assert bits(cupy, found) == bits(cupy, expected)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("ignored", ["singly", "runs", "shift"])
def test_packed_rows_give_the_bits_of_words(cupy, dtype, ignored):
    """Around ignored tokens rows of e come packed where there is room, else word by word."""
    case = problem(n=1500, v=3000, d=264, dtype=dtype, reduction="none")
    rng = case.rng()
    case.targets[:] = rng.integers(0, 3000, 1500)
    if ignored == "shift":
        case.options["shift"] = 1
        case.targets[1000:1100] = -100
    else:
        length = 1 if ignored == "singly" else 50
        case.targets[np.repeat(rng.random(1500 // length) < 0.5, length)] = -100
    arguments = sent(cupy, case)
    found, packs = [], []
    for size in (None, 2**19):
        packs.append(plan_of(case, workspace_bytes=size).hopper.packed_rows)
        found.append(
            bits(
                cupy,
                cce_cupy.linear_cross_entropy(**arguments, return_lse=True, workspace_bytes=size),
            )
        )
    assert packs == [1500, 0]
    assert found[0] == found[1]
    results = Road(cupy).linear_cross_entropy_value_and_grad(
        *case.arrays, **case.options, **UNFILTERED
    )
    check(case, results)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("n", [1, 2, 100, 127, 128])
def test_few_tokens(cupy, dtype, n):
    """Of one row tile all rows are packed; first tokens may be left out."""
    for shift in (0, 1) if n > 1 else (0,):
        case = problem(n=n, v=1500, d=576, dtype=dtype, bias=False, shift=shift)
        case.targets[:] = case.rng().integers(0, 1500, n)
        case.targets[: n // 3] = -100
        assert plan_of(case).hopper.packed_rows == 128
        loss, lse = cce_cupy.linear_cross_entropy(**sent(cupy, case), return_lse=True)
        check_forward(case, case.oracle(), (cupy.get(loss), cupy.get(lse)), with_lse=True)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("softcap", [1e-6, 0.5, 4.0, 30.0, 1000.0, 1e30])
@pytest.mark.parametrize("length", [0.02, 1.0, 5.0])
def test_softcaps_near_the_logits_and_far(cupy, dtype, softcap, length):
    """Where a warp has none far among those that it caps together their tanh is a series."""
    case = problem(n=200, v=700, d=136, dtype=dtype, softcap=softcap)
    case.e[:] = (case.e.astype(np.float32) * length).astype(case.e.dtype)
    # Of a warp some rows are far and some near, and some columns for all of its rows.
    case.e[150:] = (case.e[150:].astype(np.float32) * 0.01).astype(case.e.dtype)
    case.c[100:200] = (case.c[100:200].astype(np.float32) * 0.01).astype(case.c.dtype)
    results = Road(cupy).linear_cross_entropy_value_and_grad(
        *case.arrays, **case.options, **UNFILTERED
    )
    check(case, results)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("filtering", FILTERS)
def test_rows_of_removed_entries_may_hold_anything(cupy, dtype, filtering):
    case = problem(n=300, v=2000, d=64, dtype=dtype)
    removed = np.arange(0, 2000, 3)
    case.options["bias"][removed] = -np.inf
    case.targets[case.targets % 3 == 0] = 1
    plain = sent(cupy, case)
    expected = cce_cupy.linear_cross_entropy_value_and_grad(**plain, **filtering)
    case.c[removed] = np.asarray(np.nan, case.c.dtype)
    found = cce_cupy.linear_cross_entropy_value_and_grad(**sent(cupy, case), **filtering)
    assert bits(cupy, found) == bits(cupy, expected)
    assert np.isfinite(cupy.get(found[1].c).astype(np.float32)).all()


@pytest.mark.parametrize("d", [8, 56, 64, 72, 248, 256, 264, 1000])
@pytest.mark.parametrize("dtype", HALF)
def test_hidden_sizes_and_whole_pairs(cupy, dtype, d):
    """Boxes of 64 and parts of 256 elements of D that end where D does, or do not."""
    road = Road(cupy)
    for n, v in ((128, 128), (129, 127), (256, 513), (640, 3000)):
        case = problem(n=n, v=v, d=d, dtype=dtype)
        found = road.linear_cross_entropy_value_and_grad(*case.arrays, **case.options, **UNFILTERED)
        check(case, found)


@pytest.mark.parametrize("wanted", [("e",), ("c",), ("bias",), ("e", "bias")])
@pytest.mark.parametrize("filtering", [UNFILTERED, FILTERS[1]])
def test_some_gradients_are_the_same_bits_as_all(cupy, monkeypatch, filtering, wanted):
    """What is not asked for is left out of the same launch."""
    case = problem(n=700, v=9000, d=72, dtype="bfloat16")
    arguments = sent(cupy, case)
    everything = cce_cupy.linear_cross_entropy_value_and_grad(**arguments, **filtering)[1]
    pullback = gpu.GpuCall.pullback

    def some(self, memory, dloss, dlse, _wanted=None):
        return pullback(self, memory, dloss, dlse, gpu.Wanted.of(wanted))

    monkeypatch.setattr(gpu.GpuCall, "pullback", some)
    found = cce_cupy.linear_cross_entropy_value_and_grad(**arguments, **filtering)[1]
    for name in ("e", "c", "bias"):
        array = getattr(found, name)
        assert (array is not None) == (name in wanted)
        if array is not None:
            assert bits(cupy, array) == bits(cupy, getattr(everything, name))


DENSE = [
    {},
    {"softcap": 5.0, "logit_scale": 0.5},
    {"reduction": "mean", "z_loss": 1e-3, "return_lse": True},
    {"reduction": "none", "weights": True},
]


def dense_problem(n, v, d, dtype, **options):
    """A problem without a bias whose tokens all count."""
    weighted = options.pop("weights", False)
    case = problem(n=n, v=v, d=d, dtype=dtype, bias=False, **options)
    rng = case.rng()
    case.targets[:] = rng.integers(0, v, n)
    if weighted:
        case.options["class_weight"] = rng.random(v).astype(np.float32)
        case.options["token_weight"] = rng.random(n).astype(np.float32)
    return case


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("options", DENSE)
@pytest.mark.parametrize(
    "shape", [(1, 200, 64), (128, 500, 8), (257, 4099, 136), (300, 1000, 72), (700, 3001, 640)]
)
def test_every_column_kept_and_every_token_counting(cupy, dtype, options, shape):
    """Products of matrices; tiles, blocks and parts that are not whole."""
    case = dense_problem(*shape, dtype, **options)
    assert plan_of(case, **UNFILTERED).dense is not None
    given = {k: v for k, v in case.options.items() if k != "return_lse"}
    with_lse = case.options.get("return_lse", False)
    found = Road(cupy).linear_cross_entropy_value_and_grad(
        *case.arrays, **given, **UNFILTERED, return_lse=with_lse
    )
    case.options = given
    check(case, found)


@pytest.mark.parametrize("dtype", HALF)
def test_bits_of_dense_chunks(cupy, dtype):
    """Sums that wait for the next chunk lose nothing; neither runs nor single gradients differ."""
    case = dense_problem(700, 9000, 264, dtype)
    arguments = sent(cupy, case)
    found = set()
    # Rows of sums wait beside dz, all where the last rows of dC will be, or those that fit there;
    # the last chunk is the largest, or the smallest.
    waiting = {None: (1, 0), 5 * 2**20: (3, 0), 2 * 2**20: (7, 700), 20 * 2**16: (12, 552)}
    for size, expected in waiting.items():
        cut = plan_of(case, **UNFILTERED, workspace_bytes=size).dense_both
        assert (len(cut.chunks), cut.waiting) == expected
        for _ in range(3):
            results = cce_cupy.linear_cross_entropy_value_and_grad(
                **arguments, **UNFILTERED, workspace_bytes=size
            )
            found.add(tuple(bits(cupy, results)))
    assert len(found) == 1


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dim", [264, 320, 576, 640, 904])
@pytest.mark.parametrize("size", [None, 2**21])
def test_parts_of_dense_products(cupy, monkeypatch, forget_plans, dtype, dim, size):
    """Wide parts or not: the same bits, and right; in one chunk, and with sums that wait."""
    case = dense_problem(700, 3001, dim, dtype)
    ways = dense.cut_parts(dim)
    assert [parts.wide > 0 for parts in ways] == [True, False]
    arguments = sent(cupy, case)
    given = {**UNFILTERED, "workspace_bytes": size}
    found = set()
    for parts in ways:
        monkeypatch.setattr(dense, "cut_parts", lambda _, parts=parts: [parts])
        forget_plans()
        cut = plan_of(case, **given).dense_both
        assert cut.parts == parts
        assert (len(cut.chunks) > 1) == (size is not None)
        results = cce_cupy.linear_cross_entropy_value_and_grad(**arguments, **given)
        check(case, Road(cupy).receive(results))
        found.add(tuple(bits(cupy, results)))
    assert len(found) == 1


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}])
@pytest.mark.parametrize("way", ["dense", "gathered", "chunks"])
def test_targets_lose_nothing_to_rounding_in_de(cupy, dtype, options, way):
    """dz is kept in the inputs' dtype, but for what rounding takes from the targets' in dE."""
    case = problem(n=500, v=3000, d=136, dtype=dtype, bias=False, **options)
    kind = case.e.dtype
    case.e[:] = (2 * case.e.astype(np.float32)).astype(kind)
    e, c = case.e.astype(np.float64), case.c.astype(np.float64)
    # Likely ones: of others nearly nothing is lost.
    case.targets[:] = (e @ c.T).argmax(1)
    filtering = UNFILTERED
    if way != "dense":
        filtering = {"gradient_filter": "threshold", "filter_eps": 1e-12}
    if way == "chunks":
        filtering = filtering | {"workspace_bytes": 2**20}
        assert plan_of(case, **filtering).hopper_backward.pairs < 4 * 3000
    found = cce_cupy.linear_cross_entropy_value_and_grad(**sent(cupy, case), **filtering)[1]
    dz, slope = case.oracle().dlogits()[0], case.oracle().slope
    exact = (dz * slope) @ c
    rounded = (dz * slope).astype(np.float32).astype(kind).astype(np.float64) @ c
    rounded = rounded.astype(np.float32).astype(kind).astype(np.float64)
    errors = cupy.get(found.e).astype(np.float64) - exact, rounded - exact
    assert np.linalg.norm(errors[0]) < 0.87 * np.linalg.norm(errors[1])


@pytest.mark.parametrize("side", ["e", "c"])
def test_one_dense_side(cupy, side):
    """Where one side alone is not filtered its pass is the dense one, to the bit."""
    case = dense_problem(700, 9000, 264, "bfloat16")
    arguments = sent(cupy, case)
    filtering = {"gradient_filter": "threshold", "filter_eps": 1e-3, f"filter_{side}_grad": False}
    both = cce_cupy.linear_cross_entropy_value_and_grad(**arguments, **UNFILTERED)[1]
    one = cce_cupy.linear_cross_entropy_value_and_grad(**arguments, **filtering)[1]
    assert bits(cupy, (getattr(one, side),)) == bits(cupy, (getattr(both, side),))
    other = "c" if side == "e" else "e"
    assert bits(cupy, (getattr(one, other),)) != bits(cupy, (getattr(both, other),))


@pytest.mark.parametrize("shift", [0, 1])
def test_dense_gradients_of_rows_that_hold_anything(cupy, shift):
    """One ignored token is enough for the other way; so is a shift."""
    case = dense_problem(257, 3000, 72, "bfloat16", shift=shift)
    assert (plan_of(case, **UNFILTERED).dense is None) == (shift > 0)
    if shift == 0:
        case.targets[200] = -100
    row = 200 if shift == 0 else 256
    expected = cce_cupy.linear_cross_entropy_value_and_grad(**sent(cupy, case), **UNFILTERED)
    check(case, Road(cupy).receive(expected))
    case.e[row] = np.asarray(np.nan, case.e.dtype)
    found = cce_cupy.linear_cross_entropy_value_and_grad(**sent(cupy, case), **UNFILTERED)
    assert bits(cupy, found) == bits(cupy, expected)
