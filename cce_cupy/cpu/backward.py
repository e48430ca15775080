"""The backward: dz of the kept columns, gathered, and the products with it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from ..plan import COLUMN_CHUNK, ROW_TILE, Sweep
from . import columns as kept
from .call import Call, spans
from .forward import Forward
from .memory import Array, Scratch, Workers, as_index
from .tokens import RowFactors


class HostGradients(NamedTuple):
    """Gradients as NumPy arrays in the dtypes of the inputs, and the work they took.

    ``kept`` counts the (row tile, column) pairs that entered the filtered products and ``pairs``
    all of them; both are 0 where nothing was filtered.
    """

    e: Array
    c: Array
    bias: Array | None
    kept: int
    pairs: int


def backward(call: Call, saved: Forward, factors: RowFactors) -> HostGradients:
    """Form the gradients from the kept columns.

    Parameters
    ----------
    call : Call
    saved : Forward
        Of the same call, with ``keep_columns=True``.
    factors : RowFactors

    Returns
    -------
    HostGradients
    """
    with np.errstate(all="ignore"), Workers(len(call.rows) * call.problem.vocab) as workers:
        run = _Backward(call, saved, factors, workers)
        for sweep in call.plan.sweeps:
            if sweep.c:
                run.by_columns(sweep)
            else:
                run.by_rows(sweep)
        return run.gradients()


class _Backward:
    """Outputs and factors of one backward; its sweeps are its methods."""

    def __init__(self, call: Call, saved: Forward, factors: RowFactors, workers: Workers) -> None:
        self.call, self.saved, self.factors, self.workers = call, saved, factors, workers
        self.scratch = Scratch(call.dtype)
        e, c, bias = call.arrays.e, call.arrays.c, call.arrays.bias
        self.de = np.zeros((call.problem.tokens, call.problem.dim), e.dtype.newbyteorder("="))
        self.dc = np.zeros(c.shape, c.dtype.newbyteorder("="))
        self.dbias = None if bias is None else np.zeros(len(bias), call.dtype)
        self.rounds = self.de.dtype != call.dtype
        self.kept = self.pairs = 0
        self.onehot = factors.onehot
        if call.classes.removed is not None:
            # The logit of a removed entry is -inf whatever e and c are.
            self.onehot = np.where(call.classes.removed[call.rows.target], 0, factors.onehot)
        smoothing = call.classes.smoothing
        self.smoothing_of_rank_one = smoothing if call.problem.softcap is None else None
        self.smoothing_in_dz = None if call.problem.softcap is None else smoothing

    def gradients(self) -> HostGradients:
        """Round what is not rounded yet and return it all."""
        dbias = self.dbias
        if dbias is not None:
            if self.smoothing_of_rank_one is not None:
                dbias -= self.smoothing_of_rank_one * self.factors.smoothing.sum()
            dbias = dbias.astype(self.de.dtype, copy=False)
        de = self.de.reshape(self.call.arrays.e.shape)
        return HostGradients(de, self.dc, dbias, self.kept, self.pairs)

    def groups(self, sweep: Sweep) -> list[tuple[int, int]]:
        """Return the row spans that a sweep treats at a time: those with one list of columns."""
        size = ROW_TILE if sweep.filtered else self.call.plan.row_block
        return spans(0, len(self.call.rows), size)

    def ranges(self, sweep: Sweep) -> list[tuple[int, int]]:
        """Return the column spans over which dC is completed at a time."""
        plan = self.call.plan
        size = plan.column_range if sweep.filtered else plan.column_block
        return spans(0, self.call.problem.vocab, size)

    def pieces(self, sweep: Sweep, first: int, left: int, right: int) -> list[slice | Array]:
        """Return the columns of a range that a group works on, in pieces of bounded size."""
        if not sweep.filtered or self.saved.bits is None:
            return [slice(left, right)]
        columns = kept.kept_columns(self.saved.bits, first // ROW_TILE, left, right)
        size = self.call.plan.gather_block
        return [columns[start:stop] for start, stop in spans(0, len(columns), size)]

    def by_rows(self, sweep: Sweep) -> None:
        """Complete dE group by group."""
        groups = self.groups(sweep)
        for number, (first, last) in enumerate(groups):
            total = np.zeros((last - first, self.call.problem.dim), self.call.dtype)
            embeddings = self.call.embeddings(first, last)
            for left, right in self.ranges(sweep):
                for columns in self.pieces(sweep, first, left, right):
                    dz, classifier = self.form_dz(sweep, embeddings, first, columns)
                    total += self.product(dz, classifier)
            self.finish_rows(first, total)
            self.call.report("backward", number + 1, len(groups))

    def by_columns(self, sweep: Sweep) -> None:
        """Complete dC range by range, and sum dE along with it where the sweep asks for it."""
        call, groups, ranges = self.call, self.groups(sweep), self.ranges(sweep)
        # Where nothing is rounded the output itself is the sum.
        apart = sweep.e and self.rounds
        sums = np.zeros((len(call.rows) if apart else 0, call.problem.dim), call.dtype)
        smoothing = self.smoothing_embedding(groups)
        for number, (left, right) in enumerate(ranges):
            output = self.dc[left:right]
            total = np.zeros(output.shape, call.dtype) if self.rounds else output
            for first, last in groups:
                pieces = self.pieces(sweep, first, left, right)
                embeddings = call.embeddings(first, last) if pieces else np.empty(0)
                for columns in pieces:
                    dz, classifier = self.form_dz(sweep, embeddings, first, columns)
                    if self.dbias is not None:
                        self.dbias[columns] += dz.sum(axis=0)
                    if isinstance(columns, slice) and first == 0:
                        np.matmul(dz.T, embeddings, out=total)
                    elif isinstance(columns, slice):
                        total += self.product(dz.T, embeddings)
                    else:
                        total[columns - left] += self.product(dz.T, embeddings)
                    if apart:
                        sums[first:last] += self.product(dz, classifier)
                    elif sweep.e:
                        where = as_index(call.rows.source[first:last])
                        self.de[where] += self.product(dz, classifier)
            if smoothing is not None and self.smoothing_of_rank_one is not None:
                total -= self.smoothing_of_rank_one[left:right, None] * smoothing
            if call.problem.logit_scale != 1.0:
                total *= call.problem.logit_scale
            if self.rounds:
                output[...] = total
            call.report("backward", number + 1, len(ranges))
        if sweep.e:
            for first, last in groups:
                where = as_index(call.rows.source[first:last])
                self.finish_rows(first, sums[first:last] if apart else self.de[where])

    def finish_rows(self, first: int, total: Array) -> None:
        """Add label smoothing to a sum of dE, scale, round and store it."""
        rows = slice(first, first + len(total))
        if self.smoothing_of_rank_one is not None:
            total -= self.factors.smoothing[rows, None] * self.smoothing_classifier
        if self.call.problem.logit_scale != 1.0:
            total *= self.call.problem.logit_scale
        self.de[as_index(self.call.rows.source[rows])] = total

    @functools.cached_property
    def smoothing_classifier(self) -> Array:
        """Sum over v of smoothing[v] * C[v], shape (D,)."""
        total = np.zeros(self.call.problem.dim)
        if self.smoothing_of_rank_one is not None:
            for left, right in spans(0, self.call.problem.vocab, self.call.plan.column_block):
                weights = self.smoothing_of_rank_one[left:right]
                total += weights @ self.call.classifier(slice(left, right))
        return total.astype(self.call.dtype)

    def smoothing_embedding(self, groups: list[tuple[int, int]]) -> Array | None:
        """Sum over i of the row's weight * E[i], shape (D,)."""
        if self.smoothing_of_rank_one is None:
            return None
        total = np.zeros(self.call.problem.dim)
        for first, last in groups:
            total += self.factors.smoothing[first:last] @ self.call.embeddings(first, last)
        return total.astype(self.call.dtype)

    def product(self, left: Array, right: Array) -> Array:
        """Return a matrix product in a buffer that the next product overwrites."""
        out = self.scratch.get("product", left.shape[0], right.shape[1])
        return np.matmul(left, right, out=out)

    def form_dz(
        self, sweep: Sweep, embeddings: Array, first: int, columns: slice | Array
    ) -> tuple[Array, Array]:
        """Recompute logits and turn them into dz, in a buffer that the next call overwrites.

        Returns
        -------
        dz : ndarray, shape (rows, columns)
        classifier : ndarray, shape (columns, D)
            The rows of c that dz belongs to.
        """
        classifier = self.call.classifier(columns)
        dz = self.scratch.get("dz", len(embeddings), len(classifier))
        np.matmul(embeddings, classifier.T, out=dz)
        tiles = [
            _BackwardTile(self, dz[top : top + ROW_TILE], first + top, columns)
            for top in range(0, len(dz), ROW_TILE)
        ]
        for counted in self.workers.map(lambda tile: tile.form(sweep.filtered), tiles):
            # Where the sweeps for dE and dC differ only one of them is filtered or both are.
            if sweep.filtered and (sweep.c or not self.call.problem.filter_c_grad):
                self.kept += counted
        return dz, classifier


class _BackwardTile(NamedTuple):
    """A row tile's part of a block of recomputed logits."""

    run: _Backward
    dz: Array
    top: int
    columns: slice | Array

    def form(self, filtered: bool) -> int:
        """Turn products into dz in place; return how many columns passed the filter."""
        run, dz = self.run, self.dz
        call, problem, columns = run.call, run.call.problem, self.columns
        rows = slice(self.top, self.top + len(dz))
        call.logits(dz, columns)
        slope = None
        if problem.softcap is not None:
            slope = 1.0 - (dz / problem.softcap) ** 2
        dz -= run.saved.lse[rows, None].astype(dz.dtype)
        np.exp(dz, out=dz)
        if call.classes.removed is not None:
            dz[:, call.classes.removed[columns]] = 0.0
        hit, at = self._targets(call.rows.target[rows])
        passed = 0
        if filtered:
            weight = self._weights(at)
            passed = int(np.count_nonzero(weight))
            dz *= weight
        dz *= run.factors.softmax[rows, None]
        dz[hit, at] -= run.onehot[rows][hit]
        if run.smoothing_in_dz is not None:
            dz -= run.factors.smoothing[rows, None] * run.smoothing_in_dz[columns]
        if slope is not None:
            dz *= slope
        return passed

    def _targets(self, target: Array) -> tuple[Array, Array]:
        """Return the rows whose target is among the columns, and where it stands there."""
        if isinstance(self.columns, slice):
            at = target - self.columns.start
            hit = np.flatnonzero((at >= 0) & (at < self.dz.shape[1]))
        else:
            at = np.minimum(np.searchsorted(self.columns, target), len(self.columns) - 1)
            hit = np.flatnonzero(self.columns[at] == target)
        return hit, at[hit]

    def _weights(self, targets: Array) -> Array:
        """Apply the filter's exact test to the probabilities: 0 for a column that is dropped."""
        call = self.run.call
        eps = call.dtype.type(call.plan.filter_eps)
        largest = self.dz.max(axis=0)
        largest[targets] = 1.0
        # Comparisons are written so that a NaN is kept, with weight 1.
        if call.plan.gradient_filter == "threshold":
            return np.asarray(~(largest < eps), call.dtype)
        assert not isinstance(self.columns, slice)
        chunks: Array = self.columns // COLUMN_CHUNK
        first = int(chunks[0])
        u = kept.uniforms(call.seed, self.top // ROW_TILE, first, int(chunks[-1]) + 1)
        weight: Array = np.where(largest < eps, eps / largest, call.dtype.type(1.0))
        weight[largest < eps * u[chunks - first]] = 0.0
        return weight
