"""JAX's transformations: each cell of the table in docs/jax.md, and what a user meets beside it.

Everything runs on JAX's default devices, eight of them on the CPU (see conftest.py), so that
tests/gpu runs it once more.
"""

import concurrent.futures
import contextlib
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from oracle import Oracle
from tolerances import DTYPES, Tolerances, assert_within

import cce_cupy

jax = pytest.importorskip("jax")
jnp = jax.numpy
from cce_cupy.frameworks import jax_primitives  # noqa: E402

P = jax.sharding.PartitionSpec

BATCH, LENGTH, DIM, VOCAB = 8, 19, 12, 300
FUNCTIONS = {
    "linear_cross_entropy": cce_cupy.linear_cross_entropy,
    "..._value_and_grad": cce_cupy.linear_cross_entropy_value_and_grad,
    "..._vjp": cce_cupy.linear_cross_entropy_vjp,
    "token_statistics": cce_cupy.token_statistics,
}
UPSTREAM_LSE = 0.5


def x64():
    """Switch 64-bit numbers on for the length of a with block."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64  # where older versions keep it

    return enable_x64()


def sample(dtype="float32", seed=0):
    """Return e, c, bias and targets as NumPy arrays; a fifth of the tokens is ignored."""
    rng = np.random.default_rng(seed)
    kind = DTYPES[dtype]
    targets = rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    targets[rng.random(targets.shape) < 0.2] = -100
    e = rng.standard_normal((BATCH, LENGTH, DIM)).astype(kind)
    c = rng.standard_normal((VOCAB, DIM)).astype(kind)
    return e, c, rng.standard_normal(VOCAB).astype(kind), targets


def named(function, e, c, bias, targets, **options):
    """Call a function; return all that it gives by name."""
    call = FUNCTIONS[function]
    if function == "token_statistics":
        return call(e, c, targets, bias, **options)._asdict()
    options = {"reduction": "sum", "gradient_filter": None, "return_lse": True} | options
    result = call(e, c, targets, bias, **options)
    if function == "linear_cross_entropy":
        return dict(zip(("loss", "lse"), result, strict=True))
    (loss, lse), gradients = result
    if function == "..._vjp":
        gradients = gradients(1.0, jnp.full_like(lse, UPSTREAM_LSE))
    return {"loss": loss, "lse": lse, "e": gradients.e, "c": gradients.c, "bias": gradients.bias}


def scalar(function, *arrays, **options):
    """Return one differentiable number of what a function gives, the same for all of them."""
    found = named(function, *arrays, **options)
    loss = found["loss"] if "loss" in found else -found["log_prob"].sum()
    return loss + UPSTREAM_LSE * found["lse"].sum()


class Expected:
    """The oracle's results for `named` and `scalar`, and their tolerances."""

    def __init__(self, e, c, bias, targets, dtype="float32", **options):
        self.oracle = Oracle(
            *(np.asarray(x) for x in (e, c, targets, bias)), **{"reduction": "sum"} | options
        )
        self.allowed = Tolerances(self.oracle, dtype)
        self.dlse = np.full(np.shape(targets), UPSTREAM_LSE)

    def gradients(self, dlse=True):
        upstream = self.dlse if dlse else None
        found = self.oracle.gradients(1.0, upstream), self.allowed.gradients(1.0, upstream)
        return {n: pair for n, *pair in zip(("e", "c", "bias"), *found, strict=True)}

    def check(self, function, found):
        oracle, allowed = self.oracle, self.allowed
        expected = {"loss": (oracle.loss, allowed.loss())}
        if function == "token_statistics":
            expected = dict(
                zip(
                    ("log_prob", "lse", "entropy"),
                    zip(oracle.statistics()[:3], allowed.statistics(), strict=True),
                    strict=True,
                )
            )
            np.testing.assert_array_equal(found["argmax"], oracle.statistics()[3])
        expected["lse"] = oracle.scatter(oracle.lse), allowed.scattered_lse()
        if "c" in found:
            expected |= self.gradients(dlse=function == "..._vjp")
        assert set(found) - {"argmax"} == set(expected)
        for name, (value, bound) in expected.items():
            assert_within(found[name], value, bound, name)

    def check_gradients(self, *found):
        for (name, (value, bound)), gradient in zip(self.gradients().items(), found, strict=False):
            assert_within(gradient, value, bound, f"d{name}")

    def check_scalar(self, found):
        value = self.oracle.loss + UPSTREAM_LSE * self.oracle.lse.sum()
        bound = self.allowed.loss() + self.allowed.scattered_lse().sum()
        bound += 1e-6 * np.abs(self.oracle.lse).sum()  # the sum is JAX's own
        assert_within(found, value, bound, "scalar")


def check_jit(function):
    arrays = sample()
    Expected(*arrays).check(function, jax.jit(partial(named, function))(*arrays))


def check_grad(function, wrap=lambda f: f):
    arrays = sample()
    for run in (lambda f: f, jax.jit):
        found = run(jax.grad(wrap(partial(scalar, function)), (0, 1, 2)))(*map(jnp.asarray, arrays))
        Expected(*arrays).check_gradients(*found)


def check_value_and_grad(function):
    arrays = sample()
    value, found = jax.jit(jax.value_and_grad(partial(scalar, function), (0, 1, 2)))(*arrays)
    Expected(*arrays).check_scalar(value)
    Expected(*arrays).check_gradients(*found)


def one_each(tree, k):
    return jax.tree.map(lambda array: array[k], tree)


def check_vmap(function):
    e, c, bias, targets = arrays = sample()
    found = jax.jit(jax.vmap(partial(named, function), (0, None, None, 0)))(*arrays)
    for k in range(BATCH):
        Expected(e[k], c, bias, targets[k]).check(function, one_each(found, k))


def check_vmap_over_classifiers(function):
    e, c, bias, targets = sample()
    classifiers = np.stack([c, -c, 0.5 * c])
    found = jax.vmap(partial(named, function), (None, 0, None, None))(
        *map(jnp.asarray, (e, classifiers, bias, targets))
    )
    for k in range(3):
        Expected(e, classifiers[k], bias, targets).check(function, one_each(found, k))


def check_grad_of_vmap(function):
    arrays = sample()

    def total(e, c, bias, targets):
        return jax.vmap(partial(scalar, function), (0, None, None, 0))(e, c, bias, targets).sum()

    Expected(*arrays).check_gradients(*jax.jit(jax.grad(total, (0, 1, 2)))(*arrays))


def check_vmap_of_grad(function):
    e, c, bias, targets = arrays = sample()
    gradient = jax.grad(partial(scalar, function), (0, 1, 2))
    found = jax.jit(jax.vmap(gradient, (0, None, None, 0)))(*arrays)
    for k in range(BATCH):
        Expected(e[k], c, bias, targets[k]).check_gradients(*one_each(found, k))


def check_scan(function):
    arrays = sample()

    def total(e, c, bias, targets):
        def step(sum_, batch):
            return sum_ + scalar(function, batch[0], c, bias, batch[1]), None

        return jax.lax.scan(step, 0.0, (e, targets))[0]

    value, found = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*arrays)
    Expected(*arrays).check_scalar(value)
    Expected(*arrays).check_gradients(*found)


def mesh(name):
    return jax.sharding.Mesh(np.array(jax.devices()), (name,))


def check_shard_map(function):
    """Tokens over the devices: what every device has is summed, by us and in derivatives by JAX."""
    arrays = sample()
    over = P("tokens")

    def local(*arrays):
        found = named(function, *arrays)
        return {
            name: jax.lax.psum(x, "tokens") if name in ("loss", "c", "bias") else x
            for name, x in found.items()
        }

    names = jax.eval_shape(partial(named, function), *arrays)
    outputs = {name: P() if name in ("loss", "c", "bias") else over for name in names}
    for checked in (True, False):
        spread = partial(
            jax.shard_map,
            mesh=mesh("tokens"),
            in_specs=(over, P(), P(), over),
            check_vma=checked,
        )
        found = jax.jit(spread(local, out_specs=outputs))(*arrays)
        Expected(*arrays).check(function, found)
        total = spread(
            lambda *arrays: jax.lax.psum(scalar(function, *arrays), "tokens"), out_specs=P()
        )
        Expected(*arrays).check_gradients(*jax.jit(jax.grad(total, (0, 1, 2)))(*arrays))
    inside = jax.shard_map(
        jax.grad(partial(scalar, function), (0, 1, 2)),
        mesh=mesh("tokens"),
        in_specs=(over, P(), P(), over),
        out_specs=(over, P(), P()),
    )
    Expected(*arrays).check_gradients(*jax.jit(inside)(*arrays))


def check_forward_mode(function):
    e, *others = sample()
    of_e = partial(lambda e: scalar(function, e, *others))
    others = list(map(jnp.asarray, others))
    e = jnp.asarray(e)
    for run in (
        lambda: jax.jvp(of_e, (e,), (e,)),
        lambda: jax.jit(jax.jacfwd(of_e))(e),
        lambda: jax.hessian(of_e)(e),
    ):
        with pytest.raises(NotImplementedError, match=r"forward-mode.*jax\.grad"):
            run()


def check_second_derivatives(function):
    e, *others = map(jnp.asarray, sample())
    of_e = partial(lambda e: scalar(function, e, *others))
    for wrap in (lambda f: f, jax.jit):
        with pytest.raises(NotImplementedError, match="second derivatives"):
            wrap(jax.grad(lambda e: jax.grad(of_e)(e).sum()))(e)


CHECKS = {
    "`jit`": check_jit,
    "`grad`": check_grad,
    "`value_and_grad`": check_value_and_grad,
    "`vmap`, shared classifier": check_vmap,
    "`vmap`, a classifier each": check_vmap_over_classifiers,
    "`grad` of `vmap`": check_grad_of_vmap,
    "`vmap` of `grad`": check_vmap_of_grad,
    "`checkpoint`": partial(check_grad, wrap=jax.checkpoint),
    "`scan`": check_scan,
    "`shard_map`": check_shard_map,
    "`jvp`, `jacfwd`, `hessian`": check_forward_mode,
    "second derivatives": check_second_derivatives,
}
VMAPS = {
    "`vmap`, shared classifier": lambda f: jax.vmap(f, (0, None, None, 0)),
    "`vmap`, a classifier each": lambda f: jax.vmap(f, (None, 0, None, None)),
    "`grad` of `vmap`": lambda f: jax.grad(
        lambda *a: jax.vmap(f, (0, None, None, 0))(*a).sum(), (0, 1, 2)
    ),
    "`vmap` of `grad`": lambda f: jax.vmap(jax.grad(f, (0, 1, 2)), (0, None, None, 0)),
}


def table():
    """Read the first table of docs/jax.md: (transformation, function, cell)."""
    page = (Path(__file__).parents[1] / "docs" / "jax.md").read_text("utf-8")
    lines = page[page.index("| | `linear_cross_entropy`") :].partition("\n\n")[0].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    functions = [name.strip("`") for name in header[1:]]
    assert functions == list(FUNCTIONS)
    assert [row[0] for row in rows] == list(CHECKS)
    return [
        pytest.param(transformation, function, cell, id=f"{transformation}-{function}")
        for transformation, *cells in rows
        for function, cell in zip(functions, cells, strict=True)
    ]


@pytest.mark.parametrize(("transformation", "function", "cell"), table())
def test_table(transformation, function, cell):
    assert cell in ("yes", "folds", "loops", "refused")
    CHECKS[transformation](function)
    assert (cell in ("folds", "loops")) == (transformation in VMAPS)
    if transformation in VMAPS:
        e, c, bias, targets = sample()
        if "a classifier each" in transformation:
            c = np.stack([c, c])
        program = str(jax.make_jaxpr(VMAPS[transformation](partial(scalar, function)))(
            e, c, bias, targets
        ))  # fmt: skip
        assert "cce_cupy_forward" in program
        assert ("scan[" in program) == (cell == "loops")


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    with x64() if dtype == "float64" else contextlib.nullcontext():
        e, c, bias, targets = arrays = sample(dtype)
        (value, lse), gradients = jax.jit(cce_cupy.linear_cross_entropy_value_and_grad,
            static_argnames=("reduction", "gradient_filter", "return_lse"))(
            e, c, targets, bias, reduction="sum", gradient_filter=None, return_lse=True
        )  # fmt: skip
        assert value.dtype == lse.dtype == ("float64" if dtype == "float64" else "float32")
        assert {g.dtype.name for g in gradients} == {dtype}
        found = {"loss": value, "lse": lse, **gradients._asdict()}
        Expected(*arrays, dtype=dtype).check("..._value_and_grad", found)
        of_e = jax.grad(lambda e: cce_cupy.linear_cross_entropy(e, c_, t_, b_))
        c_, b_, t_ = map(jnp.asarray, (c, bias, targets))
        assert of_e(jnp.asarray(e)).dtype.name == dtype


def test_weak_types():
    """A Python number spread over an array: the result is as if it were of the dtype for good."""
    _, c, bias, targets = map(jnp.asarray, sample())
    weak = jnp.broadcast_to(jnp.asarray(0.5), (BATCH, LENGTH, DIM))
    assert weak.weak_type

    def loss(e, c):
        return cce_cupy.linear_cross_entropy(e, c, targets, bias)

    found = jax.jit(jax.value_and_grad(loss, (0, 1)))(weak, c)
    strong = jax.value_and_grad(loss, (0, 1))(jnp.full(weak.shape, 0.5, c.dtype), c)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(strong), strict=True):
        assert not x.weak_type
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


OPTIONS = {
    "shift": {"shift": 2},
    "mean": {"reduction": "mean", "ignore_index": 3},
    "none": {"reduction": "none", "softcap": 4.0},
    "a far ignore_index": {"reduction": "mean", "ignore_index": 2**70},
    "smoothing": {"label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 1 / 3},
}


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_options_and_traced_weights(options, weights):
    """Options travel as attributes of the program; arrays are all traced, batched ones too."""
    e, c, bias, targets = sample()
    targets = np.where(targets == -100, 3, targets)
    rng = np.random.default_rng(5)
    given = {}
    if weights:
        given["class_weight"] = rng.random(VOCAB, np.float32)
        given["token_weight"] = rng.random(targets.shape, np.float32)
    fixed = {"reduction": "sum"} | OPTIONS[options]

    def loss(e, c, bias, targets, given):
        return cce_cupy.linear_cross_entropy(e, c, targets, bias, **given, **fixed).sum()

    found = jax.jit(jax.grad(loss, (0, 1, 2)))(e, c, bias, targets, given)
    oracle = Oracle(e, c, targets, bias, **given, **fixed)
    allowed = Tolerances(oracle, "float32")
    pairs = zip(found, oracle.gradients(), allowed.gradients(), strict=True)
    for gradient, value, bound in pairs:
        assert_within(gradient, value, bound, "gradient")

    axes = {"class_weight": None, "token_weight": 0} if weights else {}
    batched = jax.vmap(loss, (0, None, None, 0, axes))(
        *map(jnp.asarray, (e, c, bias, targets)), jax.tree.map(jnp.asarray, given)
    )
    for k in range(BATCH):
        one = dict(given)
        if weights:
            one["token_weight"] = given["token_weight"][k]
        oracle = Oracle(e[k], c, targets[k], bias, **one, **fixed)
        # A mean is formed from losses by token in float32: as many roundings again.
        bound = np.sum(Tolerances(oracle, "float32").loss()) + 1e-6 * np.sum(oracle.loss)
        assert_within(batched[k], np.sum(oracle.loss), 2 * bound, "loss")


@pytest.mark.parametrize(
    ("argument", "wanted"), [(0, "e"), (1, "c"), (2, "bias"), ((0, 1), "e c"), ((0, 2), "e bias")]
)
def test_only_what_is_asked_for(argument, wanted):
    """The others' gradients are not formed, and those that are have the same bits."""
    arrays = list(map(jnp.asarray, sample()))
    gradient = jax.jit(jax.grad(partial(scalar, "linear_cross_entropy"), argument))
    program = gradient.lower(*arrays).as_text()
    assert re.findall(r'wanted = "([^"]*)"', program) == [wanted]
    all_of_them = jax.grad(partial(scalar, "linear_cross_entropy"), (0, 1, 2))(*arrays)
    places = argument if isinstance(argument, tuple) else (argument,)
    for place, found in zip(places, jax.tree.leaves(gradient(*arrays)), strict=True):
        assert np.asarray(found).tobytes() == np.asarray(all_of_them[place]).tobytes()


def test_no_gradient_no_backward():
    arrays = sample()
    program = jax.jit(partial(scalar, "linear_cross_entropy")).lower(*arrays).as_text()
    assert "cce_cupy_forward" in program
    assert "cce_cupy_backward" not in program
    assert "saved" not in program


def test_integer_tangents():
    """Targets have the trivial tangents that JAX gives integers."""
    arrays = list(map(jnp.asarray, sample()))
    _, pull = jax.vjp(partial(scalar, "linear_cross_entropy"), *arrays)
    *_, of_targets = pull(jnp.float32(1))
    assert of_targets.dtype == jax.dtypes.float0
    assert of_targets.shape == arrays[3].shape
    found = jax.grad(partial(scalar, "linear_cross_entropy"), (1, 3), allow_int=True)(*arrays)
    assert found[1].dtype == jax.dtypes.float0


def test_pullback_any_number_of_times():
    arrays = list(map(jnp.asarray, sample()))
    _, pull = jax.vjp(jax.jit(partial(scalar, "linear_cross_entropy")), *arrays)
    first, second = pull(jnp.float32(1)), pull(jnp.float32(2))
    Expected(*arrays).check_gradients(*first[:3])
    np.testing.assert_array_equal(2 * np.asarray(first[1]), second[1])


@pytest.mark.parametrize("name", ["class_weight", "token_weight"])
def test_weights_have_no_gradient(name):
    e, c, bias, targets = map(jnp.asarray, sample())
    shape = {"class_weight": (VOCAB,), "token_weight": targets.shape}[name]

    def loss(weight):
        return cce_cupy.linear_cross_entropy(e, c, targets, bias, **{name: weight})

    with pytest.raises(TypeError, match=rf"not differentiable in {name}"):
        jax.grad(loss)(jnp.ones(shape))


def test_entropy_has_no_gradient():
    e, c, bias, targets = map(jnp.asarray, sample())
    with pytest.raises(NotImplementedError, match="entropy"):
        jax.grad(lambda e: cce_cupy.token_statistics(e, c, targets, bias).entropy.sum())(e)


@pytest.mark.parametrize("name", ["softcap", "label_smoothing", "shift", "seed", "return_lse"])
def test_traced_options_are_refused(name):
    e, c, bias, targets = map(jnp.asarray, sample())

    def loss(value):
        return cce_cupy.linear_cross_entropy(e, c, targets, bias, **{name: value})

    with pytest.raises(TypeError, match=rf"{name} is traced.*static_argnames"):
        jax.jit(loss)(1)


def test_workspace_too_small_is_refused_before_any_work():
    arrays = sample()
    with pytest.raises(ValueError, match="workspace_bytes must be at least"):
        jax.jit(partial(scalar, "linear_cross_entropy", workspace_bytes=10)).lower(*arrays)


def test_errors_in_compiled_code():
    """They carry our text, and the next call is as good as ever."""
    if jax.default_backend() != "cpu":
        pytest.skip("on a GPU a wrong target makes NaN")
    e, c, bias, targets = sample()
    loss = jax.jit(partial(scalar, "linear_cross_entropy"))
    wrong = targets.copy()
    wrong[1, 2] = VOCAB
    for _ in range(2):
        with pytest.raises(jax.errors.JaxRuntimeError, match=rf"got {VOCAB} at targets\[1, 2\]"):
            loss(e, c, bias, wrong).block_until_ready()
        Expected(e, c, bias, targets).check_scalar(loss(e, c, bias, targets))

    @jax.jit
    def weighted(weight):
        return cce_cupy.linear_cross_entropy(e_, c_, t_, class_weight=weight)

    e_, c_, t_ = map(jnp.asarray, (e, c, targets))
    with pytest.raises(jax.errors.JaxRuntimeError, match="class_weight must be non-negative"):
        weighted(jnp.full(VOCAB, -1.0)).block_until_ready()


def test_compiled_once(caplog):
    """The second call finds the program, jitted or eager."""
    arrays = list(map(jnp.asarray, sample()))
    jitted = jax.jit(partial(scalar, "linear_cross_entropy"))
    eager = partial(named, "..._vjp")
    for call, name in ((jitted, "scalar"), (eager, "cce_cupy|_bind|bind")):
        jax.clear_caches()
        jax_primitives._compiled.cache_clear()
        texts = []
        for _ in range(2):
            caplog.clear()
            with jax.log_compiles(), caplog.at_level("WARNING"):
                call(*arrays)
            texts.append([text for text in caplog.messages if "Compiling" in text])
        assert any(re.search(name, text) for text in texts[0]), texts[0]
        assert not texts[1]


def test_threads_and_devices():
    """Calls side by side on all devices give what each gives alone."""
    loss = jax.jit(jax.value_and_grad(partial(scalar, "linear_cross_entropy"), (0, 1, 2)))
    devices = jax.devices()
    samples = [sample(seed=k) for k in range(16)]

    def run(k):
        placed = jax.device_put(samples[k], devices[k % len(devices)])
        found = loss(*placed)
        assert found[0].devices() == {devices[k % len(devices)]}
        return [np.asarray(x).tobytes() for x in jax.tree.leaves(found)]

    alone = [run(k) for k in range(16)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, [*range(16), *range(16)])) == alone * 2


_CACHED = """
import sys
import jax
import numpy as np
import cce_cupy
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
rng = np.random.default_rng(0)
e, c = rng.standard_normal((2, 40, 8)).astype(np.float32)
targets = rng.integers(0, 40, 40).astype(np.int32)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
found = jax.jit(jax.value_and_grad(cce_cupy.linear_cross_entropy))(e, c, targets)
print(float(found[0]).hex(), sum("cache_hits" in event for event in hits))
"""


def test_persistent_compilation_cache(tmp_path):
    """Another process finds the program on disk, and it works there."""

    def run():
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", _CACHED, str(tmp_path)]
        found = subprocess.check_output(command, env=os.environ | {"PYTHONPATH": path}, text=True)
        loss, hits = found.split()
        return loss, int(hits)

    first, again = run(), run()
    assert first[1] == 0
    assert again[1] >= 1
    assert first[0] == again[0]


_ENDING = """
import jax
import jax.numpy as jnp
import cce_cupy
e, c = jnp.ones((2048, 256)), jnp.ones((32768, 256))
targets = jnp.zeros(2048, jnp.int32)
found = jax.jit(jax.grad(cce_cupy.linear_cross_entropy))(e, c, targets)
other = jax.jit(jax.grad(lambda e: cce_cupy.linear_cross_entropy(e + 1, c, targets)))(e)
print("the end")
"""


def test_a_program_may_end_while_calls_run():
    """XLA's threads hold no lock then that Python, or XLA itself, would wait for forever."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", _ENDING],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "the end\n"
    assert not done.stderr
