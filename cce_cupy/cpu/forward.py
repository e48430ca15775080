"""The forward: every logit once; log-sum-exp, target logits and the kept-column bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..plan import COLUMN_CHUNK, MARGIN, ROW_TILE
from . import columns as kept
from .call import Call, spans
from .memory import Array, Scratch, Workers


@dataclass(frozen=True)
class Forward:
    """What the forward leaves for each compact row.

    Attributes
    ----------
    lse, nll : ndarray of float64, shape (rows,)
        Log-sum-exp, and that minus the target logit.
    smoothed_logit : ndarray of float64, shape (rows,)
        ``sum_v smoothing[v] * z[v]``; 0 without label smoothing.
    bits : ndarray of uint8 or None
        Kept-column bits of each row tile.
    entropy : ndarray of float64 or None
    argmax : ndarray of int64 or None
    """

    lse: Array
    nll: Array
    smoothed_logit: Array
    bits: Array | None
    entropy: Array | None
    argmax: Array | None


class _RowState:
    """Running sums of all compact rows, in float64: a row's share of the work is one scalar."""

    def __init__(self, rows: int, vocab: int, statistics: bool) -> None:
        self.reference = np.full(rows, -np.inf)
        """Exponent that the sums are relative to."""
        self.rest = np.zeros(rows)
        """Sum of exp(z - reference) over the columns seen, the target's left out."""
        self.bound = np.full(rows, -np.inf)
        """A lower bound of the final lse."""
        self.target_logit = np.full(rows, -np.inf)
        self.smoothed_logit = np.zeros(rows)
        self.total = np.zeros(rows if statistics else 0)
        self.weighted = np.zeros(rows if statistics else 0)
        """Sums of exp(z - reference) and of that times (z - reference), target included."""
        self.best = np.full(rows if statistics else 0, -np.inf)
        self.argmax = np.zeros(rows if statistics else 0, np.int64)


def forward(call: Call, *, keep_columns: bool, statistics: bool = False) -> Forward:
    """Visit every logit once.

    Parameters
    ----------
    call : Call
    keep_columns : bool
        Leave the kept-column bits for a backward.
    statistics : bool
        Also form entropy and argmax.

    Returns
    -------
    Forward
    """
    plan, vocab, rows = call.plan, call.problem.vocab, len(call.rows)
    state = _RowState(rows, vocab, statistics)
    filtered = keep_columns and plan.gradient_filter is not None
    bits = kept.new_bits(rows, vocab) if filtered else None
    scratch = Scratch(call.dtype)
    rowspans = spans(0, rows, plan.row_block)
    columnspans = spans(0, vocab, plan.column_block)
    blocks = len(rowspans) * len(columnspans)
    done = 0
    with np.errstate(all="ignore"), Workers(rows * vocab) as workers:
        for first, last in rowspans:
            embeddings = call.embeddings(first, last)
            state.bound[first:last] = _early_target_logit(call, embeddings, first, last)
            for left, right in columnspans:
                logits = scratch.get("logits", last - first, right - left)
                np.matmul(embeddings, call.classifier(slice(left, right)).T, out=logits)
                tiles = [
                    _ForwardTile(call, state, logits[top - first : bottom - first], top, left)
                    for top, bottom in spans(first, last, ROW_TILE)
                ]
                for tile, columns in zip(
                    tiles,
                    workers.map(lambda tile: tile.visit(statistics, filtered), tiles),
                    strict=True,
                ):
                    if bits is not None:
                        kept.put_bits(bits, tile.number, left, columns)
                done += 1
                call.report("forward", done, blocks)
        return _finish_forward(call, state, bits, statistics)


def _early_target_logit(call: Call, embeddings: Array, first: int, last: int) -> Array:
    """Return the targets' logits before anything else: the first lower bound of lse."""
    target = call.rows.target[first:last]
    # Removed entries come back as rows of zeros with a bias of -inf, whatever the softcap.
    product: Array = np.einsum("id,id->i", embeddings, call.classifier(target))
    call.logits(product[None, :], target)
    if call.classes.removed is not None:
        product[call.classes.removed[target]] = -np.inf
    return product


class _ForwardTile(NamedTuple):
    """A row tile's part of a block of logits."""

    call: Call
    state: _RowState
    logits: Array
    top: int
    left: int

    @property
    def number(self) -> int:
        return self.top // ROW_TILE

    def visit(self, statistics: bool, filtered: bool) -> Array:
        """Sum the tile up; return which of its columns to keep, or an empty array."""
        call, state, z = self.call, self.state, self.logits
        rows = slice(self.top, self.top + len(z))
        columns = slice(self.left, self.left + z.shape[1])
        call.logits(z, columns)
        if call.classes.removed is not None:
            z[:, call.classes.removed[columns]] = 0.0
        if call.classes.smoothing is not None:
            state.smoothed_logit[rows] += z @ call.classes.smoothing[columns]
        if call.classes.removed is not None:
            z[:, call.classes.removed[columns]] = -np.inf

        hit = np.flatnonzero(
            (call.rows.target[rows] >= columns.start) & (call.rows.target[rows] < columns.stop)
        )
        at = call.rows.target[rows][hit] - self.left
        state.target_logit[self.top + hit] = z[hit, at]
        if statistics:
            self._best(rows)

        old = state.reference[rows].copy()
        reference = np.maximum(state.bound[rows].astype(z.dtype), z.max(axis=1))
        # Where everything so far is -inf any finite reference will do.
        reference[reference == -np.inf] = 0.0
        z -= reference[:, None]
        state.reference[rows] = reference
        shrink = np.exp(old - state.reference[rows])
        if statistics:
            self._entropy(rows, old, shrink)
        else:
            np.exp(z, out=z)

        keep = self._keep(at) if filtered else np.empty(0, np.bool_)
        z[hit, at] = 0.0
        state.rest[rows] = state.rest[rows] * shrink + z.sum(axis=1)
        seen = state.reference[rows] + np.log(state.rest[rows])
        state.bound[rows] = np.maximum(state.bound[rows], seen)
        return keep

    def _keep(self, targets: Array) -> Array:
        """Test the columns against a lower bound of lse: a superset of what the backward keeps.

        The logits are exp(z - reference) by now, and the reference is no larger than lse.
        """
        plan, width = self.call.plan, self.logits.shape[1]
        threshold: Any = plan.filter_eps * np.exp(-MARGIN)
        if plan.gradient_filter == "unbiased":
            chunk = self.left // COLUMN_CHUNK
            u = kept.uniforms(self.call.seed, self.number, chunk, chunk - -width // COLUMN_CHUNK)
            threshold = np.repeat(u, COLUMN_CHUNK)[:width] * threshold
        # Not (largest >= threshold): a NaN must be kept, so that it reaches the gradients.
        keep = ~(self.logits.max(axis=0) < threshold)
        keep[targets] = True
        return np.asarray(keep)

    def _best(self, rows: slice) -> None:
        state, z = self.state, self.logits
        place = z.argmax(axis=1)
        value = z[np.arange(len(z)), place]
        better = (value > state.best[rows]) | (np.isnan(value) & ~np.isnan(state.best[rows]))
        state.argmax[rows] = np.where(better, place + self.left, state.argmax[rows])
        state.best[rows] = np.where(better, value, state.best[rows])

    def _entropy(self, rows: slice, old: Array, shrink: Array) -> None:
        """Exponentiate the logits in place, and update the sums that entropy needs."""
        state, z = self.state, self.logits
        # exp(-1e4) is 0 in every dtype, and 0 * -1e4 is 0 where 0 * -inf would be NaN.
        centred = np.maximum(z, -1e4)
        np.exp(z, out=z)
        moved = np.where(state.total[rows] > 0.0, old - state.reference[rows], 0.0)
        carried = state.weighted[rows] + moved * state.total[rows]
        state.weighted[rows] = carried * shrink + np.einsum("iv,iv->i", z, centred)
        state.total[rows] = state.total[rows] * shrink + z.sum(axis=1)


def _finish_forward(call: Call, state: _RowState, bits: Array | None, statistics: bool) -> Forward:
    # The loss is softplus of the other entries' log-sum-exp minus the target logit: never
    # negative, exactly 0 where there are no others, and exact where it is tiny.
    others = state.reference + np.log(state.rest)
    nll = np.logaddexp(0.0, others - state.target_logit)
    lse = np.logaddexp(others, state.target_logit)
    lse[np.isnan(nll) & (lse == -np.inf)] = np.nan
    if bits is not None:
        # A row that is not finite makes every column of the gradients so.
        for row in np.flatnonzero(~np.isfinite(lse)):
            bits[row // ROW_TILE] = 0xFF
    entropy = None
    if statistics:
        entropy = np.maximum(np.log(state.total) - state.weighted / state.total, 0.0)
    return Forward(
        lse=lse,
        nll=nll,
        smoothed_logit=state.smoothed_logit,
        bits=bits,
        entropy=entropy,
        argmax=state.argmax if statistics else None,
    )
