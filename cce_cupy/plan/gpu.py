"""The plan of a GPU's kernels."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import NamedTuple

from ..problem import Problem
from .dense import DenseCut, DenseSizes, plan_dense_both, plan_dense_side
from .hopper import (
    HopperBackward,
    HopperForward,
    HopperPass,
    plan_hopper_backward,
    plan_hopper_forward,
    refuse_hopper,
)
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


class Room(dict[str, int]):
    """Bytes of each piece of workspace, by name."""

    @functools.cached_property
    def offsets(self) -> dict[str, int]:
        """Where each piece starts in one allocation."""
        ends = itertools.accumulate(whole(size, _PART_ALIGNMENT) for size in self.values())
        return dict(zip(self, (0, *ends), strict=False))

    @functools.cached_property
    def bytes(self) -> int:
        """The size of the allocation."""
        return sum(whole(size, _PART_ALIGNMENT) for size in self.values())


PASSED_BYTES = 8
"""Of a backward's counters those of the first, the pairs that passed."""

_PART_ALIGNMENT = 256
_DENSE_BLOCK = 128
_WIDE_RANGE = 1024
_LONGEST_CHAIN = 512  # row tiles that enter one sum of dC one by one
_SMOOTHING_PARTS = 64


@dataclass(frozen=True)
class GpuPlan:
    """How a problem will be computed on a GPU.

    Attributes
    ----------
    tier : str
        The family of kernels of the forward: ``"sm90"`` or ``"portable"``.
    tier_reason : str
        Why not a faster one; empty for the fastest.
    hopper : HopperForward or None
        How the forward of ``"sm90"`` is cut; it leaves sums of one segment.
    hopper_backward : HopperBackward or None
        How the backward of ``"sm90"`` is cut; None where it is portable: as the forward, and where
        the workspace is too small for it.
    dense, dense_both : DenseCut or None
        How it is cut where every column is kept and every token counts, for one gradient and for
        both in one pass; None where nothing is gained by that.
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
        Row tiles and columns whose dz is held at a time in the backward. dE of a range of columns
        goes on where the range before ended; dC is the sum of what each part of the rows gives, in
        their order. Of the portable backward; 0 for the other.
    smooths : bool
        Whether label smoothing has any effect.
    smoothing_parts : int
        Parts of the sums over all rows or columns that label smoothing takes.
    gradient_filter, filter_eps, filter_reason, sweeps
        As in `Plan`.
    saved, forward, statistics, backward : Room
        Bytes of the pieces of workspace: those that a pullback refers to, and those that the
        forward, the forward with statistics, and the backward need while they run.
    """

    tier: str
    tier_reason: str
    hopper: HopperForward | None
    hopper_backward: HopperBackward | None
    dense: DenseCut | None
    dense_both: DenseCut | None
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
    statistics: Room
    backward: Room

    @functools.cached_property
    def forward_alone(self) -> Room:
        """The pieces of a forward that no pullback follows, in one allocation."""
        return Room(self.saved | self.forward)

    @functools.cached_property
    def statistics_alone(self) -> Room:
        """The same for the forward with statistics."""
        return Room(self.saved | self.statistics)

    @functools.cached_property
    def parts(self) -> int:
        """Of the backward, each with launches of its own."""
        cut = self.hopper_backward
        if cut is not None:
            passes = (
                (sweep, part)
                for sweep in self.sweeps
                for part in cut.passes(self.tiles, alone=not sweep.c, filtered=sweep.filtered)
            )
            return cut.attempts + sum(1 + self._most_chunks(*found) for found in passes)
        return -(-self.words * COLUMN_CHUNK // self.range_columns) * -(
            -self.tiles // self.part_tiles
        )

    def dense_cut(self, sweep: Sweep, part: HopperPass, *, both: bool) -> DenseCut | None:
        """Return how dense products that come before a pass are cut, if any do.

        Parameters
        ----------
        sweep : Sweep
        part : HopperPass
        both : bool
            Whether it forms both gradients.
        """
        if self.hopper_backward is None or sweep.filtered or part.tiles < self.tiles:
            return None
        return self.dense_both if both else self.dense

    def _most_chunks(self, sweep: Sweep, part: HopperPass) -> int:
        """Return the chunks of dense products before a pass, whatever it forms."""
        cuts = (self.dense_cut(sweep, part, both=both) for both in (False, True))
        return max(0 if cut is None else len(cut.chunks) for cut in cuts)


class GpuDevice(NamedTuple):
    """What a plan asks of a GPU: its multiprocessors and its compute capability."""

    processors: int
    capability: tuple[int, int]


@functools.lru_cache(maxsize=256)
def make_gpu_plan(problem: Problem, device: GpuDevice, *, aligned: bool = True) -> GpuPlan:
    """Plan a problem for a GPU. Plans are kept: making one takes longer than a small forward.

    Parameters
    ----------
    problem : Problem
    device : GpuDevice
    aligned : bool
        Whether rows of e and c start at multiples of 16 bytes.

    Returns
    -------
    GpuPlan

    Raises
    ------
    ValueError
        When ``workspace_bytes`` is smaller than the least this problem can be computed in.
    """
    chosen = choose_filter(problem)
    sums = ITEMSIZE[problem.accumulator]
    rows, dim, vocab = problem.tokens, problem.dim, problem.vocab
    tiles = -(-rows // ROW_TILE)
    refusal = refuse_hopper(problem, device.capability, aligned)
    hopper = None if refusal else plan_hopper_forward(problem, device.processors)
    segments = 1
    if hopper is None:
        # Two blocks a multiprocessor run at a time, or one after the other: see kBlocks of
        # product.cuh.
        segments = _segments(max(tiles, 1), 2 * device.processors, vocab // (8 * _DENSE_BLOCK))
    segment_columns = whole(-(-vocab // segments), _DENSE_BLOCK)
    segments = max(1, -(-vocab // segment_columns))
    words = -(-vocab // COLUMN_CHUNK)
    smooths = _smooths(problem)

    per_segment = segments * rows
    forward = {
        **dict.fromkeys(("bound", "own"), sums * rows),
        # Two numbers for each block of rows; blocks of 32 are the smallest.
        "loss_parts": 16 * max(-(-rows // 32), 1),
        "done": 8,
    }
    if hopper is None:
        forward |= dict.fromkeys(("segment_reference", "segment_target_logit"), sums * per_segment)
        forward |= dict.fromkeys(("segment_rest", "segment_smoothed"), 8 * per_segment)
        names = ("segment_total", "segment_weighted", "segment_argmax")
        statistics = dict.fromkeys(names, 8 * per_segment)
        statistics["segment_best"] = sums * per_segment
    else:
        per_unit = 4 * hopper.parts * rows
        forward |= dict.fromkeys(("finished", "target_logit"), sums * rows)
        forward |= dict.fromkeys(("unit_reference", "unit_rest"), per_unit)
        forward["unit_smoothed"] = per_unit if smooths else 0
        forward["packed"] = hopper.packed_rows * dim * ITEMSIZE[problem.dtype]
        statistics = dict.fromkeys(("unit_weighted", "unit_best", "unit_argmax"), per_unit)
    backward = {
        **dict.fromkeys(("factor_softmax", "factor_onehot", "factor_smoothing"), sums * rows),
        "smoothing_classifier": 8 * _SMOOTHING_PARTS * dim if smooths else 0,
        "smoothing_embedding": 8 * _SMOOTHING_PARTS * dim if smooths else 0,
        "smoothing_rows": 8,
        "counters": PASSED_BYTES,
    }
    alike = chosen.e == chosen.c
    hopper_backward = None
    if hopper is not None:
        hopper_backward = plan_hopper_backward(
            problem,
            device.processors,
            together=alike,
            filtered=chosen.kind is not None,
            zeros_in_dc=not smooths,
        )
    if hopper_backward is None:
        cut = _cut_backward(problem, tiles, together=alike)
        together, part_tiles, range_columns = cut.together, cut.tiles, cut.columns
        backward |= cut.room
    else:
        together, part_tiles, range_columns = hopper_backward.together, 0, 0
        totals = dict.fromkeys(("classifier_total", "embedding_total"), 4 * dim if smooths else 0)
        passes = hopper_backward.attempts + 1 + -(-tiles // hopper_backward.row_tiles)
        backward |= {
            "target_rest": 4 * rows,
            "counters": PASSED_BYTES + 8 + hopper_backward.counters[-1] * passes,
            **totals,
            **hopper_backward.room,
        }
    sweeps = choose_sweeps(chosen, together=together)
    dense = dense_both = None
    # A shift leaves tokens that do not count.
    if hopper_backward is not None and not (smooths or problem.has_bias or problem.shift):
        most = hopper_backward.chunk_blocks(tiles)
        if not all(sweep.filtered for sweep in sweeps):
            sizes = DenseSizes(
                problem.tokens, vocab, dim, ITEMSIZE[problem.dtype], device.processors
            )
            dense = plan_dense_side(sizes, most, hopper_backward.low_offset)
            if together:
                dense_both = plan_dense_both(sizes, hopper_backward.record_bytes)
    return GpuPlan(
        tier="portable" if hopper is None else "sm90",
        tier_reason=refusal or "",
        hopper=hopper,
        hopper_backward=hopper_backward,
        dense=dense,
        dense_both=dense_both,
        capacity=rows,
        tiles=tiles,
        segments=segments,
        segment_columns=segment_columns,
        words=words,
        part_tiles=part_tiles,
        range_columns=range_columns,
        smooths=smooths,
        smoothing_parts=_SMOOTHING_PARTS,
        gradient_filter=chosen.kind,
        filter_eps=chosen.eps,
        filter_reason=chosen.reason,
        sweeps=sweeps,
        saved=saved_room(problem),
        forward=Room(forward),
        statistics=Room(forward | statistics),
        backward=Room(backward),
    )


def saved_room(problem: Problem) -> Room:
    """Return the pieces that a pullback refers to. Sizes may be symbolic, as under a compiler."""
    rows, vocab, sums = problem.tokens, problem.vocab, ITEMSIZE[problem.accumulator]
    tiles = -(-rows // ROW_TILE)
    bits = 4 * -(-vocab // COLUMN_CHUNK) * tiles
    pieces = {
        **dict.fromkeys(("source", "position", "target"), 8 * rows),
        **dict.fromkeys(("count", "seed", "first_wrong", "normalizer", "smoothing_total"), 8),
        "row_lse": sums * rows,
        "smoothing": sums * vocab if _smooths(problem) else 0,
        "bits": whole(bits, 8) if choose_filter(problem).kind else 0,
        "unbounded": 8 * -(-tiles // 2),
    }
    return Room(pieces)


def _smooths(problem: Problem) -> bool:
    return problem.label_smoothing > 0.0 and problem.vocab > 1


@dataclass(frozen=True)
class _Cut:
    """How the backward is cut into parts, and the room that one of them takes."""

    together: bool
    tiles: int
    columns: int
    room: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.room.values())


def _cut_backward(problem: Problem, tiles: int, *, together: bool) -> _Cut:
    """Cut rows and columns so that dz, its lists and unfinished sums fit into the workspace.

    One sweep over columns in wide ranges is fastest. Narrow ranges idle; two sweeps, one for each
    gradient, recompute dz twice, but dE then takes sums for the rows of a part alone.
    """
    sums, dim = ITEMSIZE[problem.accumulator], problem.dim
    vocab = whole(problem.vocab, _DENSE_BLOCK)

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
