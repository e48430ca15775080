"""Bad input: what is refused, with which exception, and that the message helps.

One table. Each case alters one valid call; the call must raise exactly the named exception, and its
message must name the argument, what was given and what is accepted. Every case runs on every
public function that has the altered arguments, and once more on a problem so large that a library
which worked or copied before it checked would be caught by the clock or by its memory.
"""

import inspect
import re
import time
import tracemalloc
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

import cce_cupy

FUNCTIONS = {
    "linear_cross_entropy": cce_cupy.linear_cross_entropy,
    "value_and_grad": cce_cupy.linear_cross_entropy_value_and_grad,
    "vjp": cce_cupy.linear_cross_entropy_vjp,
    "token_statistics": cce_cupy.token_statistics,
}


def small_call() -> dict[str, Any]:
    """Return valid arguments: batch (2, 6), D = 4, V = 7, one ignored token."""
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 7, (2, 6))
    targets[0, 1] = -100
    return {
        "e": rng.standard_normal((2, 6, 4), np.float32),
        "c": rng.standard_normal((7, 4), np.float32),
        "targets": targets,
        "bias": rng.standard_normal(7, np.float32),
        "class_weight": rng.random(7, np.float32),
        "token_weight": rng.random((2, 6), np.float32),
    }


def large_call() -> dict[str, Any]:
    """Return valid arguments with 2^32 logits: c alone would be 1 GiB, but is one broadcast row."""
    dim, vocab = 64, 2**22
    targets = np.arange(2 * 512).reshape(2, 512)
    targets[0, 1] = -100
    return {
        "e": np.broadcast_to(np.ones(dim, np.float32), (2, 512, dim)),
        "c": np.broadcast_to(np.ones(dim, np.float32), (vocab, dim)),
        "targets": targets,
        "bias": np.broadcast_to(np.float32(0), (vocab,)),
        "class_weight": np.broadcast_to(np.float32(1), (vocab,)),
        "token_weight": np.broadcast_to(np.float32(1), (2, 512)),
    }


def astype(array: np.ndarray, dtype: Any) -> np.ndarray:
    """Return zeros of another dtype in the array's shape, without using memory."""
    return np.broadcast_to(np.zeros((), dtype), array.shape)


def put(array: np.ndarray, position: Any, value: float) -> np.ndarray:
    """Return a copy of the array with one element replaced."""
    array = array.copy()
    array[position] = value
    return array


def torch_zeros(array: np.ndarray, device: str = "cpu") -> Any:
    """Return zeros as `astype` does, as a torch tensor."""
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, array.dtype.name)
    return torch.zeros((), dtype=dtype, device=device).expand(array.shape)


def torch_call(valid: SimpleNamespace, elsewhere: Collection[str]) -> dict[str, Any]:
    """Return all arguments as torch tensors, the named ones on the device "meta"."""
    return {
        name: torch_zeros(array, "meta" if name in elsewhere else "cpu")
        for name, array in vars(valid).items()
    }


class Case(NamedTuple):
    """A way to spoil a valid call, and regular expressions that the message must match.

    ``bad`` is what the argument becomes, or a function of the valid arguments that returns it; a
    dict it returns replaces several arguments at once.
    """

    error: type[Exception]
    argument: str  # the one that the message must name, with the position in it if any
    name: str
    bad: Any
    given: str
    accepted: str

    def change(self, valid: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments to replace in a valid call."""
        bad = self.bad(SimpleNamespace(**valid)) if callable(self.bad) else self.bad
        return bad if isinstance(bad, dict) else {self.argument.partition("[")[0]: bad}


# Where several arguments are alike: what messages say is given or accepted.
FLOATS = "float64, float32, float16 or bfloat16"
INTEGERS = "integer dtype"
WEIGHTS = "floating, integer or bool dtype"
ARRAYS = "array|DLPack"
V, V_LESS, LENGTH, LENGTH_LESS = "(7|4194304)", "(6|4194303)", "(6|512)", "(5|511)"
PER_CLASS, PER_TOKEN = rf"\({V},\)", rf"\(2, {LENGTH}\)"
CAP = "positive finite number or None"
EPS = r"'auto', None .*number in \[0, 1\)"
ALPHA = "finite number from 0 to 1"
LAMBDA = "finite number of at least 0"
SHIFT = "integer of at least 0"
SEED = f"integer from 0 to {2**64 - 1} or None"
WORKSPACE = "integer of at least 1 or None"
REDUCTION = "'mean', 'sum' or 'none'"
FILTER = "'unbiased', 'threshold' or None"
FLAG = "True or False"
WEIGHT = "non-negative and finite"

TABLE = {
    TypeError: [
        # Dtypes.
        ("e", "integer", lambda a: astype(a.e, np.int32), "int32", FLOATS),
        ("e", "complex", lambda a: astype(a.e, np.complex64), "complex64", FLOATS),
        ("e", "bool", lambda a: astype(a.e, bool), "bool", FLOATS),
        ("e", "longdouble", lambda a: astype(a.e, np.longdouble), "float128|longdouble", FLOATS),
        ("e", "object", lambda a: astype(a.e, object), "object", FLOATS),
        ("c", "integer", lambda a: astype(a.c, np.uint8), "uint8", FLOATS),
        ("c", "object", lambda a: astype(a.c, object), "object", FLOATS),
        ("c", "string", lambda a: astype(a.c, "U1"), "str|U1", FLOATS),
        ("c", "wider than e", lambda a: astype(a.c, np.float64), "float64", "float32"),
        ("c", "e of half", lambda a: {"e": astype(a.e, np.float16)}, "float32", "float16"),
        ("bias", "wider than e", lambda a: astype(a.bias, np.float64), "float64", "float32"),
        ("bias", "integer", lambda a: astype(a.bias, np.int64), "int64", FLOATS),
        ("bias", "structured", lambda a: astype(a.bias, "f4,i4"), "void|f4", FLOATS),
        ("targets", "float", lambda a: astype(a.targets, np.float32), "float32", INTEGERS),
        ("targets", "bool", lambda a: astype(a.targets, bool), "bool", INTEGERS),
        ("targets", "object", lambda a: astype(a.targets, object), "object", INTEGERS),
        ("targets", "dates", lambda a: astype(a.targets, "M8[s]"), "datetime", INTEGERS),
        ("class_weight", "object", lambda a: astype(a.class_weight, object), "object", WEIGHTS),
        ("class_weight", "string", lambda a: astype(a.class_weight, "U3"), "str|U3", WEIGHTS),
        ("class_weight", "complex", lambda a: astype(a.class_weight, "c8"), "complex64", WEIGHTS),
        ("token_weight", "object", lambda a: astype(a.token_weight, object), "object", WEIGHTS),
        ("token_weight", "bytes", lambda a: astype(a.token_weight, "S2"), "bytes|S2", WEIGHTS),
        # What is no plain array.
        ("e", "list", [[0.0, 1.0]], "list", ARRAYS),
        ("e", "None", None, "None", ARRAYS),
        ("c", "tuple", ((0.0,), (1.0,)), "tuple", ARRAYS),
        ("targets", "list", [1, 2], "list", ARRAYS),
        ("targets", "int", 1, "int", ARRAYS),
        ("bias", "float", 0.5, "float", ARRAYS),
        ("class_weight", "list", [1.0], "list", ARRAYS),
        ("token_weight", "string", "ones", "str", ARRAYS),
        ("e", "masked", lambda a: np.ma.MaskedArray(a.e), "(?i)mask", ARRAYS),
        ("c", "masked", lambda a: np.ma.MaskedArray(a.c), "(?i)mask", ARRAYS),
        ("targets", "masked", lambda a: np.ma.MaskedArray(a.targets), "(?i)mask", ARRAYS),
        ("token_weight", "masked", lambda a: np.ma.MaskedArray(a.token_weight), "(?i)mask", ARRAYS),
        # Arrays of two frameworks.
        ("e", "of torch", lambda a: torch_zeros(a.e), "torch", "(?i)numpy"),
        ("c", "of torch", lambda a: torch_zeros(a.c), "torch", "(?i)numpy"),
        ("class_weight", "of torch", lambda a: torch_zeros(a.class_weight), "torch", "(?i)numpy"),
        # Options.
        ("softcap", "string", "30", "str '30'", CAP),
        ("softcap", "bool", True, "bool True", CAP),
        ("softcap", "array", np.ones(1), "array", CAP),
        ("filter_eps", "bool", False, "bool False", EPS),
        ("filter_eps", "complex", 1j, "complex 1j", EPS),
        ("label_smoothing", "string", "0.1", "str '0.1'", ALPHA),
        ("label_smoothing", "bool", True, "bool True", ALPHA),
        ("label_smoothing", "None", None, "None", ALPHA),
        ("z_loss", "string", "1e-4", "str '1e-4'", LAMBDA),
        ("z_loss", "bool", True, "bool True", LAMBDA),
        ("z_loss", "None", None, "None", LAMBDA),
        ("logit_scale", "string", "2", "str '2'", "finite number"),
        ("logit_scale", "bool", True, "bool True", "finite number"),
        ("logit_scale", "None", None, "None", "finite number"),
        ("ignore_index", "float", -100.0, "float -100.0", "an integer"),
        ("ignore_index", "None", None, "None", "an integer"),
        ("shift", "float", 1.0, "float 1.0", SHIFT),
        ("shift", "string", "1", "str '1'", SHIFT),
        ("seed", "float", 0.5, "float 0.5", SEED),
        ("seed", "array", np.arange(2), "array", SEED),
        ("workspace_bytes", "float", 1e9, "float 1000000000.0", WORKSPACE),
        ("workspace_bytes", "string", "1GB", "str '1GB'", WORKSPACE),
        ("reduction", "None", None, "None", REDUCTION),
        ("reduction", "function", lambda a: np.mean, "function", REDUCTION),
        ("gradient_filter", "bool", False, "bool False", FILTER),
        ("return_lse", "int", 1, "int 1", FLAG),
        ("return_lse", "string", "no", "str 'no'", FLAG),
        ("filter_e_grad", "int", 0, "int 0", FLAG),
        ("filter_e_grad", "None", None, "None", FLAG),
        ("filter_c_grad", "int", 0, "int 0", FLAG),
        ("filter_c_grad", "None", None, "None", FLAG),
        ("check_targets", "int", 1, "int 1", FLAG),
        ("check_targets", "string", "yes", "str 'yes'", FLAG),
        ("ignored_index", "unknown", 0, "got an", "unexpected keyword"),
    ],
    ValueError: [
        # Shapes.
        ("e", "0-d", lambda a: a.e[0, 0, 0, ...], "0-d", "D"),
        ("targets", "e has one axis less", lambda a: {"e": a.e[0]}, PER_TOKEN, rf"\({LENGTH},\)"),
        ("targets", "e has one axis more", lambda a: {"e": a.e[None]}, PER_TOKEN, r"\(1, 2, "),
        ("targets", "short", lambda a: a.targets[:, 1:], rf"\(2, {LENGTH_LESS}\)", PER_TOKEN),
        ("targets", "flat", lambda a: a.targets.ravel(), r"\((12|1024),\)", PER_TOKEN),
        ("targets", "0-d", lambda a: a.targets[0, 0, ...], r"\(\)", PER_TOKEN),
        ("targets", "empty", lambda a: a.targets[:0], r"\(0, ", PER_TOKEN),
        ("targets", "like e", lambda a: astype(a.e, int), r"\(2, \d+, \d+\)", PER_TOKEN),
        ("c", "e narrower", lambda a: {"e": a.e[..., 1:]}, rf"\({V}, (4|64)\)", "D = (3|63)"),
        ("c", "narrower", lambda a: a.c[:, 1:], rf"\({V}, (3|63)\)", "D = (4|64)"),
        ("c", "D = 0", lambda a: a.c[:, :0], rf"\({V}, 0\)", "D = (4|64)"),
        ("c", "transposed", lambda a: a.c.T, rf"\((4|64), {V}\)", "D = (4|64)"),
        ("c", "0-d", lambda a: a.c[0, 0, ...], r"\(\)", "V, D"),
        ("c", "1-d", lambda a: a.c[0], r"\((4|64),\)", "V, D"),
        ("c", "3-d", lambda a: a.c[None], r"\(1, ", "V, D"),
        ("bias", "short", lambda a: a.bias[1:], rf"\({V_LESS},\)", PER_CLASS),
        ("bias", "2-d", lambda a: a.bias[None], rf"\(1, {V}\)", PER_CLASS),
        ("bias", "0-d", lambda a: a.bias[0, ...], r"\(\)", PER_CLASS),
        ("class_weight", "short", lambda a: a.class_weight[1:], rf"\({V_LESS},\)", PER_CLASS),
        ("class_weight", "0-d", lambda a: a.class_weight[0, ...], r"\(\)", PER_CLASS),
        ("class_weight", "per token", lambda a: a.token_weight, PER_TOKEN, PER_CLASS),
        ("token_weight", "short", lambda a: a.token_weight[:, 1:], LENGTH_LESS, PER_TOKEN),
        ("token_weight", "column", lambda a: a.token_weight[..., None], r", 1\)", PER_TOKEN),
        ("token_weight", "per class", lambda a: a.class_weight, PER_CLASS, PER_TOKEN),
        # Devices.
        ("e", "elsewhere", lambda a: torch_call(a, vars(a)), "meta", "cpu"),
        ("c", "elsewhere", lambda a: torch_call(a, {"c"}), "meta", "cpu"),
        ("targets", "elsewhere", lambda a: torch_call(a, {"targets"}), "meta", "cpu"),
        ("token_weight", "elsewhere", lambda a: torch_call(a, {"token_weight"}), "meta", "cpu"),
        # Values in arrays: the message names the first wrong one's position.
        (
            r"targets[1, 2]",
            "V",
            lambda a: put(a.targets, (1, 2), len(a.c)),
            f"got {V} ",
            rf"0, {V}",
        ),
        (r"targets[1, 0]", "-1", lambda a: put(a.targets, (1, 0), -1), "got -1 ", "index=-100"),
        (r"targets[0, 0]", "least", lambda a: put(a.targets, (0, 0), -(2**63)), "-922", "0, "),
        (
            r"targets[0, 3]",
            "two wrong",
            lambda a: put(put(a.targets, (1, 0), -7), (0, 3), -8),
            "got -8 ",
            rf"\[0, {V}\)",
        ),
        (r"targets[0, 1]", "not ignored", {"ignore_index": -1}, "got -100 ", "ignore_index=-1,"),
        (
            r"targets[0, 1]",
            "-100 wrapped to uint64",
            lambda a: a.targets.astype(np.uint64),
            f"got {2**64 - 100} ",
            "ignore_index=-100",
        ),
        (
            r"targets[0, 0]",
            "of no classes",
            lambda a: {"c": a.c[:0], "bias": a.bias[:0], "class_weight": a.class_weight[:0]},
            r"got \d",
            r"\[0, 0\)",
        ),
        ("class_weight[2]", "negative", lambda a: put(a.class_weight, 2, -1), "-1", WEIGHT),
        ("class_weight[3]", "NaN", lambda a: put(a.class_weight, 3, np.nan), "nan", WEIGHT),
        ("class_weight[4]", "inf", lambda a: put(a.class_weight, 4, np.inf), "inf", WEIGHT),
        (
            "class_weight[5]",
            "negative integer",
            lambda a: put(a.class_weight.astype(np.int8), 5, -3),
            "-3",
            WEIGHT,
        ),
        ("token_weight[1, 1]", "<0", lambda a: put(a.token_weight, (1, 1), -0.5), "-0.5", WEIGHT),
        ("token_weight[0, 2]", "NaN", lambda a: put(a.token_weight, (0, 2), np.nan), "nan", WEIGHT),
        ("token_weight[1, 3]", "inf", lambda a: put(a.token_weight, (1, 3), np.inf), "inf", WEIGHT),
        # Options.
        ("softcap", "zero", 0, "got 0", CAP),
        ("softcap", "negative", -1.5, "got -1.5", CAP),
        ("softcap", "NaN", np.nan, "got nan", CAP),
        ("softcap", "inf", np.inf, "got inf", CAP),
        ("filter_eps", "negative", -0.1, "got -0.1", EPS),
        ("filter_eps", "one", 1, "got 1", EPS),
        ("filter_eps", "NaN", np.nan, "got nan", EPS),
        ("filter_eps", "inf", np.inf, "got inf", EPS),
        ("filter_eps", "string", "automatic", "got 'automatic'", EPS),
        ("label_smoothing", "negative", -0.1, "got -0.1", ALPHA),
        ("label_smoothing", "over one", 1.5, "got 1.5", ALPHA),
        ("label_smoothing", "NaN", np.nan, "got nan", ALPHA),
        ("z_loss", "negative", -1e-4, "got -0.0001", LAMBDA),
        ("z_loss", "NaN", np.nan, "got nan", LAMBDA),
        ("z_loss", "inf", np.inf, "got inf", LAMBDA),
        ("logit_scale", "NaN", np.nan, "got nan", "finite number"),
        ("logit_scale", "-inf", -np.inf, "got -inf", "finite number"),
        ("shift", "negative", -1, "got -1", SHIFT),
        ("shift", "whole length", lambda a: a.e.shape[1], f"got {LENGTH}", f"smaller.*{LENGTH}"),
        ("shift", "beyond 64 bits", 2**70, f"got {2**70}", f"smaller.*{LENGTH}"),
        (
            "shift",
            "without a sequence",
            lambda a: {
                "e": a.e[0, 0],
                "targets": a.targets[0, 0, ...],
                "token_weight": a.token_weight[0, 0, ...],
                "shift": 1,
            },
            r"\(\)",
            "accepted: 0",
        ),
        (
            "shift",
            "of an empty sequence",
            lambda a: {
                "e": a.e[:, :0],
                "targets": a.targets[:, :0],
                "token_weight": a.token_weight[:, :0],
                "shift": 1,
            },
            "got 1",
            "smaller.* 0 ",
        ),
        ("seed", "negative", -1, "got -1", SEED),
        ("seed", "too large", 2**64, f"got {2**64}", SEED),
        ("workspace_bytes", "zero", 0, "got 0", WORKSPACE),
        ("workspace_bytes", "negative", -(2**20), "got -1048576", WORKSPACE),
        ("workspace_bytes", "far too small", 1, "got 1|1 byte", r"at least \d\d"),
        ("reduction", "unknown", "average", "got 'average'", REDUCTION),
        ("reduction", "upper case", "Mean", "got 'Mean'", REDUCTION),
        ("gradient_filter", "unknown", "biased", "got 'biased'", FILTER),
        ("gradient_filter", "the word None", "None", "got 'None'", FILTER),
    ],
}
CASES = [Case(error, *row) for error, rows in TABLE.items() for row in rows]
IDS = [f"{case.argument} {case.name}" for case in CASES]

# Arguments that token_statistics, which knows no loss, does not have.
OF_THE_LOSS = frozenset(inspect.signature(FUNCTIONS["vjp"]).parameters) - frozenset(
    inspect.signature(FUNCTIONS["token_statistics"]).parameters
)


def without_loss(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that token_statistics has."""
    return {name: value for name, value in arguments.items() if name not in OF_THE_LOSS}


def assert_refused(function: Callable[..., Any], call: dict[str, Any], case: Case) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        function(**call)
    message = str(caught.value)
    assert type(caught.value) is case.error, message
    argument = rf"(?<!\w){re.escape(case.argument)}(?!\w)"
    for pattern in (argument, case.given, case.accepted):
        assert re.search(pattern, message), f"{pattern!r} not found in: {message}"


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_refused(case: Case, function: str) -> None:
    valid = small_call()
    changed = case.change(valid)
    if function == "token_statistics":
        if case.argument.partition("[")[0] in OF_THE_LOSS:
            pytest.skip("token_statistics has no such argument")
        valid, changed = without_loss(valid), without_loss(changed)
    call = {**valid, **changed}
    arrays = [value for value in call.values() if isinstance(value, np.ndarray)]
    before = [array.tobytes() for array in arrays]
    assert_refused(FUNCTIONS[function], call, case)
    assert [array.tobytes() for array in arrays] == before


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_refused_before_any_work(case: Case) -> None:
    valid = large_call()
    call = {**valid, **case.change(valid)}
    tracemalloc.start()
    started = time.process_time()
    try:
        assert_refused(FUNCTIONS["value_and_grad"], call, case)
        seconds = time.process_time() - started
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The 2^32 logits and their gradients take minutes of processor time; looking once at each
    # class and each token does not.
    assert seconds < 2
    # Nor does it need a copy of c.
    assert peak < 2**27


@pytest.mark.parametrize("call", [small_call, large_call])
def test_the_unaltered_calls_are_valid(call: Callable[[], dict[str, Any]]) -> None:
    """Or the table would show nothing. Without tokens to work on, the large one is cheap too."""
    valid = call()
    if call is large_call:
        valid["targets"] = np.full_like(valid["targets"], -100)
    assert np.isfinite(cce_cupy.linear_cross_entropy(**valid))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_argument_has_cases(function: str) -> None:
    altered = {name for case in CASES for name in case.change(small_call())}
    assert set(inspect.signature(FUNCTIONS[function]).parameters) <= altered


@pytest.mark.parametrize("function", FUNCTIONS)
def test_missing_argument(function: str) -> None:
    valid = small_call()
    with pytest.raises(TypeError, match=r"missing.*targets"):
        FUNCTIONS[function](valid["e"], valid["c"])


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("count", "named", "complaint"),
    [
        (3, ["e"], "multiple values.*'e'"),
        (2, ["unknown"], "missing.*targets|unexpected keyword.*unknown"),
        (0, ["e"], "missing.*'c'"),
        (12, [], "positional"),
    ],
)
def test_arguments_that_do_not_fit(
    function: str, count: int, named: list[str], complaint: str
) -> None:
    valid = list(small_call().values())[:3] + [None] * 9
    with pytest.raises(TypeError, match=complaint):
        FUNCTIONS[function](*valid[:count], **dict.fromkeys(named, 0))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_later_arguments_are_keyword_only(function: str) -> None:
    """Only what the reference implementation has, in its order, may be given by position."""
    reference = ["e", "c", "targets", "bias", "ignore_index", "softcap", "reduction", "shift"]
    reference += ["return_lse", "filter_eps"]
    if function == "token_statistics":
        reference = [name for name in reference if name not in OF_THE_LOSS]
    parameters = inspect.signature(FUNCTIONS[function]).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == reference
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters if p.name not in reference)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_workspace_minimum_named_is_the_minimum(function: str) -> None:
    call = small_call()
    if function == "token_statistics":
        call = without_loss(call)
    with pytest.raises(ValueError, match="workspace_bytes") as caught:
        FUNCTIONS[function](**call, workspace_bytes=1)
    minimum = int(re.search(r"at least (\d+)", str(caught.value)).group(1))
    FUNCTIONS[function](**call, workspace_bytes=minimum)
    with pytest.raises(ValueError, match=rf"workspace_bytes.*at least {minimum}\b"):
        FUNCTIONS[function](**call, workspace_bytes=minimum - 1)


ONE, EACH = np.ones(()), np.ones((2, 6))  # upstream gradients of the small call's loss or losses

# Reduction, arguments of the pullback; what its message must name, say is given, say is accepted.
UPSTREAM = {
    TypeError: [
        ("mean", {"dloss": np.ones((), int)}, "dloss", "int64", FLOATS),
        ("mean", {"dloss": np.ones((), complex)}, "dloss", "complex128", FLOATS),
        ("none", {"dloss": EACH.astype(object)}, "dloss", "object", FLOATS),
        ("none", {"dloss": EACH.tolist()}, "dloss", "list", ARRAYS),
        ("none", {"dloss": np.ma.MaskedArray(EACH)}, "dloss", "(?i)mask", ARRAYS),
        ("mean", {"dloss": None}, "dloss", "None", ARRAYS),
        ("sum", {"dloss": ONE, "dlse": EACH.astype(bool)}, "dlse", "bool", FLOATS),
        ("none", {"dloss": EACH, "dlse": [0.0]}, "dlse", "list", ARRAYS),
        ("mean", {}, "dloss", "missing", "argument"),
        ("mean", {"dloss": ONE, "lse": EACH}, "lse", "got an", "unexpected keyword"),
    ],
    ValueError: [
        ("mean", {"dloss": np.ones(1)}, "dloss", r"\(1,\)", r"\(\)"),
        ("sum", {"dloss": EACH}, "dloss", r"\(2, 6\)", r"\(\)"),
        ("none", {"dloss": ONE}, "dloss", r"\(\)", r"\(2, 6\)"),
        ("none", {"dloss": np.ones(12)}, "dloss", r"\(12,\)", r"\(2, 6\)"),
        ("none", {"dloss": EACH.T}, "dloss", r"\(6, 2\)", r"\(2, 6\)"),
        ("mean", {"dloss": ONE, "dlse": ONE}, "dlse", r"\(\)", r"\(2, 6\)"),
        ("sum", {"dloss": ONE, "dlse": np.ones(12)}, "dlse", r"\(12,\)", r"\(2, 6\)"),
    ],
}


@pytest.mark.parametrize(
    ("error", "reduction", "arguments", "patterns"),
    [(error, *row[:2], row[2:]) for error, rows in UPSTREAM.items() for row in rows],
)
def test_pullback_refuses(
    error: type[Exception], reduction: str, arguments: dict[str, Any], patterns: tuple[str, ...]
) -> None:
    _, pullback = cce_cupy.linear_cross_entropy_vjp(**small_call(), reduction=reduction)
    assert_refused(pullback, arguments, Case(error, patterns[0], "", None, *patterns[1:]))
