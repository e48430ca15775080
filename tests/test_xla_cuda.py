"""XLA's handlers on a GPU, without one: what they make of XLA's buffers, and what they launch.

A launcher that records stands for the kernels; NumPy's memory stands for the device's.
"""

import contextlib
import ctypes
import itertools
import types

import numpy as np
import pytest

from cce_cupy.frameworks import gpu, xla_call, xla_cuda
from cce_cupy.frameworks.xla_ffi import Buffer
from cce_cupy.plan import GpuDevice, make_gpu_plan, needed_sweeps
from cce_cupy.problem import ArraySpec, Options, Problem

H100, A100 = GpuDevice(132, (9, 0)), GpuDevice(108, (8, 0))
SPECS = {
    "e": ArraySpec((2, 300, 64), "bfloat16"),
    "c": ArraySpec((5000, 64), "bfloat16"),
    "targets": ArraySpec((2, 300), "int32"),
    "bias": ArraySpec((5000,), "bfloat16"),
    "token_weight": ArraySpec((2, 300), "float32"),
}


class Device:
    """Memory, by name, and the calls of the CUDA runtime that the handlers make."""

    def __init__(self):
        self.buffers, self.arrays, self.launches = {}, [], []
        self.hardware = H100
        runtime = types.SimpleNamespace(
            memsetAsync=self.set,
            pointerGetAttributes=lambda pointer: types.SimpleNamespace(device=3),
        )
        self.cupy = types.SimpleNamespace(
            cuda=types.SimpleNamespace(runtime=runtime, Device=contextlib.nullcontext)
        )

    def buffer(self, name, shape, dtype):
        found = Buffer(0, dtype, shape)
        memory = np.full(found.nbytes, 0x55, np.uint8)
        self.arrays.append(memory)
        self.buffers[name] = Buffer(memory.ctypes.data, dtype, shape)
        return self.buffers[name]

    def set(self, pointer, value, size, stream):
        assert stream == 77
        ctypes.memset(pointer, value, size)

    def holding(self, pointer):
        for name, buffer in self.buffers.items():
            if buffer.pointer <= pointer < buffer.pointer + max(buffer.nbytes, 1):
                return name
        raise AssertionError("an address outside all buffers")


@pytest.fixture
def device(monkeypatch):
    made = Device()

    class Recorder:
        def __init__(self, problem, plan, inputs, room, device, stream):
            assert (device, stream) == (3, 77)
            self.plan, self.inputs, self.room = plan, inputs, room

        def __getattr__(self, name):
            return lambda *args, **options: made.launches.append((name, self, args, options))

    class HopperRecorder(Recorder):
        pass

    monkeypatch.setattr(xla_cuda, "import_cupy", lambda: made.cupy)
    monkeypatch.setattr(xla_cuda, "hardware_of", lambda device: made.hardware)
    monkeypatch.setattr(xla_cuda, "_load", lambda device, dtype: None)
    monkeypatch.setattr(gpu, "Launcher", Recorder)
    monkeypatch.setattr(gpu, "HopperForwardLauncher", HopperRecorder)
    monkeypatch.setattr(gpu, "HopperLauncher", HopperRecorder)
    monkeypatch.setattr(gpu, "OnDevice", contextlib.nullcontext)
    monkeypatch.setattr(gpu, "launch_on", lambda stream: stream)
    # Recorded launches have no addresses yet; tests/test_recording.py follows those.
    monkeypatch.setattr(gpu.GpuCall, "_replay", gpu.GpuCall._launch)
    return made


def call(device, arguments, results, attributes):
    known = {**attributes}
    plain = tuple(
        (name, value.item() if isinstance(value, np.generic) else value)
        for name, value in sorted(known.items())
    )
    return types.SimpleNamespace(
        arguments=tuple(arguments), results=tuple(results), attributes=plain, stream=lambda: 77
    )


def problem(**options):
    return Problem.check(SPECS, Options(**options))


def inputs(device):
    return [device.buffer(name, spec.shape, spec.dtype) for name, spec in SPECS.items()]


@pytest.mark.parametrize(
    "outputs",
    [
        ("loss",),
        ("loss", "lse", "saved"),
        ("log_prob", "lse", "entropy", "argmax"),
        ("log_prob", "lse", "entropy", "argmax", "saved"),
    ],
)
def test_forward(device, outputs):
    asked = problem(reduction="none", softcap=30.0, seed=2**63 + 1, ignore_index=-(2**70))
    arguments = inputs(device)
    kinds = {"saved": ((xla_call.saved_bytes(asked),), "uint8"), "argmax": ((2, 300, 2), "int32")}
    results = [device.buffer(name, *kinds.get(name, ((2, 300), "float32"))) for name in outputs]
    size = xla_cuda.forward_bytes(asked, [0, 1], outputs)
    results.append(device.buffer("workspace", (size,), "uint8"))
    attributes = xla_call.attributes_of(asked, arrays=tuple(SPECS), outputs=outputs)
    xla_cuda.forward(call(device, arguments, results, attributes))

    launcher = device.launches[0][1]
    plan = make_gpu_plan(asked, H100)
    assert launcher.plan == plan
    assert device.holding(launcher.inputs.e.pointer) == "e"
    assert device.holding(launcher.inputs.token_weight) == "token_weight"
    assert launcher.inputs.target_bytes == 4
    pieces = plan.saved | plan.forward | (plan.statistics if "argmax" in outputs else {})
    spans = sorted((launcher.room[name], launcher.room[name] + n) for name, n in pieces.items())
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    keeps = "saved" in outputs
    for name, bytes_ in pieces.items():
        if bytes_:
            place = "saved" if name in plan.saved and keeps else "workspace"
            assert device.holding(launcher.room[name]) == place
            assert device.holding(launcher.room[name] + bytes_ - 1) == place
    steps = {name: options for name, _, _, options in device.launches}
    assert list(steps) == ["map_rows", "forward", "finish"]
    assert bool(steps["forward"]["bits"]) == keeps
    assert steps["forward"]["statistics"] == ("argmax" in outputs)
    for name in outputs:
        if name != "saved":
            assert device.holding(steps["finish"][name]) == name
            filled = device.buffers[name].on_host()
            assert (filled == (-1 if name == "argmax" else 0)).all()


@pytest.mark.parametrize(
    ("wanted", "sweeps"),
    [
        (("e", "c", "bias"), {(True, True)}),
        (("e",), {(True, False)}),
        (("c",), {(False, True)}),
        (("bias",), {(False, True)}),
        (("e", "bias"), {(True, True)}),
    ],
)
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("hardware", [H100, A100])
def test_backward(device, wanted, sweeps, lse, hardware):
    device.hardware = hardware
    asked = problem()
    arguments = inputs(device)
    arguments.append(device.buffer("saved", (xla_call.saved_bytes(asked),), "uint8"))
    arguments.append(device.buffer("dloss", (), "float32"))
    if lse:
        arguments.append(device.buffer("dlse", (2, 300), "float32"))
    results = [device.buffer(f"d{name}", SPECS[name].shape, "bfloat16") for name in wanted]
    size = xla_cuda.backward_bytes(asked, [0])
    results.append(device.buffer("workspace", (size,), "uint8"))
    attributes = xla_call.attributes_of(asked, arrays=tuple(SPECS), wanted=wanted)
    xla_cuda.backward(call(device, arguments, results, attributes))

    launcher, given = next((x, a) for name, x, a, _ in device.launches if name == "backward")
    at_dloss, at_dlse, outputs = given
    left = needed_sweeps(launcher.plan.sweeps, outputs.wanted)
    assert {(sweep.e, sweep.c) for sweep in left} == sweeps
    for name in ("e", "c", "bias"):
        output = getattr(outputs, f"d{name}")
        assert bool(output) == (name in wanted)
        if name in wanted:
            assert device.holding(output) == f"d{name}"
    assert device.holding(at_dloss) == "dloss"
    assert bool(at_dlse) == lse
    assert device.holding(launcher.room["bits"]) == "saved"
    plan = make_gpu_plan(asked, hardware)
    assert launcher.plan == plan
    assert (plan.hopper_backward is not None) == (hardware is H100)
    assert (type(launcher).__name__ == "HopperRecorder") == (hardware is H100)
    assert ("records" if hardware is H100 else "dz") in plan.backward
    for name, bytes_ in plan.backward.items():
        if bytes_:
            assert device.holding(launcher.room[name]) == "workspace"
            assert device.holding(launcher.room[name] + bytes_ - 1) == "workspace"
    if "e" in wanted:
        assert not device.buffers["de"].on_host().any()


def test_a_program_for_another_gpu_is_refused(device):
    asked = problem()
    results = [device.buffer("loss", (), "float32")]
    size = xla_call.saved_bytes(asked) + 256
    results.append(device.buffer("workspace", (size,), "uint8"))
    attributes = xla_call.attributes_of(asked, arrays=tuple(SPECS), outputs=("loss",))
    with pytest.raises(RuntimeError, match="another kind of GPU"):
        xla_cuda.forward(call(device, inputs(device), results, attributes))


@pytest.mark.parametrize("hardware", [GpuDevice(1, (7, 5)), GpuDevice(188, (12, 0)), H100])
@pytest.mark.parametrize("options", [{}, {"gradient_filter": None}, {"label_smoothing": 0.1}])
def test_what_is_saved_is_the_same_on_every_device(hardware, options):
    asked = problem(**options)
    for aligned in (True, False):
        room = make_gpu_plan(asked, hardware, aligned=aligned).saved
        assert room.bytes == xla_call.saved_bytes(asked)
    rows, words = 600, -(-5000 // 32)
    on_host = 24 * rows + 4 * words * -(-rows // 128) * (asked.gradient_filter is not None)
    assert xla_call.saved_bytes(asked) >= on_host
