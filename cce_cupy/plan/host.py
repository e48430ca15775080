"""The plan of the CPU backend.

Block sizes depend on shapes and dtype but never on ``workspace_bytes``: what a call computes, and
in which order it sums, is the same however much memory it may use, so its results are the same
bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..problem import Problem
from .shared import (
    COLUMN_CHUNK,
    DEFAULT_WORKSPACE_BYTES,
    ITEMSIZE,
    ROW_TILE,
    Sweep,
    choose_filter,
    choose_sweeps,
    whole,
)


@dataclass(frozen=True)
class Plan:
    """How a problem will be computed.

    Attributes
    ----------
    tier : str
        The family of kernels; ``"cpu"`` is NumPy and its BLAS.
    row_block : int
        Rows of one dense product and over which dz is held before it enters dC, a multiple of
        `ROW_TILE`.
    stored_rows : int
        The first rows whose exponentials the forward may leave in the memory of dC, where a
        backward that follows it at once finds them. Dense products end there, stored or not, so
        that the sums are the same.
    stores_columns : bool
        Whether the forward may leave those of the kept columns there.
    column_block : int
        Columns of one dense product, a multiple of `COLUMN_CHUNK`.
    segments : int
        Parts of the vocabulary that the forward visits independently of each other.
    column_range : int
        Columns over which dC is completed at a time where kept columns are gathered: whole column
        blocks.
    gather_block : int
        Kept columns of a row tile that are gathered at a time.
    concurrency : int
        Column ranges in progress at a time, at most. It changes memory and speed but no result.
    gradient_filter : str or None
        The filter in force, after ``filter_eps`` and the options that rule a filter out.
    filter_eps : float
        0.0 where no filter is in force.
    filter_reason : str
        Why the filter is what it is, for people.
    sweeps : tuple of Sweep
        The passes of the backward, in order.
    workspace_bytes : int
        What the passes hold at most beyond inputs, outputs, the kept-column bits and 32 bytes a
        token.
    """

    tier: str
    row_block: int
    stored_rows: int
    stores_columns: bool
    column_block: int
    segments: int
    column_range: int
    gather_block: int
    concurrency: int
    gradient_filter: str | None
    filter_eps: float
    filter_reason: str
    sweeps: tuple[Sweep, ...]
    workspace_bytes: int


def make_plan(problem: Problem) -> Plan:
    """Plan a problem for the device its arrays are on.

    Parameters
    ----------
    problem : Problem

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        When ``workspace_bytes`` is smaller than the least this problem can be computed in.
    """
    chosen = choose_filter(problem)
    dim, tokens, vocab = max(problem.dim, 1), problem.tokens, problem.vocab
    accumulator_bytes = ITEMSIZE[problem.accumulator]
    rounds = ITEMSIZE[problem.dtype] < accumulator_bytes

    # Elements per block are bounded, so that blocks stay in cache and wide D costs no memory.
    row_block = min(_fit(2**21 // dim, ROW_TILE, 1024), whole(tokens, ROW_TILE))
    # dC of some columns has room for as many rows of their logits as it is wide.
    stores = not (rounds or chosen.kind)
    stored_rows = min(problem.dim // ROW_TILE * ROW_TILE, row_block) if stores else 0
    columns = whole(vocab, COLUMN_CHUNK)
    column_block = min(_fit(2**21 // dim, 3 * COLUMN_CHUNK, 1536), columns)
    gather_block = column_block
    # dC of a range is summed in a buffer of at most column_range x D.
    column_range = _fit(min(2**22 // dim, vocab // 16), 1024, 4096)
    column_range = min(whole(column_range, column_block), columns)
    # Few rows leave cores idle unless the vocabulary is cut too.
    groups = -(-max(tokens, 1) // row_block)
    segments = max(1, min(-(-16 // groups), vocab // 4096))

    # A block of c and of e as such, or converted; and the sum of dC that is rounded at the end.
    copies = 2 if rounds else 1
    blocks = (row_block + copies * column_block) * dim
    visit = row_block * column_block + 4 * ROW_TILE * column_block + blocks
    dense = row_block * column_block + 4 * ROW_TILE * column_block + row_block * dim
    dense += blocks + (2 * row_block + column_block * copies) * dim
    gathered = 4 * ROW_TILE * gather_block + row_block * dim
    gathered += (2 * ROW_TILE + (copies + 1) * gather_block) * dim
    gathered += column_range * dim
    each = max(
        visit,
        0 if chosen.e and chosen.c else dense,
        gathered if chosen.kind else 0,
    )
    least = accumulator_bytes * each
    if problem.workspace_bytes is not None and problem.workspace_bytes < least:
        raise ValueError(
            f"workspace_bytes must be at least {least} for N = {tokens}, D = {problem.dim}, "
            f"V = {vocab} and {problem.dtype}, got {problem.workspace_bytes}"
        )
    allowed = max(problem.workspace_bytes or DEFAULT_WORKSPACE_BYTES, least)

    # Where dE is rounded, forming it along with dC takes a float32 sum for every token.
    sums = accumulator_bytes * tokens * dim if rounds else 0
    together = chosen.e == chosen.c and least + sums <= allowed
    held = least + sums if together else least
    concurrency = 1 + (allowed - held) // (accumulator_bytes * each)
    return Plan(
        tier="cpu",
        row_block=row_block,
        stored_rows=stored_rows,
        # A softcap's slope needs the logits.
        stores_columns=not rounds and chosen.e and chosen.c and problem.softcap is None,
        column_block=column_block,
        segments=segments,
        column_range=column_range,
        gather_block=gather_block,
        concurrency=concurrency,
        gradient_filter=chosen.kind,
        filter_eps=chosen.eps,
        filter_reason=chosen.reason,
        sweeps=choose_sweeps(chosen, together=together),
        workspace_bytes=held + accumulator_bytes * each * (concurrency - 1),
    )


def bit_words(problem: Problem) -> int:
    """Return the 64-bit words that hold the kept-column bits of all row tiles."""
    if choose_filter(problem).kind is None:
        return 0
    tiles, chunks = -(-problem.tokens // ROW_TILE), -(-problem.vocab // COLUMN_CHUNK)
    return -(-tiles * chunks // 2)


def _fit(size: int, low: int, high: int) -> int:
    """Return the largest power-of-two multiple of low that is at most size, within [low, high]."""
    fitted = low
    while 2 * fitted <= min(size, high):
        fitted *= 2
    return fitted
