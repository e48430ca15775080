"""The plan of the forward on Hopper: which kernel, and how its work is cut."""

from __future__ import annotations

from dataclasses import dataclass

from ..problem import Problem
from .shared import ITEMSIZE, ROW_TILE

TILE_COLUMNS = 192
"""kTileN of kernels_cu/sm90/tile.cuh."""

_CONSUMERS = 2
_CACHED_ROWS_BYTES = 20 * 10**6
_LONGEST_UNIT = 24  # column tiles
_LONGEST = 2**31 - 1  # rows, columns and units count in 32 bits there


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
    """

    kernel: str
    blocks: int
    unit_tiles: int
    group: int
    parts: int


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

    def cost(unit_tiles: int) -> float:
        units = row_blocks * -(-tiles // unit_tiles)
        # Each unit begins with loads that nothing hides.
        return -(-units // clusters) * (unit_tiles + 0.05)

    longest = max(_LONGEST_UNIT, -(-tiles // clusters))
    unit_tiles = min(range(1, min(longest, tiles) + 1), key=lambda u: (cost(u), -u))
    bytes_of_rows = rows * problem.dim * ITEMSIZE[problem.dtype]
    groups = -(-row_blocks // max(1, min(row_blocks, _CACHED_ROWS_BYTES // bytes_of_rows)))
    return HopperForward(
        kernel="forward_single" if cluster == 1 else "forward_pairs",
        blocks=min(clusters, row_blocks * -(-tiles // unit_tiles)) * cluster,
        unit_tiles=unit_tiles,
        group=-(-row_blocks // groups),
        parts=_CONSUMERS * -(-tiles // unit_tiles),
    )
