"""How the backward on Hopper is cut where every column is kept and every token counts."""

from __future__ import annotations

from typing import NamedTuple

from .hopper import ORDER_BLOCK, TILE_COLUMNS, cut_units, group_rows
from .shared import ROW_TILE

_CLUSTER = 2
_WIDTH = 256
"""kWidth of kernels_cu/sm90/backward.cuh: elements of D whose gradients are formed at once."""

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
    """

    columns: int
    blocks: int
    unit_tiles: int
    group: int


def plan_dense(
    tokens: int, vocab: int, dim: int, itemsize: int, processors: int, most_blocks: int
) -> DenseCut | None:
    """Cut the vocabulary into chunks of which the last round of work is as full as the others.

    Parameters
    ----------
    tokens, vocab, dim : int
        Sizes of the problem.
    itemsize : int
        Bytes of an element.
    processors : int
        Multiprocessors of the device.
    most_blocks : int
        Blocks of 128 columns whose dz there is room for.

    Returns
    -------
    DenseCut or None
        None where there is no room for a block.
    """
    clusters, blocks = processors // _CLUSTER, -(-vocab // ORDER_BLOCK)
    if most_blocks < 1 or clusters < 1:
        return None
    row_pairs = -(-tokens // (_CLUSTER * ROW_TILE))
    least = -(-blocks // most_blocks)
    # Beside records that hold all columns there is no room for unfinished sums.
    most = 1 if least == 1 else min(least + least // 2 + 1, blocks)
    candidates = {-(-blocks // n) for n in range(least, most + 1)}
    chunk_blocks = min(
        sorted(candidates), key=lambda n: chunks_cost(tokens, vocab, dim, processors, n)
    )
    tiles = -(-min(chunk_blocks * ORDER_BLOCK, vocab) // TILE_COLUMNS)
    return DenseCut(
        columns=chunk_blocks * ORDER_BLOCK,
        blocks=_CLUSTER * clusters,
        unit_tiles=cut_units(row_pairs, tiles, clusters),
        group=group_rows(row_pairs, _CLUSTER * ROW_TILE * dim * itemsize),
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
    embeddings = row_pairs * parts
    items = embeddings + -(-chunk_blocks // _CLUSTER) * parts
    each = columns + (_UNFINISHED if chunks > 1 else 0)
    longest = 0
    for first in range(min(clusters, items)):
        mine = -(-(items - first) // clusters)
        of_e = max(-(-(embeddings - first) // clusters), 0)
        longest = max(longest, of_e * each + (mine - of_e) * tokens)
    tiles = -(-columns // TILE_COLUMNS)
    unit_tiles = cut_units(row_pairs, tiles, clusters)
    rounds = -(-row_pairs * -(-tiles // unit_tiles) // clusters)
    logits = rounds * unit_tiles * dim * TILE_COLUMNS / _WIDTH
    return chunks * (longest + logits + _LAUNCHES)
