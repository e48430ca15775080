"""The road from any framework's device arrays through the kernels and back.

The framework of the caller allocates everything, outputs and workspace alike, on its own stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from ..launcher import DeviceInputs, DeviceMatrix, Launcher
from ..plan import ITEMSIZE, GpuDevice, GpuPlan, Room, lay_out, make_gpu_plan, wanted_sweeps
from ..problem import INTEGER_DTYPES, Problem


class DeviceView(NamedTuple):
    """Where an array lies: its address, and its strides in elements."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class DeviceMemory(Protocol):
    """What a framework does for a call on one of its devices."""

    device: int
    stream: int

    def view(self, array: Any) -> DeviceView:
        """Return where an array lies."""

    def contiguous(self, array: Any, dtype: str | None = None) -> Any:
        """Return an array's elements contiguous, in a dtype; the array itself where it is so."""

    def full(self, shape: tuple[int, ...], dtype: str, value: float | None) -> Any:
        """Return a new array; uninitialised where value is None."""

    def hardware(self) -> GpuDevice:
        """Return what the device is."""

    def read_integer(self, array: Any, index: int) -> int:
        """Return one element of an int64 array, waiting for it."""

    def wait(self) -> None:
        """Wait for the stream."""

    def outlives(self, array: Any) -> None:
        """Keep an array's memory from being used again before this stream is done with it."""


class GpuEvaluation(NamedTuple):
    """A loss that has been computed, and its lse where it was asked for."""

    loss: Any
    lse: Any
    call: GpuCall


def evaluate(
    memory: DeviceMemory, problem: Problem, arrays: Mapping[str, Any], *, differentiate: bool
) -> GpuEvaluation:
    """Compute the loss, and with `differentiate` what its pullback needs."""
    call = GpuCall(memory, problem, arrays)
    by_token = problem.reduction == "none"
    sums = problem.accumulator
    loss = memory.full(problem.batch_shape if by_token else (), sums, 0 if by_token else None)
    outputs = {"loss": loss}
    if problem.return_lse:
        outputs["lse"] = memory.full(problem.batch_shape, sums, 0)
    call.run_forward(keep_columns=differentiate, outputs=outputs)
    return GpuEvaluation(loss, outputs.get("lse"), call)


def statistics(
    memory: DeviceMemory, problem: Problem, arrays: Mapping[str, Any]
) -> tuple[Any, Any, Any, Any]:
    """Return log_prob, lse, entropy and argmax of each token."""
    call = GpuCall(memory, problem, arrays)
    shape, sums = problem.batch_shape, problem.accumulator
    outputs = {name: memory.full(shape, sums, 0) for name in ("log_prob", "lse", "entropy")}
    outputs["argmax"] = memory.full(shape, "int64", -1)
    call.run_forward(keep_columns=False, outputs=outputs)
    return outputs["log_prob"], outputs["lse"], outputs["entropy"], outputs["argmax"]


class _Space:
    """Workspace: one allocation of the caller's framework, cut into named pieces."""

    def __init__(self, memory: DeviceMemory, room: Room) -> None:
        self.offsets, size = lay_out(room)
        try:
            self.words = memory.full((max(size // 8, 1),), "int64", None)
        except Exception as error:
            # Every framework has an exception of its own for this.
            if "OutOfMemory" not in type(error).__name__ and not isinstance(error, MemoryError):
                raise
            raise MemoryError(
                f"the device has no room for {size} bytes of workspace; a smaller "
                f"workspace_bytes needs less: {error}"
            ) from error
        base = memory.view(self.words).pointer
        self.addresses = {name: base + offset for name, offset in self.offsets.items()}


class GpuCall:
    """One call on device arrays.

    Parameters
    ----------
    memory : DeviceMemory
    problem : Problem
    arrays : mapping of str to array
        By argument name.
    """

    def __init__(self, memory: DeviceMemory, problem: Problem, arrays: Mapping[str, Any]) -> None:
        self.memory, self.problem = memory, problem
        self.held: list[Any] = []
        self.inputs = self._inputs(arrays)
        aligned = self.inputs.e.in_words and self.inputs.c.in_words
        self.plan: GpuPlan = make_gpu_plan(problem, memory.hardware(), aligned=aligned)
        self.saved = _Space(memory, self.plan.saved)

    def run_forward(self, *, keep_columns: bool, outputs: Mapping[str, Any]) -> None:
        """Compute the outputs: arrays by the names that `Launcher.finish` gives them."""
        filtered = keep_columns and self.plan.gradient_filter is not None
        statistics = "argmax" in outputs
        pieces = self.plan.forward | (self.plan.statistics if statistics else {})
        room = _Space(self.memory, pieces)
        launcher = self._launcher(self.memory, room)
        addresses = {name: self.memory.view(array).pointer for name, array in outputs.items()}
        saved = self.saved.addresses
        launcher.fill_words(saved["unbounded"], self.plan.saved["unbounded"])
        launcher.map_rows()
        if self.problem.check_targets:
            self._check_targets()
        launcher.forward(bits=saved["bits"] if filtered else 0, statistics=statistics)
        launcher.finish(**addresses, unbounded=saved["unbounded"])

    def pullback(
        self,
        memory: DeviceMemory,
        dloss: Any | None,
        dlse: Any | None,
        wanted: frozenset[str] = frozenset(("e", "c", "bias")),
    ) -> tuple[Any, Any, Any]:
        """Return the wanted gradients for upstream gradients; dloss of None stands for ones.

        The stream is that of `memory`, the current one of now: the forward's may be another.
        """
        problem = self.problem
        room = _Space(memory, self.plan.backward)
        plan = self.plan
        sweeps = wanted_sweeps(plan.sweeps, wanted)
        if sweeps != plan.sweeps:
            plan = dataclasses.replace(plan, sweeps=sweeps)
        launcher = self._launcher(memory, room, plan)
        if memory.stream != self.memory.stream:
            for array in (*self.held, self.saved.words):
                memory.outlives(array)
        kept = [
            None if given is None else memory.contiguous(given, problem.accumulator)
            for given in (dloss, dlse)
        ]
        dloss_at, dlse_at = (0 if a is None else memory.view(a).pointer for a in kept)
        de = dc = dbias = None
        if "e" in wanted:
            # Rows that no token maps to are zero; dC is written whole.
            de = memory.full((*problem.batch_shape, problem.dim), problem.dtype, 0)
        if wanted & {"c", "bias"}:
            dc = memory.full((problem.vocab, problem.dim), problem.dtype, None)
        if problem.has_bias and "bias" in wanted:
            dbias = memory.full((problem.vocab,), problem.dtype, None)
        de_at, dc_at, dbias_at = (
            0 if a is None else memory.view(a).pointer for a in (de, dc, dbias)
        )
        saved = self.saved.addresses
        launcher.fill_words(room.addresses["passed"], 8)
        launcher.backward(
            dloss=dloss_at,
            dlse=dlse_at,
            bits=saved["bits"],
            unbounded=saved["unbounded"],
            de=de_at,
            dc=dc_at,
            dbias=dbias_at,
            passed=room.addresses["passed"],
        )
        return de, dc, dbias

    def _launcher(
        self, memory: DeviceMemory, room: _Space, plan: GpuPlan | None = None
    ) -> Launcher:
        addresses = self.saved.addresses | room.addresses
        return Launcher(
            self.problem, plan or self.plan, self.inputs, addresses, memory.device, memory.stream
        )

    def _check_targets(self) -> None:
        offset = self.saved.offsets["first_wrong"] // 8
        wrong = self.memory.read_integer(self.saved.words, offset)
        if wrong < self.problem.tokens:
            raise ValueError(
                f"targets must lie in [0, {self.problem.vocab}) or equal "
                f"ignore_index={self.problem.ignore_index}; the first that does not is number "
                f"{wrong} of the flattened targets"
            )

    def _inputs(self, arrays: Mapping[str, Any]) -> DeviceInputs:
        sums = self.problem.accumulator
        targets = self._keep(self.memory.contiguous(arrays["targets"]))
        dtype = str(arrays["targets"].dtype).removeprefix("torch.")
        assert dtype in INTEGER_DTYPES
        return DeviceInputs(
            e=self._matrix(arrays["e"]),
            c=self._matrix(arrays["c"]),
            targets=targets.pointer,
            target_bytes=int(dtype.removeprefix("u").removeprefix("int")) // 8,
            target_signed=not dtype.startswith("u"),
            bias=self._vector(arrays, "bias", None),
            class_weight=self._vector(arrays, "class_weight", sums),
            token_weight=self._vector(arrays, "token_weight", sums),
        )

    def _vector(self, arrays: Mapping[str, Any], name: str, dtype: str | None) -> int:
        if name not in arrays:
            return 0
        return self._keep(self.memory.contiguous(arrays[name], dtype)).pointer

    def _keep(self, array: Any) -> DeviceView:
        # The pullback refers to it too.
        self.held.append(array)
        return self.memory.view(array)

    def _matrix(self, array: Any) -> DeviceMatrix:
        view = self._keep(array)
        stride = _row_stride(view)
        if stride is None:
            view = self._keep(self.memory.contiguous(array))
            stride = self.problem.dim
        group = 4 * ITEMSIZE[self.problem.dtype]
        aligned = view.pointer % group == 0 and stride % 4 == 0 and self.problem.dim % 4 == 0
        row_bytes = stride * ITEMSIZE[self.problem.dtype]
        in_words = view.pointer % 16 == 0 and row_bytes % 16 == 0 and stride >= self.problem.dim
        return DeviceMatrix(view.pointer, stride, aligned, in_words)


def _row_stride(view: DeviceView) -> int | None:
    """Return the one distance between the rows of an array (..., D), None where there is none."""
    *shape, dim = view.shape
    *strides, inner = view.strides
    if inner != 1 and dim > 1:
        return None
    distance, step = None, None
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if distance is None:
            distance, step = stride, stride * size
        elif stride == step:
            step = stride * size
        else:
            return None
    return dim if distance is None else distance
