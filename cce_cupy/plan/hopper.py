"""The plan of the kernels for Hopper: which of them, and how their work is cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..problem import Problem
from .shared import DEFAULT_WORKSPACE_BYTES, ITEMSIZE, ROW_TILE, whole

TILE_COLUMNS = 192
"""kTileN of kernels_cu/sm90/tile.cuh."""

_CONSUMERS = 2
_CACHED_ROWS_BYTES = 20 * 10**6
_LONGEST_UNIT = 24  # column tiles
_LONGEST = 2**31 - 1  # rows, columns and units count in 32 bits there

ORDER_BLOCK = 128
"""kOrderBlock of kernels_cu/sm90/order.cuh."""

ORDER_THREADS = 1024
"""kThreads of kernels_cu/sm90/sort.cuh."""

ORDER_DIGITS = 256
"""kDigits there."""

_ALIGNMENT = 256  # of a piece of workspace
_LIST_UNIT = 16  # kListUnit of kernels_cu/sm90/order.cuh
_ITEM = 256  # kPairs there
_MOST_ROW_TILES = 1024  # kMostRowTiles there
_RECORD_BYTES = 2 * ROW_TILE
_LEAST_SHARE = 8  # of the room is left to a chunk's pairs beside unfinished sums
_MOST_ELEMENTS = 2**34  # of c: its words count in 32 bits there
_CARRIED = 16  # kStep of kernels_cu/sm90/passed.cuh


@dataclass(frozen=True)
class HopperForward:
    """How the forward is cut into units: some row tiles and some tiles of 192 columns each.

    Attributes
    ----------
    kernel : str
        ``"forward_pairs"``, whose blocks share the columns of c they copy, or
        ``"forward_single"``, for no more than one row tile.
    blocks : int
        Of the grid; each works on one unit after the other.
    unit_tiles : int
        Column tiles of a unit.
    group : int
        Row blocks whose units follow one another, so that their rows of e stay in the cache.
    parts : int
        Partial sums that are left for each row: one of each unit across the vocabulary and each
        of the two warp groups that take turns.
    packed_rows : int
        Room for a copy of the rows of e that count, one after the other: around ignored tokens
        they then come as fast as where none is ignored. A whole row tile at least; 0 where that
        is more than the workspace may be.
    """

    kernel: str
    blocks: int
    unit_tiles: int
    group: int
    parts: int
    packed_rows: int


def refuse_hopper(problem: Problem, capability: tuple[int, int], aligned: bool) -> str | None:
    """Return why the kernels for Hopper cannot serve a problem, None where they can.

    Parameters
    ----------
    problem : Problem
    capability : tuple of int
        Compute capability of the device.
    aligned : bool
        Whether rows of e and c start at multiples of 16 bytes.
    """
    if capability != (9, 0):
        return f"compute capability {capability[0]}.{capability[1]} is not 9.0"
    if problem.dtype not in ("float16", "bfloat16"):
        return f"{problem.dtype} has no fast matrix unit"
    if problem.dim == 0 or problem.dim * ITEMSIZE[problem.dtype] % 16 or not aligned:
        return "rows of e and c do not all start at multiples of 16 bytes"
    if problem.tokens == 0 or problem.vocab == 0:
        return "there is nothing to compute"
    if max(problem.tokens, problem.vocab, problem.dim) > _LONGEST - 1024:
        return "a dimension is longer than 32 bits count"
    return None


def plan_hopper_forward(problem: Problem, processors: int) -> HopperForward:
    """Cut the forward so that the last round of units is as full as the others.

    Parameters
    ----------
    problem : Problem
    processors : int
        Multiprocessors of the device.
    """
    cluster = 1 if problem.tokens <= ROW_TILE else 2
    rows = ROW_TILE * cluster
    clusters = max(processors // cluster, 1)
    row_blocks = -(-problem.tokens // rows)
    tiles = -(-problem.vocab // TILE_COLUMNS)
    unit_tiles = cut_units(row_blocks, tiles, clusters)
    return HopperForward(
        kernel="forward_single" if cluster == 1 else "forward_pairs",
        blocks=min(clusters, row_blocks * -(-tiles // unit_tiles)) * cluster,
        unit_tiles=unit_tiles,
        group=group_rows(row_blocks, rows * problem.dim * ITEMSIZE[problem.dtype]),
        parts=_CONSUMERS * -(-tiles // unit_tiles),
        packed_rows=_packed_rows(problem),
    )


def _packed_rows(problem: Problem) -> int:
    rows = max(problem.tokens, ROW_TILE)
    allowed = problem.workspace_bytes or DEFAULT_WORKSPACE_BYTES
    return rows if rows * problem.dim * ITEMSIZE[problem.dtype] <= allowed else 0


def cut_units(row_blocks: int, tiles: int, clusters: int) -> int:
    """Return the column tiles of a unit of work: the last round is as full as the others.

    Parameters
    ----------
    row_blocks, tiles : int
        Row blocks and column tiles of the product.
    clusters : int
        Units that are worked on at a time.
    """

    def cost(unit_tiles: int) -> float:
        units = row_blocks * -(-tiles // unit_tiles)
        # Each unit begins with loads that nothing hides.
        return -(-units // clusters) * (unit_tiles + 0.05)

    longest = max(_LONGEST_UNIT, -(-tiles // clusters))
    return min(range(1, min(longest, tiles) + 1), key=lambda u: (cost(u), -u))


def group_rows(row_blocks: int, block_bytes: int) -> int:
    """Return how many row blocks, of so many bytes each, are worked on together."""
    groups = -(-row_blocks // max(1, min(row_blocks, _CACHED_ROWS_BYTES // block_bytes)))
    return -(-row_blocks // groups)


class HopperPass(NamedTuple):
    """What one launch of the backward works on.

    Attributes
    ----------
    first_tile, tiles : int
        Its row tiles.
    chunk_blocks : int
        Blocks of 128 columns whose records are held at a time where every column is kept; 0 where
        the kept-column bits say.
    """

    first_tile: int
    tiles: int
    chunk_blocks: int


@dataclass(frozen=True)
class HopperBackward:
    """How the backward is cut: what a launch is given, and what the device cuts by itself.

    How many columns are kept is known on the device only. It cuts the vocabulary into chunks whose
    records fit; dE of a row tile goes on from chunk to chunk, in two halves of float32 numbers:
    the high ones where dE will be, the low ones in the workspace, or in rows of dC that nobody
    keeps, which become zeros last: chunks may then be as large as if there were one.

    Attributes
    ----------
    blocks : int
        Of the grid.
    together : bool
        Whether one pass over all row tiles forms both gradients.
    zeros_in_dc : bool
        Whether rows of dC that nobody keeps become zeros, and may hold unfinished sums before.
    attempts : bool
        Whether such a pass comes first although it needs these rows: only the device knows
        whether there are enough, and else leaves the work to the passes that follow.
    row_tiles : int
        Row tiles of a pass that forms dE alone; dC takes all of them.
    natural_blocks, order_blocks : int
        Blocks of 128 columns: of the vocabulary, and at most in the order of the kept columns.
    tile_words : int
        32-bit words that hold a bit for each row tile.
    pairs, pairs_in_one : int
        Kept (row tile, column) pairs of a chunk; and of all, where one chunk then does.
    low_offset : int
        Where the low halves start, in bytes from the first record.
    counters : tuple of int
        Where the zeros start that a pass counts in, in bytes from the first: of sorting, of the
        work handed out, of the blocks that wait for each other, of the chunks' columns, of those
        that any row tile keeps, of the row tiles whose pairs are known; and their size.
    scratch : tuple of int
        Where the pieces start that sorting the columns takes, in bytes from the first record: it
        is done when records come.
    room : dict of str to int
        The pieces of workspace.
    """

    blocks: int
    together: bool
    zeros_in_dc: bool
    attempts: bool
    row_tiles: int
    natural_blocks: int
    order_blocks: int
    tile_words: int
    pairs: int
    pairs_in_one: int
    low_offset: int
    counters: tuple[int, ...]
    scratch: tuple[int, ...]
    room: dict[str, int]

    @property
    def record_bytes(self) -> int:
        """Room for records and unfinished sums."""
        return self.pairs_in_one * _RECORD_BYTES

    def passes(self, tiles: int, *, alone: bool, filtered: bool) -> Iterator[HopperPass]:
        """Cut a sweep into launches.

        Parameters
        ----------
        tiles : int
            Row tiles.
        alone : bool
            Whether it forms dE alone.
        filtered : bool
            Whether it works on kept columns.
        """
        each = self.row_tiles if alone else tiles
        for first in range(0, tiles, each):
            number = min(each, tiles - first)
            yield HopperPass(first, number, 0 if filtered else self.chunk_blocks(number))

    def chunk_blocks(self, tiles: int) -> int:
        """Return the blocks of 128 columns of a chunk that all row tiles of a pass keep."""
        if self.pairs_in_one // tiles // ORDER_BLOCK >= self.natural_blocks:
            return self.natural_blocks
        return self.pairs // tiles // ORDER_BLOCK


def plan_hopper_backward(
    problem: Problem, processors: int, *, together: bool, filtered: bool, zeros_in_dc: bool
) -> HopperBackward | None:
    """Cut the backward so that its records, lists and unfinished sums fit into the workspace.

    One pass over all row tiles forms both gradients, if the low halves of unfinished dE leave
    enough of the room, or rows of dC take them. Else dE is formed for some row tiles at a time,
    and dC in a pass of its own, which computes dz twice.

    Parameters
    ----------
    problem : Problem
    processors : int
        Multiprocessors of the device.
    together : bool
        Whether both gradients may come from one pass: the filter treats them alike.
    filtered : bool
        Whether any pass works on kept columns.
    zeros_in_dc : bool
        Whether rows of dC that nobody keeps become zeros.

    Returns
    -------
    HopperBackward or None
        None where the workspace is too small, or there are more row tiles than fit.
    """
    tiles, vocab = -(-problem.tokens // ROW_TILE), problem.vocab
    natural_blocks, tile_words = -(-vocab // ORDER_BLOCK), -(-tiles // 32)
    if tiles > _MOST_ROW_TILES or tiles * natural_blocks * ORDER_BLOCK > _LONGEST:
        return None
    if vocab * problem.dim > _MOST_ELEMENTS:
        return None
    allowed = problem.workspace_bytes or DEFAULT_WORKSPACE_BYTES
    most = tiles * natural_blocks * ORDER_BLOCK
    # A block of columns of all row tiles, and what rounds their lists up.
    least = tiles * (ORDER_BLOCK + _LIST_UNIT - 1)
    each = _RECORD_BYTES + 4 + (8 if filtered else 0) + (4 if problem.has_bias else 0)
    carried = 2 * _CARRIED * tiles if filtered else 0

    def lay_out(chunks: int) -> tuple[int, dict[str, int], int]:
        """Return the most blocks of the order, its pieces, and how many pairs there is room for."""
        blocks = natural_blocks + chunks
        order = {
            "order_column": 4 * blocks * ORDER_BLOCK,
            "order_word": tiles * blocks * ORDER_BLOCK // 8,
            "order_before": 4 * tiles * (blocks + 1),
            "order_kept_in": 4 * tiles * (natural_blocks + 1),
            "order_tiles": 2 * 4 * blocks * tile_words,
            "order_block": 4 * blocks,
            "order_chunk": 4 * (chunks + 4),
            "order_range": 4 * (chunks + 1),
            "passed_pairs": 4 * tiles,
            "carried": 4 * tiles,
        }
        order = order if filtered else {}
        taken = sum(whole(size, _ALIGNMENT) for size in order.values())
        taken += carried * (_RECORD_BYTES + 4) + (4 * _CARRIED * tiles if filtered else 0)
        # Alignments, and items of dz: the last of each row tile may be short.
        taken += 8 * _ALIGNMENT + 4 * tiles + allowed // 2**14
        return blocks, order, min((allowed - taken) // each, most)

    def low_bytes(row_tiles: int, in_one: int) -> int:
        return 0 if in_one == most else whole(2 * ROW_TILE * row_tiles * problem.dim, _ALIGNMENT)

    def left(row_tiles: int, in_one: int) -> int:
        """Return the pairs of a chunk; 0 where it would hold too few."""
        pairs = in_one - -(-low_bytes(row_tiles, in_one) // _RECORD_BYTES)
        return pairs if pairs >= min(max(2 * least, in_one // _LEAST_SHARE), most) else 0

    # Tables for as many chunks as there are blocks leave the least room; chunks of it, each fuller
    # than a block of columns short of its capacity, are the most that there can be.
    in_one = lay_out(natural_blocks)[2]
    row_tiles = tiles
    while not left(row_tiles, in_one) and row_tiles > 1:
        row_tiles = -(-row_tiles // 2)
    if in_one <= 0 or not left(row_tiles, in_one):
        return None
    chunks = min(most // max(left(row_tiles, in_one) - least, 1) + 2, natural_blocks)
    order_blocks, order, in_one = lay_out(chunks)
    low = low_bytes(row_tiles, in_one)
    records = in_one * _RECORD_BYTES
    # OrderScratch of kernels_cu/sm90/order.cu, but for the columns of each chunk.
    scratch = (
        2 * 4 * vocab,
        2 * 4 * vocab,
        4 * vocab * tile_words,
        4 * vocab,
        4 * processors * ORDER_DIGITS,
        4 * (natural_blocks + 1),
        4 * order_blocks,
    )
    ends = tuple(itertools.accumulate(whole(size, _ALIGNMENT) for size in scratch))
    counters = (8, 8, 8, 4 * (chunks + 1), 8, 4 * tiles)
    counters_ends = tuple(itertools.accumulate(whole(size, 8) for size in counters))
    room = {
        **order,
        "list": 4 * (in_one + carried),
        "dz_sum": 4 * in_one if problem.has_bias else 0,
        "item": 4 * (in_one // _ITEM + tiles),
        "slot": 4 * in_one if filtered else 0,
        "passing": 4 * (in_one + _CARRIED * tiles) if filtered else 0,
        "records": max(records + carried * _RECORD_BYTES, ends[-1] if filtered else 0),
    }
    # Sorting may take more than the records do.
    if sum(room.values()) > allowed:
        return None
    return HopperBackward(
        blocks=processors,
        together=together and row_tiles == tiles,
        zeros_in_dc=zeros_in_dc,
        attempts=together
        and row_tiles < tiles
        and filtered
        and zeros_in_dc
        and in_one >= 2 * least,
        row_tiles=row_tiles,
        natural_blocks=natural_blocks,
        order_blocks=order_blocks,
        tile_words=tile_words,
        pairs=in_one - -(-low // _RECORD_BYTES),
        pairs_in_one=in_one,
        low_offset=records - low,
        counters=(0, *counters_ends),
        scratch=(0, *ends[:-1]),
        room=room,
    )
