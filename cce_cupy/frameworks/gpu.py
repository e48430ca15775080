"""The road from any framework's device arrays through the kernels and back.

The framework of the caller allocates everything, outputs and workspace alike, on its own stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from ..hopper_launcher import HopperLauncher
from ..launcher import DeviceInputs, DeviceMatrix, Launcher
from ..plan import EVERY_GRADIENT, ITEMSIZE, GpuDevice, GpuPlan, Room, Wanted, make_gpu_plan
from ..problem import INTEGER_DTYPES, Problem

_INTEGERS = {
    name: (int(name.removeprefix("u").removeprefix("int")) // 8, not name.startswith("u"))
    for name in INTEGER_DTYPES
}
"""Bytes of each dtype of targets, and whether it is signed."""


class DeviceView(NamedTuple):
    """How an array lies: its shape, and its strides in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]


class DeviceMemory(Protocol):
    """What a framework does for a call on one of its devices."""

    device: int
    stream: int

    def view(self, array: Any) -> DeviceView:
        """Return how an array lies."""

    def address(self, array: Any) -> int:
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
    """Workspace: one allocation of the caller's framework, cut into named pieces.

    `words` is one that was made for the same room before.
    """

    def __init__(self, memory: DeviceMemory, room: Room, words: Any | None = None) -> None:
        self.offsets = room.offsets
        try:
            if words is None:
                words = memory.full((max(room.bytes // 8, 1),), "int64", None)
        except Exception as error:
            # Every framework has an exception of its own for this.
            if "OutOfMemory" not in type(error).__name__ and not isinstance(error, MemoryError):
                raise
            raise MemoryError(
                f"the device has no room for {room.bytes} bytes of workspace; a smaller "
                f"workspace_bytes needs less: {error}"
            ) from error
        self.words = words
        base = memory.address(words)
        self.addresses = {name: base + offset for name, offset in self.offsets.items()}


class GpuCall:
    """One call on device arrays.

    Parameters
    ----------
    memory : DeviceMemory
    problem : Problem
    arrays : mapping of str to array
        By argument name.
    saved : array of int64, optional
        What the forward of an equal call has left in ``saved.words``: a pullback may follow.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        problem: Problem,
        arrays: Mapping[str, Any],
        saved: Any | None = None,
    ) -> None:
        self.memory, self.problem = memory, problem
        self.held: list[Any] = []
        self.inputs = self._inputs(arrays)
        aligned = self.inputs.e.in_words and self.inputs.c.in_words
        self.plan: GpuPlan = make_gpu_plan(problem, memory.hardware(), aligned=aligned)
        self.saved = _Space(memory, self.plan.saved, saved)

    def run_forward(self, *, keep_columns: bool, outputs: Mapping[str, Any]) -> None:
        """Compute the outputs: arrays by the names that `Launcher.finish` gives them."""
        filtered = keep_columns and self.plan.gradient_filter is not None
        statistics = "argmax" in outputs
        room = _Space(self.memory, self.plan.statistics if statistics else self.plan.forward)
        addresses = {name: self.memory.address(array) for name, array in outputs.items()}
        saved = self.saved.addresses
        with self._launcher(self.memory, room) as launcher:
            launcher.map_rows(unbounded=saved["unbounded"])
            if self.problem.check_targets:
                self._check_targets()
            launcher.forward(bits=saved["bits"] if filtered else 0, statistics=statistics)
            launcher.finish(**addresses, unbounded=saved["unbounded"])

    def pullback(
        self,
        memory: DeviceMemory,
        dloss: Any | None,
        dlse: Any | None,
        wanted: Wanted = EVERY_GRADIENT,
    ) -> tuple[Any, Any, Any]:
        """Return the wanted gradients for upstream gradients; dloss of None stands for ones.

        The stream is that of `memory`, the current one of now: the forward's may be another.
        """
        problem = self.problem
        room = _Space(memory, self.plan.backward)
        if memory.stream != self.memory.stream:
            for array in (*self.held, self.saved.words):
                memory.outlives(array)
        kept = [
            None if given is None else memory.contiguous(given, problem.accumulator)
            for given in (dloss, dlse)
        ]
        dloss_at, dlse_at = (0 if a is None else memory.address(a) for a in kept)
        wanted = wanted._replace(bias=wanted.bias and problem.has_bias)
        de = dc = dbias = None
        if wanted.e:  # rows that no token maps to are zero
            de = memory.full((*problem.batch_shape, problem.dim), problem.dtype, 0)
        if wanted.c:  # written whole
            dc = memory.full((problem.vocab, problem.dim), problem.dtype, None)
        if wanted.bias:
            dbias = memory.full((problem.vocab,), problem.dtype, None)
        saved = self.saved.addresses
        with self._launcher(memory, room) as launcher:
            launcher.fill_words(room.addresses["passed"], 8)
            launcher.backward(
                dloss=dloss_at,
                dlse=dlse_at,
                bits=saved["bits"],
                unbounded=saved["unbounded"],
                de=0 if de is None else memory.address(de),
                dc=0 if dc is None else memory.address(dc),
                dbias=0 if dbias is None else memory.address(dbias),
                passed=room.addresses["passed"],
                wanted=wanted,
            )
        return de, dc, dbias

    def _launcher(self, memory: DeviceMemory, room: _Space) -> Launcher:
        addresses = self.saved.addresses | room.addresses
        kind = Launcher if self.plan.hopper_backward is None else HopperLauncher
        return kind(self.problem, self.plan, self.inputs, addresses, memory.device, memory.stream)

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
        targets = arrays["targets"]
        size, signed = _INTEGERS[str(targets.dtype).removeprefix("torch.")]
        return DeviceInputs(
            e=self._matrix(arrays["e"]),
            c=self._matrix(arrays["c"]),
            targets=self._keep(self.memory.contiguous(targets)),
            target_bytes=size,
            target_signed=signed,
            bias=self._vector(arrays, "bias", None),
            class_weight=self._vector(arrays, "class_weight", sums),
            token_weight=self._vector(arrays, "token_weight", sums),
        )

    def _vector(self, arrays: Mapping[str, Any], name: str, dtype: str | None) -> int:
        if name not in arrays:
            return 0
        return self._keep(self.memory.contiguous(arrays[name], dtype))

    def _keep(self, array: Any) -> int:
        # The pullback refers to it too.
        self.held.append(array)
        return self.memory.address(array)

    def _matrix(self, array: Any) -> DeviceMatrix:
        stride = _row_stride(self.memory.view(array))
        if stride is None:
            array, stride = self.memory.contiguous(array), self.problem.dim
        pointer, size = self._keep(array), ITEMSIZE[self.problem.dtype]
        aligned = pointer % (4 * size) == 0 and stride % 4 == 0 and self.problem.dim % 4 == 0
        in_words = pointer % 16 == 0 and stride * size % 16 == 0 and stride >= self.problem.dim
        return DeviceMatrix(pointer, stride, aligned, in_words)


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
