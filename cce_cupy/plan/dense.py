"""How the backward on Hopper is cut where every column is kept and every token counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .hopper import ORDER_BLOCK, TILE_COLUMNS, cut_units, group_rows
from .shared import ROW_TILE

_CLUSTER = 2
_WIDTH = 256
"""kWidth of kernels_cu/sm90/backward.cuh: elements of D whose gradients are formed at once."""

_NARROW = 128
"""kNarrow of kernels_cu/sm90/gradients.cuh: where no more are left, products take half the time."""

_UNFINISHED = 512
"""What it costs to take up and leave unfinished sums of dE, in elements of depth."""

_LAUNCHES = 1600
"""What the launches of a chunk cost, likewise."""


class DenseCut(NamedTuple):
    """What the launches of a chunk are given.

    Attributes
    ----------
    columns : int
        Of a chunk, a multiple of 128.
    blocks : int
        Of the grids.
    unit_tiles, group : int
        The order of work of dz, as of the forward.
    waiting : int
        Rows of unfinished sums of dE whose low halves wait in the last rows of dC, which the last
        chunk writes when it is done with dE.
    low_offset : int
        Where those of the other rows start, in bytes from the first record.
    """

    columns: int
    blocks: int
    unit_tiles: int
    group: int
    waiting: int
    low_offset: int

    def chunks(self, vocab: int) -> range:
        """Return the first column of each chunk."""
        return range(0, vocab, self.columns)


class DenseSizes(NamedTuple):
    """What dense products are of.

    Attributes
    ----------
    tokens, vocab, dim : int
        Sizes of the problem.
    itemsize : int
        Bytes of an element.
    processors : int
        Multiprocessors of the device.
    """

    tokens: int
    vocab: int
    dim: int
    itemsize: int
    processors: int


def plan_dense_side(sizes: DenseSizes, most_blocks: int, low_offset: int) -> DenseCut | None:
    """Cut the vocabulary into chunks of which the last round of work is as full as the others.

    Parameters
    ----------
    sizes : DenseSizes
    most_blocks : int
        Blocks of 128 columns whose dz there is room for.
    low_offset : int
        Where there is room for low halves of unfinished sums, in bytes from the first record.

    Returns
    -------
    DenseCut or None
        None where there is no room for a block.
    """
    return _cut(sizes, _candidates(sizes, most_blocks), lambda blocks: (0, low_offset))


def plan_dense_both(sizes: DenseSizes, room: int) -> DenseCut | None:
    """Cut it where both gradients are formed: sums of dE then wait where dC comes last.

    Parameters
    ----------
    sizes : DenseSizes
    room : int
        Bytes for dz of a chunk and for low halves that do not fit into the last rows of dC.

    Returns
    -------
    DenseCut or None
        None where there is no room for a block.
    """
    tokens, vocab = sizes.tokens, sizes.vocab
    block_bytes = sizes.itemsize * tokens * ORDER_BLOCK

    def waits(chunk_blocks: int) -> tuple[int, int]:
        columns = chunk_blocks * ORDER_BLOCK
        last = vocab - (vocab - 1) // columns * columns
        return 0 if last == vocab else min(tokens, last), chunk_blocks * block_bytes

    def fits(chunk_blocks: int) -> bool:
        waiting, dz = waits(chunk_blocks)
        in_one = chunk_blocks * ORDER_BLOCK >= vocab
        return dz + (0 if in_one else 2 * sizes.dim * (tokens - waiting)) <= room

    return _cut(sizes, list(filter(fits, _candidates(sizes, room // block_bytes))), waits)


def _candidates(sizes: DenseSizes, most_blocks: int) -> list[int]:
    """Return sizes of chunks, in blocks: of as few as there can be, up to half as many again."""
    if most_blocks < 1 or sizes.processors < _CLUSTER:
        return []
    blocks = -(-sizes.vocab // ORDER_BLOCK)
    least = -(-blocks // most_blocks)
    # Beside records that hold all columns there is no room for unfinished sums.
    most = 1 if least == 1 else min(least + least // 2 + 1, blocks)
    return sorted({-(-blocks // n) for n in range(least, most + 1)})


def _cut(
    sizes: DenseSizes, candidates: list[int], waits: Callable[[int], tuple[int, int]]
) -> DenseCut | None:
    """Return the fastest chunks, and the order of their work; `waits` says what waits where."""
    if not candidates:
        return None
    tokens, vocab, dim, itemsize, processors = sizes
    chunk_blocks = min(candidates, key=lambda n: chunks_cost(tokens, vocab, dim, processors, n))
    waiting, low_offset = waits(chunk_blocks)
    clusters, row_pairs = processors // _CLUSTER, -(-tokens // (_CLUSTER * ROW_TILE))
    tiles = -(-min(chunk_blocks * ORDER_BLOCK, vocab) // TILE_COLUMNS)
    return DenseCut(
        columns=chunk_blocks * ORDER_BLOCK,
        blocks=_CLUSTER * clusters,
        unit_tiles=cut_units(row_pairs, tiles, clusters),
        group=group_rows(row_pairs, _CLUSTER * ROW_TILE * dim * itemsize),
        waiting=waiting,
        low_offset=low_offset,
    )


def chunks_cost(tokens: int, vocab: int, dim: int, processors: int, chunk_blocks: int) -> float:
    """Return how long all chunks take: the depth that the fullest pair of blocks multiplies over.

    Parameters
    ----------
    tokens, vocab, dim : int
        Sizes of the problem.
    processors : int
        Multiprocessors of the device.
    chunk_blocks : int
        Blocks of 128 columns of a chunk.
    """
    clusters, blocks = processors // _CLUSTER, -(-vocab // ORDER_BLOCK)
    parts, row_pairs = -(-dim // _WIDTH), -(-tokens // (_CLUSTER * ROW_TILE))
    columns = min(chunk_blocks * ORDER_BLOCK, vocab)
    chunks = -(-blocks // chunk_blocks)
    each = columns + (_UNFINISHED if chunks > 1 else 0)
    longest = longest_of_products(
        clusters,
        [each] * row_pairs + [tokens] * -(-chunk_blocks // _CLUSTER),
        [1.0] * (parts - 1) + [0.5 if dim - (parts - 1) * _WIDTH <= _NARROW else 1.0],
    )
    tiles = -(-columns // TILE_COLUMNS)
    unit_tiles = cut_units(row_pairs, tiles, clusters)
    rounds = -(-row_pairs * -(-tiles // unit_tiles) // clusters)
    logits = rounds * unit_tiles * dim * TILE_COLUMNS / _WIDTH
    return chunks * (longest + logits + _LAUNCHES)


def longest_of_products(clusters: int, depths: list[int], parts: list[float]) -> float:
    """Return the depth that the fullest pair of blocks multiplies over.

    Pairs take items in rounds, and change their places from one to the next, as DenseItem of
    kernels_cu/sm90/dense_gradients.cu says.

    Parameters
    ----------
    clusters : int
        Pairs of blocks.
    depths : list of int
        Of the products: all parts of D of one, then those of the next.
    parts : list of float
        How much of a whole one each part of D is.
    """
    work = [depth * share for depth in depths for share in parts]
    taken = [0.0] * clusters
    for number, first in enumerate(range(0, len(work), clusters)):
        for place, depth in enumerate(work[first : first + clusters]):
            taken[(place - number) % clusters] += depth
    return max(taken)
