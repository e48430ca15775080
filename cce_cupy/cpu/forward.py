"""The forward: every logit once; log-sum-exp, target logits and the kept-column bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..plan import COLUMN_CHUNK, MARGIN, ROW_TILE
from . import columns as kept
from .call import ELEMENTWISE_ROWS, Call, Stored, StoredColumns, spans
from .memory import Array, Scratch, Workers

NEAR_ZERO = (-8.0, 40.0)
"""Bounds of lse between which exponentials need no reference: they are far from both ends of a
float32, and a probability above exp(-79) is a normal number."""

FAR = 30.0
"""How far below lse the reference of a row may be for a backward to take the exponentials
relative to it: the rest, exp(reference - lse), is a factor that must not underflow."""


@dataclass(frozen=True)
class Saved:
    """What a backward needs of a forward.

    Attributes
    ----------
    lse, nll : ndarray of float64, shape (rows,)
        Log-sum-exp, and that minus the target logit.
    bits : ndarray of uint8 or None
        Kept-column bits of each row tile.
    reference : ndarray of the dtype of the sums, shape (rows,)
        What the backward takes its exponentials relative to.
    apart : ndarray of bool, shape (rows,)
        Rows whose reference is their lse, which was not known when exponentials were stored.
    stored : Stored or None
    stored_columns : StoredColumns or None
        Some of the exponentials, which the backward consumes.
    """

    lse: Array
    nll: Array
    bits: Array | None
    reference: Array
    apart: Array
    stored: Stored | None
    stored_columns: StoredColumns | None


@dataclass(frozen=True)
class Forward(Saved):
    """What the forward leaves for each compact row.

    Attributes
    ----------
    smoothed_logit : ndarray of float64, shape (rows,)
        ``sum_v smoothing[v] * z[v]``; 0 without label smoothing.
    entropy : ndarray of float64 or None
    argmax : ndarray of int64 or None
    """

    smoothed_logit: Array
    entropy: Array | None
    argmax: Array | None


class _RowState:
    """Running sums of some rows, in float64: a row's share of the work is one scalar."""

    def __init__(self, bound: Array, statistics: bool) -> None:
        rows = len(bound)
        self.reference = np.full(rows, -np.inf)
        """Exponent that the sums are relative to."""
        self.rest = np.zeros(rows)
        """Sum of exp(z - reference) over the columns seen, the target's left out."""
        self.bound = bound.astype(np.float64)
        """A lower bound of the final lse."""
        near = (bound > NEAR_ZERO[0]) & (bound < NEAR_ZERO[1])
        self.base = np.where(near, 0.0, self.bound)
        """Exponent that those sums are relative to that no filter looks at."""
        self.apart = np.zeros(rows, np.bool_)
        """Rows whose sums overflowed relative to that."""
        self.target_logit = np.full(rows, -np.inf)
        self.smoothed_logit = np.zeros(rows)
        self.total = np.zeros(rows if statistics else 0)
        self.weighted = np.zeros(rows if statistics else 0)
        """Sums of exp(z - reference) and of that times (z - reference), target included."""
        self.best = np.full(rows if statistics else 0, -np.inf)
        self.argmax = np.zeros(rows if statistics else 0, np.int64)

    def merge(self, other: _RowState) -> None:
        """Add the sums of columns further to the right."""
        reference = np.maximum(self.reference, other.reference)
        finite = np.where(reference == -np.inf, 0.0, reference)
        mine, theirs = np.exp(self.reference - finite), np.exp(other.reference - finite)
        self.rest = self.rest * mine + other.rest * theirs
        self.apart |= other.apart
        self.target_logit = np.maximum(self.target_logit, other.target_logit)
        self.smoothed_logit = self.smoothed_logit + other.smoothed_logit
        if len(self.total):
            moved = _moved(self.weighted, self.total, self.reference - finite) * mine
            added = _moved(other.weighted, other.total, other.reference - finite) * theirs
            self.weighted = moved + added
            self.total = self.total * mine + other.total * theirs
            self.take_best(other.best, other.argmax)
        self.reference = reference

    def take_best(self, value: Array, place: Array, rows: slice = slice(None)) -> None:
        """Keep the larger logit, the earlier one of equals, and a NaN once it is there."""
        best = self.best[rows]
        better = (value > best) | (np.isnan(value) & ~np.isnan(best))
        self.argmax[rows] = np.where(better, place, self.argmax[rows])
        self.best[rows] = np.where(better, value, best)


def _moved(weighted: Array, total: Array, shift: Array) -> Array:
    """Return the sum of exp(z - r) * (z - r) with shift added to each (z - r) that is a factor."""
    return np.asarray(weighted + np.where(total > 0.0, shift, 0.0) * total)


def forward(
    call: Call, *, keep_columns: bool, statistics: bool = False, store: bool = False
) -> Forward:
    """Visit every logit once.

    Parameters
    ----------
    call : Call
    keep_columns : bool
        Leave the kept-column bits for a backward.
    statistics : bool
        Also form entropy and argmax.
    store : bool
        Leave exponentials in the memory of dC for one backward, as far as the plan allows.

    Returns
    -------
    Forward
    """
    plan, vocab, rows = call.plan, call.problem.vocab, len(call.rows)
    filtered = keep_columns and plan.gradient_filter is not None
    run = _ForwardRun(
        call,
        kept.new_bits(rows, vocab) if filtered else None,
        statistics,
        Scratch(call.dtype),
        _new_store(call) if store else None,
        _new_column_store(call) if store and filtered else None,
    )
    groups = spans(0, rows, plan.row_block)
    segments = spans(0, vocab, _segment_columns(vocab, plan.segments, plan.column_block))
    items = [(group, segment) for group in groups for segment in segments]
    states: list[_RowState] = []
    with np.errstate(all="ignore"), Workers(rows * vocab, plan.concurrency) as workers:
        parts = [part for group in groups for part in spans(*group, ELEMENTWISE_ROWS)]
        bounds = np.concatenate([*workers.map(run.first_bounds, parts), np.zeros(0, call.dtype)])
        starts = [bounds[slice(*group)] for group, _ in items]
        for done, state in enumerate(workers.map(run.visit, zip(items, starts, strict=True))):
            if items[done][1] == segments[0]:
                states.append(state)
            else:
                states[-1].merge(state)
            call.report("forward", done + 1, len(items))
        if not segments:
            states = [_RowState(bounds[slice(*group)], statistics) for group in groups]
        return run.finish(states)


def _segment_columns(vocab: int, segments: int, column_block: int) -> int:
    """Return the width of a segment: whole column blocks."""
    return max(-(-vocab // (segments * column_block)), 1) * column_block


def _new_store(call: Call) -> Stored | None:
    rows = min(call.plan.stored_rows, len(call.rows))
    return Stored(np.empty(call.arrays.c.shape, call.dtype), rows) if rows else None


def _new_column_store(call: Call) -> StoredColumns | None:
    plan, tiles = call.plan, -(-len(call.rows) // ROW_TILE)
    if not (plan.stores_columns and tiles):
        return None
    sizes = np.zeros((tiles, -(-call.problem.vocab // plan.column_block)), np.int64)
    return StoredColumns(np.zeros(call.arrays.c.shape, call.dtype), plan.column_block, sizes)


class _ForwardRun(NamedTuple):
    """What the parts of one forward share."""

    call: Call
    bits: Array | None
    statistics: bool
    scratch: Scratch
    stored: Stored | None
    stored_columns: StoredColumns | None

    def first_bounds(self, part: tuple[int, int]) -> Array:
        """Bound each row's lse from below by the logits of its group's targets.

        A sum over some of the columns is less than that over all; and what neighbours are about
        is likely here too. On the data of docs/performance.md the forward then keeps a sixth
        more columns than the exact test; with the targets of a row tile alone it was a quarter,
        with each row's own three times as many.
        """
        call = self.call
        group = part[0] // call.plan.row_block * call.plan.row_block
        targets = np.unique(call.rows.target[group : group + call.plan.row_block])
        sums = np.full(part[1] - part[0], -np.inf, call.dtype)
        embeddings = call.embeddings(*part)
        for start, stop in spans(0, len(targets), call.plan.column_block):
            some = targets[start:stop]
            z = self.scratch.get("logits", len(sums), len(some))
            # Removed entries come back as rows of zeros with a bias of -inf.
            np.matmul(embeddings, call.classifier(some).T, out=z)
            call.logits(z, some)
            if call.classes.removed is not None:
                z[:, call.classes.removed[some]] = -np.inf
            largest = np.maximum(z.max(axis=1), sums)
            finite = np.where(largest == -np.inf, 0, largest)
            z -= finite[:, None]
            np.exp(z, out=z)
            sums = finite + np.log(z.sum(axis=1) + np.exp(sums - finite))
        return sums

    def visit(self, item: tuple[tuple[tuple[int, int], tuple[int, int]], Array]) -> _RowState:
        """Sum a group of rows over a segment of the columns."""
        ((first, last), (left, right)), bound = item
        call = self.call
        state = _RowState(bound, self.statistics)
        embeddings = call.embeddings(first, last)
        ones = np.ones(call.plan.column_block, call.dtype)
        for start, stop in spans(left, right, call.plan.column_block):
            classifier = call.classifier(slice(start, stop))
            for begin, end in call.products(first, last):
                block = self.scratch.get("logits", end - begin, stop - start)
                np.matmul(embeddings[begin - first : end - first], classifier.T, out=block)
                store = None
                if self.stored is not None and begin < self.stored.rows:
                    store = self.stored.block(start, stop)[begin:end]
                for top, bottom in spans(0, end - begin, ELEMENTWISE_ROWS):
                    _ForwardTile(
                        run=self,
                        state=state,
                        logits=block[top:bottom],
                        embeddings=embeddings[begin - first + top : begin - first + bottom],
                        classifier=classifier,
                        ones=ones[: stop - start],
                        store=None if store is None else store[top:bottom],
                        group=first,
                        top=begin - first + top,
                        left=start,
                    ).visit()
        return state

    def finish(self, states: list[_RowState]) -> Forward:
        """Turn the sums into what the loss and the backward need."""

        def joined(name: str) -> Array:
            parts = [getattr(state, name) for state in states]
            return np.concatenate(parts) if parts else np.zeros(0)

        # The loss is softplus of the other entries' log-sum-exp minus the target logit: never
        # negative, exactly 0 where there are no others, and exact where it is tiny.
        others = joined("reference") + np.log(joined("rest"))
        target_logit = joined("target_logit")
        nll = np.logaddexp(0.0, others - target_logit)
        # Also where nothing but removed entries is left: -inf minus -inf is not a number.
        nll[(target_logit == -np.inf) & ~np.isnan(others)] = np.inf
        lse = np.logaddexp(others, target_logit)
        if self.bits is not None:
            # A row that is not finite makes every column of the gradients so.
            lost = np.unique(np.flatnonzero(~np.isfinite(lse)) // ROW_TILE)
            self.bits[lost] = 0xFF
            if self.stored_columns is not None:
                # What lies there will be overwritten: now all columns are kept.
                self.stored_columns.sizes[lost] = 0
        entropy = argmax = None
        if self.statistics:
            total, weighted = joined("total"), joined("weighted")
            entropy = np.maximum(np.log(total) - weighted / total, 0.0)
            argmax = joined("argmax").astype(np.int64)
        base, dtype = joined("base"), self.call.dtype
        apart = joined("apart").astype(np.bool_) | ~(np.abs(lse - base) < FAR)
        if self.bits is not None:
            apart[:] = True
        reference = np.where(apart, lse, base).astype(dtype)
        smoothed = joined("smoothed_logit")
        return Forward(
            lse=lse,
            nll=nll,
            bits=self.bits,
            reference=reference,
            apart=apart,
            stored=self.stored,
            stored_columns=self.stored_columns,
            smoothed_logit=smoothed,
            entropy=entropy,
            argmax=argmax,
        )


class _ForwardTile(NamedTuple):
    """A few row tiles' part of a block of logits."""

    run: _ForwardRun
    state: _RowState
    logits: Array
    embeddings: Array
    classifier: Array
    ones: Array
    """One for each column: a product with it is the fastest sum over a row."""
    store: Array | None
    """Where to leave for the backward what `Stored` describes."""
    group: int
    top: int
    left: int

    def visit(self) -> None:
        """Sum the tile up, and mark the columns to keep."""
        run, call, state, z = self.run, self.run.call, self.state, self.logits
        rows = slice(self.top, self.top + len(z))
        columns = slice(self.left, self.left + z.shape[1])
        removed, smoothing = call.classes.removed, call.classes.smoothing
        call.logits(z, columns)
        if removed is not None:
            z[:, removed[columns]] = 0.0
        if smoothing is not None:
            state.smoothed_logit[rows] += z @ smoothing[columns]
        # Only a removed entry may be -inf; from an infinite input it must come out as NaN.
        infinite = np.zeros(len(z), np.bool_)
        if not np.isfinite(z @ self.ones).all():
            infinite = z.min(axis=1) == -np.inf
        if removed is not None:
            z[:, removed[columns]] = -np.inf

        start = self.group + self.top
        target = call.rows.target[start : start + len(z)] - self.left
        hit = np.flatnonzero((target >= 0) & (target < z.shape[1]))
        at = target[hit]
        state.target_logit[self.top + hit] = z[hit, at]
        if run.statistics:
            place = z.argmax(axis=1)
            state.take_best(z[np.arange(len(z)), place], place + self.left, rows)

        if self.store is not None and call.problem.softcap is not None:
            np.copyto(self.store, z)

        # The bound is close enough to the largest logit for all but contrived input, and finding
        # the largest takes a third as long as the exponentials. Entropy needs its accuracy.
        reference = state.bound[rows].astype(z.dtype)
        if run.statistics:
            reference = np.maximum(reference, z.max(axis=1))
            # Where everything so far is -inf any finite reference will do.
            reference[reference == -np.inf] = 0.0
        elif run.bits is None:
            # Mostly nothing to subtract; and the same in all blocks, for the backward.
            apart = state.apart[rows]
            reference = np.where(apart, reference, state.base[rows].astype(z.dtype))
        reference[infinite] = np.nan
        others = self._others(reference, hit, at)
        if not np.isfinite(others).all():
            self._repeat(np.flatnonzero(~np.isfinite(others)), reference, others)
        shift = state.reference[rows] - reference
        state.reference[rows] = reference
        state.rest[rows] = state.rest[rows] * np.exp(shift) + others
        if run.bits is not None:
            for top, bottom in spans(0, len(z), ROW_TILE):
                targets = at[(hit >= top) & (hit < bottom)]
                number = (self.group + self.top + top) // ROW_TILE
                keep = self._keep(number, z[top:bottom], targets)
                kept.put_bits(run.bits, number, self.left, keep)
                if run.stored_columns is not None:
                    tile = slice(top, bottom)
                    run.stored_columns.put(number, self.left, z[tile], reference[tile], keep)
        seen = state.reference[rows] + np.log(state.rest[rows])
        state.bound[rows] = np.maximum(state.bound[rows], seen)

    def _others(self, reference: Array, hit: Array, at: Array) -> Array:
        """Form exp(z - reference), the target's 0, in place or in the store; sum up each row."""
        z = self.logits
        if reference.any():  # a NaN too
            z -= reference[:, None]
        out = z
        if self.run.statistics:
            self._entropy(z, reference)
        else:
            # The product's own output is not in the store: BLAS visits its output repeatedly.
            if self.store is not None and self.run.call.problem.softcap is None:
                out = self.store
            np.exp(z, out=out)
        out[hit, at] = 0.0
        return np.asarray(out @ self.ones)

    def _repeat(self, rows: Array, reference: Array, others: Array) -> None:
        """Sum rows whose sums overflowed again, relative to their largest logit.

        Those alone: what they hold may not change a bit of the others.
        """
        call, columns = self.run.call, slice(self.left, self.left + self.logits.shape[1])
        z = np.matmul(self.embeddings[rows], self.classifier.T)
        call.logits(z, columns)
        if call.classes.removed is not None:
            z[:, call.classes.removed[columns]] = -np.inf
        largest = np.maximum(reference[rows], z.max(axis=1))
        largest[largest == -np.inf] = 0.0
        reference[rows] = largest
        z -= largest[:, None]
        np.exp(z, out=z)
        first = self.group + self.top
        target = call.rows.target[first + rows] - self.left
        hit = np.flatnonzero((target >= 0) & (target < z.shape[1]))
        z[hit, target[hit]] = 0.0
        others[rows] = z @ self.ones
        self.logits[rows] = z
        self.state.apart[self.top + rows] = True

    def _keep(self, number: int, z: Array, targets: Array) -> Array:
        """Test a row tile's columns against bounds of lse: a superset of what the backward keeps.

        The logits are exp(z - reference) here, and the reference is no larger than lse.
        """
        call, plan, width = self.run.call, self.run.call.plan, z.shape[1]
        threshold: Any = plan.filter_eps * np.exp(-MARGIN)
        if plan.gradient_filter == "unbiased":
            chunk = self.left // COLUMN_CHUNK
            u = kept.uniforms(call.seed, number, chunk, chunk - -width // COLUMN_CHUNK)
            threshold = np.repeat(u, COLUMN_CHUNK)[:width] * threshold
        # Not (largest >= threshold): a NaN must be kept, so that it reaches the gradients.
        # The target's is 0 by now.
        keep = ~(z.max(axis=0) < threshold)
        keep[targets] = True
        return np.asarray(keep)

    def _entropy(self, z: Array, reference: Array) -> None:
        """Exponentiate the centred logits in place, and update the sums that entropy needs."""
        state, rows = self.state, slice(self.top, self.top + len(z))
        shift = state.reference[rows] - reference
        # exp(-1e4) is 0 in every dtype, and 0 * -1e4 is 0 where 0 * -inf would be NaN.
        centred = np.maximum(z, -1e4)
        np.exp(z, out=z)
        shrink = np.exp(shift)
        carried = _moved(state.weighted[rows], state.total[rows], shift) * shrink
        state.weighted[rows] = carried + np.einsum("iv,iv->i", z, centred)
        state.total[rows] = state.total[rows] * shrink + z.sum(axis=1)
