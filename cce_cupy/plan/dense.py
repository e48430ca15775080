"""How the backward on Hopper is cut where every column is kept and every token counts."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .hopper import ORDER_BLOCK, TILE_COLUMNS, cut_units, group_rows
from .shared import ROW_TILE

_CLUSTER = 2
_WIDTH, _WIDE = 256, 320
"""kWidth of kernels_cu/sm90/backward.cuh and kWide of gradients.cuh: elements of D whose gradients
are formed at once, and where fewer parts do then."""

_NARROW = 128
"""kNarrow of gradients.cuh: where no more are left, products are half as many."""

_NARROW_SHARE, _WIDE_SHARE = 0.7, 1.27
"""How long narrow and wide parts take, as measured, others being 1: each copies as much of dz."""

_UNFINISHED = 512
"""What it costs to take up and leave unfinished sums of dE, in elements of depth."""

_LAUNCH = 800
"""What a launch costs, likewise."""

_SIZES = 8
"""Of chunks that are compared for one number of them, about: a plan must not take long."""

_CLOSE = 1.005
"""Costs that are no further apart count as the same."""


class DenseChunk(NamedTuple):
    """Columns whose dz is held at a time.

    Attributes
    ----------
    first, columns : int
        Which they are.
    unit_tiles : int
        Of the order of work of dz, as of the forward.
    """

    first: int
    columns: int
    unit_tiles: int


class DenseParts(NamedTuple):
    """Parts of D whose gradients are formed at a time.

    Attributes
    ----------
    number : int
    wide : int
        Those of 320 elements, which come first; the others are of 256, and the last of what is
        left.
    """

    number: int
    wide: int

    def shares(self, dim: int) -> list[float]:
        """Return how long the products of each take, those of 256 elements being 1."""
        narrow = dim - (self.number - 1) * _WIDTH <= _NARROW  # none is wide then
        others = self.number - self.wide - narrow
        return [_WIDE_SHARE] * self.wide + [1.0] * others + [_NARROW_SHARE] * narrow


class DenseCut(NamedTuple):
    """What the launches of a chunk are given.

    Attributes
    ----------
    chunks : tuple of DenseChunk
        The last may be larger than the others, or smaller.
    parts : DenseParts
    width : int
        Elements from a row of dz to the next: a multiple of 128.
    blocks : int
        Of the grids.
    group : int
        Of the order of work of dz, as of the forward.
    waiting : int
        Rows of unfinished sums of dE whose low halves wait in the last rows of dC, which the last
        chunk writes when it is done with dE.
    low_offset : int
        Where those of the other rows start, in bytes from the first record.
    """

    chunks: tuple[DenseChunk, ...]
    parts: DenseParts
    width: int
    blocks: int
    group: int
    waiting: int
    low_offset: int


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
    return _cut(sizes, _candidates(sizes, most_blocks), lambda _: (0, low_offset))


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

    def waits(blocks: Blocks) -> tuple[int, int]:
        alone = blocks.chunks == 1
        dz = blocks.largest * block_bytes
        # With room for all sums beside dz the last chunk's dE and dC are one launch.
        if alone or dz + 2 * sizes.dim * tokens <= room:
            return 0, dz
        return min(tokens, vocab - blocks.before_last * ORDER_BLOCK), dz

    def fits(blocks: Blocks) -> bool:
        waiting, dz = waits(blocks)
        low = 0 if blocks.chunks == 1 else 2 * sizes.dim * (tokens - waiting)
        return dz + low <= room

    return _cut(sizes, list(filter(fits, _candidates(sizes, room // block_bytes))), waits)


class Blocks(NamedTuple):
    """Blocks of 128 columns of each chunk but the last, and of that one."""

    chunks: int
    each: int
    last: int

    @property
    def largest(self) -> int:
        """Those of the largest chunk."""
        return max(self.each, self.last)

    @property
    def before_last(self) -> int:
        """Those of all chunks but the last."""
        return (self.chunks - 1) * self.each


def _candidates(sizes: DenseSizes, most_blocks: int) -> list[Blocks]:
    """Return ways to cut, into as few chunks as there can be up to half as many again."""
    if most_blocks < 1 or sizes.processors < _CLUSTER:
        return []
    blocks = -(-sizes.vocab // ORDER_BLOCK)
    least = -(-blocks // most_blocks)
    # Beside records that hold all columns there is no room for unfinished sums.
    if least == 1:
        return [Blocks(1, blocks, blocks)]
    found = []
    for chunks in range(least, min(least + least // 2 + 1, blocks) + 1):
        # What is left for the last is no more than fits, and no less than one.
        fewest = max(-(-(blocks - most_blocks) // (chunks - 1)), 1)
        largest = min((blocks - 1) // (chunks - 1), most_blocks)
        if fewest > largest:
            continue
        step = (largest - fewest) // _SIZES + 1
        even = min(max(-(-blocks // chunks), fewest), largest)
        for each in {even, *range(fewest, largest + 1, step)}:
            found.append(Blocks(chunks, each, blocks - (chunks - 1) * each))
    return sorted(found)


def _cut(
    sizes: DenseSizes, candidates: list[Blocks], waits: Callable[[Blocks], tuple[int, int]]
) -> DenseCut | None:
    """Return the fastest chunks, and the order of their work; `waits` says what waits where."""
    if not candidates:
        return None
    tokens, vocab, dim, itemsize, processors = sizes
    ways = itertools.product(candidates, cut_parts(dim))
    costs = {
        (blocks, parts): chunks_cost(sizes, blocks, parts, apart=waits(blocks)[0] > 0)
        for blocks, parts in ways
    }
    # The account is not exact to the last percent, and fewer chunks wait less for each other.
    close = [way for way, cost in costs.items() if cost <= _CLOSE * min(costs.values())]
    fewest = min(blocks.chunks for blocks, _ in close)
    chosen, parts = min((way for way in close if way[0].chunks == fewest), key=costs.__getitem__)
    waiting, low_offset = waits(chosen)
    clusters, row_pairs = processors // _CLUSTER, -(-tokens // (_CLUSTER * ROW_TILE))
    firsts = [k * chosen.each * ORDER_BLOCK for k in range(chosen.chunks)]
    widths = [after - first for first, after in itertools.pairwise((*firsts, vocab))]
    units = {w: cut_units(row_pairs, -(-w // TILE_COLUMNS), clusters) for w in set(widths)}
    return DenseCut(
        chunks=tuple(DenseChunk(f, w, units[w]) for f, w in zip(firsts, widths, strict=True)),
        parts=parts,
        width=chosen.largest * ORDER_BLOCK,
        blocks=_CLUSTER * clusters,
        group=group_rows(row_pairs, _CLUSTER * ROW_TILE * dim * itemsize),
        waiting=waiting,
        low_offset=low_offset,
    )


def cut_parts(dim: int) -> list[DenseParts]:
    """Return ways to cut D: without wide parts, and into as few as there can be.

    Each part reads all of dz, so that fewer are better where they do not make rounds of work less
    even.

    Parameters
    ----------
    dim : int
    """
    fewest = -(-dim // _WIDE)
    wide = max(-(-(dim - fewest * _WIDTH) // (_WIDE - _WIDTH)), 0)
    return sorted({DenseParts(-(-dim // _WIDTH), 0), DenseParts(fewest, wide)})


def chunks_cost(sizes: DenseSizes, blocks: Blocks, parts: DenseParts, *, apart: bool) -> float:
    """Return how long all chunks take: the depth that the fullest pair of blocks multiplies over.

    Parameters
    ----------
    sizes : DenseSizes
    blocks : Blocks
    parts : DenseParts
    apart : bool
        Whether the last chunk's dE and dC are launches of their own.
    """
    one = functools.partial(_chunk_cost, sizes, parts, unfinished=blocks.chunks > 1)
    return (blocks.chunks - 1) * one(blocks.each, apart=False) + one(blocks.last, apart=apart)


def _chunk_cost(
    sizes: DenseSizes, parts: DenseParts, blocks: int, *, unfinished: bool, apart: bool
) -> float:
    tokens, dim = sizes.tokens, sizes.dim
    clusters, columns = sizes.processors // _CLUSTER, min(blocks * ORDER_BLOCK, sizes.vocab)
    row_pairs = -(-tokens // (_CLUSTER * ROW_TILE))
    of_e = [columns + (_UNFINISHED if unfinished else 0)] * row_pairs
    of_c = [tokens] * -(-blocks // _CLUSTER)
    launches = [of_e, of_c] if apart else [of_e + of_c]
    shares = parts.shares(dim)
    products = sum(longest_of_products(clusters, depths, shares) for depths in launches)
    tiles = -(-columns // TILE_COLUMNS)
    unit_tiles = cut_units(row_pairs, tiles, clusters)
    rounds = -(-row_pairs * -(-tiles // unit_tiles) // clusters)
    logits = rounds * unit_tiles * dim * TILE_COLUMNS / _WIDTH
    return products + logits + _LAUNCH * (1 + len(launches))


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
    work = np.outer(depths, parts).ravel()
    rounds = -(-len(work) // clusters)
    places = np.arange(clusters) - np.arange(rounds)[:, None]
    taken = np.bincount(places.ravel()[: len(work)] % clusters, weights=work)
    return float(taken.max())
