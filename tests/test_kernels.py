"""The CUDA sources and their compiler, without a GPU; a stub stands for CuPy."""

import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kernel_resources
import pytest
from kernel_resources import Report, Resources, Unit, read_log
from rich.console import Console

from cce_cupy import compiler
from cce_cupy.commands import warmup

LOG = """\
ptxas info    : 52 bytes gmem
ptxas info    : Compiling entry function 'forward' for 'sm_90a'
ptxas info    : Function properties for forward
ptxas         .     {stack} bytes stack frame, {stores} bytes spill stores, 8 bytes spill loads
ptxas info    : Used 171 registers, used 1 barriers, 38928 bytes smem
ptxas info    : Compile time = 4135.098 ms
ptxas info    : Compiling entry function 'fill' for 'sm_90a'
ptxas info    : Function properties for fill
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 16 registers
\0"""


def test_log_is_read() -> None:
    kernels, complaints = read_log(LOG.format(stack=24, stores=16))
    assert kernels == {
        "forward": Resources(registers=171, shared=38928, stack=24, spills=24),
        "fill": Resources(registers=16),
    }
    assert complaints == [
        "forward spills 24 bytes",
        "forward has a stack of 24 bytes in local memory",
    ]


def test_a_stack_is_complained_of_without_spills() -> None:
    log = LOG.format(stack=16, stores=0).replace("8 bytes spill loads", "0 bytes spill loads")
    assert read_log(log)[1] == ["forward has a stack of 16 bytes in local memory"]


def test_what_is_tolerated_is_so_by_name_and_bytes() -> None:
    log = LOG.format(stack=8, stores=0)
    assert read_log(log, {"forward": 8})[1] == []
    assert len(read_log(log, {"fill": 8})[1]) == 2
    assert len(read_log(log, {"forward": 7})[1]) == 2


@pytest.mark.parametrize(
    "line",
    [
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async is serialized",
        "ptxas warning : Value of threads per SM is out of range",
        'forward.cu(7): warning #177-D: variable "x" was declared but never referenced',
    ],
)
def test_warnings_are_complaints(line: str) -> None:
    assert read_log(line + "\n\0")[1] == [line]


def test_parameters_are_compared_with_the_signatures() -> None:
    ptx = """
.visible .entry sum_rows(
	.param .align 8 .b8 sum_rows_param_0[40],
	.param .u64 .ptr .align 1 sum_rows_param_1,
	.param .u32 sum_rows_param_2
)
.visible .entry takes_structs(
	.param .align 8 .b8 takes_structs_param_0[24],
	.param .f64 takes_structs_param_1
)
"""
    assert kernel_resources.read_parameters(ptx) == {
        "sum_rows": [40, 8, 4],
        "takes_structs": [24, 8],
    }
    unit = Unit("portable/backward.cu", "float32", "sm_80")
    assert kernel_resources.complain_of_parameters(unit, ptx) == [
        "sum_rows takes parameters of [40, 8, 4] bytes, signatures.py says [40, 8, 8]"
    ]


def test_table_shows_the_most_and_where() -> None:
    reports = [
        Report(Unit("portable/a.cu", "float32", arch), {"f": Resources(n, 64)}, [], 1.0)
        for arch, n in (("sm_75", 30), ("sm_80", 40))
    ]
    console = Console(width=100)
    with console.capture() as captured:
        console.print(kernel_resources.show(reports))
    row = next(line for line in captured.get().splitlines() if "a: f" in line)
    assert row.replace("│", " ").split() == ["a:", "f", "float32", "40", "sm_80", "64", "0", "0"]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put compiler.py where a copy of the sources lies beside the package; return the copy."""
    copy = tmp_path / "kernels_cu"
    shutil.copytree(compiler.sources_root(), copy)
    monkeypatch.setattr(compiler, "__file__", str(tmp_path / "cce_cupy" / "compiler.py"))
    # Without its cache, which must not come to know the copy.
    monkeypatch.setattr(compiler, "sources_hash", compiler.sources_hash.__wrapped__)
    return copy


def test_sources_are_found_in_a_checkout(checkout: Path) -> None:
    assert compiler.sources_root() == checkout


def test_sources_are_found_in_an_installation(checkout: Path) -> None:
    installed = checkout.parent / "cce_cupy" / "kernels_cu"
    shutil.copytree(checkout, installed)
    assert compiler.sources_root() == installed


def test_missing_sources_are_said(checkout: Path) -> None:
    shutil.rmtree(checkout)
    with pytest.raises(FileNotFoundError, match="install cce-cupy again"):
        compiler.sources_root()


def test_every_source_is_in_the_hash(checkout: Path) -> None:
    seen = {compiler.sources_hash()}
    sources = [*checkout.rglob("*.cu"), *checkout.rglob("*.cuh")]
    assert {"number.cuh", "product.cuh", "forward.cu"} <= {path.name for path in sources}
    for path in sources:
        path.write_text(path.read_text() + "\n")
        seen.add(compiler.sources_hash())
    (checkout / "portable" / "new.cuh").write_text("")
    seen.add(compiler.sources_hash())
    assert len(seen) == len(sources) + 2


def test_an_edit_changes_the_options(checkout: Path) -> None:
    before = compiler.compile_options("portable/forward.cu", "float32")
    assert f"-DCCE_SOURCES=0x{compiler.sources_hash()}" in before
    header = checkout / "number.cuh"
    header.write_text(header.read_text() + "\n")
    assert compiler.compile_options("portable/forward.cu", "float32") != before


def test_options_tell_dtypes_apart() -> None:
    options = {compiler.compile_options("portable/forward.cu", dtype) for dtype in compiler.DTYPES}
    assert len(options) == len(compiler.DTYPES)


def test_kernels_are_those_of_the_sources() -> None:
    root = compiler.sources_root()
    there = {path.relative_to(root).as_posix() for path in root.rglob("*.cu")}
    assert there == set(compiler.KERNELS)


class CompileException(Exception):
    """Stands for cupy.cuda.compiler.CompileException."""


class CUDARuntimeError(RuntimeError):
    """Stands for cupy.cuda.runtime.CUDARuntimeError."""


class StubCupy(SimpleNamespace):
    """As much of CuPy as compiling needs; `error` is raised by its compiler."""

    def __init__(self, error: Exception | None = None, devices: int | Exception = 1) -> None:
        def count() -> int:
            if isinstance(devices, Exception):
                raise devices
            return devices

        runtime = SimpleNamespace(
            getDeviceCount=count,
            getDeviceProperties=lambda device: {
                "name": b"NVIDIA Stub",
                "major": 9 - device,
                "minor": 0,
            },
            CUDARuntimeError=CUDARuntimeError,
        )
        super().__init__(
            RawModule=self.compile,
            compiled=[],
            error=error,
            cuda=SimpleNamespace(
                Device=lambda device: nullcontext(),
                compiler=SimpleNamespace(CompileException=CompileException),
                runtime=runtime,
            ),
        )

    def compile(self, code: str, options: tuple[str, ...]) -> Any:
        self.compiled.append((code, options))
        if self.error is not None:
            raise self.error
        return SimpleNamespace(get_function=lambda name: SimpleNamespace(name=name, num_regs=32))


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes an object pass for CuPy, with no kernel loaded yet."""

    def put(cupy: StubCupy | None) -> None:
        monkeypatch.setitem(sys.modules, "cupy", cupy)  # type: ignore[arg-type]
        monkeypatch.setattr(compiler, "_kernels", {})

    return put


def test_kernel_is_compiled_once_and_held(use: Any) -> None:
    cupy = StubCupy()
    use(cupy)
    first = compiler.kernel(0, "portable/forward.cu", "forward", "float32")
    assert first.name == "forward"
    assert compiler.kernel(0, "portable/forward.cu", "forward", "float32") is first
    assert len(cupy.compiled) == 1
    assert cupy.compiled[0][1] == compiler.compile_options("portable/forward.cu", "float32")
    assert compiler.kernel(1, "portable/forward.cu", "forward", "float32") is not first


def test_compile_error_carries_the_log(use: Any) -> None:
    use(StubCupy(CompileException('forward.cu(3): error: identifier "x" is undefined')))
    with pytest.raises(compiler.KernelError) as raised:
        compiler.kernel(0, "portable/forward.cu", "forward", "bfloat16")
    message = str(raised.value)
    assert "portable/forward.cu did not compile for bfloat16" in message
    assert 'identifier "x" is undefined' in message


def test_missing_compiler_says_what_to_install(use: Any) -> None:
    use(StubCupy(RuntimeError("libnvrtc.so.13 not found")))
    with pytest.raises(compiler.KernelError, match=r"libnvrtc.so.13 not found.*cupy-cuda13x\[ctk"):
        compiler.kernel(0, "portable/forward.cu", "forward", "float32")


def test_a_failure_is_not_held(use: Any) -> None:
    cupy = StubCupy(CompileException("log"))
    use(cupy)
    with pytest.raises(compiler.KernelError):
        compiler.kernel(0, "portable/forward.cu", "forward", "float32")
    cupy.error = None
    assert compiler.kernel(0, "portable/forward.cu", "forward", "float32").name == "forward"


def test_missing_cupy_names_the_extra(use: Any) -> None:
    use(None)
    with pytest.raises(ImportError, match=r"pip install 'cce-cupy\[cuda13x\]'"):
        compiler.kernel(0, "portable/forward.cu", "forward", "float32")


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """Run a warmup that must fail; return its one line."""
    assert warmup.run() == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    return captured.err


def test_warmup_without_cupy(use: Any, capsys: pytest.CaptureFixture[str]) -> None:
    use(None)
    assert "pip install 'cce-cupy[cuda13x]'" in complaint(capsys)


@pytest.mark.parametrize("devices", [0, CUDARuntimeError("no CUDA-capable device is detected")])
def test_warmup_without_a_gpu(
    use: Any, capsys: pytest.CaptureFixture[str], devices: int | Exception
) -> None:
    use(StubCupy(devices=devices))
    assert "finds no GPU" in complaint(capsys)


def test_warmup_that_does_not_compile(use: Any, capsys: pytest.CaptureFixture[str]) -> None:
    use(StubCupy(CompileException("error: the log")))
    assert warmup.run() == 1
    assert "error: the log" in capsys.readouterr().err


def test_warmup_loads_every_kernel_of_the_dtypes(
    use: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(StubCupy(devices=2))
    asked = []

    def fresh(device: int, units: list[tuple[str, str]]) -> warmup.Seconds:
        asked.append((device, units))
        return dict.fromkeys(units, 0.125)

    monkeypatch.setattr(warmup, "_load_in_fresh_process", fresh)
    assert warmup.run(["float16"]) == 0
    assert asked == [(0, warmup.list_units(0, ["float16"]))]
    assert set(compiler._kernels) == {
        (device, file, name, "float16")
        for device in range(2)
        for file, names in compiler.KERNELS.items()
        for name in names
        if device == 0 or not file.startswith("sm90/")
    }
    shown = capsys.readouterr().out
    assert "cuda:0, NVIDIA Stub" in shown
    assert "cuda:1, NVIDIA Stub" in shown
    assert shown.count("portable/forward.cu") == 2
    assert "0.12" in shown


def test_warmup_compiles_side_by_side_what_a_kind_of_gpu_needs(
    use: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file in a process of its own, once; one that fails is left to the process that loads."""
    use(StubCupy(devices=2))
    units = {device: warmup.list_units(device, ["float16", "float32"]) for device in range(2)}
    asked = []

    def fresh(device: int, given: list[tuple[str, str]]) -> warmup.Seconds:
        asked.append((device, given))
        if given == [("portable/tokens.cu", "float16")]:
            raise subprocess.CalledProcessError(1, "python")
        return dict.fromkeys(given, 12.5)

    monkeypatch.setattr(warmup, "_load_in_fresh_process", fresh)
    assert warmup.run(["float16", "float32"], processes=3) == 0
    alone = [(device, [unit]) for device in range(2) for unit in units[device]]
    assert sorted(asked[:-1]) == sorted(alone)
    assert asked[-1] == (0, units[0])
    shown = capsys.readouterr().out
    assert shown.count("12.50") == len(alone) - 2 + len(units[0])
