"""The backward: dz of the kept columns, gathered, and the products with it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ..plan import COLUMN_CHUNK, EVERY_GRADIENT, ROW_TILE, Sweep, Wanted, needed_sweeps
from . import columns as kept
from .call import ELEMENTWISE_ROWS, Call, spans
from .forward import Saved
from .memory import Array, Scratch, Workers, as_index
from .tokens import RowFactors
from .turns import Turns


class HostGradients(NamedTuple):
    """Gradients as NumPy arrays in the dtypes of the inputs, and the work they took.

    Those that were not wanted are None.

    ``kept`` counts the (row tile, column) pairs that entered the filtered products and ``pairs``
    all of them; both are 0 where nothing was filtered.
    """

    e: Array | None
    c: Array | None
    bias: Array | None
    kept: int
    pairs: int


def backward(
    call: Call, saved: Saved, factors: RowFactors, wanted: Wanted = EVERY_GRADIENT
) -> HostGradients:
    """Form the gradients from the kept columns.

    Parameters
    ----------
    call : Call
    saved : Saved
        Of a forward of the same call, with ``keep_columns=True``.
    factors : RowFactors
    wanted : Wanted
        No work is done for the other gradients.

    Returns
    -------
    HostGradients
    """
    work = len(call.rows) * call.problem.vocab
    with np.errstate(all="ignore"), Workers(work, call.plan.concurrency) as workers:
        run = _Backward(call, saved, factors, workers, wanted)
        for sweep in run.sweeps:
            if sweep.c:
                run.by_columns(sweep)
            else:
                run.by_rows(sweep)
        return run.gradients()


class _Piece(NamedTuple):
    """dz of a group of rows at some columns, and the rows of c that belong to them."""

    columns: slice | Array
    dz: Array
    classifier: Array
    passed: Array | None
    """Which columns passed the filter; dz of the others is 0."""

    @property
    def number_passed(self) -> int:
        return 0 if self.passed is None else int(np.count_nonzero(self.passed))


class _ColumnSums(NamedTuple):
    """The sums of dC of some columns of a range.

    ``place`` says where in ``total`` each column of the range stands; it is None where all do, in
    their order.
    """

    columns: slice | Array
    left: int
    total: Array
    place: Array | None


class _Backward:
    """Outputs and factors of one backward; its sweeps are its methods."""

    def __init__(
        self, call: Call, saved: Saved, factors: RowFactors, workers: Workers, wanted: Wanted
    ) -> None:
        self.call, self.saved, self.factors, self.workers = call, saved, factors, workers
        self.wanted, self.sweeps = wanted, needed_sweeps(call.plan.sweeps, wanted)
        self.scratch = Scratch(call.dtype)
        e, c, bias = call.arrays.e, call.arrays.c, call.arrays.bias
        self.de = np.zeros((call.problem.tokens if wanted.e else 0, call.problem.dim), e.dtype)
        # What the forward stored is overwritten or cleared, range by range.
        stored = saved.stored or saved.stored_columns
        self.dc = np.zeros(0, c.dtype) if stored is None else stored.memory
        if wanted.c and stored is None:
            self.dc = np.zeros(c.shape, c.dtype)
        self.dbias = np.zeros(len(bias), call.dtype) if bias is not None and wanted.bias else None
        self.rounds = e.dtype != call.dtype
        self.counts_rows = not any(sweep.c and sweep.filtered for sweep in self.sweeps)
        self.kept = 0
        tiles = len(spans(0, len(call.rows), ROW_TILE))
        self.pairs = 0 if saved.bits is None else tiles * call.problem.vocab
        self.onehot = factors.onehot
        if call.classes.removed is not None:
            # The logit of a removed entry is -inf whatever e and c are.
            self.onehot = np.where(call.classes.removed[call.rows.target], 0, factors.onehot)
        self.scale, self.target_dz = self._row_scales()
        smoothing = call.classes.smoothing
        self.smoothing_of_rank_one = smoothing if call.problem.softcap is None else None
        self.smoothing_in_dz = None if call.problem.softcap is None else smoothing

    def _row_scales(self) -> tuple[Array, Array]:
        """Return what a row's exponentials are multiplied by, and dz at its target.

        The latter from the loss, whose relative accuracy is that of 1 - p of a certain token.
        """
        saved, softmax = self.saved, self.factors.softmax.astype(np.float64)
        rest = np.exp(saved.reference - saved.lse)
        scale = softmax * np.where(np.isfinite(saved.lse), rest, 1.0)
        nll = np.where(np.isfinite(saved.lse), saved.nll, np.nan)
        if self.call.classes.removed is not None:
            nll[self.call.classes.removed[self.call.rows.target]] = np.inf
        target_dz = softmax * np.exp(-nll) - self.onehot
        plain = softmax == self.onehot
        target_dz[plain] = (softmax * np.expm1(-nll))[plain]
        return scale.astype(self.call.dtype), target_dz.astype(self.call.dtype)

    def gradients(self) -> HostGradients:
        """Round what is not rounded yet and return it all."""
        dbias = self.dbias
        if dbias is not None:
            if self.smoothing_of_rank_one is not None:
                dbias -= self.smoothing_of_rank_one * self.factors.smoothing.sum()
            dbias = dbias.astype(self.de.dtype, copy=False)
        de = self.de.reshape(self.call.arrays.e.shape) if self.wanted.e else None
        dc = self.dc if self.wanted.c else None
        return HostGradients(de, dc, dbias, self.kept, self.pairs)

    def groups(self, sweep: Sweep, first: int, last: int) -> list[tuple[int, int]]:
        """Cut rows into those that a product takes at a time: those with one list of columns."""
        if sweep.filtered:
            return spans(first, last, ROW_TILE)
        return spans(first, last, self.call.plan.row_block)

    def ranges(self, sweep: Sweep) -> list[tuple[int, int]]:
        """Return the column spans over which dC is completed."""
        plan = self.call.plan
        size = plan.column_range if sweep.filtered else plan.column_block
        return spans(0, self.call.problem.vocab, size)

    def by_rows(self, sweep: Sweep) -> None:
        """Complete dE, group by group."""
        call = self.call

        def visit(rows: tuple[int, int]) -> int:
            total = np.zeros((rows[1] - rows[0], call.problem.dim), call.dtype)
            embeddings = call.embeddings(*rows)
            passed = 0
            for columns in self.ranges(sweep):
                part, counted = None, 0
                for piece in self.pieces(sweep, rows, embeddings, columns):
                    part = self.add_product(part, piece)
                    counted += piece.number_passed
                if part is not None:
                    total += part
                passed += counted
            self.finish_rows(rows[0], total)
            return passed

        groups = self.groups(sweep, 0, len(call.rows))
        for done, passed in enumerate(self.workers.map(visit, groups)):
            # Where both sweeps filter they pass the same columns, counted in the other one.
            self.kept += passed if self.counts_rows else 0
            call.report("backward", done + 1, len(groups))

    def by_columns(self, sweep: Sweep) -> None:
        """Complete dC, range by range, and sum dE along with it; either where it is asked for."""
        call, ranges, turns = self.call, self.ranges(sweep), Turns()
        # Where nothing is rounded the output itself is the sum.
        apart = sweep.e and self.rounds
        sums = np.zeros((len(call.rows) if apart else 0, call.problem.dim), call.dtype)

        def add_rows(number: int, rows: tuple[int, int], part: Array | None) -> None:
            with turns.turn(rows[0], number):
                if part is not None and apart:
                    sums[slice(*rows)] += part
                elif part is not None:
                    self.de[as_index(call.rows.source[slice(*rows)])] += part

        def visit(numbered: tuple[int, tuple[int, int]]) -> int:
            try:
                return self.visit_range(sweep, *numbered, add_rows)
            except BaseException:
                turns.fail()
                raise

        for done, passed in enumerate(self.workers.map(visit, enumerate(ranges))):
            self.kept += passed
            call.report("backward", done + 1, len(ranges))
        if sweep.e:
            for first, last in spans(0, len(call.rows), call.plan.row_block):
                where = as_index(call.rows.source[first:last])
                self.finish_rows(first, sums[first:last] if apart else self.de[where])

    def visit_range(
        self,
        sweep: Sweep,
        number: int,
        columns: tuple[int, int],
        add_rows: Callable[[int, tuple[int, int], Array | None], None],
    ) -> int:
        """Complete dC of a range of columns and hand its part of dE on; return what passed."""
        call, width = self.call, columns[1] - columns[0]
        sums = self.column_sums(sweep, columns) if self.wanted.c else None
        passed = 0
        for first, last in spans(0, len(call.rows), call.plan.row_block):
            embeddings = call.embeddings(first, last)
            # The dz of dense groups lie under one another, and enter dC by one product.
            dense = None if sweep.filtered else self.scratch.get("dz", last - first, width)
            for rows in self.groups(sweep, first, last):
                within = slice(rows[0] - first, rows[1] - first)
                into = None if dense is None else dense[within]
                part = None
                for piece in self.pieces(sweep, rows, embeddings[within], columns, into):
                    passed += piece.number_passed
                    if sweep.e:
                        part = self.add_product(part, piece)
                    if dense is None:
                        self.add_columns(sums, piece, embeddings[within], empty=False)
                if sweep.e:
                    add_rows(number, rows, part)
            if dense is not None:
                whole = _Piece(slice(*columns), dense, dense, None)
                self.add_columns(sums, whole, embeddings, empty=first == 0)
        if self.saved.stored_columns is not None:
            self.saved.stored_columns.clear(*columns)
        if sums is not None:
            self.finish_columns(sums)
        return passed

    def column_sums(self, sweep: Sweep, columns: tuple[int, int]) -> _ColumnSums:
        """Return what dC of a range of columns is summed in.

        Of a filtered sweep it holds the columns that some row tile keeps, and is added to many
        times: in a buffer that stays in cache, where dC itself would be fetched from memory.
        """
        call, (left, right) = self.call, columns
        if not sweep.filtered or self.saved.bits is None:
            output = self.dc[left:right]
            total = np.zeros(output.shape, call.dtype) if self.rounds else output
            return _ColumnSums(slice(left, right), left, total, None)
        if self.smoothing_of_rank_one is None:
            some = kept.columns_kept_by_any(self.saved.bits, left, right)
        else:
            some = np.arange(left, right)
        total = self.scratch.get("dC", len(some), call.problem.dim)
        total.fill(0)
        place = np.zeros(right - left, np.intp)
        place[some - left] = np.arange(len(some))
        return _ColumnSums(some, left, total, place)

    def pieces(
        self,
        sweep: Sweep,
        rows: tuple[int, int],
        embeddings: Array,
        columns: tuple[int, int],
        into: Array | None = None,
    ) -> Iterator[_Piece]:
        """Recompute the logits of a group of rows in a range of columns and form their dz.

        Parameters
        ----------
        into : ndarray, shape (rows, columns), or None
            Where to put the dz of a dense range; a buffer that the next piece overwrites where
            it is None.
        """
        call = self.call
        chosen: list[slice | Array] = [slice(*columns)]
        if sweep.filtered and self.saved.bits is not None:
            listed = kept.kept_columns(self.saved.bits, rows[0] // ROW_TILE, *columns)
            stored = self.stored_piece(rows, columns, listed)
            if stored is not None:
                yield stored
                return
            cuts = spans(0, len(listed), call.plan.gather_block)
            chosen = [listed[start:stop] for start, stop in cuts]
        elementwise = ROW_TILE if sweep.filtered else ELEMENTWISE_ROWS
        for piece in chosen:
            classifier = call.classifier(piece)
            dz = into
            if dz is None:
                dz = self.scratch.get("dz", len(embeddings), len(classifier))
            passed = None
            for first, last in call.products(*rows):
                within = slice(first - rows[0], last - rows[0])
                some = embeddings[within]
                known = self.stored((first, last), some, classifier, piece)
                ready = known is not None and call.problem.softcap is None
                source = dz[within] if known is None else known
                if known is None:
                    np.matmul(some, classifier.T, out=source)
                    call.logits(source, piece)
                for top, bottom in spans(first, last, elementwise):
                    tile = _BackwardTile(self, dz[top - rows[0] : bottom - rows[0]], top, piece)
                    part = source[top - first : bottom - first]
                    passed = tile.form(part, ready=ready, filtered=sweep.filtered)
            yield _Piece(piece, dz, classifier, passed)

    def stored_piece(
        self, rows: tuple[int, int], columns: tuple[int, int], listed: Array
    ) -> _Piece | None:
        """Form dz of the kept columns of a range, if the forward stored all of them."""
        stored, first = self.saved.stored_columns, rows[0]
        if stored is None or not 0 < len(listed) <= self.call.plan.gather_block:
            return None
        dz = self.scratch.get("dz", rows[1] - first, len(listed))
        if not stored.take(dz, first // ROW_TILE, columns, self.saved.reference[slice(*rows)]):
            return None
        passed = _BackwardTile(self, dz, first, listed).form(dz, ready=True, filtered=True)
        return _Piece(listed, dz, self.call.classifier(listed), passed)

    def stored(
        self,
        rows: tuple[int, int],
        embeddings: Array,
        classifier: Array,
        columns: slice | Array,
    ) -> Array | None:
        """Return what the forward stored of some rows, or None."""
        stored = self.saved.stored
        if stored is None or rows[0] >= stored.rows:
            return None
        assert isinstance(columns, slice)
        values = stored.block(columns.start, columns.stop)[slice(*rows)]
        apart = np.flatnonzero(self.saved.apart[slice(*rows)])
        if len(apart) and self.call.problem.softcap is None:
            z = np.matmul(embeddings[apart], classifier.T)
            self.call.logits(z, columns)
            z -= self.saved.reference[slice(*rows)][apart, None]
            np.exp(z, out=z)
            if self.call.classes.removed is not None:
                z[:, self.call.classes.removed[columns]] = 0.0
            values[apart] = z
        return values

    def add_product(self, part: Array | None, piece: _Piece) -> Array:
        """Add ``dz @ c`` to a group's part of dE, in a buffer of this thread."""
        product = self.product("first" if part is None else "next", piece.dz, piece.classifier)
        if part is None:
            return product
        part += product
        return part

    def add_columns(
        self, sums: _ColumnSums | None, piece: _Piece, embeddings: Array, *, empty: bool
    ) -> None:
        """Add ``dz.T @ e`` to a range of dC, and dz to dbias."""
        if self.dbias is not None:
            self.dbias[piece.columns] += piece.dz.sum(axis=0)
        if sums is None:
            return
        if empty:
            np.matmul(piece.dz.T, embeddings, out=sums.total)
            return
        if sums.place is None or piece.passed is None:
            sums.total[...] += self.product("next", piece.dz.T, embeddings)
            return
        assert not isinstance(piece.columns, slice)
        at = np.flatnonzero(piece.passed)
        product = self.product("next", piece.dz[:, at].T, embeddings)
        rows = sums.place[piece.columns[at] - sums.left]
        room = self.scratch.get("rows", *product.shape)
        product += np.take(sums.total, rows, axis=0, out=room, mode="clip")
        sums.total[rows] = product

    def finish_rows(self, first: int, total: Array) -> None:
        """Add label smoothing to a sum of dE, scale, round and store it."""
        rows = slice(first, first + len(total))
        if self.smoothing_of_rank_one is not None:
            total -= self.factors.smoothing[rows, None] * self.smoothing_classifier
        if self.call.problem.logit_scale != 1.0:
            total *= self.call.problem.logit_scale
        self.de[as_index(self.call.rows.source[rows])] = total

    def finish_columns(self, sums: _ColumnSums) -> None:
        """Add label smoothing to a sum of dC, scale, round and store it."""
        columns, total = sums.columns, sums.total
        if self.smoothing_of_rank_one is not None:
            total -= self.smoothing_of_rank_one[columns, None] * self.smoothing_embedding
        if self.call.problem.logit_scale != 1.0:
            total *= self.call.problem.logit_scale
        if self.rounds or sums.place is not None:
            self.dc[columns] = total

    @functools.cached_property
    def smoothing_classifier(self) -> Array:
        """Sum over v of smoothing[v] * C[v], shape (D,)."""
        total = np.zeros(self.call.problem.dim)
        if self.smoothing_of_rank_one is not None:
            for left, right in spans(0, self.call.problem.vocab, self.call.plan.column_block):
                weights = self.smoothing_of_rank_one[left:right]
                total += weights @ self.call.classifier(slice(left, right))
        return total.astype(self.call.dtype)

    @functools.cached_property
    def smoothing_embedding(self) -> Array:
        """Sum over i of the row's weight * E[i], shape (D,)."""
        total = np.zeros(self.call.problem.dim)
        for first, last in spans(0, len(self.call.rows), self.call.plan.row_block):
            total += self.factors.smoothing[first:last] @ self.call.embeddings(first, last)
        return total.astype(self.call.dtype)

    def product(self, name: str, left: Array, right: Array) -> Array:
        """Return a matrix product in a buffer of this thread and name."""
        out = self.scratch.get(name, left.shape[0], right.shape[1])
        return np.matmul(left, right, out=out)


class _BackwardTile(NamedTuple):
    """A row tile's part of a block of logits."""

    run: _Backward
    dz: Array
    top: int
    columns: slice | Array

    def form(self, source: Array, *, ready: bool, filtered: bool) -> Array | None:
        """Form dz from logits, or from exponentials that are ready; return which columns passed.

        What it is formed from may lie in its place.
        """
        run, dz = self.run, self.dz
        call, problem, columns = run.call, run.call.problem, self.columns
        rows = slice(self.top, self.top + len(dz))
        slope = None
        if problem.softcap is not None:
            slope = 1.0 - (source / problem.softcap) ** 2
        if not ready:
            reference = run.saved.reference[rows]
            if reference.any():  # a NaN too
                source = np.subtract(source, reference[:, None], out=dz)
            source = np.exp(source, out=dz)
            if call.classes.removed is not None:
                removed = call.classes.removed[columns]
                dz[:, removed] = 0.0
                if slope is not None:
                    slope[:, removed] = 0.0
        hit, at = self._targets(call.rows.target[rows])
        weight = None
        if filtered:
            weight = self._weights(at)
            dz *= weight
        np.multiply(source, run.scale[rows, None], out=dz)
        dz[hit, at] = run.target_dz[rows][hit]
        if run.smoothing_in_dz is not None:
            dz -= run.factors.smoothing[rows, None] * run.smoothing_in_dz[columns]
        if slope is not None:
            dz *= slope
        return weight

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
