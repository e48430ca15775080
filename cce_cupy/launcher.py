"""Plan and raw pointers to launches of the portable kernels, and of what all share.

Allocates nothing, synchronises nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple

from . import driver
from .compiler import import_cupy, kernel, shared_bytes
from .plan import (
    ITEMSIZE,
    MARGIN,
    ROW_TILE,
    GpuPlan,
    Sweep,
    Wanted,
    needed_sweeps,
)
from .problem import Problem
from .recording import Launch
from .signatures import layout
from .tensor_map import TensorMap, encode

_BLOCK = 128
"""kBlockM and kBlockN of kernels_cu/portable/product.cuh."""

_PRODUCT_THREADS = 256
"""kThreads there."""

_THREADS = 256
"""kRowThreads of kernels_cu/portable/tokens.cu."""

_WALKERS = 1024
"""kWalkers there."""

_SEGMENT_FIELDS = (
    "reference", "rest", "target_logit", "smoothed", "total", "weighted", "best", "argmax",
)  # fmt: skip
_SLACK = math.exp(-MARGIN)


def _as_int64(value: int) -> tuple[int, int]:
    """Return an integer's low 64 bits, and whether a uint64 alone can hold it (1) or none (2)."""
    low = value & (2**64 - 1)
    wrapped = low - 2**64 if low >= 2**63 else low
    if -(2**63) <= value < 2**63:
        return wrapped, 0
    return wrapped, 1 if 0 <= value < 2**64 else 2


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


class BackwardOutputs(NamedTuple):
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


_loaded: dict[tuple[int, str, str, str], tuple[int, int, driver.Layout]] = {}
"""What a launch needs of a kernel: its handle, shared memory and layout."""


def _load(device: int, file: str, name: str, dtype: str) -> tuple[int, int, driver.Layout]:
    source = f"{file}.cu"
    function = kernel(device, source, name, dtype)
    return function.kernel.ptr, shared_bytes(source, name), layout(source, name)


class OnDevice:
    """Within ``with``, a device is the current one.

    Parameters
    ----------
    device : int
    """

    def __init__(self, device: int) -> None:
        self.device = device
        self.runtime = import_cupy().cuda.runtime

    def __enter__(self) -> None:
        self._before = self.runtime.getDevice()
        # Also where it is this one: a thread's first call binds the device to it.
        self.runtime.setDevice(self.device)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before != self.device:
            self.runtime.setDevice(self._before)


def launch_on(stream: int) -> Callable[[Launch], None]:
    """Return what makes launches on a stream of the current device.

    Parameters
    ----------
    stream : int
        The raw handle.
    """

    def launch(given: Launch) -> None:
        function, grid, block, shared, arranged, values, cooperative = given
        values = tuple(encode(x) if isinstance(x, TensorMap) else x for x in values)
        driver.launch(
            function, grid, block, shared, stream, arranged, values, cooperative=cooperative
        )

    return launch


class Launcher:
    """The launches of one call on one device.

    Addresses may be stand-ins for those of later calls: offsets are added to them, and they are
    compared with 0, which stands for no array. Nothing else may depend on them.

    Parameters
    ----------
    problem : Problem
    plan : GpuPlan
    inputs : DeviceInputs
    room : mapping of str to int
        Addresses of the pieces of workspace that the plan lists, by name.
    device : int
    take : callable
        Is given each launch: what `launch_on` returns makes it at once.
    """

    def __init__(
        self,
        problem: Problem,
        plan: GpuPlan,
        inputs: DeviceInputs,
        room: Mapping[str, int],
        device: int,
        take: Callable[[Launch], None],
    ) -> None:
        self.problem, self.plan, self.inputs, self.room = problem, plan, inputs, room
        self.device, self.take = device, take
        e, c = inputs.e, inputs.c
        self.e, self.c = (e.pointer, e.stride, e.aligned), (c.pointer, c.stride, c.aligned)
        self.logit_options = problem.logit_scale, problem.softcap or 0.0
        self.loss_options = problem.label_smoothing, problem.z_loss
        self.map = tuple(room[x] for x in ("source", "position", "target", "count", "seed"))
        self.weights = (
            inputs.class_weight,
            inputs.token_weight,
            room["smoothing_total"] if plan.smooths else 0,
        )

    def launch(
        self,
        file: str,
        name: str,
        grid: tuple[int, int],
        block: tuple[int, int],
        *arguments: Any,
        cooperative: bool = False,
    ) -> None:
        """Launch a kernel; a grid without blocks is no launch. An argument may be a `TensorMap`."""
        if 0 in grid:
            return
        key = self.device, file, name, self.problem.dtype
        loaded = _loaded.get(key)
        if loaded is None:
            loaded = _loaded[key] = _load(*key)
        function, shared, arranged = loaded
        self.take(Launch(function, grid, block, shared, arranged, arguments, cooperative))

    def map_rows(self, *, unbounded: int) -> None:
        """Find the rows that count, the classes' weights, and zero what only some rows write."""
        problem, room, inputs = self.problem, self.room, self.inputs
        length = problem.batch_shape[-1] if problem.batch_shape else 1
        self.launch(
            "portable/tokens", "map_rows", (1, 1), (_WALKERS, 1),
            inputs.targets, inputs.target_bytes, inputs.target_signed,
            problem.tokens, max(length, 1), problem.shift, *_as_int64(problem.ignore_index),
            problem.vocab, problem.seed is not None, problem.seed or 0, *self.map,
            room["first_wrong"], unbounded, room["done"],
        )  # fmt: skip
        if self.plan.smooths:
            self.launch(
                "portable/tokens", "smoothing_weights", (1, 1), (_WALKERS, 1),
                inputs.bias, inputs.class_weight, problem.vocab, problem.label_smoothing,
                room["smoothing"], room["smoothing_total"],
            )  # fmt: skip

    def forward(self, *, bits: int, statistics: bool) -> None:
        """Visit every logit; leave the segments' sums, and the bits where asked for."""
        problem, plan, room = self.problem, self.plan, self.room
        self.launch(
            "portable/forward", "first_bound", (plan.tiles, 1), (_PRODUCT_THREADS, 1),
            *self.e, *self.c, self.inputs.bias, problem.dim, *self.logit_options, *self.map,
            room["bound"], room["own"],
        )  # fmt: skip
        self.launch(
            "portable/forward", "forward_statistics" if statistics else "forward",
            (plan.tiles, plan.segments), (_PRODUCT_THREADS, 1),
            *self.e, *self.c, self.inputs.bias, room["smoothing"] if plan.smooths else 0,
            problem.dim, problem.vocab, plan.segment_columns, plan.capacity, *self.logit_options,
            *self.filter(), *self.map, room["bound"], room["own"],
            *self._segment_sums(statistics), bits, plan.words,
        )  # fmt: skip

    def _segment_sums(self, statistics: bool) -> list[int]:
        sums = [self.room[f"segment_{name}"] for name in _SEGMENT_FIELDS[:4]]
        rest = _SEGMENT_FIELDS[4:]
        return sums + [self.room[f"segment_{name}"] if statistics else 0 for name in rest]

    def filter(self) -> tuple[float, float, bool]:
        """Return the filter in force."""
        return self.plan.filter_eps, _SLACK, self.plan.gradient_filter == "unbiased"

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
        """Merge the sums of each row, place what depends on tokens, and sum the losses."""
        problem, room, by_token = self.problem, self.room, self.problem.reduction == "none"
        outputs = (
            *self.loss_options, *self.weights,
            room["row_lse"], loss if by_token else 0, lse, log_prob, entropy, argmax, unbounded,
            room["loss_parts"], room["done"], problem.reduction == "mean", room["normalizer"],
            0 if by_token else loss,
        )  # fmt: skip
        self.merge_rows(outputs, statistics=argmax != 0)

    def merge_rows(self, outputs: tuple[Any, ...], *, statistics: bool) -> None:
        """Merge what the forward left; `outputs` are the last arguments of `finish_rows`."""
        plan = self.plan
        # One block at least: it places the loss of no rows.
        self.launch(
            "portable/tokens", "finish_rows", (max(-(-plan.capacity // _THREADS), 1), 1),
            (_THREADS, 1), *self.map, *self._segment_sums(statistics),
            plan.segments if self.problem.vocab else 0, plan.capacity, *outputs,
        )  # fmt: skip

    def backward(self, dloss: int, dlse: int, outputs: BackwardOutputs) -> None:
        """Form the wanted gradients, one range of columns at a time."""
        plan = self.plan
        self.row_factors(dloss, dlse)
        if self.rank_one:
            self.smoothing_sums(outputs.wanted)
        for sweep in needed_sweeps(plan.sweeps, outputs.wanted):
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

    @property
    def plain(self) -> bool:
        """Whether logits are the products as they are, and no class but the target counts."""
        problem = self.problem
        shaped = self.inputs.bias or problem.logit_scale != 1.0 or problem.softcap is not None
        return not (shaped or self.plan.smooths)

    @property
    def rank_one(self) -> bool:
        """Whether label smoothing adds what is of rank one to the logits' gradients."""
        return self.plan.smooths and self.problem.softcap is None

    def row_factors(self, dloss: int, dlse: int) -> None:
        """Find what the gradients of a row's logits are multiplied by, and clear the counters."""
        problem, plan, room = self.problem, self.plan, self.room
        blocks = max(-(-plan.capacity // _THREADS), 1)
        self.launch(
            "portable/tokens", "row_factors", (blocks, 1), (_THREADS, 1),
            *self.map, *self.loss_options, *self.weights, self.inputs.bias,
            room["normalizer"], room["row_lse"], dloss, problem.reduction == "none", dlse,
            *self.factors(), room["counters"], plan.backward["counters"] // 8,
        )  # fmt: skip

    def factors(self) -> tuple[int, ...]:
        """Return where they are."""
        return tuple(self.room[f"factor_{name}"] for name in ("softmax", "onehot", "smoothing"))

    def smoothing_sums(self, wanted: Wanted) -> None:
        """Add up what label smoothing brings to the gradients of every row and every column."""
        problem, plan, room = self.problem, self.plan, self.room
        grid, no_map = (-(-problem.dim // 32), plan.smoothing_parts), (0, 0, 0, 0, 0)
        if wanted.e:
            self.launch(
                "portable/backward", "weighted_rows", grid, (32, 8),
                *self.c, problem.vocab, problem.dim, *no_map, room["smoothing"],
                room["smoothing_classifier"],
            )  # fmt: skip
        if wanted.c:
            self.launch(
                "portable/backward", "weighted_rows", grid, (32, 8),
                *self.e, 0, problem.dim, *self.map, room["factor_smoothing"],
                room["smoothing_embedding"],
            )  # fmt: skip
        self.launch(
            "portable/backward", "sum_rows", (1, 1), (_PRODUCT_THREADS, 1),
            *self.map, room["factor_smoothing"], room["smoothing_rows"],
        )  # fmt: skip

    def _part(self, sweep: Sweep, part: _Part, outputs: BackwardOutputs) -> None:
        """Work on some row tiles and columns: their lists, dz, and its products."""
        problem, plan, room, inputs = self.problem, self.plan, self.room, self.inputs
        dim, tiles = problem.dim, part.last_tile - part.first_tile
        width = -(-(part.right - part.left) // _BLOCK) * _BLOCK
        lists = room["list_column"], room["list_before"], width
        with_bias = outputs.dbias if sweep.c else 0
        records = room["dz"], room["dz_column"] if with_bias else 0
        rank_one = self.rank_one
        smoothing = room["smoothing"] if plan.smooths else 0
        self.launch(
            "portable/backward", "list_columns", (tiles, 1), (_PRODUCT_THREADS, 1),
            *self.map, outputs.bits if sweep.filtered else 0, plan.words, outputs.unbounded,
            part.first_tile, part.left, part.right, *lists,
        )  # fmt: skip
        in_columns = problem.filter_c_grad and (outputs.wanted.c or outputs.wanted.bias)
        counts = sweep.filtered and (sweep.c or not in_columns)
        self.launch(
            "portable/backward", "dlogits", (tiles, width // _BLOCK), (_PRODUCT_THREADS, 1),
            *self.e, *self.c, inputs.bias, dim, part.first_tile, part.left, *self.logit_options,
            *(self.filter() if sweep.filtered else (0.0, 1.0, False)), *self.map, *lists,
            room["row_lse"], *self.factors(), 0 if rank_one else smoothing, *records,
            outputs.passed if counts else 0,
        )  # fmt: skip
        d_blocks = -(-dim // _BLOCK)
        if sweep.e:
            # Where both gradients are formed at once the sums of all rows are held.
            row = part.first_tile * ROW_TILE if sweep.c else 0
            sums = room["de_sums"] + row * dim * ITEMSIZE[problem.accumulator]
            self.launch(
                "portable/backward", "dembedding", (tiles, d_blocks), (_PRODUCT_THREADS, 1),
                *self.c, inputs.bias, dim, part.first_tile, part.left, problem.logit_scale,
                *self.map, *lists, *records, room["factor_smoothing"],
                room["smoothing_classifier"] if rank_one else 0, plan.smoothing_parts,
                sums, part.left == 0, part.right == problem.vocab, outputs.de,
            )  # fmt: skip
        if sweep.c:
            # Of a width of 0 the kernel forms dbias alone.
            c_dim, c_blocks = (dim, max(d_blocks, 1)) if outputs.wanted.c else (0, 1)
            grid = (width // _BLOCK, c_blocks)
            self.launch(
                "portable/backward", "dclassifier", grid, (_PRODUCT_THREADS, 1),
                *self.e, c_dim, part.left, part.right, problem.logit_scale, *self.map, *lists,
                *records, part.first_tile, part.last_tile, smoothing,
                room["smoothing_embedding"] if rank_one else 0, plan.smoothing_parts,
                room["smoothing_rows"] if rank_one else 0, room["dc_sums"], room["dbias_sums"],
                part.first_tile == 0, part.last_tile == plan.tiles, outputs.dc, with_bias,
            )  # fmt: skip
