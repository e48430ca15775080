"""What each kernel takes of a GPU, by compiling all of them for all architectures, without a GPU.

    python tests/kernel_resources.py [--dtype DTYPE ...] [--arch ARCH ...]

The compiler is NVRTC with the options that CuPy hands it; the assembler inside NVRTC reports
registers, shared memory, stack and spills. Complaints, and status 1: a spill or a stack in local
memory beyond `TOLERATED`, a kernel that `KERNELS` names and the source lacks or the other way
round, another target than the one asked for, and any warning.
"""

import argparse
import ctypes
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from cce_cupy.commands.progress import WorkProgress
from cce_cupy.compiler import DTYPES, KERNELS, compile_options, serves, sources_root
from cce_cupy.signatures import layout

ARCHITECTURES = ("sm_75", "sm_80", "sm_89", "sm_90a", "sm_100", "sm_120")
PROCESSES = 2

TOLERATED = {
    "sm90/options.cu": {"forward_options": 164},
    "sm90/statistics.cu": {"forward_statistics": 76},
    "sm90/backward.cu": {"backward": 1400},
    "sm90/backward_options.cu": {"backward_options": 1700},
}
"""Bytes of spills, and of stack for them, of kernels in whose main loops there are none: a few
registers, written and read once a tile; in the backward what its phases know of a chunk, which
waits while they copy and multiply."""

NVRTC = "nvidia-cuda-nvrtc"
HEADERS = "nvidia-cuda-runtime"  # cuda_fp16.h and cuda_bf16.h


class Unit(NamedTuple):
    """One compilation."""

    file: str
    dtype: str
    arch: str


class Resources(NamedTuple):
    """What a kernel takes: registers of a thread, and bytes."""

    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0  # stores and loads


class Report(NamedTuple):
    """What came of a compilation."""

    unit: Unit
    kernels: dict[str, Resources]
    complaints: list[str]
    seconds: float  # of processor time


def missing() -> str | None:
    """Return what must be installed before anything can be compiled, or None."""
    absent = [package for package in (NVRTC, HEADERS) if not _files(package)]
    return f"pip install 'cce-cupy[test]': {' and '.join(absent)} missing" if absent else None


def units(
    dtypes: Sequence[str] = tuple(DTYPES), archs: Sequence[str] = ARCHITECTURES
) -> list[Unit]:
    """Return the compilations, the long ones first."""
    sized = sorted(KERNELS, key=lambda file: -(sources_root() / file).stat().st_size)
    every = [Unit(file, dtype, arch) for file in sized for dtype in dtypes for arch in archs]
    return [unit for unit in every if serves(unit.file, unit.dtype, _capability(unit.arch))]


def _capability(arch: str) -> tuple[int, int]:
    number = int(re.sub(r"\D", "", arch))
    return number // 10, number % 10


def compile_unit(unit: Unit) -> Report:
    """Compile one file for one dtype and architecture."""
    started = time.process_time()
    source = (sources_root() / unit.file).read_text(encoding="utf-8")
    # CuPy appends -ftz=true and its own -arch, after the options that it is given.
    options = [
        *compile_options(unit.file, unit.dtype),
        "-ftz=true",
        f"-arch={unit.arch}",
        "--ptxas-options=-v",
        f"-I{_find(HEADERS, 'cuda_fp16.h').parent}",
    ]
    good, log, ptx = run_nvrtc(source, unit.file, options)
    kernels, complaints = read_log(log, TOLERATED.get(unit.file))
    if good:
        complaints += _complain_of_ptx(unit, ptx)
        complaints += complain_of_parameters(unit, ptx)
        complaints += _complain_of_kernels(unit, kernels)
    elif not complaints:
        complaints = ["does not compile, and the log is empty"]
    return Report(unit, kernels, complaints, time.process_time() - started)


def run_nvrtc(source: str, name: str, options: Sequence[str]) -> tuple[bool, str, str]:
    """Compile a source; return whether it compiled, the log, and the PTX."""
    nvrtc = _load_nvrtc()
    program = ctypes.c_void_p()
    _check(
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), name.encode(), 0, None, None
        )
    )
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        good = nvrtc.nvrtcCompileProgram(program, len(options), arguments) == 0
        log = _text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        ptx = _text(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX) if good else ""
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return good, log, ptx


_ENTRY = re.compile(r"Compiling entry function '(\w+)' for")
_LOCAL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_PLAIN = re.compile(r"ptxas info\s*: (\d+ bytes gmem|Function properties for|Compile time)")


def read_log(
    log: str, tolerated: Mapping[str, int] | None = None
) -> tuple[dict[str, Resources], list[str]]:
    """Return the kernels of a log of NVRTC and its assembler, and what the log complains of.

    Complaints are the spills, the stacks, and every line that is no plain report: warnings come
    as "warning" and as "info" with a code.
    """
    kernels: dict[str, Resources] = {}
    complaints = []
    entry = ""
    for line in log.strip("\0").splitlines():
        if found := _ENTRY.search(line):
            entry = found[1]
            kernels[entry] = Resources()
        elif found := _LOCAL.search(line):
            # The entry's own, or that of a function it calls.
            stack, stores, loads = (int(number) for number in found.groups())
            was = kernels.get(entry, Resources())
            kernels[entry] = was._replace(
                stack=max(was.stack, stack), spills=max(was.spills, stores + loads)
            )
        elif found := _USED.search(line):
            shared = _SHARED.search(line)
            kernels[entry] = kernels.get(entry, Resources())._replace(
                registers=int(found[1]), shared=int(shared[1]) if shared else 0
            )
        elif line.strip() and not _PLAIN.search(line):
            complaints.append(line.strip())
    for name, taken in kernels.items():
        allowed = (tolerated or {}).get(name, 0)
        if taken.spills > allowed:
            complaints.append(f"{name} spills {taken.spills} bytes")
        if taken.stack > allowed:
            complaints.append(f"{name} has a stack of {taken.stack} bytes in local memory")
    return kernels, complaints


def _complain_of_ptx(unit: Unit, ptx: str) -> list[str]:
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    if target is None or target[1] != unit.arch:
        return [f"the PTX is for {target and target[1]}, asked for was {unit.arch}"]
    return []


_ENTRY_PARAMETERS = re.compile(r"\.entry (\w+)\(([^)]*)\)")
_PARAMETER = re.compile(
    r"\.param (?:\.align \d+ )?\.[a-z](\d+)(?: \.ptr(?: \.align \d+)?)? \w+(?:\[(\d+)\])?"
)


def read_parameters(ptx: str) -> dict[str, list[int]]:
    """Return the bytes of each parameter of each kernel."""
    return {
        name: [int(bits) // 8 * int(number or 1) for bits, number in _PARAMETER.findall(listed)]
        for name, listed in _ENTRY_PARAMETERS.findall(ptx)
    }


def complain_of_parameters(unit: Unit, ptx: str) -> list[str]:
    found = read_parameters(ptx)
    return [
        f"{name} takes parameters of {found[name]} bytes, signatures.py says {stated}"
        for name in KERNELS[unit.file]
        if name in found and (stated := layout(unit.file, name).sizes) != found[name]
    ]


def _complain_of_kernels(unit: Unit, kernels: Iterable[str]) -> list[str]:
    named, there = set(KERNELS[unit.file]), set(kernels)
    lacking = [f"there is no kernel {name}" for name in sorted(named - there)]
    return lacking + [f"{name} is not in KERNELS" for name in sorted(there - named)]


def _files(package: str) -> list[Path]:
    try:
        listed = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in listed]


def _find(package: str, pattern: str) -> Path:
    return next(path for path in _files(package) if path.match(pattern))


@cache
def _load_nvrtc() -> Any:
    # NVRTC looks for its built-in library by name, and takes one that is loaded already.
    ctypes.CDLL(str(_find(NVRTC, "libnvrtc-builtins.so.*")))
    nvrtc = ctypes.CDLL(str(_find(NVRTC, "libnvrtc.so.*")))
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    return nvrtc


def _check(status: int) -> None:
    if status:
        raise RuntimeError(_load_nvrtc().nvrtcGetErrorString(status).decode())


def _text(program: ctypes.c_void_p, size_of: Any, read: Any) -> str:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(read(program, text))
    return text.value.decode(errors="replace")


def show(reports: Sequence[Report]) -> Table:
    """Return a row for each kernel and dtype: the most over architectures, and where it is."""
    table = Table(title="Most over architectures", title_justify="left")
    table.add_column("kernel")
    table.add_column("dtype")
    for heading in ("registers", "shared", "stack", "spills"):
        table.add_column(heading, justify="right")
    taken: dict[tuple[str, str], list[tuple[str, Resources]]] = {}
    for report in reports:
        for name, resources in report.kernels.items():
            key = f"{Path(report.unit.file).stem}: {name}", report.unit.dtype
            taken.setdefault(key, []).append((report.unit.arch, resources))
    for (kernel, dtype), found in sorted(taken.items()):
        cells = []
        for field in range(len(Resources._fields)):
            most = max(resources[field] for _, resources in found)
            where = [arch for arch, resources in found if resources[field] == most]
            everywhere = len(where) == len(found)
            cells.append(f"{most}" if everywhere else f"{most} {' '.join(where)}")
        table.add_row(kernel, dtype, *cells)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table and the complaints; return 1 when there are complaints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, metavar="sm_NN")
    parsed = parser.parse_args(arguments)
    if lacking := missing():
        print(lacking, file=sys.stderr)
        return 1
    console = Console(width=None if sys.stdout.isatty() else 160)
    started = time.monotonic()
    reports = []
    asked = units(parsed.dtype, parsed.arch)
    with WorkProgress() as progress, ProcessPoolExecutor(PROCESSES) as pool:
        progress.start("kernels", len(asked))
        for report in pool.map(compile_unit, asked):
            reports.append(report)
            progress.update(len(reports), " ".join(report.unit))
    console.print(show(reports))
    complaints = [
        f"{report.unit.file} {report.unit.dtype} {report.unit.arch}: {complaint}"
        for report in reports
        for complaint in report.complaints
    ]
    for complaint in complaints:
        console.print(complaint, markup=False, highlight=False, soft_wrap=True)
    slowest = max(reports, key=lambda report: report.seconds)
    console.print(
        f"{len(reports)} compilations in {time.monotonic() - started:.0f} s, "
        f"{len(complaints)} complaints; the longest, {' '.join(slowest.unit)}, "
        f"took {slowest.seconds:.1f} s of {sum(report.seconds for report in reports):.0f} s of "
        "processor time",
        highlight=False,
    )
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
