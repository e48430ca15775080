"""Plan, raw pointers and a stream to kernel launches. Allocates nothing, synchronises nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from .compiler import import_cupy, kernel, shared_bytes
from .plan import (
    ITEMSIZE,
    MARGIN,
    ROW_TILE,
    TILE_COLUMNS,
    GpuPlan,
    HopperForward,
    Sweep,
    Wanted,
    needed_sweeps,
)
from .problem import Problem
from .tensor_map import tensor_map

_BLOCK = 128
"""kBlockM and kBlockN of kernels_cu/portable/product.cuh."""

_PRODUCT_THREADS = 256
"""kThreads there."""

_THREADS = 256
_WALKERS = 1024
"""kWalkers of kernels_cu/portable/tokens.cu."""

# Mirrors of the structs that kernels take by value, in the C compiler's layout.
_POINTER, _INT64, _INT32, _FLOAT64 = np.uint64, np.int64, np.int32, np.float64


def _struct(**fields: Any) -> np.dtype[Any]:
    return np.dtype(list(fields.items()), align=True)


_MATRIX = _struct(data=_POINTER, stride=_INT64, aligned=_INT32)
_LOGIT_OPTIONS = _struct(scale=_FLOAT64, softcap=_FLOAT64)
_FILTER = _struct(eps=_FLOAT64, slack=_FLOAT64, unbiased=_INT32)
_ROW_MAP = _struct(
    source=_POINTER, position=_POINTER, target=_POINTER, count=_POINTER, seed=_POINTER
)
_TARGETS = _struct(data=_POINTER, bytes=_INT32, is_signed=_INT32)
_SEGMENT_FIELDS = (
    "reference", "rest", "target_logit", "smoothed", "total", "weighted", "best", "argmax",
)  # fmt: skip
_SEGMENT_SUMS = _struct(**dict.fromkeys(_SEGMENT_FIELDS, _POINTER))
_SEGMENTS = _struct(**dict.fromkeys(_SEGMENT_FIELDS, _POINTER), number=_INT64, capacity=_INT64)
_LOSS_OPTIONS = _struct(label_smoothing=_FLOAT64, z_loss=_FLOAT64)
_WEIGHTS = _struct(of_class=_POINTER, of_token=_POINTER, smoothing_total=_POINTER)
_LISTS = _struct(column=_POINTER, before=_POINTER, width=_INT32)
_ROW_FACTORS = _struct(softmax=_POINTER, onehot=_POINTER, smoothing=_POINTER)
_RECORDS = _struct(dz=_POINTER, column=_POINTER)
_UNIT_FIELDS = ("reference", "rest", "smoothed", "weighted", "best", "argmax")
_UNIT_SUMS = _struct(**dict.fromkeys(_UNIT_FIELDS, _POINTER))
_FORWARD_ARGUMENTS = _struct(
    e=_MATRIX, map=_ROW_MAP, bias=_POINTER, smoothing=_POINTER, dim=_INT64, vocab=_INT64,
    options=_LOGIT_OPTIONS, filter=_FILTER, unit_tiles=_INT32, group=_INT32, own=_POINTER,
    bound=_POINTER, target_logit=_POINTER, out=_UNIT_SUMS, capacity=_INT64, bits=_POINTER,
    words=_INT64,
)  # fmt: skip
_MERGE_ROWS = 32
_DEPTH = 64
"""kTileK of kernels_cu/sm90/tile.cuh."""

_FORWARD_THREADS = 384
"""kThreads of kernels_cu/sm90/forward.cu."""


def _pack(layout: np.dtype[Any], *values: Any) -> np.ndarray[Any, Any]:
    packed = np.zeros((), layout)
    packed[()] = values
    return packed


def _opaque(argument: Any) -> Any:
    """Return a struct as bytes: CuPy looks at each of its fields, at every launch."""
    if argument.dtype.names is None:
        return argument
    return argument.reshape(1).view(f"V{argument.dtype.itemsize}")


def _as_int64(value: int) -> tuple[np.int64, np.int32]:
    """Return an integer's low 64 bits, and whether a uint64 alone can hold it (1) or none (2)."""
    low = value & (2**64 - 1)
    wrapped = np.int64(low - 2**64 if low >= 2**63 else low)
    if -(2**63) <= value < 2**63:
        return wrapped, np.int32(0)
    return wrapped, np.int32(1 if 0 <= value < 2**64 else 2)


class DeviceMatrix(NamedTuple):
    """Rows in device memory, `stride` elements apart.

    ``aligned``: in whole groups of four elements; ``in_words``: each starts at a multiple of 16
    bytes.
    """

    pointer: int
    stride: int
    aligned: bool
    in_words: bool


class DeviceInputs(NamedTuple):
    """The array arguments of a call as device addresses; 0 for those that were not given.

    Weights are in the dtype of the sums; targets of `target_bytes` each.
    """

    e: DeviceMatrix
    c: DeviceMatrix
    targets: int
    target_bytes: int
    target_signed: bool
    bias: int
    class_weight: int
    token_weight: int


class _Gradients(NamedTuple):
    """Addresses of what a backward reads from the forward and of what it writes."""

    bits: int
    unbounded: int
    de: int
    dc: int
    dbias: int
    passed: int
    wanted: Wanted


class _Part(NamedTuple):
    """Row tiles and columns that a backward works on at a time."""

    first_tile: int
    last_tile: int
    left: int
    right: int


class _ForeignStream:
    """A raw stream handle, as CuPy takes those of others."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


class Launcher:
    """The launches of one call on one device and stream.

    Parameters
    ----------
    problem : Problem
    plan : GpuPlan
    inputs : DeviceInputs
    room : mapping of str to int
        Addresses of the pieces of workspace that the plan lists, by name.
    device : int
    stream : int
        The raw handle.
    """

    def __init__(
        self,
        problem: Problem,
        plan: GpuPlan,
        inputs: DeviceInputs,
        room: Mapping[str, int],
        device: int,
        stream: int,
    ) -> None:
        self.problem, self.plan, self.inputs, self.room = problem, plan, inputs, room
        self.device = device
        self.context = import_cupy().cuda.Device(device)
        self.stream = import_cupy().cuda.Stream.from_external(_ForeignStream(stream))
        e, c = inputs.e, inputs.c
        self.e = _pack(_MATRIX, e.pointer, e.stride, e.aligned)
        self.c = _pack(_MATRIX, c.pointer, c.stride, c.aligned)
        self.logit_options = _pack(_LOGIT_OPTIONS, problem.logit_scale, problem.softcap or 0.0)
        self.loss_options = _pack(_LOSS_OPTIONS, problem.label_smoothing, problem.z_loss)
        self.map = _pack(
            _ROW_MAP, *(room[name] for name in ("source", "position", "target", "count", "seed"))
        )
        self.no_map = _pack(_ROW_MAP, 0, 0, 0, 0, 0)
        self.weights = _pack(
            _WEIGHTS,
            inputs.class_weight,
            inputs.token_weight,
            room["smoothing_total"] if plan.smooths else 0,
        )

    def launch(
        self,
        file: str,
        name: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        *arguments: Any,
    ) -> None:
        """Launch a kernel; a grid without blocks is no launch."""
        if 0 in grid:
            return
        source = f"{file}.cu"
        function = kernel(self.device, source, name, self.problem.dtype)
        shared = shared_bytes(source, name)
        plain = tuple(_opaque(argument) for argument in arguments)
        with self.context:
            function(grid, block, plain, shared_mem=shared, stream=self.stream)

    def map_rows(self) -> None:
        """Find the rows that count, the classes' weights, and zero what only some rows write."""
        problem, room, plan = self.problem, self.room, self.plan
        targets = _pack(
            _TARGETS, self.inputs.targets, self.inputs.target_bytes, self.inputs.target_signed
        )
        length = problem.batch_shape[-1] if problem.batch_shape else 1
        self.launch(
            "portable/tokens", "map_rows", (1,), (_WALKERS,),
            targets, np.int64(problem.tokens), np.int64(max(length, 1)), np.int64(problem.shift),
            *_as_int64(problem.ignore_index), np.int64(problem.vocab),
            np.int32(problem.seed is not None), np.uint64(problem.seed or 0),
            *(np.uint64(room[name]) for name in (
                "source", "position", "target", "count", "seed", "first_wrong")),
        )  # fmt: skip
        if plan.smooths:
            self.launch(
                "portable/tokens", "smoothing_weights", (1,), (_WALKERS,),
                np.uint64(self.inputs.bias), np.uint64(self.inputs.class_weight),
                np.int64(problem.vocab), np.float64(problem.label_smoothing),
                np.uint64(room["smoothing"]), np.uint64(room["smoothing_total"]),
            )  # fmt: skip

    def fill_words(self, pointer: int, nbytes: int, value: int = 0) -> None:
        """Set 8-byte words of workspace."""
        blocks = min(-(-nbytes // 8 // _THREADS), 1024)
        self.launch(
            "portable/tokens", "fill_integers", (blocks,), (_THREADS,),
            np.uint64(pointer), np.int64(nbytes // 8), np.int64(value),
        )  # fmt: skip

    def forward(self, *, bits: int, statistics: bool) -> None:
        """Visit every logit; leave the segments' sums, and the bits where asked for."""
        if self.plan.hopper is not None:
            self._forward_on_hopper(self.plan.hopper, bits=bits, statistics=statistics)
            return
        problem, plan, room = self.problem, self.plan, self.room
        dim, vocab = np.int64(problem.dim), np.int64(problem.vocab)
        self.launch(
            "portable/forward", "first_bound", (plan.tiles,), (_PRODUCT_THREADS,),
            self.e, self.c, np.uint64(self.inputs.bias), dim, self.logit_options, self.map,
            np.uint64(room["bound"]), np.uint64(room["own"]),
        )  # fmt: skip
        sums = [room[f"segment_{name}"] for name in _SEGMENT_FIELDS[:4]]
        sums += [room[f"segment_{name}"] if statistics else 0 for name in _SEGMENT_FIELDS[4:]]
        self.launch(
            "portable/forward", "forward_statistics" if statistics else "forward",
            (plan.tiles, plan.segments), (_PRODUCT_THREADS,),
            self.e, self.c, np.uint64(self.inputs.bias),
            np.uint64(room["smoothing"] if plan.smooths else 0), dim, vocab,
            np.int64(plan.segment_columns), np.int64(plan.capacity), self.logit_options,
            self.filter(), self.map, np.uint64(room["bound"]), np.uint64(room["own"]),
            _pack(_SEGMENT_SUMS, *sums),
            np.uint64(bits), np.int64(plan.words),
        )  # fmt: skip

    def _forward_on_hopper(self, cut: HopperForward, *, bits: int, statistics: bool) -> None:
        problem, plan, room, inputs = self.problem, self.plan, self.room, self.inputs
        dim, bias, own = np.int64(problem.dim), np.uint64(inputs.bias), np.uint64(room["own"])
        bound, target_logit = np.uint64(room["bound"]), np.uint64(room["segment_target_logit"])
        if bits:
            self.fill_words(bits, plan.saved["bits"])
        self.launch(
            "sm90/forward", "target_logits", (-(-plan.capacity * 32 // _THREADS),), (_THREADS,),
            self.e, self.c, bias, dim, self.logit_options, self.map, own, bound, target_logit,
        )  # fmt: skip
        asked = {"reference", "rest"}
        asked |= {"smoothed"} if plan.smooths else set()
        asked |= {"weighted", "best", "argmax"} if statistics else set()
        units = tuple(room[f"unit_{name}"] if name in asked else 0 for name in _UNIT_FIELDS)
        name = "forward_statistics" if statistics else cut.kernel
        if not statistics and (
            plan.smooths or inputs.bias or problem.logit_scale != 1.0 or problem.softcap is not None
        ):
            name = "forward_options"
        cluster = 1 if name == "forward_single" else 2
        # Pairs need an even number of blocks.
        blocks = -(-cut.blocks // cluster) * cluster
        box = ROW_TILE, _DEPTH
        e_map = tensor_map(
            inputs.e.pointer, (problem.tokens, problem.dim), inputs.e.stride, problem.dtype, box
        )
        box = TILE_COLUMNS // cluster, _DEPTH
        c_map = tensor_map(
            inputs.c.pointer, (problem.vocab, problem.dim), inputs.c.stride, problem.dtype, box
        )
        arguments = _pack(
            _FORWARD_ARGUMENTS, self.e, self.map, inputs.bias,
            room["smoothing"] if plan.smooths else 0, problem.dim, problem.vocab,
            self.logit_options, self.filter(), cut.unit_tiles, cut.group, own, bound, target_logit,
            units, plan.capacity, bits, plan.words,
        )  # fmt: skip
        self.launch("sm90/forward", name, (blocks,), (_FORWARD_THREADS,), e_map, c_map, arguments)
        sums = [room[f"segment_{name}"] for name in ("reference", "rest", "smoothed")]
        sums += [room[f"segment_{name}"] if statistics else 0 for name in _SEGMENT_FIELDS[4:]]
        self.launch(
            "sm90/forward", "merge_units", (-(-plan.capacity // _MERGE_ROWS),), (_MERGE_ROWS, 16),
            self.map, _pack(_UNIT_SUMS, *units), np.int64(cut.parts), np.int64(plan.capacity),
            target_logit, *(np.uint64(at) for at in sums),
        )  # fmt: skip

    def filter(self) -> np.ndarray[Any, Any]:
        """Return the filter in force."""
        plan = self.plan
        unbiased = plan.gradient_filter == "unbiased"
        return _pack(_FILTER, plan.filter_eps, np.exp(-MARGIN), unbiased)

    def finish(
        self,
        *,
        loss: int = 0,
        lse: int = 0,
        log_prob: int = 0,
        entropy: int = 0,
        argmax: int = 0,
        unbounded: int = 0,
    ) -> None:
        """Merge the segments, place what depends on tokens, and reduce the loss."""
        problem, plan, room = self.problem, self.plan, self.room
        by_token = problem.reduction == "none"
        statistics = argmax != 0
        sums = [room[f"segment_{name}"] for name in _SEGMENT_FIELDS[:4]]
        sums += [room[f"segment_{name}"] if statistics else 0 for name in _SEGMENT_FIELDS[4:]]
        parts = _pack(_SEGMENTS, *sums, plan.segments if problem.vocab else 0, plan.capacity)
        self.launch(
            "portable/tokens", "finish_rows", (-(-plan.capacity // _THREADS),), (_THREADS,),
            self.map, parts, self.loss_options, self.weights,
            np.uint64(room["row_loss"]), np.uint64(room["row_lse"]),
            np.uint64(loss if by_token else 0),
            *(np.uint64(p) for p in (lse, log_prob, entropy, argmax, unbounded)),
        )  # fmt: skip
        self.launch(
            "portable/tokens", "reduce_loss", (1,), (_WALKERS,),
            self.map, self.weights, np.int32(problem.reduction == "mean"),
            np.uint64(room["row_loss"]), np.uint64(room["normalizer"]),
            np.uint64(0 if by_token else loss),
        )  # fmt: skip

    def backward(
        self,
        *,
        dloss: int,
        dlse: int,
        bits: int,
        unbounded: int,
        de: int,
        dc: int,
        dbias: int,
        passed: int,
        wanted: Wanted,
    ) -> None:
        """Form the wanted gradients, one range of columns at a time."""
        problem, plan, room = self.problem, self.plan, self.room
        self.launch(
            "portable/tokens", "row_factors", (-(-plan.capacity // _THREADS),), (_THREADS,),
            self.map, self.loss_options, self.weights, np.uint64(self.inputs.bias),
            *(np.uint64(room[name]) for name in ("normalizer", "row_lse")),
            np.uint64(dloss), np.int32(problem.reduction == "none"), np.uint64(dlse),
            *(np.uint64(room[f"factor_{name}"]) for name in ("softmax", "onehot", "smoothing")),
        )  # fmt: skip
        rank_one = plan.smooths and problem.softcap is None
        if rank_one:
            self._smoothing_sums(wanted)
        outputs = _Gradients(bits, unbounded, de, dc, dbias, passed, wanted)
        for sweep in needed_sweeps(plan.sweeps, wanted):
            for part in self._parts(sweep):
                self._part(sweep, part, outputs)

    def _parts(self, sweep: Sweep) -> Iterator[_Part]:
        """Cut a sweep so that all that enters one sum follows one another."""
        plan, vocab = self.plan, self.problem.vocab
        columns = [
            (left, min(left + plan.range_columns, vocab))
            for left in range(0, vocab, plan.range_columns)
        ]
        tiles = [
            (first, min(first + plan.part_tiles, plan.tiles))
            for first in range(0, max(plan.tiles, 1), plan.part_tiles)
        ]
        if sweep.c:
            return (_Part(*t, *c) for c in columns for t in tiles)
        return (_Part(*t, *c) for t in tiles for c in columns)

    def _smoothing_sums(self, wanted: Wanted) -> None:
        problem, plan, room = self.problem, self.plan, self.room
        dim = np.int64(problem.dim)
        grid = (-(-problem.dim // 32), plan.smoothing_parts)
        if wanted.e:
            self.launch(
                "portable/backward", "weighted_rows", grid, (32, 8),
                self.c, np.int64(problem.vocab), dim, self.no_map, np.uint64(room["smoothing"]),
                np.uint64(room["smoothing_classifier"]),
            )  # fmt: skip
        if wanted.c:
            self.launch(
                "portable/backward", "weighted_rows", grid, (32, 8),
                self.e, np.int64(0), dim, self.map, np.uint64(room["factor_smoothing"]),
                np.uint64(room["smoothing_embedding"]),
            )  # fmt: skip
        self.launch(
            "portable/backward", "sum_rows", (1,), (_PRODUCT_THREADS,),
            self.map, np.uint64(room["factor_smoothing"]), np.uint64(room["smoothing_rows"]),
        )  # fmt: skip

    def _part(self, sweep: Sweep, part: _Part, outputs: _Gradients) -> None:
        """Work on some row tiles and columns: their lists, dz, and its products."""
        problem, plan, room, inputs = self.problem, self.plan, self.room, self.inputs
        dim, tiles = np.int64(problem.dim), part.last_tile - part.first_tile
        width = -(-(part.right - part.left) // _BLOCK) * _BLOCK
        lists = _pack(_LISTS, room["list_column"], room["list_before"], width)
        with_bias = outputs.dbias if sweep.c else 0
        records = _pack(_RECORDS, room["dz"], room["dz_column"] if with_bias else 0)
        factors = _pack(
            _ROW_FACTORS, *(room[f"factor_{name}"] for name in ("softmax", "onehot", "smoothing"))
        )
        rank_one = plan.smooths and problem.softcap is None
        smoothing = room["smoothing"] if plan.smooths else 0
        parts = np.int32(plan.smoothing_parts)
        scale = np.float64(problem.logit_scale)
        first_tile, left, right = (np.int64(x) for x in (part.first_tile, part.left, part.right))
        filter_ = self.filter() if sweep.filtered else _pack(_FILTER, 0.0, 1.0, 0)
        self.launch(
            "portable/backward", "list_columns", (tiles,), (_PRODUCT_THREADS,),
            self.map, np.uint64(outputs.bits if sweep.filtered else 0), np.int64(plan.words),
            np.uint64(outputs.unbounded), first_tile, left, right, lists,
        )  # fmt: skip
        in_columns = problem.filter_c_grad and (outputs.wanted.c or outputs.wanted.bias)
        counts = sweep.filtered and (sweep.c or not in_columns)
        self.launch(
            "portable/backward", "dlogits", (tiles, width // _BLOCK), (_PRODUCT_THREADS,),
            self.e, self.c, np.uint64(inputs.bias), dim, first_tile, left, self.logit_options,
            filter_, self.map, lists, np.uint64(room["row_lse"]), factors,
            np.uint64(0 if rank_one else smoothing), records,
            np.uint64(outputs.passed if counts else 0),
        )  # fmt: skip
        d_blocks = -(-problem.dim // _BLOCK)
        if sweep.e:
            # Where both gradients are formed at once the sums of all rows are held.
            row = part.first_tile * ROW_TILE if sweep.c else 0
            sums = room["de_sums"] + row * problem.dim * ITEMSIZE[problem.accumulator]
            self.launch(
                "portable/backward", "dembedding", (tiles, d_blocks), (_PRODUCT_THREADS,),
                self.c, np.uint64(inputs.bias), dim, first_tile, left, scale, self.map, lists,
                records, np.uint64(room["factor_smoothing"]),
                np.uint64(room["smoothing_classifier"] if rank_one else 0), parts,
                np.uint64(sums), np.int32(part.left == 0), np.int32(part.right == problem.vocab),
                np.uint64(outputs.de),
            )  # fmt: skip
        if sweep.c:
            # Of a width of 0 the kernel forms dbias alone.
            c_dim, c_blocks = (dim, max(d_blocks, 1)) if outputs.wanted.c else (np.int64(0), 1)
            grid = (width // _BLOCK, c_blocks)
            self.launch(
                "portable/backward", "dclassifier", grid, (_PRODUCT_THREADS,),
                self.e, c_dim, left, right, scale, self.map, lists, records,
                first_tile, np.int64(part.last_tile), np.uint64(smoothing),
                np.uint64(room["smoothing_embedding"] if rank_one else 0), parts,
                np.uint64(room["smoothing_rows"] if rank_one else 0),
                np.uint64(room["dc_sums"]), np.uint64(room["dbias_sums"]),
                np.int32(part.first_tile == 0), np.int32(part.last_tile == plan.tiles),
                np.uint64(outputs.dc), np.uint64(with_bias),
            )  # fmt: skip
