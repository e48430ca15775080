"""The kept-column bitmask and the random thresholds of the unbiased filter, in NumPy.

One bit for each row tile and vocabulary column, packed little-endian along the columns, and one
uniform number for each row tile and chunk of `COLUMN_CHUNK` columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..plan import COLUMN_CHUNK, ROW_TILE

_MASK = 0xFFFFFFFF


def new_bits(tokens: int, vocab: int) -> npt.NDArray[np.uint8]:
    """Return cleared bits, uint8 of shape (row tiles, 4 * column chunks)."""
    return np.zeros((-(-tokens // ROW_TILE), 4 * -(-vocab // COLUMN_CHUNK)), np.uint8)


def put_bits(
    bits: npt.NDArray[np.uint8], tile: int, first: int, keep: npt.NDArray[np.bool_]
) -> None:
    """Write the bits of columns [first, first + len(keep)) of a tile; first is whole chunks."""
    packed = np.packbits(keep, bitorder="little")
    bits[tile, first // 8 : first // 8 + len(packed)] = packed


def kept_columns(
    bits: npt.NDArray[np.uint8], tile: int, first: int, last: int
) -> npt.NDArray[np.intp]:
    """Return the kept columns of a tile in [first, last), ascending; first is whole chunks."""
    packed = bits[tile, first // 8 : -(-last // 8)]
    return first + np.flatnonzero(np.unpackbits(packed, count=last - first, bitorder="little"))


def columns_kept_by_any(bits: npt.NDArray[np.uint8], first: int, last: int) -> npt.NDArray[np.intp]:
    """Return the columns in [first, last) that some tile keeps, as `kept_columns` does of one."""
    some = bits[:, first // 8 : -(-last // 8)]
    united = np.bitwise_or.reduce(some, axis=0, keepdims=True)
    return first + kept_columns(united, 0, 0, last - first)


def uniforms(seed: int, tile: int, first: int, last: int) -> npt.NDArray[np.float32]:
    """Return the thresholds u of the chunks [first, last) of a row tile.

    A counter-based hash: a pure function of its arguments, in 32-bit integers so that every
    device computes the same. The 24 leading bits make a float32 exactly.

    Parameters
    ----------
    seed : int
        64 bits.
    tile, first, last : int
        Row tile, and the range of chunks (column // `COLUMN_CHUNK`).

    Returns
    -------
    ndarray of float32, shape (last - first,)
        Multiples of 2**-24 in (0, 1].
    """
    key = _mix(_number(seed >> 32))
    key = _mix(key ^ _number(seed))
    row = _mix(key ^ _number(tile))
    chunk = np.arange(first, last, dtype=np.uint32) * np.uint32(0x9E3779B9)
    # Two keys and two rounds: with one, the rows of two tiles could be shifts of each other.
    hashed = _mix(_mix(chunk + row) ^ _mix(row + np.uint32(1)))
    return ((hashed >> np.uint32(8)).astype(np.float32) + np.float32(1)) * np.float32(2.0**-24)


def seed_from_targets(targets: npt.NDArray[np.int64]) -> int:
    """Derive a seed from the targets that count, in their order.

    A sum of hashes of (position, target): it can be formed in any order.

    Parameters
    ----------
    targets : ndarray of int64, shape (N,)

    Returns
    -------
    int
        64 bits.
    """
    low = targets.astype(np.uint32)
    high = (targets >> 32).astype(np.uint32)
    position = np.arange(len(targets), dtype=np.uint32)
    hashed = _mix(_mix(position * np.uint32(0x9E3779B9) ^ high) ^ low)
    other = _mix(hashed ^ np.uint32(0x85EBCA6B))
    total = int(hashed.sum(dtype=np.uint64)) & _MASK
    return total << 32 | int(other.sum(dtype=np.uint64)) & _MASK


def _number(value: int) -> npt.NDArray[np.uint32]:
    # A one-element array: NumPy warns about the wrap-around of scalars, which is wanted here.
    return np.array([value & _MASK], np.uint32)


def _mix(x: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """Mix 32 bits: each input bit flips each output bit with a chance close to one half."""
    mixed = np.array(x, np.uint32)
    mixed ^= mixed >> np.uint32(16)
    mixed *= np.uint32(0x7FEB352D)
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0x846CA68B)
    mixed ^= mixed >> np.uint32(16)
    return mixed
