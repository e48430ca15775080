"""Arrays of every framework that has device arrays: results of the same kind, on their device.

A bare producer of ``__dlpack__`` gets CuPy arrays back.
"""

import contextlib
import gc

import numpy as np
import pytest
from devices import EVERY_ROAD, FRAMEWORKS, Bare, Jax, occupy
from strategies import Case
from test_properties import STATISTICS_OPTIONS, check_forward, check_gradients
from tolerances import DTYPES, accumulator, assert_within

import cce_cupy

UNFILTERED = {"gradient_filter": None}
OPTIONS = [
    {},
    {"reduction": "none", "shift": 2, "softcap": 4.0},
    {"reduction": "mean", "label_smoothing": 0.1, "z_loss": 0.01, "weights": True},
]


@pytest.fixture(params=EVERY_ROAD)
def road(request):
    chosen = EVERY_ROAD[request.param]
    with x64() if request.param == "jax" else contextlib.nullcontext():
        yield chosen


def x64():
    """JAX knows 64-bit numbers only where it is told to."""
    jax = Jax().module
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64  # where older versions keep it

    return enable_x64()


def problem(dtype="float32", shape=(3, 70), v=1025, d=33, seed=0, weights=False, **options):
    rng = np.random.default_rng(seed)
    kind = DTYPES[dtype]
    e = (1.5 * rng.standard_normal((*shape, d))).astype(kind)
    c = (rng.standard_normal((v, d)) / np.sqrt(d)).astype(kind)
    targets = rng.integers(0, v, shape)
    targets[rng.random(shape) < 0.2] = -100
    options = {"bias": rng.standard_normal(v).astype(kind), "reduction": "sum"} | options
    if weights:
        options["class_weight"] = rng.random(v).astype(np.float32)
        options["token_weight"] = rng.random(shape).astype(np.float32)
    return Case(dtype, e, c, targets, options, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("integer", ["int64", "int32", "uint8"])
def test_results(road, dtype, options, integer):
    """Loss, lse, gradients, statistics: values, kinds, dtypes and devices."""
    case = problem(dtype, **options)
    if integer == "uint8":
        case.targets = np.where(case.targets < 0, 255, case.targets % 255)
        case.options["ignore_index"] = 255
    case.targets = case.targets.astype(integer)
    oracle = case.oracle()
    found = road.linear_cross_entropy(*case.arrays, **case.options, return_lse=True)
    check_forward(case, oracle, found, with_lse=True)
    found, gradients = road.linear_cross_entropy_value_and_grad(
        *case.arrays, **case.options, **UNFILTERED
    )
    check_forward(case, oracle, found, with_lse=False)
    check_gradients(case, oracle, gradients)

    found, pullback = road.linear_cross_entropy_vjp(*case.arrays, **case.options, **UNFILTERED)
    check_forward(case, oracle, found, with_lse=False)
    rng = case.rng()
    dloss = rng.standard_normal(case.targets.shape if oracle.reduction == "none" else ())
    dloss = np.asarray(dloss, np.float32)
    dlse = rng.standard_normal(case.targets.shape).astype(np.float32)
    check_gradients(case, oracle, pullback(dloss), dloss)
    check_gradients(case, oracle, pullback(dloss, dlse), dloss, dlse)

    options = {k: v for k, v in case.options.items() if k in STATISTICS_OPTIONS}
    statistics = road.token_statistics(*case.arrays, **options)
    expected = case.oracle().statistics()
    allowed = case.tolerances(oracle).statistics()
    for name, values, exact, bound in zip(
        statistics._fields[:3], statistics[:3], expected[:3], allowed, strict=True
    ):
        assert values.dtype == DTYPES[accumulator(dtype)]
        assert_within(values, exact, bound, name)
    assert statistics.argmax.dtype == np.int64
    assert statistics.argmax.shape == case.targets.shape


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("filter_eps", ["auto", 0.01])
def test_same_bits_from_every_framework(road, dtype, filter_eps):
    """The kernels, the plan and the seed are the same."""
    case = problem(dtype, shape=(5, 60), filter_eps=filter_eps)
    results = []
    for chosen in (EVERY_ROAD["cupy"], road):
        loss, gradients = chosen.linear_cross_entropy_value_and_grad(*case.arrays, **case.options)
        results.append([array.tobytes() for array in (loss, *gradients)])
    assert results[0] == results[1]


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0)])
def test_few_tokens(road, shape):
    case = problem(shape=shape)
    if shape in ((), (1,)):
        case.targets = np.full(shape, 7)
    found, gradients = road.linear_cross_entropy_value_and_grad(
        *case.arrays, **case.options, return_lse=True
    )
    check_forward(case, case.oracle(), found, with_lse=True)
    check_gradients(case, case.oracle(), gradients)


def test_upstream_gradients_may_be_numbers(road):
    case = problem()
    pullback = road.linear_cross_entropy_vjp(*case.arrays, **case.options)[1]
    check_gradients(case, case.oracle(), pullback(2.5), 2.5)


def test_wrong_targets(road):
    """NaN for the token, or the error that was asked for."""
    case = problem(shape=(100,), reduction="none")
    case.targets[37] = 1025
    loss = road.linear_cross_entropy(*case.arrays, **case.options)
    assert np.flatnonzero(np.isnan(loss)).tolist() == [37]
    with pytest.raises(ValueError, match=r"targets must .*\b37\b"):
        road.linear_cross_entropy(*case.arrays, **case.options, check_targets=True)


@pytest.mark.parametrize("other", ["cupy", "torch", "jax", "numpy"])
def test_other_frameworks_among_the_arguments(road, other):
    if other == road.framework.name or (road.framework.name, other) == ("dlpack", "cupy"):
        pytest.skip("the same framework")
    case = problem()
    e, targets = (road.framework.send(array)[0] for array in (case.e, case.targets))
    c = case.c if other == "numpy" else EVERY_ROAD[other].framework.send(case.c)[0]
    with pytest.raises(TypeError, match="one framework"):
        cce_cupy.linear_cross_entropy(e, c, targets)


# order of work among streams


def expected_bits(case):
    loss, gradients = EVERY_ROAD["cupy"].linear_cross_entropy_value_and_grad(
        *case.arrays, **case.options
    )
    return [array.tobytes() for array in (loss, *gradients)]


def test_a_producer_on_another_stream_is_waited_for():
    """Its ``__dlpack__`` is handed the stream on which its memory will be read."""
    cupy = FRAMEWORKS["cupy"].module
    case = problem(shape=(300,))
    expected = expected_bits(case)
    named = {"e": case.e, "c": case.c, "targets": case.targets, "bias": case.options["bias"]}
    values = {name: cupy.asarray(array) for name, array in named.items()}
    late = {name: cupy.zeros_like(array) for name, array in values.items()}
    theirs, ours = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))

    def call():
        producers = {name: Bare(array, theirs) for name, array in late.items()}
        with ours:
            found = cce_cupy.linear_cross_entropy_value_and_grad(**producers, reduction="sum")
            ours.synchronize()
            return [array.get().tobytes() for array in (found[0], *found[1])]

    def fill():
        with theirs:
            for name, array in late.items():
                array[...] = values[name]

    call()
    fill()
    for array in late.values():
        with theirs:
            array.fill(0)
    cupy.cuda.Device().synchronize()
    occupy(theirs.ptr, 0.3)
    fill()
    assert call() == expected


def jax_arguments(case):
    named = {"e": case.e, "c": case.c, "targets": case.targets, "bias": case.options["bias"]}
    return {name: Jax().send(array)[0] for name, array in named.items()}


@pytest.fixture
def jax():
    with x64():
        yield Jax().module


def test_jax_arrays_that_are_still_being_computed(jax):
    """A call may come right after their dispatch."""
    case = problem(shape=(300,))
    expected = expected_bits(case)
    arguments = jax_arguments(case)
    big = jax.numpy.ones((4096, 4096), np.float32)

    @jax.jit
    def slowly(e):
        """The same numbers, after a chain of products that ends in zero."""
        x = big
        for _ in range(60):
            x = big @ x * 2.0**-12
        return e + (x[0, 0] - x[0, 1])

    slowly(arguments["e"]).block_until_ready()
    for _ in range(3):
        late = arguments | {"e": slowly(arguments["e"])}
        loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(**late, reduction="sum")
        assert [np.asarray(x).tobytes() for x in (loss, *gradients)] == expected


def test_jax_results_are_ready_when_jax_reads_them(jax):
    """Also where CuPy's stream, on which the kernels run, is still busy with something else."""
    cupy = FRAMEWORKS["cupy"].module
    case = problem(shape=(300,))
    expected = expected_bits(case)
    arguments = jax_arguments(case)
    double = jax.jit(lambda x: 2 * x)
    for _ in range(2):
        occupy(cupy.cuda.get_current_stream().ptr, 0.3)
        loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(**arguments, reduction="sum")
        doubled = [np.asarray(double(x)) / 2 for x in (loss, *gradients)]
        assert [x.tobytes() for x in doubled] == expected


def test_jax_arrays_may_be_freed_right_after_the_call(jax):
    """JAX hands their memory out again without looking at CuPy's stream."""
    cupy = FRAMEWORKS["cupy"].module
    case = problem(shape=(300,), v=4000)
    expected = expected_bits(case)
    for _ in range(2):
        arguments = jax_arguments(case)
        for array in arguments.values():
            array.block_until_ready()
        occupy(cupy.cuda.get_current_stream().ptr, 0.3)
        found = cce_cupy.linear_cross_entropy_value_and_grad(**arguments, reduction="sum")
        shapes = [array.shape for array in arguments.values()]
        del arguments
        gc.collect()
        others = [jax.numpy.full(shape, np.nan, np.float32) for shape in shapes * 4]
        for other in others:
            other.block_until_ready()
        assert [np.asarray(x).tobytes() for x in (found[0], *found[1])] == expected
        del others


def test_jax_without_64_bit_numbers():
    """argmax is int32 then, and all else as it is."""
    jax = Jax().module
    case = problem(shape=(300,))
    e, c = (jax.device_put(x, jax.devices("gpu")[0]) for x in (case.e, case.c))
    targets = jax.device_put(case.targets.astype(np.int32), jax.devices("gpu")[0])
    statistics = cce_cupy.token_statistics(e, c, targets)
    wide = EVERY_ROAD["cupy"].token_statistics(*case.arrays)
    assert statistics.argmax.dtype == np.int32
    np.testing.assert_array_equal(np.asarray(statistics.argmax), wide.argmax)
    assert np.asarray(statistics.lse).tobytes() == wide.lse.tobytes()
    assert next(iter(statistics.lse.devices())).platform == "gpu"
