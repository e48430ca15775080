"""The road from any framework's device arrays through the kernels and back.

The framework of the caller allocates everything, outputs and workspace alike, on its own stream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from ..launcher import DeviceInputs, DeviceMatrix, Launcher, OnDevice, launch_on
from ..plan import EVERY_GRADIENT, ITEMSIZE, GpuDevice, GpuPlan, Room, Wanted, make_gpu_plan
from ..problem import INTEGER_DTYPES, Problem
from ..recording import Launch, Recording, stand_in

_INTEGERS = {
    name: (int(name.removeprefix("u").removeprefix("int")) // 8, not name.startswith("u"))
    for name in INTEGER_DTYPES
}
"""Bytes of each dtype of targets, and whether it is signed."""

_WIDEST = 32
"""Bytes of the widest access of a kernel: four elements of float64."""

MOST_PARTS = 16
"""Of a backward whose launches are kept: those of more parts would take much memory, and the
device is busy for longer than the host needs to form them."""


class DeviceView(NamedTuple):
    """How an array lies: its shape, and its strides in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]


class DeviceMemory(Protocol):
    """What a framework does for a call on one of its devices."""

    device: int
    stream: int
    """The raw handle of the current one."""

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
    """A loss that has been computed.

    lse, and saved, what a pullback needs, are None where they were not asked for.
    """

    loss: Any
    lse: Any
    saved: Any
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
    saved = None if call.saved is None else call.saved.words
    return GpuEvaluation(loss, outputs.get("lse"), saved, call)


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
        self.address = memory.address(words)

    @functools.cached_property
    def addresses(self) -> dict[str, int]:
        """Where each piece lies."""
        return {name: self.address + offset for name, offset in self.offsets.items()}


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
        self.hardware = memory.hardware()
        self.held: list[Any] = []
        self.inputs = self._inputs(arrays)
        self.aligned = self.inputs.e.in_words and self.inputs.c.in_words
        self.plan: GpuPlan = make_gpu_plan(problem, self.hardware, aligned=self.aligned)
        self.saved = None if saved is None else _Space(memory, self.plan.saved, saved)

    def run_forward(self, *, keep_columns: bool, outputs: Mapping[str, Any]) -> None:
        """Compute the outputs: arrays by the names that `Launcher.finish` gives them.

        With `keep_columns` a pullback may follow.
        """
        memory, plan = self.memory, self.plan
        addresses = {name: memory.address(array) for name, array in outputs.items()}
        if keep_columns:
            self.saved = _Space(memory, plan.saved)
            spaces = {"saved": self.saved, "forward": _Space(memory, plan.forward)}
        elif "argmax" in outputs:
            spaces = {"statistics_alone": _Space(memory, plan.statistics_alone)}
        else:
            spaces = {"forward_alone": _Space(memory, plan.forward_alone)}
        if self.problem.check_targets:
            # The host waits within the forward anyway.
            check = functools.partial(self._check_targets, next(iter(spaces.values())))
            self._launch(memory, _form_forward, (keep_columns, check), spaces, addresses)
        else:
            self._replay(memory, _form_forward, (keep_columns,), spaces, addresses)

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
        problem, plan = self.problem, self.plan
        assert self.saved is not None
        spaces = {"saved": self.saved, "backward": _Space(memory, plan.backward)}
        if memory.stream != self.memory.stream:
            for array in (*self.held, self.saved.words):
                memory.outlives(array)
        kept = [
            None if given is None else memory.contiguous(given, problem.accumulator)
            for given in (dloss, dlse)
        ]
        wanted = wanted._replace(bias=wanted.bias and problem.has_bias)
        de = dc = dbias = None
        if wanted.e:  # rows that no token maps to are zero
            de = memory.full((*problem.batch_shape, problem.dim), problem.dtype, 0)
        if wanted.c:  # written whole
            dc = memory.full((problem.vocab, problem.dim), problem.dtype, None)
        if wanted.bias:
            dbias = memory.full((problem.vocab,), problem.dtype, None)
        named = zip(("dloss", "dlse", "de", "dc", "dbias"), (*kept, de, dc, dbias), strict=True)
        addresses = {name: 0 if x is None else memory.address(x) for name, x in named}
        run = self._replay if plan.parts <= MOST_PARTS else self._launch
        run(memory, _form_backward, (wanted,), spaces, addresses)
        return de, dc, dbias

    def _launch(
        self,
        memory: DeviceMemory,
        form: Callable[..., None],
        options: tuple[Any, ...],
        spaces: Mapping[str, _Space],
        addresses: Mapping[str, int],
    ) -> None:
        """Make the launches that `form` forms with a launcher, addresses and options."""
        room: dict[str, int] = {}
        for space in spaces.values():
            room |= space.addresses
        with OnDevice(memory.device):
            launcher = Launcher(
                self.problem, self.plan, self.inputs, room, memory.device, launch_on(memory.stream)
            )
            form(launcher, addresses, *options)

    def _replay(
        self,
        memory: DeviceMemory,
        form: Callable[..., None],
        options: tuple[Any, ...],
        spaces: Mapping[str, _Space],
        addresses: Mapping[str, int],
    ) -> None:
        """Make the same launches, which have been formed at the first call like this one."""
        e, c, *others = self.inputs
        targets, target_bytes, target_signed, *optional = others
        everything = (
            e.pointer, c.pointer, targets, *optional,
            *[space.address for space in spaces.values()], *addresses.values(),
        )  # fmt: skip
        with OnDevice(memory.device):
            recording = _record(
                self.problem, self.hardware, self.aligned, memory.device,
                e[1:], c[1:], (target_bytes, target_signed), form, options,
                tuple(spaces), tuple(addresses), tuple([x != 0 for x in everything]),
            )  # fmt: skip
            recording.replay(everything, memory.stream)

    def _check_targets(self, space: _Space) -> None:
        wrong = self.memory.read_integer(space.words, space.offsets["first_wrong"] // 8)
        if wrong < self.problem.tokens:
            raise ValueError(
                f"targets must lie in [0, {self.problem.vocab}) or equal "
                f"ignore_index={self.problem.ignore_index}; the first that does not is number "
                f"{wrong} of the flattened targets"
            )

    def _inputs(self, arrays: Mapping[str, Any]) -> DeviceInputs:
        sums = self.problem.accumulator
        targets = arrays["targets"]
        return DeviceInputs(
            self._matrix(arrays["e"]),
            self._matrix(arrays["c"]),
            self._keep(self.memory.contiguous(targets)),
            *_integers(targets.dtype),
            self._vector(arrays, "bias", None),
            self._vector(arrays, "class_weight", sums),
            self._vector(arrays, "token_weight", sums),
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
        memory, size = self.memory, ITEMSIZE[self.problem.dtype]
        rows = _rows(*memory.view(array), size, memory.address(array) % _WIDEST)
        if rows is None:
            array = memory.contiguous(array)
            rows = _rows(*memory.view(array), size, memory.address(array) % _WIDEST)
            assert rows is not None
        return DeviceMatrix(self._keep(array), *rows)


def _form_forward(
    launcher: Launcher,
    at: Mapping[str, int],
    keep_columns: bool,
    check_targets: Callable[[], None] | None = None,
) -> None:
    room = launcher.room
    launcher.map_rows(unbounded=room["unbounded"])
    if check_targets is not None:
        check_targets()
    filtered = keep_columns and launcher.plan.gradient_filter is not None
    launcher.forward(bits=room["bits"] if filtered else 0, statistics="argmax" in at)
    launcher.finish(**at, unbounded=room["unbounded"])


def _form_backward(launcher: Launcher, at: Mapping[str, int], wanted: Wanted) -> None:
    room = launcher.room
    launcher.fill_words(room["passed"], 8)
    launcher.backward(
        **at,
        bits=room["bits"],
        unbounded=room["unbounded"],
        passed=room["passed"],
        wanted=wanted,
    )


@functools.lru_cache(maxsize=256)
def _record(
    problem: Problem,
    hardware: GpuDevice,
    aligned: bool,
    device: int,
    e: tuple[Any, ...],
    c: tuple[Any, ...],
    targets: tuple[int, bool],
    form: Callable[..., None],
    options: tuple[Any, ...],
    rooms: tuple[str, ...],
    names: tuple[str, ...],
    present: tuple[bool, ...],
) -> Recording:
    """Form the launches of calls that differ in their addresses alone.

    Parameters
    ----------
    problem, hardware, aligned, device
        As for the plan and the launcher.
    e, c : tuple
        The fields of `DeviceMatrix` behind its pointer.
    targets : tuple of int and bool
        Bytes of each, and whether they are signed.
    form : callable
        What forms them, with a launcher, addresses by name, and options.
    options : tuple
    rooms : tuple of str
        The plan's rooms that there is an allocation for.
    names : tuple of str
        Of the other addresses.
    present : tuple of bool
        Which addresses are not 0: of the arguments in their order, of the allocations, and of
        `names`.
    """
    stand_ins = [stand_in(k) if there else 0 for k, there in enumerate(present)]
    e_at, c_at, targets_at, bias, class_weight, token_weight, *rest = stand_ins
    inputs = DeviceInputs(
        DeviceMatrix(e_at, *e), DeviceMatrix(c_at, *c),
        targets_at, *targets, bias, class_weight, token_weight,
    )  # fmt: skip
    plan = make_gpu_plan(problem, hardware, aligned=aligned)
    room: dict[str, int] = {}
    for name, start in zip(rooms, rest, strict=False):
        offsets = getattr(plan, name).offsets
        room |= {piece: start + offset for piece, offset in offsets.items()}
    launches: list[Launch] = []
    launcher = Launcher(problem, plan, inputs, room, device, launches.append)
    form(launcher, dict(zip(names, rest[len(rooms) :], strict=True)), *options)
    return Recording(launches)


@functools.cache
def _integers(dtype: Any) -> tuple[int, bool]:
    return _INTEGERS[str(dtype).removeprefix("torch.")]


@functools.lru_cache(maxsize=1024)
def _rows(
    shape: tuple[int, ...], strides: tuple[int, ...], size: int, beyond: int
) -> tuple[int, bool, bool] | None:
    """Return what `DeviceMatrix` says of rows that start `beyond` a multiple of `_WIDEST` bytes.

    None where they are not at one distance.
    """
    dim, stride = shape[-1], _row_stride(shape, strides)
    if stride is None:
        return None
    aligned = beyond % (4 * size) == 0 and stride % 4 == 0 and dim % 4 == 0
    in_words = beyond % 16 == 0 and stride * size % 16 == 0 and stride >= dim
    return stride, aligned, in_words


def _row_stride(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """Return the one distance between the rows of an array (..., D), None where there is none."""
    *shape_of_rows, dim = shape
    *outer, inner = strides
    if inner != 1 and dim > 1:
        return None
    distance, step = None, None
    for size, stride in zip(reversed(shape_of_rows), reversed(outer), strict=True):
        if size == 1:
            continue
        if distance is None:
            distance, step = stride, stride * size
        elif stride == step:
            step = stride * size
        else:
            return None
    return dim if distance is None else distance
