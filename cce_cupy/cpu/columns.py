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
_TILE_STEP, _CHUNK_STEP = np.uint32(0xC13FA9A9), np.uint32(0x91E10DA5)
"""Of the lattice of thresholds, as kTileStep and kChunkStep of kernels_cu/columns.cuh."""


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

    A lattice that the seed shifts: each threshold alone is uniform, whatever the others, so that
    the filter is unbiased. Over neighbouring row tiles of a chunk, and chunks of a row tile, they
    are spread evenly, so that of what these have in common less is lost or doubled by chance than
    with independent ones. In 32-bit integers: every device computes the same.

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

    References
    ----------
    M. Roberts, "The unreasonable effectiveness of quasirandom sequences" (2018): the steps are
    1 / g and 1 / g**2, where g**3 = g + 1.
    """
    shift = _mix(_number(seed >> 32))
    shift = _mix(shift ^ _number(seed))
    chunk = np.arange(first, last, dtype=np.uint32) * _CHUNK_STEP
    # The leading 24 bits make a float32 exactly.
    place: npt.NDArray[np.uint32] = (shift + _number(tile) * _TILE_STEP + chunk) >> np.uint32(8)
    return (place.astype(np.float32) + np.float32(1)) * np.float32(2.0**-24)


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
