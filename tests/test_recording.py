"""Launches that are formed once and made again, with a stub for the driver's library.

What the stub is given must be what it is given by launches that are formed for each call.
"""

import contextlib
import ctypes
import struct
import threading
from types import SimpleNamespace

import pytest

import cce_cupy
from cce_cupy import driver, launcher, recording, tensor_map
from cce_cupy.driver import Layout
from cce_cupy.frameworks import gpu
from cce_cupy.frameworks.gpu import GpuCall
from cce_cupy.plan import GpuDevice, Wanted, make_gpu_plan
from cce_cupy.problem import ArraySpec, Options, Problem
from cce_cupy.recording import Launch, Recording, stand_in
from cce_cupy.signatures import (
    DENSE_DLOGITS,
    DENSE_GRADIENTS,
    HOPPER_BACKWARD,
    PARAMETERS,
    layout,
)

H100, A100 = GpuDevice(132, (9, 0)), GpuDevice(108, (8, 0))


class Untyped(ctypes._CFuncPtr):
    """A function of C as a library hands it out: without the types of its arguments."""

    _flags_ = ctypes._FUNCFLAG_CDECL
    _restype_ = ctypes.c_int


class Library:
    """Launches nothing, and keeps what it was asked to launch, with the bytes of each argument."""

    def __init__(self):
        self.calls, self.sizes, self.status = [], {}, 0
        self.pause, self.recorded = None, 0
        address, size = ctypes.c_void_p, ctypes.c_uint
        types = address, *[size] * 7, address, ctypes.POINTER(address)
        given = {
            self.cuLaunchKernel: (*types, address),
            self.cuLaunchCooperativeKernel: types,
        }
        self._functions = {
            function.__name__: (ctypes.CFUNCTYPE(ctypes.c_int, *types)(function), len(types))
            for function, types in given.items()
        }

    def __getitem__(self, name):
        callback, count = self._functions[name]
        function = Untyped(ctypes.cast(callback, ctypes.c_void_p).value)

        def call(*arguments):
            assert len(arguments) == count  # C would not see one too many
            return function(*arguments)

        return call

    def cuLaunchKernel(self, function, *rest):
        *rest, extra = rest
        return self._launch(function, rest, extra)

    def cuLaunchCooperativeKernel(self, function, *rest):
        return self._launch(function, rest, "cooperative")

    def _launch(self, function, rest, how):
        *sizes, shared, stream, pointers = rest
        if self.pause is not None:
            self.pause.wait()
        arguments = [
            ctypes.string_at(pointers[k], size) for k, size in enumerate(self.sizes[function])
        ]
        self.calls.append((function, sizes, shared, stream or 0, arguments, how))
        return self.status

    def cuTensorMapEncodeTiled(self, out, kind, rank, pointer, *rest):
        text = b"descriptor of a matrix at %x" % pointer.value
        ctypes.memmove(out.value, text.ljust(128, b"."), 128)
        return 0

    def cuGetErrorName(self, status, text):
        text._obj.value = b"CUDA_ERROR"
        return 0

    def take(self):
        taken, self.calls = self.calls, []
        return taken


@pytest.fixture
def library(monkeypatch):
    stub = Library()
    for module in (driver, recording, tensor_map):
        monkeypatch.setattr(module, "library", lambda: stub)
    kernels = [(file, name) for file, names in PARAMETERS.items() for name in names]
    handles = {kernel: 0x7000 + k for k, kernel in enumerate(kernels)}
    stub.names = {handle: name for (_, name), handle in handles.items()}
    stub.sizes = {handle: layout(*kernel).sizes for kernel, handle in handles.items()}

    def load(device, file, name, dtype):
        return handles[f"{file}.cu", name], 64, layout(f"{file}.cu", name)

    monkeypatch.setattr(launcher, "_loaded", {})
    monkeypatch.setattr(launcher, "_load", load)
    monkeypatch.setattr(gpu, "OnDevice", contextlib.nullcontext)

    def record(launches):
        stub.recorded += 1
        return Recording(launches)

    monkeypatch.setattr(gpu, "Recording", record)
    gpu._alike.cache_clear()
    tensor_map.encode.cache_clear()
    yield stub
    gpu._alike.cache_clear()
    tensor_map.encode.cache_clear()


class Memory:
    """Addresses in the order in which they are asked for, of no memory."""

    def __init__(self, first, stream=5, hardware=H100):
        self.next, self.device, self.stream, self.found = first, 1, stream, hardware

    def array(self, shape, dtype):
        strides = []
        step = 1
        for size in reversed(shape):
            strides.insert(0, step)
            step *= size
        pointer = self.next if step else 0
        self.next += 2**32
        return SimpleNamespace(
            shape=tuple(shape), strides=tuple(strides), dtype=dtype, pointer=pointer
        )

    def strides(self, array):
        return array.strides

    def address(self, array):
        return array.pointer

    def contiguous(self, array, dtype=None):
        return array

    def full(self, shape, dtype, value):
        return self.array(shape, dtype)

    def hardware(self):
        return self.found


def specs(rows, vocab, dim, dtype, *optional):
    shapes = {
        "e": ((rows, dim), dtype),
        "c": ((vocab, dim), dtype),
        "targets": ((rows,), "int32"),
        "bias": ((vocab,), dtype),
        "class_weight": ((vocab,), "float32"),
        "token_weight": ((rows,), "float32"),
    }
    names = ("e", "c", "targets", *optional)
    return {name: ArraySpec(*shapes[name], "cuda:1") for name in names}


def call(memory, described, options=(), *, outputs=("loss",), wanted=None, dlse=False):
    """A forward, and a backward where gradients are wanted, on arrays of their own."""
    problem = Problem.check(described, Options(**dict(options)))
    arrays = {name: memory.array(x.shape, x.dtype) for name, x in described.items()}
    made = GpuCall(memory, problem, arrays)
    results = {name: memory.array((problem.tokens,), "float32") for name in outputs}
    made.run_forward(keep_columns=wanted is not None, outputs=results)
    if wanted is not None:
        upstream = memory.array((problem.tokens,), "float32") if dlse else None
        made.pullback(memory, memory.array((1,), "float32"), upstream, wanted)


EVERYTHING = ("bias", "class_weight", "token_weight")
STATISTICS = ("log_prob", "lse", "entropy", "argmax")
CALLS = {
    "plain": ((300, 5000, 64, "bfloat16"), {}, {}),
    "one tile": ((100, 5000, 64, "bfloat16"), {}, {}),
    "portable": ((300, 5000, 63, "float32"), {}, {}),
    "float64": ((300, 500, 20, "float64", *EVERYTHING), {"reduction": "none"}, {}),
    "options": (
        (300, 5000, 64, "float16", *EVERYTHING),
        {"softcap": 30.0, "label_smoothing": 0.1, "seed": 2**64 - 1, "return_lse": True},
        {"outputs": ("loss", "lse"), "dlse": True},
    ),
    "every column": ((300, 5000, 64, "float16", "bias"), {"gradient_filter": None}, {}),
    "dense": ((300, 5000, 64, "float16", "token_weight"), {"gradient_filter": None}, {}),
    "dense chunks": (
        (300, 20_000, 64, "bfloat16"),
        {"gradient_filter": None, "workspace_bytes": 2**22},
        {"outputs": ("loss", "lse"), "dlse": True},
    ),
    "dense sums in dc": (
        (300, 20_000, 64, "bfloat16"),
        {"gradient_filter": None, "workspace_bytes": 3 * 2**20},
        {},
    ),
    "dense dc": (
        (1000, 2500, 1024, "bfloat16"),
        {"gradient_filter": None, "workspace_bytes": 2**21},
        {},
    ),
    "one side": ((300, 5000, 64, "bfloat16"), {"filter_c_grad": False}, {}),
    "other side": ((300, 5000, 64, "bfloat16"), {"filter_e_grad": False}, {}),
    "passes": ((1000, 5000, 1024, "bfloat16"), {"workspace_bytes": 2**21}, {}),
    "rank one": ((300, 5000, 64, "bfloat16", "bias"), {"label_smoothing": 0.1}, {}),
    "in parts": ((300, 5000, 64, "float32"), {"workspace_bytes": 1_500_000}, {}),
    "statistics": ((300, 5000, 64, "bfloat16"), {}, {"outputs": STATISTICS}),
    "no rows": ((0, 50, 64, "bfloat16"), {}, {}),
    "no classes": ((7, 0, 64, "bfloat16", "bias"), {"ignore_index": 0}, {}),
    "no dimension": ((7, 50, 0, "float32", "bias"), {}, {}),
}


@pytest.mark.parametrize("hardware", [H100, A100])
@pytest.mark.parametrize("wanted", [None, Wanted(), Wanted(e=False), Wanted(False, False, True)])
@pytest.mark.parametrize("name", CALLS)
def test_recorded_launches_are_those_formed_for_a_call(
    library, monkeypatch, name, wanted, hardware
):
    shapes, options, extra = CALLS[name]
    described = specs(*shapes)

    def run(first, stream):
        call(Memory(first, stream, hardware), described, options, wanted=wanted, **extra)
        return library.take()

    places = [(2**40, 5), (2**45, 6), (2**40, 7)]
    with monkeypatch.context() as patch:
        patch.setattr(GpuCall, "_replay", GpuCall._launch)
        formed = [run(*place) for place in places]
    assert formed[0] != formed[1]
    assert [run(*place) for place in places] == formed
    plan = make_gpu_plan(Problem.check(described, Options(**options)), hardware)
    assert library.recorded == 1 + (wanted is not None and plan.parts <= gpu.MOST_PARTS)


# Passes over the rows, how many of them sort the columns that are kept, and the chunks of columns
# whose gradients are formed before one of them, if every token counts.
ON_HOPPER = {
    "plain": (1, 1, 0),
    "one tile": (1, 1, 0),
    "options": (1, 0, 0),
    "every column": (1, 0, 0),
    "dense": (1, 0, 1),
    "dense chunks": (1, 0, 4),
    "dense sums in dc": (1, 0, 6),
    "dense dc": (3, 0, 7),
    "one side": (2, 1, 1),
    "other side": (2, 1, 1),
    "passes": (4, 4, 0),  # one of them an attempt at all at once
    "rank one": (1, 1, 0),
}


SHAPED = ("options", "every column", "rank one")
BACKWARD = {name: "backward_options" if name in SHAPED else "backward" for name in ON_HOPPER}
"""Logits that are not the products as they are have a kernel of their own."""


@pytest.mark.parametrize("name", ON_HOPPER)
def test_recorded_backward_on_hopper(library, monkeypatch, name):
    shapes, options, extra = CALLS[name]
    described = specs(*shapes)
    plan = make_gpu_plan(Problem.check(described, Options(**options)), H100)
    assert plan.hopper_backward is not None
    passes, sorting, chunks = ON_HOPPER[name]
    assert plan.parts == passes + chunks

    def run(first, stream):
        call(Memory(first, stream), described, options, wanted=Wanted(), **extra)
        return [(library.names[function], *rest) for function, *rest in library.take()]

    with monkeypatch.context() as patch:
        patch.setattr(GpuCall, "_replay", GpuCall._launch)
        formed = run(2**40, 5)
    run(2**45, 6)
    run(2**46, 6)
    assert library.recorded == 2
    recorded = run(2**40, 5)
    assert recorded == formed
    together = [(kernel, sizes) for kernel, sizes, *_, how in recorded if how == "cooperative"]
    kernels = [kernel for kernel, _ in together]
    assert [kernel for kernel in kernels if kernel != "order_columns"] == [BACKWARD[name]] * passes
    assert kernels.count("order_columns") == sorting
    # Blocks that wait for each other must all fit onto the device.
    assert all(sizes[:3] == [132, 1, 1] for _, sizes in together)
    alone = {kernel for kernel, *_, how in recorded if how != "cooperative"}
    assert {"map_rows", "row_factors"} <= alone
    assert not alone & {*BACKWARD.values(), "order_columns", "dlogits"}
    dense = [kernel for kernel, *_ in recorded if kernel.startswith("dense_")]
    # Sums that wait where the last rows of dC will be are taken up before these are written. Where
    # both gradients are formed together there is room for larger chunks.
    waits = plan.dense_both is not None and plan.dense_both.waiting > 0
    assert waits == (name == "dense sums in dc")
    together = {"dense chunks": 3, "dense sums in dc": 4}.get(name, chunks)
    each = ["dense_dlogits", "dense_gradients"]
    assert dense == each * together + each[1:] * waits


DENSE = {
    "dense": "ec",
    "dense chunks": "ec",
    "dense sums in dc": "ec",
    "dense dc": "c",
    "one side": "c",
    "other side": "e",
}


@pytest.mark.parametrize("name", ON_HOPPER)
@pytest.mark.parametrize("wanted", [Wanted(), Wanted(e=False), Wanted(c=False, bias=False)])
def test_the_backward_knows_whether_dense_products_came_before(library, name, wanted):
    shapes, options, extra = CALLS[name]
    rows, vocab, dim, *_ = shapes
    described = specs(*shapes)
    plan = make_gpu_plan(Problem.check(described, Options(**options)), H100)

    def read(format, argument):
        return struct.unpack("@" + format, argument)

    seen = set()
    # Formed twice, then made again with other addresses.
    for first in (2**40, 2**45, 2**46):
        call(Memory(first), described, options, wanted=wanted, **extra)
        launches = []
        for function, sizes, *_, arguments, how in library.take():
            kernel = library.names[function]
            if kernel.startswith("dense_"):
                assert (sizes[:3], how) == ([plan.dense.blocks, 1, 1], None)
                launches.append((kernel, arguments))
            elif kernel == BACKWARD[name]:
                last = read(HOPPER_BACKWARD, arguments[1])
                low, de, dc, dense_rows = last[-12], last[-7], last[-6], last[-1]
                formed = "e" * bool(de) + "c" * bool(dc)
                both = formed == "ec"
                cut = plan.dense_both if both else plan.dense
                is_dense = bool(set(formed) & set(DENSE.get(name, "")))
                assert bool(launches) == is_dense
                assert dense_rows == (rows if is_dense else -1)
                at, chunks = 0, iter(cut.chunks if cut is not None else ())
                while launches:
                    (one, dz), (two, gradients) = launches[:2]
                    assert (one, two) == ("dense_dlogits", "dense_gradients")
                    *given, largest, into, pitch = read(DENSE_DLOGITS, dz[2])
                    first, columns, _ = next(chunks)
                    assert tuple(given[8:12]) == (rows, dim, first, columns)
                    assert first == at
                    assert pitch == cut.width
                    # The matrix that one writes is the one that the other copies boxes of.
                    assert b"matrix at %x." % into in gradients[0][:128]
                    assert gradients[0][256:] == dz[1]
                    waits = dc + 2 * dim * (vocab - cut.waiting) if cut.waiting else 0
                    apart = bool(cut.waiting) and at + columns == vocab
                    sides = [(de, 0), (0, dc)] if apart else [(de, dc)]
                    for (kernel, arguments), side in zip(launches[1:], sides, strict=False):
                        assert kernel == "dense_gradients"
                        assert arguments[0] == gradients[0]
                        found = read(DENSE_GRADIENTS, arguments[1])
                        assert found[1:8] == (rows, dim, *cut.parts, at, columns, vocab)
                        assert found[-6:-3] == (largest, waits, cut.waiting)
                        assert found[-3:] == (into + cut.low_offset, *side)
                        assert both or found[-3] == low
                    launches = launches[1 + len(sides) :]
                    at += columns
                assert at == (vocab if is_dense else 0)
                seen.update(formed)
        assert launches == []
    assert seen == {side for side in "ec" if getattr(wanted, side)}


def test_calls_of_two_shapes_take_turns(library):
    both = [specs(300, 5000, 64, "bfloat16"), specs(500, 5000, 64, "bfloat16")]
    alone = []
    for described in both:
        call(Memory(2**40), described, wanted=Wanted())
        alone.append(library.take())
    assert alone[0] != alone[1]
    for k in (0, 1, 0, 1):
        call(Memory(2**40), both[k], wanted=Wanted())
        assert library.take() == alone[k]


def test_matrices_that_lie_otherwise_are_other_calls(library):
    described = specs(300, 5000, 64, "bfloat16")
    for beyond in (0, 8, 2, 0, 64, 8, 2):
        call(Memory(2**40 + beyond), described)
    assert library.recorded == 3


def test_launches_are_recorded_when_they_come_again(library):
    for rows in range(300, 310):
        call(Memory(2**40), specs(rows, 5000, 64, "bfloat16"))
    assert library.recorded == 0


def test_many_parts_are_not_kept(library):
    described = specs(300, 50_000, 64, "float32")
    for _ in range(3):
        call(Memory(2**40), described, {"workspace_bytes": 500_000}, wanted=Wanted())
    assert library.recorded == 1  # the forward
    assert len(library.take()) > 3 * 4 * gpu.MOST_PARTS


def test_many_dense_chunks_are_not_kept(library):
    described = specs(300, 50_000, 64, "bfloat16")
    options = {"gradient_filter": None, "workspace_bytes": 2**20}
    for _ in range(3):
        call(Memory(2**40), described, options, wanted=Wanted())
    assert library.recorded == 1  # the forward
    assert len(library.take()) > 3 * 2 * gpu.MOST_PARTS


def test_launches_of_both_kinds_keep_their_order(library):
    kernel = Layout(["P"])
    library.sizes = {1: kernel.sizes, 2: kernel.sizes}
    flags = [True, False, True]
    launches = [Launch(1 + f, (1, 1), (1, 1), 0, kernel, (stand_in(0),), f) for f in flags]
    Recording(launches).replay((100,), 3)
    found = [(function, how == "cooperative") for function, *_, how in library.take()]
    assert found == [(2, True), (1, False), (2, True)]


@pytest.fixture
def tensors_on_a_device(library, monkeypatch):
    """Tensors of the host that are taken for those of a GPU; and the calls that look at them."""
    torch = pytest.importorskip("torch")
    from cce_cupy.frameworks import torch as of_torch

    spec = of_torch._spec.__wrapped__
    monkeypatch.setattr(of_torch, "_spec", lambda *given: spec(*given)._replace(device="cuda:1"))
    monkeypatch.setattr(of_torch, "_hardware", lambda device: H100)

    def begin(memory, device):
        memory._device, memory.device, memory.stream = device, 1, 5

    monkeypatch.setattr(of_torch.TorchMemory, "__init__", begin)
    looks, look_at = [], GpuCall._look_at
    monkeypatch.setattr(GpuCall, "_look_at", lambda *given: looks.append(look_at(*given)))

    def run(hooks=None, **given):
        arguments = {
            "e": torch.ones(300, 64, dtype=torch.bfloat16, requires_grad=True),
            "c": torch.ones(5000, 64, dtype=torch.bfloat16, requires_grad=True),
            "targets": torch.zeros(300, dtype=torch.int32),
        }
        arguments |= {name: make(torch) for name, make in given.items()}
        with contextlib.ExitStack() as stack:
            if hooks is not None:
                pack, unpack = hooks
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
            loss = cce_cupy.linear_cross_entropy(**arguments)
        loss.backward()
        assert arguments["e"].grad.shape == (300, 64)
        assert arguments["c"].grad.shape == (5000, 64)
        kernels = [library.names[function] for function, *_ in library.take()]
        taken, looks[:] = len(looks), []
        return taken, kernels

    return run


SAVED = {
    "as they are": (1, None, {}),
    "the same": (1, (lambda x: x, lambda x: x), {}),
    "copies": (2, (lambda x: x, lambda x: x.clone()), {}),
    "negated": (2, (lambda x: x, lambda x: x._neg_view() if x.is_floating_point() else x), {}),
    "transposed": (2, (lambda x: x, lambda x: x.mT.clone().mT if x.ndim == 2 else x), {}),
    "of another dtype": (2, None, {"class_weight": lambda torch: torch.ones(5000).double()}),
    "with gaps": (2, None, {"token_weight": lambda torch: torch.ones(600)[::2]}),
    "with gaps between rows": (
        1, None, {"e": lambda torch: torch.ones(300, 128).bfloat16()[:, :64].requires_grad_()},
    ),
    "weighted": (1, None, {"token_weight": lambda torch: torch.ones(300)}),
}  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
def test_the_backward_of_torch_looks_at_tensors_that_are_others(tensors_on_a_device, name):
    """What the forward has found counts for the tensors it was found for, and for no others."""
    looks, hooks, given = SAVED[name]
    taken, kernels = tensors_on_a_device(hooks, **given)
    assert taken == looks
    assert tensors_on_a_device(hooks, **given) == (looks, kernels)
    for _ in range(2):  # recorded now
        assert tensors_on_a_device(hooks, **given) == (looks, kernels)
    assert {"map_rows", "row_factors", "backward"} <= {*kernels}


def two_words():
    kernel = Layout(["P", "q", "P"])
    values = stand_in(0) + 8, -3, stand_in(1)
    return Recording([Launch(1, (3, 2), (128, 4), 16, kernel, values)]), kernel


def test_threads_do_not_share_arguments(library):
    recorded, kernel = two_words()
    library.sizes = {1: kernel.sizes}
    # Both are between the writing of their arguments and the driver's reading them at once.
    library.pause = threading.Barrier(2)
    given = [(100, 200), (300, 400)]
    threads = [threading.Thread(target=recorded.replay, args=(x, 9)) for x in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = sorted(arguments for *_, arguments, _ in library.take())
    words = [[(a + 8), 2**64 - 3, b] for a, b in given]
    assert found == sorted([w.to_bytes(8, "little") for w in each] for each in words)
    library.pause = None
    recorded.replay((500, 600), 0)
    assert len(recorded._rooms) == 2


def test_a_refused_launch_says_why(library):
    recorded, kernel = two_words()
    library.sizes, library.status = {1: kernel.sizes}, 719
    with pytest.raises(RuntimeError, match="refused to launch a kernel: CUDA_ERROR"):
        recorded.replay((100, 200), 9)
    library.status = 0
    library.take()
    recorded.replay((100, 200), 9)
    ((function, sizes, shared, stream, *_),) = library.take()
    assert (function, sizes, shared, stream) == (1, [3, 2, 1, 128, 4, 1], 16, 9)


def test_an_address_that_would_be_the_same_in_each_call_is_refused():
    with pytest.raises(ValueError, match="0x7f0000000000 is not within an array"):
        Recording([Launch(1, (1, 1), (1, 1), 0, Layout(["P"]), (0x7F0000000000,))])
