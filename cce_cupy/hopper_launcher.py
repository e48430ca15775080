"""The launches on Hopper: the forward in units, the columns' order, then all chunks in one launch.

Where every column is kept, launches for each chunk come before that one, and do its work if every
token counts: only the device knows.
"""

from __future__ import annotations

from typing import Any

from .launcher import BackwardOutputs, Launcher
from .plan import (
    ITEMSIZE,
    ORDER_THREADS,
    PASSED_BYTES,
    ROW_TILE,
    TILE_COLUMNS,
    DenseCut,
    HopperBackward,
    HopperForward,
    HopperPass,
    Sweep,
    needed_sweeps,
)
from .tensor_map import TensorMap

_THREADS = 384
"""kThreads of kernels_cu/sm90/forward.cuh and of backward.cuh."""

_BOX = 64
"""kTileK of kernels_cu/sm90/operand.cuh: columns of the boxes that are copied, and rows of most."""

_ROW_THREADS = 256
"""Of target_logits of kernels_cu/sm90/rows.cu, a warp a row, and of bounds.cu."""

_MERGE_ROWS, _MERGERS = 32, 16
"""Rows of a block of finish_rows of kernels_cu/sm90/rows.cu, and kMergers there."""

_BOUND_ROWS = 32
"""kBoundRows of kernels_cu/sm90/bounds.cu."""

_UNIT_STATISTICS = ("weighted", "best", "argmax")

_TAKEN = 4
"""Bytes of the largest factor; behind it stands whether an attempt took on both gradients."""

_HEAD = 8
"""Bytes of the two, which stand before the counters of the passes and behind PASSED_BYTES."""


class HopperForwardLauncher(Launcher):
    """The launches of one call whose forward runs on Hopper's matrix units."""

    @property
    def forward_cut(self) -> HopperForward:
        """How the forward is cut."""
        cut = self.plan.hopper
        assert cut is not None
        return cut

    def forward(self, *, bits: int, statistics: bool) -> None:
        """Visit every logit; leave the units' sums, and the bits where asked for."""
        problem, plan, room, inputs = self.problem, self.plan, self.room, self.inputs
        cut = self.forward_cut
        file, name = "forward", cut.kernel
        if statistics:
            file, name = "statistics", "forward_statistics"
        elif not self.plain:
            file, name = "options", "forward_options"
        known = room["own"], room["bound"], room["finished"], room["target_logit"]
        packed = room["packed"] if cut.packed_rows else 0
        rows = max(plan.capacity, cut.packed_rows)
        self.launch(
            "sm90/rows", "target_logits", (-(-rows * 32 // _ROW_THREADS), 1), (_ROW_THREADS, 1),
            *self.e, *self.c, inputs.bias, problem.dim, *self.logit_options, *self.map, *known,
            packed, cut.packed_rows,
            bits, plan.saved["bits"] // 4 if bits else 0,
        )  # fmt: skip
        if bits:
            self.launch(
                "sm90/bounds", "first_bound", (-(-plan.capacity // _BOUND_ROWS), 1),
                (_ROW_THREADS, 1),
                *self.e, *self.c, inputs.bias, problem.dim, *self.logit_options, *self.map,
                room["bound"],
            )  # fmt: skip
        cluster = 1 if name == "forward_single" else 2
        # Pairs need an even number of blocks.
        blocks = -(-cut.blocks // cluster) * cluster
        shape, box = (problem.tokens, problem.dim), (ROW_TILE, _BOX)
        e_map = TensorMap(inputs.e.pointer, shape, inputs.e.stride, problem.dtype, box)
        packed_map = e_map  # of something, where nothing is packed
        if packed:
            shape = (cut.packed_rows, problem.dim)
            packed_map = TensorMap(packed, shape, problem.dim, problem.dtype, box)
        shape, box = (problem.vocab, problem.dim), (TILE_COLUMNS // cluster, _BOX)
        c_map = TensorMap(inputs.c.pointer, shape, inputs.c.stride, problem.dtype, box)
        self.launch(
            f"sm90/{file}", name, (blocks, 1), (_THREADS, 1),
            e_map, packed_map, c_map, *self.e, *self.map, packed, inputs.bias,
            room["smoothing"] if plan.smooths else 0, problem.dim, problem.vocab,
            *self.logit_options, *self.filter(), cut.unit_tiles, cut.group,
            *known, *self._unit_sums(statistics), plan.capacity, bits, plan.words,
        )  # fmt: skip

    def merge_rows(self, outputs: tuple[Any, ...], *, statistics: bool) -> None:
        """Merge what the forward left; `outputs` are the last arguments of `finish_rows`."""
        plan = self.plan
        self.launch(
            "sm90/rows", "finish_rows", (max(-(-plan.capacity // _MERGE_ROWS), 1), 1),
            (_MERGE_ROWS, _MERGERS), *self.map, *self._unit_sums(statistics),
            self.forward_cut.parts, plan.capacity, self.room["target_logit"], *outputs,
        )  # fmt: skip

    def _unit_sums(self, statistics: bool) -> list[int]:
        room = self.room
        rest = [room[f"unit_{name}"] for name in _UNIT_STATISTICS] if statistics else [0, 0, 0]
        smoothed = room["unit_smoothed"] if self.plan.smooths else 0
        return [room["unit_reference"], room["unit_rest"], smoothed, *rest]


class HopperLauncher(HopperForwardLauncher):
    """The launches of one call whose backward runs there too."""

    @property
    def largest(self) -> int:
        """Where the largest of the rows' factors stands."""
        return self.room["counters"] + PASSED_BYTES

    def backward(self, dloss: int, dlse: int, outputs: BackwardOutputs) -> None:
        """Form the wanted gradients."""
        problem, plan, room, wanted = self.problem, self.plan, self.room, outputs.wanted
        cut = plan.hopper_backward
        assert cut is not None
        self.row_factors(dloss, dlse)
        if problem.dtype == "float16":
            self.launch(
                "sm90/factors", "largest_factor", (1, 1), (1024, 1), room["count"],
                room["factor_softmax"], room["factor_onehot"], self.largest,
            )  # fmt: skip
        if self.rank_one:
            self.smoothing_sums(wanted)
            for wants, name in ((wanted.e, "classifier"), (wanted.c, "embedding")):
                if wants:
                    self.launch(
                        "sm90/factors", "sum_parts", (-(-problem.dim // 256), 1), (256, 1),
                        room[f"smoothing_{name}"], plan.smoothing_parts, problem.dim,
                        room[f"{name}_total"],
                    )  # fmt: skip
        counters = self.largest + _HEAD
        if cut.attempts and wanted.e and wanted.c:
            both = Sweep(e=True, c=True, filtered=True)
            self._pass(cut, both, HopperPass(0, plan.tiles, 0), counters, outputs, attempt=True)
            counters += cut.counters[-1]
        for sweep in needed_sweeps(plan.sweeps, wanted):
            for part in cut.passes(plan.tiles, alone=not sweep.c, filtered=sweep.filtered):
                self._pass(cut, sweep, part, counters, outputs)
                counters += cut.counters[-1]

    def _pass(
        self,
        cut: HopperBackward,
        sweep: Sweep,
        part: HopperPass,
        counters: int,
        outputs: BackwardOutputs,
        *,
        attempt: bool = False,
    ) -> None:
        """Order the columns that a pass keeps, and work through them."""
        problem, plan, room, inputs = self.problem, self.plan, self.room, self.inputs
        names = ("column", "word", "before", "kept_in", "tiles", "block", "chunk", "range")
        kept: tuple[int, ...] = (0, 0, 0, problem.vocab)
        if sweep.filtered:
            bits = outputs.bits + 4 * plan.words * part.first_tile
            kept = bits, plan.words, outputs.unbounded + 4 * part.first_tile, problem.vocab
        order = (
            *kept, *(room[f"order_{name}"] if sweep.filtered else 0 for name in names),
            cut.order_blocks, cut.natural_blocks, cut.tile_words, part.chunk_blocks,
        )  # fmt: skip
        ordered, queue, arrived, active, any_column, ready = (
            counters + at for at in cut.counters[:-1]
        )
        rank_one, wanted, taken = self.rank_one, outputs.wanted, self.largest + _TAKEN
        wants_e, wants_c = sweep.e and wanted.e, sweep.c and wanted.c
        if sweep.filtered:
            may_wait_in_dc = wants_e and wants_c and cut.zeros_in_dc
            self.launch(
                "sm90/order", "order_columns", (cut.blocks, 1), (ORDER_THREADS, 1), room["count"],
                part.first_tile, part.tiles, cut.pairs, cut.pairs_in_one, may_wait_in_dc, *order,
                *(room["records"] + at for at in cut.scratch), active, any_column, ordered,
                taken, attempt, cooperative=True,
            )  # fmt: skip
        shape = problem.tokens, problem.dim
        e_map = TensorMap(inputs.e.pointer, shape, inputs.e.stride, problem.dtype, (_BOX, _BOX))
        lists: tuple[int, ...] = room["list"], room["item"], 0, 0
        passed: tuple[int, ...] = 0, 0
        if sweep.filtered:
            lists = room["list"], room["item"], room["slot"], room["passing"]
            passed = room["passed_pairs"], room["carried"]
        dense = plan.dense_cut(sweep, part, both=wants_e and wants_c)
        if dense is not None:
            self._dense(dense, outputs.de if wants_e else 0, outputs.dc if wants_c else 0)
        with_bias = sweep.c and wanted.bias
        in_columns = problem.filter_c_grad and (wanted.c or wanted.bias)
        counts = sweep.filtered and (sweep.c or not in_columns)
        smoothing = room["smoothing"] if plan.smooths else 0
        kernel = "backward" if self.plain else "backward_options"
        self.launch(
            f"sm90/{kernel}", kernel, (cut.blocks, 1), (_THREADS, 1), e_map,
            *self.e, *self.c, *self.map, inputs.bias, 0 if rank_one else smoothing, problem.dim,
            *self.logit_options, *(self.filter() if sweep.filtered else (0.0, 1.0, False)),
            part.first_tile, part.tiles, taken, attempt, *order, room["row_lse"], *self.factors(),
            self.largest, room["target_rest"], *lists, room["records"], cut.pairs_in_one,
            *passed, ready,
            room["dz_sum"] if with_bias else 0, room["records"] + cut.low_offset,
            smoothing if rank_one else 0,
            room["classifier_total"] if rank_one and wants_e else 0,
            room["embedding_total"] if rank_one and wants_c else 0,
            room["smoothing_rows"], outputs.de if wants_e else 0, outputs.dc if wants_c else 0,
            outputs.dbias if with_bias else 0, outputs.passed if counts else 0, queue, arrived,
            problem.tokens if dense else -1,
            cooperative=True,
        )  # fmt: skip

    def _dense(self, dense: DenseCut, de: int, dc: int) -> None:
        """Form gradients of all columns chunk by chunk; nothing where any token is ignored."""
        problem, room, inputs = self.problem, self.room, self.inputs
        largest, records = self.largest, room["records"]
        tokens, vocab, dim = problem.tokens, problem.vocab, problem.dim
        e, c = inputs.e, inputs.c

        def boxes(pointer: int, rows: int, columns: int, stride: int, box: int) -> TensorMap:
            return TensorMap(pointer, (rows, columns), stride, problem.dtype, (box, _BOX))

        waiting = dc + (vocab - dense.waiting) * dim * ITEMSIZE[problem.dtype]
        for first, columns, unit_tiles in dense.chunks:
            chunk = c.pointer + first * c.stride * ITEMSIZE[problem.dtype]
            self.launch(
                "sm90/dense_dlogits", "dense_dlogits", (dense.blocks, 1), (_THREADS, 1),
                boxes(e.pointer, tokens, dim, e.stride, ROW_TILE),
                boxes(chunk, columns, dim, c.stride, TILE_COLUMNS // 2),
                *self.e, *self.map, tokens, dim, first, columns, *self.logit_options,
                unit_tiles, dense.group, room["row_lse"], *self.factors(),
                room["target_rest"], largest, records, dense.width,
            )  # fmt: skip
            # Sums of dE that wait where the last rows of dC will be have to be taken up before.
            apart = dense.waiting > 0 and first + columns == vocab
            for of_e, of_c in ((de, 0), (0, dc)) if apart else ((de, dc),):
                self.launch(
                    "sm90/dense_gradients", "dense_gradients", (dense.blocks, 1), (_THREADS, 1),
                    boxes(records, tokens, columns, dense.width, _BOX),
                    boxes(e.pointer, tokens, dim, e.stride, _BOX),
                    boxes(chunk, columns, dim, c.stride, _BOX),
                    room["count"], tokens, dim, *dense.parts, first, columns, vocab,
                    problem.logit_scale, *self.c, room["target"], room["target_rest"], largest,
                    waiting if dense.waiting else 0, dense.waiting,
                    records + dense.low_offset, of_e, of_c,
                )  # fmt: skip
