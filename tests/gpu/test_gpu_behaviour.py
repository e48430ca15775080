"""What a call does besides its numbers: memory, streams, graphs, threads, odd shapes, bad input."""

import contextlib
import gc
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from devices import FRAMEWORKS, ROADS, Road, Torch, occupy
from strategies import INTEGERS, Case
from test_properties import check_forward, check_gradients
from tolerances import (
    DTYPES,
    FUNCTION,
    Tolerances,
    assert_within,
    excess,
    rounding,
    terms,
    unit_roundoff,
)

import cce_cupy
from cce_cupy.frameworks import gpu
from cce_cupy.plan import make_gpu_plan

each = pytest.fixture(params=FRAMEWORKS)(lambda request: FRAMEWORKS[request.param])

UNFILTERED = {"gradient_filter": None}
FILTERS = [
    UNFILTERED,
    {"filter_eps": 2e-3, "seed": 3},
    {"filter_eps": 2e-3, "gradient_filter": "threshold"},
    {"filter_eps": 2e-3, "filter_e_grad": False},
    {"filter_eps": 2e-3, "filter_c_grad": False},
]
BUSY = 0.5  # seconds that a stream is kept busy: far longer than it takes to enqueue a few calls


def problem(n=300, v=1025, d=33, dtype="float32", seed=0, bias=True, **options):
    rng = np.random.default_rng([seed, n, v, d])
    kind = DTYPES[dtype]
    e = (1.5 * rng.standard_normal((n, d))).astype(kind)
    c = (rng.standard_normal((v, d)) / np.sqrt(max(d, 1))).astype(kind)
    targets = rng.integers(0, v, n)
    targets[rng.random(n) < 0.2] = -100
    if bias:
        options["bias"] = rng.standard_normal(v).astype(kind)
    return Case(dtype, e, c, targets, {"reduction": "sum"} | options, seed)


def sent(each, case, **pads):
    """The arrays of a case on the device by argument name, and its other options."""
    named = {"e": case.e, "c": case.c, "targets": case.targets} | case.options
    return {
        name: each.send(value, pads.get(name, 0))[0] if isinstance(value, np.ndarray) else value
        for name, value in named.items()
    }


def flat(found):
    """Device arrays of a result, in order."""
    if isinstance(found, tuple):
        return [array for part in found for array in flat(part)]
    return [] if found is None else [found]


def bits(each, found):
    return [each.get(array).tobytes() for array in flat(found)]


def everything(arguments, dlse=None, **filtering):
    """Each kind of result that there is for the arguments, as device arrays."""
    plain = ("e", "c", "targets", "bias", "softcap", "shift", "ignore_index", "logit_scale")
    found = cce_cupy.linear_cross_entropy_value_and_grad(**arguments, **filtering, return_lse=True)
    lse, pullback = cce_cupy.linear_cross_entropy_vjp(**arguments, **filtering)
    pulled = () if dlse is None else pullback(2.0, dlse)
    statistics = cce_cupy.token_statistics(**{k: arguments[k] for k in plain if k in arguments})
    return found, lse, tuple(pulled), tuple(statistics)


def check(case, found, **changes):
    """A loss and its gradients, in NumPy, against the oracle."""
    oracle = case.oracle(**changes)
    check_forward(case, oracle, found[0], with_lse=isinstance(found[0], tuple))
    check_gradients(case, oracle, found[1])


# memory


def poison(each, byte):
    """Fill the memory that the framework will hand out next, large blocks and small ones."""
    gc.collect()
    each.release()
    sizes = [2**28]
    if each.name == "torch":
        # Small blocks come from segments of their own, which others may have begun to fill.
        sizes += [2**k for k in range(24, 20, -1) for _ in range(4)]
        sizes += [2**k for k in range(20, 8, -1) for _ in range(16)]
    blocks = [each.empty(size) for size in sizes]
    for block in blocks:
        each.fill(block, byte)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filtering", FILTERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none", "softcap": 4.0, "z_loss": 0.01},
        {"reduction": "mean", "label_smoothing": 0.1, "workspace_bytes": 2**21},
        {"d": 1, "bias": False},
        {"n": 128, "v": 32, "d": 16},
    ],
)
def test_results_do_not_depend_on_what_memory_held(each, dtype, filtering, options):
    """The same bits from memory full of NaN (0xFF), of 3e38 (0x7F) and of zeros."""
    case = problem(dtype=dtype, **options)
    dlse = case.rng().standard_normal(case.targets.shape).astype(np.float32)
    gc.collect()
    each.release()
    arguments, upstream = sent(each, case), each.send(dlse)[0]
    if case.options["reduction"] == "none":
        upstream = None
    found = []
    for byte in (0xFF, 0x7F, 0x00):
        poison(each, byte)
        for size in (100, 2**15, 2**23, 2**26):
            block = each.get(each.empty(size)[-100:])
            assert (block == byte).all(), "memory is not what was left there"
        found.append(bits(each, everything(arguments, upstream, **filtering)))
    assert found[0] == found[1] == found[2]


def test_every_token_ignored_writes_zeros(each):
    """Nothing maps to any row of dE, and no row tile lists a column of dC."""
    case = problem()
    case.targets[:] = -100
    arguments = sent(each, case)
    for filtering in FILTERS:
        poison(each, 0xFF)
        loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(**arguments, **filtering)
        for array in (loss, *gradients):
            assert not each.get(array).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filtering", FILTERS)
def test_same_bits_every_run(each, dtype, filtering):
    """Also with another stream at work, which changes the order in which blocks run."""
    case = problem(n=700, v=3000, d=65, dtype=dtype, label_smoothing=0.1)
    arguments = sent(each, case)
    dlse = each.send(case.rng().standard_normal(700).astype(np.float32))[0]
    first = bits(each, everything(arguments, dlse, **filtering))
    other = each.stream()
    for _ in range(4):
        with each.on(other):
            noise = cce_cupy.linear_cross_entropy_value_and_grad(**arguments)
        assert bits(each, everything(arguments, dlse, **filtering)) == first
        del noise


@pytest.mark.parametrize("filtering", FILTERS)
def test_nothing_is_left_behind(each, filtering):
    """All memory of a call comes back with its results, without help of the garbage collector."""
    case = problem(label_smoothing=0.1)
    arguments = sent(each, case)
    dlse = each.send(case.rng().standard_normal(300).astype(np.float32))[0]
    gc.collect()
    everything(arguments, dlse, **filtering)
    gc.collect()
    before = each.used()
    gc.disable()
    try:
        for _ in range(3):
            everything(arguments, dlse, **filtering)
        assert each.used() == before
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("n", "v", "d"), [(2048, 50_000, 256), (128, 1_000_000, 32), (400_000, 500, 8)]
)
@pytest.mark.parametrize("workspace", [None, 32 * 2**20, 256 * 2**20])
def test_workspace_is_bounded(n, v, d, workspace):
    """Beyond outputs: workspace_bytes (128 MiB by default), one bit a row tile and column, a
    float32 a column, and what there is for each token: at most 128 bytes, in as many copies as
    fill the device.
    """
    torch = FRAMEWORKS["torch"].module
    e = torch.randn(n, d, device="cuda").bfloat16()
    c = torch.randn(v, d, device="cuda").bfloat16()
    targets = torch.randint(0, v, (n,), device="cuda")
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    tiles = -(-n // 128)
    limit = workspace or 128 * 2**20
    limit += tiles * v // 8 + 128 * (n + 128 * 2 * processors) + 4 * v + 2**21
    outputs = 2 * (n + v) * d
    for options in ({}, UNFILTERED, {"label_smoothing": 0.1}):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        cce_cupy.linear_cross_entropy_value_and_grad(
            e, c, targets, workspace_bytes=workspace, **options
        )
        held = torch.cuda.max_memory_allocated() - before
        assert held <= outputs + limit, (held - outputs) / limit


def test_strided_rows_are_not_copied():
    torch = FRAMEWORKS["torch"].module
    e = torch.randn(256, 2048, device="cuda")[:, :1024]
    c = torch.randn(40_000, 2048, device="cuda")[:, 1024:]
    targets = torch.randint(0, 40_000, (256,), device="cuda")
    cce_cupy.linear_cross_entropy(e, c, targets)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cce_cupy.linear_cross_entropy(e, c, targets)
    assert torch.cuda.max_memory_allocated() - before < c.numel() * c.element_size() // 4


@pytest.mark.parametrize("filtering", FILTERS)
def test_arrays_may_be_freed_right_after_the_call(each, filtering):
    """The call has only been enqueued when its arrays go, and their memory is used again."""
    case = problem(n=500, v=20_000, d=64, class_weight=np.linspace(0, 2, 20_000))
    expected = bits(
        each, cce_cupy.linear_cross_entropy_value_and_grad(**sent(each, case), **filtering)
    )
    stream = each.stream()

    def reuse():
        """Fill blocks of every input's size, more of them than there are inputs."""
        sizes = [
            x.nbytes
            for x in (case.e, case.c, case.targets, *case.options.values())
            if isinstance(x, np.ndarray)
        ]
        others = [each.empty(size) for size in sizes for _ in range(4)]
        for other in others:
            each.fill(other, 0xFF)
        return others

    with each.on(stream):
        arguments = sent(each, case)
        for _ in range(2):
            warm = cce_cupy.linear_cross_entropy_value_and_grad(**arguments, **filtering), reuse()
        del warm
        synchronize(each)
        busy = occupy(each.handle(stream), BUSY)
        found = cce_cupy.linear_cross_entropy_value_and_grad(**arguments, **filtering)
        arguments.clear()
        others = reuse()
        assert not busy.done
        assert bits(each, found) == expected
        del others


@pytest.mark.parametrize("filtering", FILTERS)
def test_a_pullback_keeps_what_it_refers_to(each, filtering):
    """The arrays' memory is not used again before the pullback is gone."""
    case = problem(n=500, v=5000, d=64, class_weight=np.linspace(0, 2, 5000))
    expected = cce_cupy.linear_cross_entropy_value_and_grad(**sent(each, case), **filtering)[1]
    arguments = sent(each, case)
    pullback = cce_cupy.linear_cross_entropy_vjp(**arguments, **filtering)[1]
    arguments.clear()
    poison(each, 0xFF)
    first = pullback(1.0)
    before = bits(each, first)
    assert before == bits(each, expected)
    # Earlier results are the caller's: no later call writes to them.
    other = pullback(0.5)
    assert bits(each, first) == before
    assert bits(each, other) != before
    del pullback
    poison(each, 0xFF)
    assert bits(each, first) == before


# streams


@pytest.mark.parametrize("filtering", FILTERS)
def test_work_is_ordered_by_the_current_stream(each, filtering):
    """Inputs that arrive late on a stream, results that are read on it."""
    case, other = problem(seed=1), problem(seed=2)
    early, late = sent(each, other), sent(each, case)
    expected = bits(each, everything(late, **filtering))
    stream = each.stream()

    def overwrite(arguments, values):
        for name in ("e", "c", "targets", "bias"):
            each.copy(arguments[name], values[name])

    with each.on(stream):
        arguments = sent(each, other)
        for _ in range(2):
            overwrite(arguments, early)
            warm = everything(arguments, **filtering)
        assert bits(each, warm) != expected
        del warm
        synchronize(each)
        busy = occupy(each.handle(stream), BUSY)
        overwrite(arguments, late)
        found = everything(arguments, **filtering)
        # What comes next on the stream comes after the call.
        overwrite(arguments, early)
        assert not busy.done
        assert bits(each, found) == expected


def synchronize(each):
    FRAMEWORKS["cupy"].module.cuda.Device().synchronize()


@pytest.mark.parametrize("filtering", FILTERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_call_does_not_wait_for_the_device(each, dtype, filtering):
    """It returns while the stream is still busy with what was there before."""
    case = problem(
        dtype=dtype,
        label_smoothing=0.1,
        class_weight=np.linspace(0, 2, 1025),
        token_weight=np.arange(300) % 3,
    )
    stream = each.stream()
    with each.on(stream):
        arguments = sent(each, case)
        dlse = each.send(case.rng().standard_normal(300))[0]
        for _ in range(2):
            results = everything(arguments, dlse, **filtering)
        del results
        synchronize(each)
        busy = occupy(each.handle(stream), BUSY)
        found = everything(arguments, dlse, **filtering)
        assert not busy.done, "the call waited for the stream"
        del found
        synchronize(each)


def test_two_streams_at_once(each):
    """Calls in flight on two streams share nothing."""
    cases = [problem(seed=k, n=600, v=4000) for k in range(2)]
    arguments = [sent(each, case) for case in cases]
    expected = [bits(each, everything(arguments[k])) for k in range(2)]
    streams = [each.stream(), each.stream()]
    synchronize(each)
    found = [[], []]
    for k in range(6):
        with each.on(streams[k % 2]):
            found[k % 2].append(everything(arguments[k % 2]))
    synchronize(each)
    for k in range(2):
        for results in found[k]:
            assert bits(each, results) == expected[k]


@pytest.mark.parametrize("own_streams", [False, True])
def test_two_threads_at_once(own_streams):
    """Each with a framework and a problem of its own, twenty calls each."""
    jobs = []
    for k, each in enumerate([*FRAMEWORKS.values()] * 2):
        arguments = sent(each, problem(seed=k, n=300 + k, v=2000))
        jobs.append((each, arguments, bits(each, everything(arguments))))
    synchronize(each)
    start, wrong = threading.Barrier(len(jobs)), []

    def work(each, arguments, expected):
        try:
            start.wait()
            with each.on(each.stream()) if own_streams else contextlib.nullcontext():
                for _ in range(20):
                    if bits(each, everything(arguments)) != expected:
                        wrong.append(each.name)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# CUDA graphs


def replays():
    """Problems of one shape that differ in everything that a replay may change."""
    cases = [problem(seed=k, label_smoothing=0.1) for k in range(4)]
    cases[2].targets[:] = -100  # none counts
    cases[3].targets[:] = np.arange(300) % 7  # all count
    return cases


@pytest.mark.parametrize("filtering", FILTERS)
def test_graph_capture_through_torch(filtering):
    """A replay computes on what the arrays hold then, also with other tokens ignored."""
    each = FRAMEWORKS["torch"]
    torch = each.module
    cases = replays()
    news = [sent(each, case) for case in cases]
    expected = [bits(each, everything(new, **filtering)) for new in news]
    arguments = sent(each, cases[0])
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        everything(arguments, **filtering)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = everything(arguments, **filtering)
    for k in (1, 2, 3, 0, 1):
        for name in ("e", "c", "targets", "bias"):
            arguments[name].copy_(news[k][name])
        graph.replay()
        torch.cuda.synchronize()
        assert bits(each, found) == expected[k], k


@pytest.mark.parametrize("filtering", FILTERS)
def test_graph_capture_through_cupy(filtering):
    """The pool may hand a capture's workspace out again: nothing else is allocated meanwhile."""
    each = FRAMEWORKS["cupy"]
    cupy = each.module
    cases = replays()
    news = [sent(each, case) for case in cases]
    expected = [bits(each, everything(new, **filtering)) for new in news]
    arguments = sent(each, cases[0])
    synchronize(each)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for _ in range(2):
            found = everything(arguments, **filtering)
            del found
        stream.synchronize()
        stream.begin_capture()
        found = everything(arguments, **filtering)
        graph = stream.end_capture()
    for k in (1, 2, 3, 0, 1):
        for name in ("e", "c", "targets", "bias"):
            arguments[name].data.copy_from_device(news[k][name].data, arguments[name].nbytes)
        synchronize(each)
        graph.launch(stream)
        stream.synchronize()
        assert bits(each, found) == expected[k], k


def test_graph_capture_of_a_pullback():
    each = FRAMEWORKS["torch"]
    torch = each.module
    case = problem(reduction="none")
    arguments = sent(each, case)
    pullback = cce_cupy.linear_cross_entropy_vjp(**arguments)[1]
    dloss = torch.ones(300, device="cuda")
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        pullback(dloss)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = pullback(dloss)
    for _ in range(2):
        dloss.copy_(torch.randn(300, device="cuda"))
        expected = bits(each, pullback(dloss))
        graph.replay()
        torch.cuda.synchronize()
        assert bits(each, found) == expected


# shapes and layouts


@pytest.mark.parametrize("d", [0, 1, 7, 511, 640, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_sizes(each, d, dtype):
    case = problem(n=130, v=257, d=d, dtype=dtype)
    check(
        case,
        Road(each).linear_cross_entropy_value_and_grad(
            *case.arrays, **case.options, **UNFILTERED, return_lse=True
        ),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pad", [1, 2, 3, 4])
@pytest.mark.parametrize("gap", [0, 1, 2, 3, 4, 61])
@pytest.mark.parametrize("d", [64, 67])
def test_bases_and_row_strides_of_any_alignment(each, dtype, pad, gap, d):
    """Rows in place: starts `pad` elements off an allocation's, rows `d + gap` elements apart."""
    case = problem(n=130, v=257, d=d, dtype=dtype)
    wide = {}
    for name in ("e", "c"):
        rows = getattr(case, name)
        wide[name] = np.full((len(rows), d + gap), np.nan, rows.dtype)[:, :d]
        wide[name][...] = rows
    arguments = sent(each, case) | {
        name: each.send(rows, pad if name == "e" else 5 - pad)[0] for name, rows in wide.items()
    }
    arguments["bias"] = each.send(case.options["bias"], pad)[0]
    arguments["targets"] = each.send(case.targets, pad)[0]
    found = cce_cupy.linear_cross_entropy_value_and_grad(**arguments, **UNFILTERED)
    check(case, Road(each).receive(found))


def test_rows_backwards_and_repeated():
    """Negative strides and strides of zero, which CuPy has."""
    each = FRAMEWORKS["cupy"]
    case = problem(n=130, v=257, d=64)
    case.e[:] = case.e[0]
    arguments = sent(each, case)
    arguments["e"] = each.module.broadcast_to(arguments["e"][0], (130, 64))
    arguments["c"] = each.module.ascontiguousarray(arguments["c"][::-1])[::-1]
    assert arguments["c"].strides[0] < 0
    assert arguments["e"].strides[0] == 0
    check(case, Road(each).receive(cce_cupy.linear_cross_entropy_value_and_grad(**arguments)))


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 50), (4, 1, 33), (0,), (2, 0)])
@pytest.mark.parametrize("shift", [0, 1, 32])
def test_batch_shapes_and_shift(each, shape, shift):
    if shift >= (shape[-1] if shape else 1):
        shift = 0
    n = int(np.prod(shape))
    flat_case = problem(n=n, reduction="none", shift=shift)
    case = Case(
        flat_case.dtype,
        flat_case.e.reshape(*shape, 33),
        flat_case.c,
        flat_case.targets.reshape(shape),
        flat_case.options,
    )
    check(
        case,
        Road(each).linear_cross_entropy_value_and_grad(
            *case.arrays, **case.options, return_lse=True
        ),
    )


@pytest.mark.parametrize("integer", INTEGERS)
def test_target_dtypes(each, integer):
    """The same bits from every integer dtype."""
    case = problem(v=120, ignore_index=119)
    case.targets[case.targets < 0] = 119
    expected = bits(each, everything(sent(each, case)))
    case.targets = case.targets.astype(integer)
    assert bits(each, everything(sent(each, case))) == expected


@pytest.mark.parametrize("integer", ["int64", "uint64"])
def test_ignore_index_beyond_64_bits(each, integer):
    """No int64 holds it, and a target of uint64 may equal it."""
    case = problem(ignore_index=2**64 - 1)
    targets = np.maximum(case.targets, 0).astype(integer)
    if integer == "uint64":
        targets[case.targets < 0] = 2**64 - 1
    case.targets = targets
    check(case, Road(each).linear_cross_entropy_value_and_grad(*case.arrays, **case.options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "filtering", [UNFILTERED, FILTERS[2], FILTERS[2] | {"filter_e_grad": False}]
)
def test_workspace_bytes_changes_no_more_than_roundings(each, dtype, filtering):
    """One range of columns, a few, and as many as there are blocks of 128."""
    case = problem(n=300, v=3000, d=40, dtype=dtype, label_smoothing=0.1)
    oracle = case.oracle()
    tolerances = case.tolerances(oracle)
    found = [
        Road(each).linear_cross_entropy_value_and_grad(
            *case.arrays, **case.options, **filtering, workspace_bytes=size
        )
        for size in (2 * 2**20, 4 * 2**20, 16 * 2**20, None)
    ]
    if filtering is UNFILTERED:
        for results in found:
            check(case, results)
    for loss, gradients in found[1:]:
        assert abs(loss - found[0][0]) <= 2 * tolerances.loss()
        # What a threshold drops only makes the sums shorter.
        for values, first, bound in zip(
            gradients, found[0][1], tolerances.gradients(), strict=True
        ):
            assert_within(values, first, 2 * bound, "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "filtering", [UNFILTERED, FILTERS[2], FILTERS[2] | {"filter_e_grad": False}]
)
def test_column_ranges_change_no_bit(monkeypatch, each, dtype, filtering):
    """Each sum goes on where the range before ended; only parts of the rows start new ones."""
    plans = []

    def spy(*given, **options):
        plans.append(make_gpu_plan(*given, **options))
        return plans[-1]

    monkeypatch.setattr(gpu, "make_gpu_plan", spy)
    gpu._alike.cache_clear()  # it keeps plans
    case = problem(n=300, v=20000, d=40, dtype=dtype, label_smoothing=0.1)
    arguments = sent(each, case)
    found = []
    for size in (2**22, 2**23, 2**24):
        results = cce_cupy.linear_cross_entropy_value_and_grad(
            **arguments, **filtering, workspace_bytes=size
        )
        found.append(bits(each, results))
    cuts = {(plan.range_columns, getattr(plan.hopper_backward, "pairs", 0)) for plan in plans}
    assert len(cuts) == 3
    assert {plan.part_tiles for plan in plans if plan.hopper_backward is None} <= {3}
    assert {plan.hopper_backward.row_tiles for plan in plans if plan.hopper_backward} <= {3}
    assert found[1:] == found[:-1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["e", "c"])
@pytest.mark.parametrize("kind", ["unbiased", "threshold"])
def test_two_sweeps(each, dtype, side, kind):
    """One side is exact, the other is filtered as with both."""
    case = problem(n=300, v=3000, d=40, dtype=dtype)
    road = Road(each)
    filtering = {"gradient_filter": kind, "filter_eps": 0.01, "seed": 5}

    def gradients(**options):
        return road.linear_cross_entropy_value_and_grad(*case.arrays, **case.options, **options)[1]

    mixed = gradients(**filtering, **{f"filter_{side}_grad": False})
    both = gradients(**filtering)
    oracle = case.oracle()
    expected, allowed = oracle.gradients(), case.tolerances(oracle).gradients()
    exact = [0] if side == "e" else [1, 2]
    for k in range(3):
        within = excess(mixed[k], expected[k], allowed[k]) <= 1
        assert within == (k in exact), k
        assert excess(both[k], expected[k], allowed[k]) > 1
    kept = both.bias != 0
    assert 0 < kept.mean() < 1
    if side == "e":
        np.testing.assert_array_equal(mixed.bias != 0, kept)


# sizes beyond 32 bits


@pytest.mark.parametrize("filtering", [UNFILTERED, {"filter_eps": 1e-6}])
def test_vocabulary_times_hidden_size_beyond_32_bits(filtering):
    """V * D = 2.25e9 in bfloat16: lse, dE and sampled rows of dC against float64.

    Under the threshold filter a row of dC with all its p below eps is zero.
    """
    torch = FRAMEWORKS["torch"].module
    n, v, d, chunk = 8, 1_100_000, 2048, 50_000
    need = 2 * 2 * v * d + 3 * 8 * chunk * d + 2**30
    if torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of device memory")
    torch.cuda.empty_cache()
    generator = torch.Generator("cuda").manual_seed(0)
    c = torch.empty(v, d, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    e = (2 / d**0.5 * torch.randn(n, d, generator=generator, device="cuda")).bfloat16()
    edge = 2**31 // d
    targets = torch.tensor([0, edge - 1, edge, edge + 1, v - 1, v // 2, 7, 7], device="cuda")
    sample = torch.unique(
        torch.cat([targets, torch.randint(0, v, (200,), generator=generator, device="cuda")])
    )
    kind = {} if filtering is UNFILTERED else {"gradient_filter": "threshold"}
    (loss, lse), gradients = cce_cupy.linear_cross_entropy_value_and_grad(
        e, c, targets, reduction="sum", return_lse=True, **filtering, **kind
    )
    statistics = cce_cupy.token_statistics(e, c, targets)

    wide = e.double()
    parts, tops, bottoms, product_size = [], [], [], 0.0
    for left in range(0, v, chunk):
        block = c[left : left + chunk].double()
        z = wide @ block.T
        parts.append(z.logsumexp(1))
        tops.append(z.amax(1))
        bottoms.append(z.amin(1))
        product_size = max(product_size, (wide.abs() @ block.abs().T).max().item())
    exact_lse = torch.stack(parts).logsumexp(0)
    top, bottom = torch.stack(tops).amax(0), torch.stack(bottoms).amin(0)
    target_z = (wide * c[targets].double()).sum(1)

    # As in tolerances.py, with the largest of all logits' errors in place of each one's own.
    u = unit_roundoff("float32") + unit_roundoff("float64")
    largest_lse = exact_lse.max().item()
    spread = (top - bottom).max().item() + largest_lse
    z_error = (terms(d) + 3) * u * product_size
    lse_error = z_error + u * spread + (2 * terms(v) + 2 * FUNCTION + 2) * u + 2 * u * largest_lse
    assert (lse.double() - exact_lse).abs().max().item() <= lse_error + u * largest_lse
    exact_loss = (exact_lse - target_z).sum().item()
    assert abs(loss.item() - exact_loss) <= n * (lse_error + z_error) + 8 * u * exact_loss
    chosen = (wide * c[statistics.argmax].double()).sum(1)
    assert (top - chosen <= 2 * z_error).all()

    relative = float(np.expm1(z_error + lse_error + 4 * u * spread + FUNCTION * u))

    def dz_of(block, indices):
        """p, dz and its error."""
        p = torch.exp(wide @ block.T - exact_lse[:, None])
        hit = (targets[:, None] == indices[None]).double()
        kept = unit_roundoff("bfloat16") * (p - hit).abs() if Tolerances.rounds_dz else 0.0
        return p, p - hit, relative * p + 8 * u * (p + hit) + kept

    eps = filtering.get("filter_eps", 0.0)
    p, dz, error = dz_of(c[sample].double(), sample)
    exact_dc = dz.T @ wide
    bound = ((error + n * u * dz.abs()).T @ wide.abs()).cpu().numpy()
    bound += rounding(exact_dc.cpu().numpy(), "bfloat16")
    found = gradients.c[sample].double()
    within = torch.as_tensor(((found - exact_dc).abs().cpu().numpy() <= bound).all(1))
    zero = (found == 0).all(1).cpu()
    m = torch.where((targets[:, None] == sample[None]).any(0), 1.0, p.amax(0)).cpu()
    kept, dropped = m >= eps * (1 + relative), m < eps * (1 - relative)
    assert within[kept].all()
    assert zero[dropped].all()
    assert (within | zero).all()
    assert dropped.any() == (eps > 0)

    exact_de = torch.zeros(n, d, dtype=torch.float64, device="cuda")
    bound = torch.zeros_like(exact_de)
    for left in range(0, v, chunk):
        block = c[left : left + chunk].double()
        indices = torch.arange(left, left + len(block), device="cuda")
        p, dz, error = dz_of(block, indices)
        kept = (p.amax(0) >= eps) | (targets[:, None] == indices[None]).any(0)
        exact_de += (dz * kept) @ block
        borderline = (p.amax(0) - eps).abs() <= relative * eps
        size = error + (terms(v) + 3) * u * (p + (dz - p).abs()) + p * borderline
        bound += size @ block.abs()
    bound = bound.cpu().numpy() + rounding(exact_de.cpu().numpy(), "bfloat16")
    assert ((gradients.e.double() - exact_de).abs().cpu().numpy() <= bound).all()


def test_more_row_tiles_than_a_grid_axis_holds():
    """65536 row tiles: a launch takes at most 65535 blocks along its second axis."""
    torch = FRAMEWORKS["torch"].module
    n = 65536 * 128 + 1
    targets = torch.zeros(n, dtype=torch.int8, device="cuda")
    targets[-1] = 2
    e = torch.ones(n, 1, device="cuda")
    c = torch.zeros(3, 1, device="cuda")
    loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(e, c, targets)
    u = unit_roundoff("float32")
    assert abs(loss.item() - np.log(3)) <= 20 * u
    expected = np.array([1 / 3 - (n - 1) / n, 1 / 3, 1 / 3 - 1 / n])
    found = gradients.c.double().cpu().numpy()[:, 0]
    assert (np.abs(found - expected) <= (terms(n) + 20) * u).all()
    assert not gradients.e.any()


# bad input


def wrong_targets():
    yield from ((integer, 1025) for integer in INTEGERS if np.iinfo(integer).max > 1025)
    yield from ((integer, -1) for integer in INTEGERS if integer.startswith("i"))
    for integer in INTEGERS:
        if np.dtype(integer).itemsize >= 4:
            yield integer, np.iinfo(integer).max
    yield "int64", -(2**63)
    yield "uint64", 2**63


@pytest.mark.parametrize(("integer", "target"), list(wrong_targets()))
@pytest.mark.parametrize("position", [0, 140, 299])
def test_target_out_of_range_is_nan_for_its_token_alone(each, integer, target, position):
    case = problem(reduction="none", z_loss=0.01, class_weight=np.linspace(0.5, 2, 1025))
    limit = min(np.iinfo(integer).max, 1024)
    case.targets = (np.abs(case.targets) % (limit + 1)).astype(integer)
    road = Road(each)
    options = case.options | {"ignore_index": 5} | UNFILTERED
    case.targets[position] = 6
    good = road.linear_cross_entropy_value_and_grad(*case.arrays, **options, return_lse=True)
    good_statistics = road.token_statistics(*case.arrays, ignore_index=5)
    case.targets[position] = target
    (loss, lse), gradients = road.linear_cross_entropy_value_and_grad(
        *case.arrays, **options, return_lse=True
    )
    statistics = road.token_statistics(*case.arrays, ignore_index=5)
    others = np.arange(300) != position
    for found, before in [
        (loss, good[0][0]),
        (lse, good[0][1]),
        (gradients.e, good[1].e),
        (statistics.log_prob, good_statistics.log_prob),
    ]:
        assert np.isnan(found[position]).all()
        assert found[others].tobytes() == before[others].tobytes()
    assert np.isnan(gradients.c).all()
    assert np.isnan(gradients.bias).all()
    for reduction in ("mean", "sum"):
        found = road.linear_cross_entropy(*case.arrays, **options | {"reduction": reduction})
        assert np.isnan(found)


@pytest.mark.parametrize("filtering", FILTERS[1:3])
def test_target_out_of_range_is_not_filtered_away(each, filtering):
    case = problem(reduction="none")
    case.targets[200] = 2000
    loss, gradients = Road(each).linear_cross_entropy_value_and_grad(
        *case.arrays, **case.options, **filtering
    )
    assert np.flatnonzero(np.isnan(loss)).tolist() == [200]
    assert np.flatnonzero(np.isnan(gradients.e).any(1)).tolist() == [200]
    assert np.isnan(gradients.c).all()
    assert np.isnan(gradients.bias).all()


@pytest.mark.parametrize(
    "function",
    [
        "linear_cross_entropy",
        "linear_cross_entropy_value_and_grad",
        "linear_cross_entropy_vjp",
        "token_statistics",
    ],
)
def test_check_targets(each, function):
    """A ValueError that names the first wrong position; nothing for targets that are right."""
    case = problem(reduction="none")
    case.targets = np.maximum(case.targets, 0)
    call = getattr(cce_cupy, function)
    arguments = {name: each.send(getattr(case, name))[0] for name in ("e", "c", "targets")}
    call(**arguments, check_targets=True)
    case.targets[200], case.targets[250] = 1025, -7
    arguments["targets"] = each.send(case.targets)[0]
    with pytest.raises(ValueError, match=r"targets must .*\b200\b"):
        call(**arguments, check_targets=True)
    call(**arguments)
    with pytest.raises(ValueError, match=r"targets must .*\b250\b"):
        call(**arguments, ignore_index=1025, check_targets=True)


@pytest.mark.parametrize("name", ["c", "targets", "bias", "class_weight", "token_weight"])
def test_arrays_on_different_devices_are_refused(name):
    each = FRAMEWORKS["torch"]
    case = problem(class_weight=np.ones(1025, np.float32), token_weight=np.ones(300, np.float32))
    arguments = sent(each, case)
    arguments[name] = arguments[name].cpu()
    with pytest.raises(ValueError, match=rf"e is on cuda:0, {name} on cpu"):
        cce_cupy.linear_cross_entropy(**arguments)


@pytest.mark.parametrize("name", ["dloss", "dlse"])
def test_upstream_gradients_on_another_device_are_refused(name):
    each = FRAMEWORKS["torch"]
    case = problem(reduction="none")
    pullback = cce_cupy.linear_cross_entropy_vjp(**sent(each, case))[1]
    upstream = {key: each.module.ones(300, device="cuda") for key in ("dloss", "dlse")}
    upstream[name] = upstream[name].cpu()
    with pytest.raises(ValueError, match=rf"{name} must be on cuda:0"):
        pullback(**upstream)


@pytest.mark.parametrize("name", ["c", "targets", "bias"])
@pytest.mark.parametrize("other", ["NumPy", "torch"])
def test_mixed_frameworks_are_refused(name, other):
    """CuPy arrays among others: TypeError that names both."""
    case = problem()
    arguments = sent(FRAMEWORKS["cupy"], case)
    host = getattr(case, name, None)
    host = case.options["bias"] if host is None else host
    arguments[name] = host if other == "NumPy" else FRAMEWORKS["torch"].send(host)[0]
    with pytest.raises(TypeError, match=rf"e is of CuPy, {name} of {other}"):
        cce_cupy.linear_cross_entropy(**arguments)


# out of memory


@contextlib.contextmanager
def no_more_than(each, nbytes):
    """Let the framework have that much memory beyond what it has handed out."""
    gc.collect()
    synchronize(each)
    each.release()
    if each.name == "cupy":
        pool = each.module.get_default_memory_pool()
        pool.set_limit(size=pool.total_bytes() + nbytes)
        try:
            yield
        finally:
            pool.set_limit(size=0)
    else:
        cuda = each.module.cuda
        total = cuda.get_device_properties(0).total_memory
        cuda.set_per_process_memory_fraction((cuda.memory_reserved() + nbytes) / total)
        try:
            yield
        finally:
            cuda.set_per_process_memory_fraction(1.0)


def out_of_memory(each):
    return MemoryError if each.name == "cupy" else (MemoryError, each.module.OutOfMemoryError)


@pytest.mark.parametrize("what", ["gradients", "workspace"])
def test_out_of_memory_leaves_the_library_usable(each, what):
    """The workspace's complaint says which knob lowers it; afterwards the same call works.

    In a process of its own: what other tests left in a pool would serve the call that must fail.
    """
    script = Path(__file__).parent / "out_of_memory.py"
    done = subprocess.run(
        [sys.executable, script, each.name, what], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# several devices


def test_runs_where_the_arrays_are(each):
    """Whatever the current device is."""
    runtime = FRAMEWORKS["cupy"].module.cuda.runtime
    if runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    case = problem()
    expected = bits(each, everything(sent(each, case)))
    with each.device(1) if each.name == "cupy" else contextlib.nullcontext():
        twin = each if each.name == "cupy" else Torch("cuda:1")
        named = {"e": case.e, "c": case.c, "targets": case.targets, "bias": case.options["bias"]}
        arguments = {name: twin.send(array)[0] for name, array in named.items()}
    for current in (0, 1):
        with each.device(current):
            found = everything(arguments | {"reduction": "sum"})
            for array in flat(found):
                assert each.device_of(array) == 1
            assert bits(each, found) == expected
    mixed = arguments | {"e": each.send(case.e)[0]}
    with pytest.raises(ValueError, match="e is on cuda:0, c on cuda:1"):
        cce_cupy.linear_cross_entropy(**mixed)


def test_roads_are_what_the_suites_use():
    """Arrays arrive as they were sent: values, strides and offsets."""
    for road in ROADS.values():
        array = np.arange(60, dtype=np.float32).reshape(5, 12)[::2, 1:9:3]
        view, _ = road.framework.send(array, pad=3)
        np.testing.assert_array_equal(road.framework.get(view), array)
