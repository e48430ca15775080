"""Descriptors by which Hopper copies boxes of a matrix to shared memory."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

from .driver import library

BYTES = 128
"""Of a CUtensorMap, which lies at a multiple of 64."""

_KIND = {"float16": 6, "bfloat16": 9}  # CUtensorMapDataType
_SWIZZLE_128 = 3
_PROMOTE_256 = 3  # of L2 sectors
_ITEM = 2


class TensorMap(NamedTuple):
    """A matrix whose boxes are copied, swizzled, to rows of 128 bytes.

    What of a box lies outside the matrix comes as zeros.

    Attributes
    ----------
    pointer : int
        Device address, a multiple of 16.
    shape : tuple of int
        Rows and columns.
    stride : int
        Elements from row to row, whose bytes are a multiple of 16.
    dtype : str
        ``"float16"`` or ``"bfloat16"``.
    box : tuple of int
        Rows, at most 256, and columns, of 128 bytes.
    """

    pointer: int
    shape: tuple[int, int]
    stride: int
    dtype: str
    box: tuple[int, int]


@functools.lru_cache(maxsize=1024)
def encode(matrix: TensorMap) -> bytes:
    """Return the descriptor, to be passed to a kernel by value.

    Descriptors are kept: training comes back to the same addresses.

    Raises
    ------
    RuntimeError
        When the driver refuses.
    """
    pointer, shape, stride, dtype, box = matrix
    room = ctypes.create_string_buffer(BYTES + 64)
    offset = -ctypes.addressof(room) % 64
    dims = (ctypes.c_uint64 * 2)(shape[1], shape[0])
    strides = (ctypes.c_uint64 * 1)(stride * _ITEM)
    boxes = (ctypes.c_uint32 * 2)(box[1], box[0])
    steps = (ctypes.c_uint32 * 2)(1, 1)
    status = library().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(room) + offset),
        _KIND[dtype], 2, ctypes.c_void_p(pointer), dims, strides, boxes, steps,
        0, _SWIZZLE_128, _PROMOTE_256, 0,
    )  # fmt: skip
    if status != 0:
        raise RuntimeError(
            f"the driver refused to describe a matrix of {shape[0]} x {shape[1]} {dtype}, rows "
            f"{stride} elements apart, at {pointer:#x}: CUDA error {status}"
        )
    return room.raw[offset : offset + BYTES]
