"""Odd input that is accepted: the results are those of the plain call, the input stays as it was.

Plain means C-contiguous, aligned, native byte order, int64 targets and Python numbers as options.
"""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cce_cupy

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
SHAPE = (3, 70)  # 210 tokens: more than one row tile
DIM, VOCAB = 12, 45
ARRAYS = ("e", "c", "targets", "bias", "class_weight", "token_weight")
OF_STATISTICS = {"e", "c", "targets", "bias", "ignore_index", "softcap", "shift", "logit_scale"}
OF_STATISTICS |= {"check_targets", "workspace_bytes"}


def plain_call(dtype: Any = np.float32) -> dict[str, Any]:
    """Return arguments that put every array to use; no value repeats by accident."""
    rng = np.random.default_rng(2)
    targets = rng.integers(0, VOCAB, SHAPE)
    targets[rng.random(SHAPE) < 0.2] = -100
    return {
        "e": rng.standard_normal((*SHAPE, DIM)).astype(dtype),
        "c": rng.standard_normal((VOCAB, DIM)).astype(dtype),
        "targets": targets,
        "bias": rng.standard_normal(VOCAB).astype(dtype),
        "class_weight": rng.random(VOCAB, np.float32),
        "token_weight": rng.random(SHAPE, np.float32),
    }


def results(call: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return everything that the four functions and a pullback make of the call, by name."""
    of_loss = {"reduction": "sum", **call}
    loss = cce_cupy.linear_cross_entropy(**of_loss)
    same_loss, grad = cce_cupy.linear_cross_entropy_value_and_grad(**of_loss)
    each, pullback = cce_cupy.linear_cross_entropy_vjp(**{**call, "reduction": "none"})
    upstream = np.linspace(-1, 1, each.size).reshape(each.shape)
    pulled = pullback(upstream, upstream[::-1] if upstream.ndim else upstream)
    statistics = cce_cupy.token_statistics(
        **{name: value for name, value in call.items() if name in OF_STATISTICS}
    )
    named = {"loss": loss, "value_and_grad": same_loss, "none": each, **statistics._asdict()}
    for kind, gradients in {"gradient": grad, "pulled": pulled}.items():
        named |= {f"{kind} of {name}": array for name, array in gradients._asdict().items()}
    return {name: array for name, array in named.items() if array is not None}


def assert_same(odd: dict[str, np.ndarray], plain: dict[str, np.ndarray]) -> None:
    """Assert equal values, shapes and dtypes, byte order aside."""
    assert odd.keys() == plain.keys()
    for name, expected in plain.items():
        assert type(odd[name]) is np.ndarray, name
        assert odd[name].dtype.newbyteorder("=") == expected.dtype, name
        np.testing.assert_array_equal(odd[name], expected, err_msg=name, strict=False)
        assert odd[name].shape == expected.shape, name


def widened(array: np.ndarray, axis: int, step: int) -> np.ndarray:
    """Return equal values as a view that takes every step-th place of a larger array."""
    places = list(array.shape)
    places[axis] *= abs(step)
    room = np.full(places, 77, array.dtype)
    view = np.moveaxis(np.moveaxis(room, axis, 0)[::step], 0, axis)
    view[...] = array
    return view


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


def transposed(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.T).T


def unaligned(array: np.ndarray) -> np.ndarray:
    room = np.zeros(array.nbytes + 1, np.uint8)
    view = np.ndarray(array.shape, array.dtype, room.data, offset=1)
    view[...] = array
    return view


def swapped(array: np.ndarray) -> np.ndarray:
    if array.dtype == ml_dtypes.bfloat16:
        pytest.skip("NumPy knows bfloat16 in native byte order only")
    return array.astype(array.dtype.newbyteorder())


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "read-only": read_only,
    "Fortran order": np.asfortranarray,
    "transposed": transposed,
    "every second row": lambda array: widened(array, 0, 2),
    "every third along the last axis": lambda array: widened(array, -1, 3),
    "rows backwards": lambda array: widened(array, 0, -1),
    "last axis backwards, every second": lambda array: widened(array, -1, -2),
    "unaligned": unaligned,
    "swapped byte order": swapped,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str, dtype: Any) -> None:
    """All arrays at once; which one is at fault, `test_layout_of_one` tells."""
    plain = plain_call(dtype)
    assert_same(results({n: LAYOUTS[layout](a) for n, a in plain.items()}), results(plain))


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_one(layout: str, name: str) -> None:
    plain = plain_call()
    odd = {**plain, name: LAYOUTS[layout](plain[name])}
    assert odd[name].strides != plain[name].strides or layout in {
        "read-only", "unaligned", "swapped byte order", "Fortran order", "transposed"
    }  # fmt: skip
    assert_same(results(odd), results(plain))


def test_batch_axes_that_no_reshape_can_join() -> None:
    plain = plain_call()
    odd = {**plain, "e": np.ascontiguousarray(plain["e"].swapaxes(0, 1)).swapaxes(0, 1)}
    odd["targets"] = np.asfortranarray(plain["targets"])
    assert_same(results(odd), results(plain))


@pytest.mark.parametrize("filtered", ["unbiased", "threshold"])
def test_layout_does_not_change_what_a_filter_keeps(filtered: str) -> None:
    plain = {**plain_call(), "gradient_filter": filtered, "filter_eps": 0.02}
    odd = {**plain, **{name: widened(plain[name], 0, -2) for name in ARRAYS}}
    assert_same(results(odd), results(plain))


@pytest.mark.parametrize("name", ARRAYS)
def test_broadcast(name: str) -> None:
    """Stride 0: one row, or one number, standing for the whole array."""
    plain = plain_call()
    odd = np.broadcast_to(plain[name][:1], plain[name].shape)
    assert 0 in odd.strides
    assert_same(results({**plain, name: odd}), results({**plain, name: odd.copy()}))


def test_overlapping_rows() -> None:
    """A sliding window: rows that share memory with each other."""
    plain = plain_call()
    line = np.random.default_rng(3).standard_normal(VOCAB + DIM - 1, np.float32)
    odd = np.lib.stride_tricks.sliding_window_view(line, DIM)
    assert_same(results({**plain, "c": odd}), results({**plain, "c": odd.copy()}))


def test_e_and_c_may_be_the_same_memory() -> None:
    """As in a contrastive loss of a batch with itself.

    NumPy multiplies a matrix by its own transpose in another routine, which sums in another order.
    """
    both = plain_call()["c"]
    call = {"e": both, "c": both, "targets": np.arange(VOCAB)}
    expected = results({**call, "e": both.copy()})
    for name, array in results(call).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_memory_mapped(mode: str, tmp_path: Path) -> None:
    plain = plain_call()
    odd = {}
    for name, array in plain.items():
        np.save(tmp_path / name, array)
        odd[name] = np.load(tmp_path / f"{name}.npy", mmap_mode=mode)
    assert_same(results(odd), results(plain))
    del odd
    for name, array in plain.items():
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), array)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_keep_every_byte(layout: str) -> None:
    """Also between the elements of a strided view, and whatever the results are made of."""
    call = {name: LAYOUTS[layout](array) for name, array in plain_call().items()}
    memory = {name: _whole_memory(array) for name, array in call.items()}
    before = {name: bytes(array) for name, array in memory.items()}
    returned = results({**call, "softcap": 5.0, "label_smoothing": 0.1, "z_loss": 1e-3})
    for array in returned.values():
        assert not any(np.may_share_memory(array, given) for given in memory.values())
        array[...] = 0  # results belong to the caller
    assert {name: bytes(array) for name, array in memory.items()} == before


def _whole_memory(array: np.ndarray) -> np.ndarray:
    """Return the array that owns a view's memory, as bytes."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    if isinstance(array.base, memoryview):
        array = np.frombuffer(array.base, np.uint8)
    return array.reshape(-1, order="A").view(np.uint8)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (0, 0, 4)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_tokens(shape: tuple[int, ...], reduction: str) -> None:
    call = {"e": np.ones((*shape, DIM), np.float32), "targets": np.ones(shape, int)}
    call |= {name: plain_call()[name] for name in ("c", "bias", "class_weight")}
    call |= {"token_weight": np.ones(shape), "reduction": reduction, "return_lse": True}
    (loss, lse), gradients = cce_cupy.linear_cross_entropy_value_and_grad(**call)
    assert loss.shape == (shape if reduction == "none" else ())
    assert lse.shape == shape
    assert (loss == 0).all()
    for name in ("e", "c", "bias"):
        gradient = getattr(gradients, name)
        assert gradient.shape == call[name].shape
        assert (gradient == 0).all()
    statistics = cce_cupy.token_statistics(call["e"], call["c"], call["targets"])
    assert all(array.shape == shape for array in statistics)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_features(dtype: Any) -> None:
    """D = 0: every logit is the bias alone."""
    call = {"e": np.ones((4, 0), dtype), "c": np.ones((8, 0), dtype), "targets": np.arange(4)}
    loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(**call)
    np.testing.assert_allclose(loss, np.log(8), rtol=1e-6)
    assert (gradients.e.shape, gradients.c.shape) == ((4, 0), (8, 0))
    call["bias"] = np.log(np.arange(1, 9)).astype(dtype)
    expected = np.log(np.exp(call["bias"].astype(float)).sum()) - call["bias"][:4].astype(float)
    loss = cce_cupy.linear_cross_entropy(**call, reduction="none")
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_classes(reduction: str) -> None:
    """V = 0: no target can be right, so all are ignored."""
    call = {"e": np.ones((4, 5), np.float32), "c": np.ones((0, 5), np.float32)}
    call |= {"targets": np.full(4, -100), "bias": np.ones(0, np.float32)}
    loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(**call, reduction=reduction)
    assert (loss == 0).all()
    assert (gradients.e == 0).all()
    assert (gradients.c.shape, gradients.bias.shape) == ((0, 5), (0,))
    statistics = cce_cupy.token_statistics(**call)
    assert (statistics.argmax == -1).all()
    assert (statistics.lse == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_without_batch_axes(reduction: str, dtype: Any) -> None:
    """Batch shape (): the same as a batch of one."""
    plain = plain_call(dtype)
    weight = {"class_weight": plain["class_weight"], "reduction": reduction, "return_lse": True}
    for_one = {"e": plain["e"][0, 0], "targets": np.array(7), "token_weight": np.array(0.5)}
    batch_of_one = {name: array[None] for name, array in for_one.items()}
    shared = {"c": plain["c"], "bias": plain["bias"], **weight}
    (loss, lse), gradients = cce_cupy.linear_cross_entropy_value_and_grad(**for_one, **shared)
    (losses, lses), batched = cce_cupy.linear_cross_entropy_value_and_grad(**batch_of_one, **shared)
    for scalar in (loss, lse):
        assert type(scalar) is np.ndarray
        assert scalar.shape == ()
    np.testing.assert_array_equal(loss, losses.reshape(()))
    np.testing.assert_array_equal(lse, lses[0])
    np.testing.assert_array_equal(gradients.e, batched.e[0])
    np.testing.assert_array_equal(gradients.c, batched.c)
    np.testing.assert_array_equal(gradients.bias, batched.bias)
    statistics = cce_cupy.token_statistics(for_one["e"], plain["c"], for_one["targets"])
    assert all(type(array) is np.ndarray and array.shape == () for array in statistics)
    # NumPy's scalars are 0-d arrays here.
    scalars = {**for_one, "targets": np.int64(7), "token_weight": np.float64(0.5)}
    del shared["return_lse"]
    assert_same(results({**scalars, **shared}), results({**for_one, **shared}))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_target_dtype(dtype: str) -> None:
    """Also where ignore_index, or V, is no number of that dtype."""
    plain = plain_call()
    plain["ignore_index"] = 99
    plain["targets"][plain["targets"] == -100] = 99
    odd = {**plain, "targets": plain["targets"].astype(dtype)}
    assert_same(results(odd), results(plain))

    plain["ignore_index"] = -(2**40)
    plain["targets"][plain["targets"] == 99] = 3
    odd = {**plain, "targets": plain["targets"].astype(dtype)}
    assert_same(results(odd), results(plain))

    wide = {name: plain[name] for name in ("e", "c", "targets", "bias")}
    wide["c"], wide["bias"] = np.tile(wide["c"], (8, 1)), np.tile(wide["bias"], 8)
    odd = {**wide, "targets": wide["targets"].astype(dtype)}
    assert_same(results(odd), results(wide))


def test_ignore_index_at_the_top_of_uint64() -> None:
    plain = plain_call()
    odd = {**plain, "targets": plain["targets"].astype(np.uint64), "ignore_index": 2**64 - 100}
    assert_same(results(odd), results(plain))


def test_ignore_index_that_is_a_class() -> None:
    plain = plain_call()
    plain["targets"][plain["targets"] == 5] = -100
    odd = {**plain, "targets": np.where(plain["targets"] == -100, 5, plain["targets"])}
    assert_same(results({**odd, "ignore_index": 5}), results(plain))


@pytest.mark.parametrize("name", ["class_weight", "token_weight"])
@pytest.mark.parametrize("dtype", ["bool", "int8", "uint64", "float16", "float64", "bfloat16"])
def test_weight_dtype(name: str, dtype: str) -> None:
    plain = plain_call()
    weight = np.arange(plain[name].size).reshape(plain[name].shape) % 2
    odd = {**plain, name: weight.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)}
    assert_same(results(odd), results({**plain, name: weight.astype(np.float32)}))


OPTIONS = [
    ("softcap", np.float32(5), 5.0),
    ("softcap", np.int16(5), 5.0),
    ("softcap", Fraction(5, 2), 2.5),
    ("logit_scale", np.float16(0.5), 0.5),
    ("logit_scale", 2, 2.0),
    ("shift", np.int64(2), 2),
    ("shift", np.uint8(2), 2),
    ("shift", True, 1),
    ("shift", False, 0),
    ("ignore_index", np.int8(-100), -100),
    ("ignore_index", np.array(-100), -100),
    ("check_targets", np.True_, True),
]
OPTIONS_OF_LOSS = [
    ("label_smoothing", np.float64(0.25), 0.25),
    ("label_smoothing", 1, 1.0),
    ("z_loss", np.float32(0.5), 0.5),
    ("filter_eps", np.float64(0.125), 0.125),
    ("filter_eps", 0, None),
    ("seed", np.uint64(2**64 - 1), 2**64 - 1),
    ("seed", True, 1),
    ("gradient_filter", np.str_("threshold"), "threshold"),
    ("filter_e_grad", np.False_, False),
    ("filter_c_grad", np.False_, False),
    ("workspace_bytes", np.int64(2**28), 2**28),
]


@pytest.mark.parametrize(("name", "odd", "plain"), OPTIONS + OPTIONS_OF_LOSS)
def test_option(name: str, odd: Any, plain: Any) -> None:
    """Numbers of any kind, NumPy's scalars among them, count as the number they are."""
    call = {"filter_eps": 0.02, **plain_call()}
    assert_same(results({**call, name: odd}), results({**call, name: plain}))


def test_option_return_lse_as_numpy_bool() -> None:
    loss, lse = cce_cupy.linear_cross_entropy(**plain_call(), return_lse=np.True_)
    assert (loss.shape, lse.shape) == ((), SHAPE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_upstream_of_another_dtype_and_layout(dtype: Any) -> None:
    call = {**plain_call(), "reduction": "none"}
    _, pullback = cce_cupy.linear_cross_entropy_vjp(**call)
    upstream = np.random.default_rng(4).standard_normal(SHAPE).astype(dtype)
    plain = pullback(upstream.astype(np.float64), upstream.astype(np.float64))._asdict()
    odd = pullback(widened(upstream, 0, -2), np.asfortranarray(upstream))._asdict()
    assert_same(odd, plain)


@pytest.mark.parametrize("number", [2, 2.0, np.float16(2), np.array(2.0)])
def test_upstream_of_a_scalar_loss_may_be_a_number(number: Any) -> None:
    _, pullback = cce_cupy.linear_cross_entropy_vjp(**plain_call())
    plain = pullback(np.full((), 2.0, np.float32))._asdict()
    assert_same(pullback(number)._asdict(), plain)
