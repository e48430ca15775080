"""What the driver is told of a matrix; a stub stands for it."""

import ctypes
from types import SimpleNamespace

import pytest

from cce_cupy import tensor_map as module
from cce_cupy.tensor_map import TensorMap, encode


@pytest.fixture
def encoded(monkeypatch):
    """Let a stub encode; return what it was given, and where to put the status it returns."""
    seen = SimpleNamespace(status=0)

    def stub(out, kind, rank, pointer, dims, strides, box, steps, *rest):
        seen.out, seen.kind, seen.pointer = out.value, kind, pointer.value
        seen.dims, seen.strides = list(dims), list(strides)
        seen.box, seen.steps, seen.rest = list(box), list(steps), rest
        assert rank == len(dims) == len(box) == len(strides) + 1
        ctypes.memset(out.value, 0xA5, 128)
        return seen.status

    driver = SimpleNamespace(cuTensorMapEncodeTiled=stub)
    monkeypatch.setattr(module, "library", lambda: driver)
    encode.cache_clear()
    return seen


@pytest.mark.parametrize(("dtype", "kind"), [("float16", 6), ("bfloat16", 9)])
def test_matrix_is_described_inner_axis_first(encoded, dtype, kind):
    found = encode(TensorMap(0x7F0000000010, (1000, 72), 80, dtype, (128, 64)))
    assert encoded.kind == kind
    assert encoded.pointer == 0x7F0000000010
    assert encoded.dims == [72, 1000]
    assert encoded.strides == [160]  # bytes
    assert encoded.box == [64, 128]
    assert encoded.steps == [1, 1]
    assert encoded.rest == (0, 3, 3, 0)
    assert encoded.out % 64 == 0
    assert found == b"\xa5" * 128


def test_refusal_says_of_what(encoded):
    encoded.status = 1
    with pytest.raises(RuntimeError, match=r"8 x 16 float16, rows 24 elements apart.*error 1"):
        encode(TensorMap(16, (8, 16), 24, "float16", (8, 8)))
