"""The plan of a call: tier, tiles, blocks, filter and workspace, from the problem alone.

Pure arithmetic: no array is touched and no GPU is needed to make or to test a plan. Block sizes
depend on shapes and dtype but never on ``workspace_bytes``: what a call computes, and in which
order it sums, is the same however much memory it may use, so its results are the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from .problem import Problem

ROW_TILE = 128
"""Tokens that share one list of kept columns."""

COLUMN_CHUNK = 32
"""Columns that share one random threshold, and one word of the kept-column bitmask."""

MARGIN = 1e-2
"""Slack of the forward's test, in the exponent.

The backward recomputes a logit with another order of sums; no column that its exact test would
keep may be missing from the forward's bits because of that difference.
"""

DEFAULT_WORKSPACE_BYTES = 128 * 2**20

LARGEST_AUTO_EPS = 2.0**-8
"""A small vocabulary has little tail to drop, and 16 / V would start dropping what matters."""

_AUTO_EPS = {
    ("unbiased", "bfloat16"): 16.0,
    ("unbiased", "float16"): 2.0,
    ("threshold", "bfloat16"): 1.0,
    ("threshold", "float16"): 1.0 / 8.0,
}

ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Sweep:
    """One pass of the backward over rows and columns.

    Attributes
    ----------
    e, c : bool
        Which gradients the pass forms (that of the bias comes with c).
    filtered : bool
        Whether it works on the kept columns only.
    """

    e: bool
    c: bool
    filtered: bool


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
        The first rows whose logits the forward may leave in the memory of dC, where a backward
        that follows it at once finds them. Dense products end there, stored or not, so that the
        sums are the same.
    column_block : int
        Columns of one dense product, a multiple of `COLUMN_CHUNK`.
    segments : int
        Parts of the vocabulary that the forward visits independently of each other.
    column_range : int
        Columns over which dC is completed at a time where kept columns are gathered.
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
    gradient_filter, eps, reason = _choose_filter(problem)
    filtered_e = gradient_filter is not None and problem.filter_e_grad
    filtered_c = gradient_filter is not None and problem.filter_c_grad
    dim, tokens, vocab = max(problem.dim, 1), problem.tokens, problem.vocab
    accumulator_bytes = ITEMSIZE[problem.accumulator]
    rounds = ITEMSIZE[problem.dtype] < accumulator_bytes

    # Elements per block are bounded, so that blocks stay in cache and wide D costs no memory.
    row_block = min(_fit(2**21 // dim, ROW_TILE, 1024), _whole(tokens, ROW_TILE))
    # dC of some columns has room for as many rows of their logits as it is wide.
    stores = not (rounds or filtered_e or filtered_c)
    stored_rows = min(problem.dim // ROW_TILE * ROW_TILE, row_block) if stores else 0
    columns = _whole(vocab, COLUMN_CHUNK)
    column_block = min(_fit(2**21 // dim, 3 * COLUMN_CHUNK, 1536), columns)
    gather_block = min(_fit(2**21 // dim, 3 * COLUMN_CHUNK, 1536), columns)
    # Where the output is rounded, dC is summed in a buffer of column_range x D.
    column_range = min(
        _fit(min(2**22 // dim if rounds else vocab, vocab // 16), 1024, 4096), columns
    )
    # Few rows leave cores idle unless the vocabulary is cut too.
    groups = -(-max(tokens, 1) // row_block)
    segments = max(1, min(-(-16 // groups), vocab // 4096))

    filtered = filtered_e or filtered_c
    # A block of c and of e as such, or converted; and the sum of dC that is rounded at the end.
    copies = 2 if rounds else 1
    blocks = (row_block + copies * column_block) * dim
    visit = row_block * column_block + 2 * ROW_TILE * column_block + blocks
    dense = row_block * column_block + 2 * ROW_TILE * column_block + row_block * dim
    dense += blocks + (2 * row_block + column_block * copies) * dim
    gathered = 4 * ROW_TILE * gather_block + row_block * dim
    gathered += (2 * ROW_TILE + (copies + 1) * gather_block) * dim
    gathered += column_range * dim if rounds else 0
    each = max(
        visit,
        0 if filtered_e and filtered_c else dense,
        gathered if filtered else 0,
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
    together = filtered_e == filtered_c and least + sums <= allowed
    held = least + sums if together else least
    concurrency = 1 + (allowed - held) // (accumulator_bytes * each)
    return Plan(
        tier="cpu",
        row_block=row_block,
        stored_rows=stored_rows,
        column_block=column_block,
        segments=segments,
        column_range=column_range,
        gather_block=gather_block,
        concurrency=concurrency,
        gradient_filter=gradient_filter if filtered else None,
        filter_eps=eps if filtered else 0.0,
        filter_reason=reason,
        sweeps=(
            (Sweep(True, True, filtered_e),)
            if together
            else (Sweep(True, False, filtered_e), Sweep(False, True, filtered_c))
        ),
        workspace_bytes=held + accumulator_bytes * each * (concurrency - 1),
    )


def _choose_filter(problem: Problem) -> tuple[str | None, float, str]:
    if problem.gradient_filter is None:
        return None, 0.0, "off: gradient_filter=None"
    if problem.filter_eps == 0.0:
        return None, 0.0, "off: filter_eps is None or 0"
    if problem.softcap is not None and problem.label_smoothing > 0.0:
        return (
            None,
            0.0,
            "off: with softcap, label smoothing reaches every column and is not of rank one",
        )
    if not (problem.filter_e_grad or problem.filter_c_grad):
        return None, 0.0, "off: filter_e_grad and filter_c_grad are False"
    if problem.filter_eps is not None:
        return problem.gradient_filter, problem.filter_eps, "filter_eps as given"
    scale = _AUTO_EPS.get((problem.gradient_filter, problem.dtype))
    if scale is None:
        return None, 0.0, f"off: filter_eps='auto' does not filter {problem.dtype}"
    eps = min(scale / max(problem.vocab, 1), LARGEST_AUTO_EPS)
    return problem.gradient_filter, eps, "filter_eps='auto': near the rounding of the dtype"


def _fit(size: int, low: int, high: int) -> int:
    """Return the largest power-of-two multiple of low that is at most size, within [low, high]."""
    fitted = low
    while 2 * fitted <= min(size, high):
        fitted *= 2
    return fitted


def _whole(size: int, unit: int) -> int:
    """Round a size up to whole units, and to one unit at least."""
    return max(-(-size // unit), 1) * unit


# ------------------------------------------------------------------------------------- GPU

Room = dict[str, int]
"""Bytes of each piece of workspace, by name."""

_PART_ALIGNMENT = 256
_DENSE_BLOCK = 128
_WIDE_RANGE = 1024
_LONGEST_CHAIN = 512  # row tiles that enter one sum of dC one by one
_SMOOTHING_PARTS = 64


@dataclass(frozen=True)
class GpuPlan:
    """How a problem will be computed by the portable kernels.

    Attributes
    ----------
    tier : str
    capacity : int
        Rows there is room for: all tokens, ignored ones included, since how many count is known
        on the device only.
    tiles : int
        Row tiles of as many rows.
    segments, segment_columns : int
        Parts of the vocabulary that the forward visits independently of each other.
    words : int
        32-bit words of kept-column bits of a row tile.
    part_tiles, range_columns : int
        Row tiles and columns whose dz is held at a time in the backward. Columns change no bit of a
        result; dC is the sum of what each part of the rows gives, in their order.
    smooths : bool
        Whether label smoothing has any effect.
    smoothing_parts : int
        Parts of the sums over all rows or columns that label smoothing takes.
    gradient_filter, filter_eps, filter_reason, sweeps
        As in `Plan`.
    saved, forward, backward : dict of str to int
        Bytes of the pieces of workspace: those that a pullback refers to, and those that the
        forward and the backward need while they run.
    """

    tier: str
    capacity: int
    tiles: int
    segments: int
    segment_columns: int
    words: int
    part_tiles: int
    range_columns: int
    smooths: bool
    smoothing_parts: int
    gradient_filter: str | None
    filter_eps: float
    filter_reason: str
    sweeps: tuple[Sweep, ...]
    saved: Room
    forward: Room
    backward: Room


def make_gpu_plan(problem: Problem, processors: int) -> GpuPlan:
    """Plan a problem for the portable kernels of a GPU.

    Parameters
    ----------
    problem : Problem
    processors : int
        Multiprocessors of the device.

    Returns
    -------
    GpuPlan

    Raises
    ------
    ValueError
        When ``workspace_bytes`` is smaller than the least this problem can be computed in.
    """
    gradient_filter, eps, reason = _choose_filter(problem)
    filtered_e = gradient_filter is not None and problem.filter_e_grad
    filtered_c = gradient_filter is not None and problem.filter_c_grad
    filtered = filtered_e or filtered_c
    sums = ITEMSIZE[problem.accumulator]
    rows, dim, vocab = problem.tokens, problem.dim, problem.vocab
    tiles = -(-rows // ROW_TILE)
    segments = _segments(max(tiles, 1), 2 * processors, vocab // (8 * _DENSE_BLOCK))
    segment_columns = _whole(-(-vocab // segments), _DENSE_BLOCK)
    segments = max(1, -(-vocab // segment_columns))
    words = -(-vocab // COLUMN_CHUNK)
    smooths = problem.label_smoothing > 0.0 and vocab > 1

    saved = {
        **dict.fromkeys(("source", "position", "target"), 8 * rows),
        **dict.fromkeys(("count", "seed", "first_wrong", "normalizer", "smoothing_total"), 8),
        "row_lse": sums * rows,
        "smoothing": sums * vocab if smooths else 0,
        "bits": 4 * words * tiles if filtered else 0,
        "unbounded": 8 * -(-tiles // 2),
    }
    per_segment = segments * rows
    forward = {
        "bound": sums * rows,
        "own": sums * rows,
        "row_loss": 8 * rows,
        "segment_reference": sums * per_segment,
        "segment_rest": 8 * per_segment,
        "segment_target_logit": sums * per_segment,
        "segment_smoothed": 8 * per_segment,
        "segment_total": 8 * per_segment,
        "segment_weighted": 8 * per_segment,
        "segment_best": sums * per_segment,
        "segment_argmax": 8 * per_segment,
    }
    cut = _cut_backward(problem, tiles, together=filtered_e == filtered_c)
    sweeps: tuple[Sweep, ...] = (Sweep(True, True, filtered_e),)
    if not cut.together:
        sweeps = (Sweep(True, False, filtered_e), Sweep(False, True, filtered_c))
    backward = {
        **dict.fromkeys(("factor_softmax", "factor_onehot", "factor_smoothing"), sums * rows),
        "smoothing_classifier": 8 * _SMOOTHING_PARTS * dim if smooths else 0,
        "smoothing_embedding": 8 * _SMOOTHING_PARTS * dim if smooths else 0,
        "smoothing_rows": 8,
        "passed": 8,
        **cut.room,
    }
    return GpuPlan(
        tier="portable",
        capacity=rows,
        tiles=tiles,
        segments=segments,
        segment_columns=segment_columns,
        words=words,
        part_tiles=cut.tiles,
        range_columns=cut.columns,
        smooths=smooths,
        smoothing_parts=_SMOOTHING_PARTS,
        gradient_filter=gradient_filter if filtered else None,
        filter_eps=eps if filtered else 0.0,
        filter_reason=reason,
        sweeps=sweeps,
        saved=saved,
        forward=forward,
        backward=backward,
    )


@dataclass(frozen=True)
class _Cut:
    """How the backward is cut into parts, and the room that one of them takes."""

    together: bool
    tiles: int
    columns: int
    room: Room

    @property
    def bytes(self) -> int:
        return sum(self.room.values())


def _cut_backward(problem: Problem, tiles: int, *, together: bool) -> _Cut:
    """Cut rows and columns so that dz, its lists and unfinished sums fit into the workspace.

    One sweep over columns in wide ranges is fastest. Narrow ranges idle; two sweeps, one for each
    gradient, recompute dz twice, but dE then takes sums for the rows of a part alone.
    """
    sums, dim = ITEMSIZE[problem.accumulator], problem.dim
    vocab = _whole(problem.vocab, _DENSE_BLOCK)

    def cut(together: bool, part: int, columns: int) -> _Cut:
        in_ranges, in_parts = columns < vocab, part < tiles
        blocks = columns // _DENSE_BLOCK
        summed_rows = problem.tokens if together else part * ROW_TILE
        return _Cut(
            together,
            part,
            columns,
            {
                "de_sums": sums * summed_rows * dim if in_ranges else 0,
                "dc_sums": sums * columns * dim if in_parts else 0,
                "dbias_sums": 8 * columns if in_parts else 0,
                "list_column": 4 * part * columns,
                "list_before": 4 * part * (blocks + 1),
                "dz": sums * part * columns * ROW_TILE,
                "dz_column": sums * part * columns,
            },
        )

    least = cut(False, 1, _DENSE_BLOCK)
    if problem.workspace_bytes is not None and problem.workspace_bytes < least.bytes:
        raise ValueError(
            f"workspace_bytes must be at least {least.bytes} for D = {dim}, "
            f"V = {problem.vocab} and {problem.dtype} on a GPU, got {problem.workspace_bytes}"
        )
    allowed = max(problem.workspace_bytes or DEFAULT_WORKSPACE_BYTES, least.bytes)
    for in_one in (True, False) if together else (False,):
        part = min(max(tiles, 1), _LONGEST_CHAIN)
        while True:
            columns = vocab
            while columns > _DENSE_BLOCK and cut(in_one, part, columns).bytes > allowed:
                # What a column takes is the same in every range, so that one step nearly fits.
                fixed = cut(in_one, part, 0).bytes
                each = (cut(in_one, part, columns).bytes - fixed) / columns
                fitting = int(max(allowed - fixed, 0) / each) // _DENSE_BLOCK * _DENSE_BLOCK
                columns = max(min(fitting, columns - _DENSE_BLOCK), _DENSE_BLOCK)
            found = cut(in_one, part, columns)
            wide = columns >= min(vocab, _WIDE_RANGE) or (part == 1 and not in_one)
            if found.bytes <= allowed and wide:
                return found
            if part == 1:
                break
            part = -(-part // 2)
    return least


def _segments(tiles: int, slots: int, most: int) -> int:
    """Return into how many parts to cut the vocabulary so that blocks fill the device evenly.

    A last wave of a few blocks takes as long as a full one. Fewer parts of equal merit: each
    takes its own sums of every row.
    """

    def idle(parts: int) -> float:
        blocks = tiles * parts
        return 1.0 - blocks / (-(-blocks // slots) * slots)

    candidates = range(1, max(1, min(max(2 * slots // tiles, 2), most)) + 1)
    return min(candidates, key=lambda parts: (max(idle(parts), 0.04), parts))


def lay_out(room: Room) -> tuple[dict[str, int], int]:
    """Return the offset of each piece in one allocation, and the bytes of the whole."""
    offsets, end = {}, 0
    for name, size in room.items():
        offsets[name] = end
        end += _whole(size, _PART_ALIGNMENT)
    return offsets, end
