"""The road from any framework's device arrays through the kernels and back.

The framework of the caller allocates everything, outputs and workspace alike, on its own stream.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ..hopper_launcher import HopperForwardLauncher, HopperLauncher
from ..launcher import BackwardOutputs, DeviceInputs, DeviceMatrix, Launcher, OnDevice, launch_on
from ..plan import (
    EVERY_GRADIENT,
    ITEMSIZE,
    ROW_TILE,
    GpuDevice,
    GpuPlan,
    Room,
    Wanted,
    make_gpu_plan,
)
from ..problem import INTEGER_DTYPES, Problem
from ..recording import Launch, Recording, stand_in

_INTEGERS = {
    name: (int(name.removeprefix("u").removeprefix("int")) // 8, not name.startswith("u"))
    for name in INTEGER_DTYPES
}
"""Bytes of each dtype of targets, and whether it is signed."""

_INPUTS = 6
"""Arrays that a call may be given."""

_WIDEST = 32
"""Bytes of the widest access of a kernel: four elements of float64."""

_WORD = 16
"""Bytes that the kernels on Hopper copy at once."""

MOST_PARTS = 16
"""Of a backward whose launches are kept: those of more parts would take much memory, and the
device is busy for longer than the host needs to form them."""


class DeviceMemory(Protocol):
    """What a framework does for a call on one of its devices."""

    device: int
    stream: int
    """The raw handle of the current one."""

    def strides(self, array: Any) -> tuple[int, ...]:
        """Return how far apart an array's elements lie along each axis, in elements."""

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


def filter_effect(
    memory: DeviceMemory, problem: Problem, arrays: Mapping[str, Any]
) -> tuple[int, int, int, Any]:
    """Return the pairs that pass the filter, all pairs, the tokens, and what is left.

    A pair is of a row tile and a class. What is left are each class's sums of probabilities: the
    gradient of the sum of lse with respect to a bias. Waits for the device.
    """
    zeros = memory.full((problem.vocab,), problem.dtype, 0)
    problem = dataclasses.replace(problem, has_bias=True)
    call = GpuCall(memory, problem, {"bias": zeros} | dict(arrays))
    call.run_forward(keep_columns=True, outputs={})
    assert call.saved is not None
    space = _Space(memory, call.plan.backward)
    nothing = memory.full((), problem.accumulator, 0)
    ones = memory.full(problem.batch_shape, problem.accumulator, 1)
    wanted = Wanted(e=False, c=False, bias=True)
    _, _, sums = call.pullback(memory, nothing, ones, wanted, space)
    count = memory.read_integer(call.saved.words, call.saved.offsets["count"] // 8)
    passed = memory.read_integer(space.words, space.offsets["counters"] // 8)
    pairs = -(-count // ROW_TILE) * problem.vocab
    return passed, pairs, count, sums


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


class Found(NamedTuple):
    """What a call has found out about its arrays, without a reference to them."""

    places: tuple[int, ...]
    """Where each lies."""
    strides: tuple[tuple[int, ...], ...]
    addresses: tuple[int, ...]
    """The places in the order of the arguments, with 0 for those that were not given."""
    alike: _Alike

    def fits(self, memory: DeviceMemory, arrays: Mapping[str, Any]) -> bool:
        """Tell whether arrays of the same names, shapes and dtypes lie where those lay."""
        given = arrays.values()
        places, strides = map(memory.address, given), map(memory.strides, given)
        return self.places == tuple(places) and self.strides == tuple(strides)


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
    found : Found, optional
        What that forward has found, where it `fits` the arrays.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        problem: Problem,
        arrays: Mapping[str, Any],
        saved: Any | None = None,
        found: Found | None = None,
    ) -> None:
        self.memory, self.problem = memory, problem
        # The pullback refers to them too.
        self.held = [*arrays.values()]
        if found is None:
            self._look_at(arrays)
        else:
            self.addresses, self.alike = found.addresses, found.alike
        self.plan = self.alike.plan
        self.saved = None if saved is None else _Space(memory, self.plan.saved, saved)

    def _look_at(self, arrays: Mapping[str, Any]) -> None:
        """Find where arrays lie, and what calls on such arrays share; copy those that must be."""
        memory, problem = self.memory, self.problem
        sums, targets = problem.accumulator, memory.contiguous(arrays["targets"])
        e, e_rows = self._matrix(arrays["e"])
        c, c_rows = self._matrix(arrays["c"])
        self.held = [e, c, targets]
        self.addresses = tuple(map(memory.address, self.held))
        for name, dtype in (("bias", None), ("class_weight", sums), ("token_weight", sums)):
            if name in arrays:
                self.held.append(memory.contiguous(arrays[name], dtype))
                self.addresses += (memory.address(self.held[-1]),)
            else:
                self.addresses += (0,)
        self.alike = _alike(
            problem, memory.hardware(), memory.device, e_rows, c_rows, arrays["targets"].dtype
        )

    def found(self, arrays: Mapping[str, Any]) -> Found | None:
        """Return what an equal call on these arrays need not look for.

        None where one had to be copied: once the copy is gone, its place may be another array's.
        """
        if not all(map(operator.is_, self.held, arrays.values())):
            return None
        places = tuple(map(self.memory.address, self.held))
        strides = tuple(map(self.memory.strides, self.held))
        return Found(places, strides, self.addresses, self.alike)

    def run_forward(self, *, keep_columns: bool, outputs: Mapping[str, Any]) -> None:
        """Compute the outputs: arrays by the names that `Launcher.finish` gives them.

        With `keep_columns` a pullback may follow.
        """
        memory, plan = self.memory, self.plan
        addresses = {name: memory.address(array) for name, array in outputs.items()}
        if keep_columns:
            self.saved = _Space(memory, plan.saved)
            kind = "statistics" if "argmax" in outputs else "forward"
            spaces = {"saved": self.saved, kind: _Space(memory, getattr(plan, kind))}
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
        space: _Space | None = None,
    ) -> tuple[Any, Any, Any]:
        """Return the wanted gradients for upstream gradients; dloss of None stands for ones.

        The stream is that of `memory`, the current one of now: the forward's may be another. The
        workspace is the one that is given, or one of its own.
        """
        problem, plan = self.problem, self.plan
        assert self.saved is not None
        if space is None:
            space = _Space(memory, plan.backward)
        spaces = {"saved": self.saved, "backward": space}
        if memory.stream != self.memory.stream:
            for array in (*self.held, self.saved.words):
                memory.outlives(array)
        if dloss is not None:
            dloss = memory.contiguous(dloss, problem.accumulator)
        if dlse is not None:
            dlse = memory.contiguous(dlse, problem.accumulator)
        if wanted.bias and not problem.has_bias:
            wanted = wanted._replace(bias=False)
        de = dc = dbias = None
        if wanted.e:  # rows that no token maps to are zero
            de = memory.full((*problem.batch_shape, problem.dim), problem.dtype, 0)
        if wanted.c:  # written whole
            dc = memory.full((problem.vocab, problem.dim), problem.dtype, None)
        if wanted.bias:
            dbias = memory.full((problem.vocab,), problem.dtype, None)
        address = memory.address
        addresses = {
            "dloss": 0 if dloss is None else address(dloss),
            "dlse": 0 if dlse is None else address(dlse),
            "de": 0 if de is None else address(de),
            "dc": 0 if dc is None else address(dc),
            "dbias": 0 if dbias is None else address(dbias),
        }
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
            launcher = self.alike.launcher(self.addresses, room, launch_on(memory.stream))
            form(launcher, addresses, *options)

    def _replay(
        self,
        memory: DeviceMemory,
        form: Callable[..., None],
        options: tuple[Any, ...],
        spaces: Mapping[str, _Space],
        addresses: Mapping[str, int],
    ) -> None:
        """Make the same launches as were recorded for calls like this one."""
        starts = [space.address for space in spaces.values()]
        everything = (*self.addresses, *starts, *addresses.values())
        with OnDevice(memory.device):
            recording = self.alike.recording(
                form, options, tuple(spaces), tuple(addresses), tuple(map(bool, everything))
            )
            if recording is not None:
                recording.replay(everything, memory.stream)
                return
        self._launch(memory, form, options, spaces, addresses)

    def _check_targets(self, space: _Space) -> None:
        wrong = self.memory.read_integer(space.words, space.offsets["first_wrong"] // 8)
        if wrong < self.problem.tokens:
            raise ValueError(
                f"targets must lie in [0, {self.problem.vocab}) or equal "
                f"ignore_index={self.problem.ignore_index}; the first that does not is number "
                f"{wrong} of the flattened targets"
            )

    def _matrix(self, array: Any) -> tuple[Any, _Rows]:
        """Return a matrix whose rows are at one distance, the array itself where they are."""
        memory, dtype = self.memory, self.problem.dtype
        rows = _rows(array.shape, memory.strides(array), dtype, memory.address(array) % _WIDEST)
        if rows is None:
            array = memory.contiguous(array)
            rows = _rows(array.shape, memory.strides(array), dtype, memory.address(array) % _WIDEST)
            assert rows is not None
        return array, rows


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
    outputs = BackwardOutputs(
        bits=room["bits"],
        unbounded=room["unbounded"],
        passed=room["counters"],
        wanted=wanted,
        **{name: at[name] for name in ("de", "dc", "dbias")},
    )
    launcher.backward(at["dloss"], at["dlse"], outputs)


class _Rows(NamedTuple):
    """The fields of `DeviceMatrix` behind its pointer."""

    stride: int
    aligned: bool
    in_words: bool


class _Alike:
    """What calls share that differ in their addresses alone."""

    def __init__(
        self,
        problem: Problem,
        hardware: GpuDevice,
        device: int,
        e: _Rows,
        c: _Rows,
        targets_dtype: Any,
    ) -> None:
        self.problem, self.device, self.e, self.c = problem, device, e, c
        self.targets = _INTEGERS[str(targets_dtype).removeprefix("torch.")]
        self.plan: GpuPlan = make_gpu_plan(problem, hardware, aligned=e.in_words and c.in_words)
        self._recordings: dict[Any, Recording | None] = {}

    def launcher(
        self, inputs: Sequence[int], room: Mapping[str, int], take: Callable[[Launch], None]
    ) -> Launcher:
        """Return what forms launches for addresses of the array arguments, in their order."""
        e, c, targets, *optional = inputs
        given = DeviceInputs(
            DeviceMatrix(e, *self.e), DeviceMatrix(c, *self.c), targets, *self.targets, *optional
        )
        kind = Launcher
        if self.plan.hopper is not None:
            kind = HopperForwardLauncher if self.plan.hopper_backward is None else HopperLauncher
        return kind(self.problem, self.plan, given, room, self.device, take)

    def recording(
        self,
        form: Callable[..., None],
        options: tuple[Any, ...],
        rooms: tuple[str, ...],
        names: tuple[str, ...],
        present: tuple[bool, ...],
    ) -> Recording | None:
        """Return launches as they were formed once; None at the first request for them.

        To record takes longer than to launch, and of batches of ever new lengths few come again.

        Parameters
        ----------
        form : callable
            What forms them, with a launcher, addresses by name, and options.
        options : tuple
        rooms : tuple of str
            The plan's rooms that there is an allocation for.
        names : tuple of str
            Of the other addresses.
        present : tuple of bool
            Which addresses are not 0: of the array arguments, of the allocations, and of `names`.
        """
        key = form, options, rooms, names, present
        if key not in self._recordings:
            self._recordings[key] = None
            return None
        found = self._recordings[key]
        if found is None:
            stand_ins = [stand_in(k) if there else 0 for k, there in enumerate(present)]
            inputs, rest = stand_ins[:_INPUTS], stand_ins[_INPUTS:]
            room: dict[str, int] = {}
            for name, start in zip(rooms, rest, strict=False):
                offsets = getattr(self.plan, name).offsets
                room |= {piece: start + offset for piece, offset in offsets.items()}
            launches: list[Launch] = []
            launcher = self.launcher(inputs, room, launches.append)
            form(launcher, dict(zip(names, rest[len(rooms) :], strict=True)), *options)
            found = self._recordings[key] = Recording(launches)
        return found


_alike = functools.lru_cache(maxsize=256)(_Alike)


@functools.lru_cache(maxsize=1024)
def _rows(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: str, beyond: int
) -> _Rows | None:
    """Return how rows lie that start `beyond` a multiple of `_WIDEST` bytes.

    None where they are not at one distance.
    """
    dim, size, stride = shape[-1], ITEMSIZE[dtype], _row_stride(shape, strides)
    if stride is None:
        return None
    aligned = beyond % (4 * size) == 0 and stride % 4 == 0 and dim % 4 == 0
    # Kernels that take words of 16 bytes count them in 32 bits.
    number = math.prod(shape[:-1]) * stride * size // _WORD
    in_words = (
        beyond % _WORD == 0 and stride * size % _WORD == 0 and stride >= dim and number < 2**32
    )
    return _Rows(stride, aligned, in_words)


def _row_stride(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """Return the one distance between the rows of an array (..., D), None where there is none."""
    *shape_of_rows, dim = shape
    *outer, inner = strides
    if 0 in shape:  # no row is read, and frameworks differ in the strides they tell
        return dim
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
