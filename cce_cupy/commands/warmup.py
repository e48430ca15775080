"""``cce-cupy warmup``: compile what this machine's GPUs will need, before it is needed."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import ModuleType

from rich.console import Console
from rich.table import Table

from ..compiler import DTYPES, KERNELS, KernelError, import_cupy, kernel, serves
from .progress import WorkProgress

Seconds = dict[tuple[str, str], float]
"""By source file and dtype."""


def run(dtypes: Sequence[str] = tuple(DTYPES), processes: int = 1) -> int:
    """Compile and load every kernel on every GPU in sight, and print how long it took.

    The compiled kernels stay in CuPy's cache on disk, which the next process reads. The times of
    such a process are the second column of the table.

    Parameters
    ----------
    dtypes : sequence of str
        Those of the arrays to come.
    processes : int
        Files that are compiled at a time, each in a process of its own; with 1 in this one.

    Returns
    -------
    int
        Exit status: 0, or 1 after one line on the standard error where there is no CuPy, no GPU
        or no compiler.
    """
    try:
        cupy = import_cupy()
        devices = range(count_devices(cupy))
    except (ImportError, RuntimeError) as error:
        return _complain(str(error))
    first, kinds = [], set()
    try:
        for device in devices:
            units, compiled = list_units(device, dtypes), {}
            capability = capability_of(device)
            if processes > 1 and capability not in kinds:
                compiled = compile_side_by_side(device, units, processes)
            kinds.add(capability)
            first.append(load(device, units) | compiled)
    except KernelError as error:
        return _complain(str(error))
    # One process is enough to time the cache: it holds one entry for GPUs of one kind.
    again = _load_in_fresh_process(0, list_units(0, dtypes))
    console = Console()
    for device, seconds in enumerate(first):
        name = cupy.cuda.runtime.getDeviceProperties(device)["name"].decode(errors="replace")
        console.print(_table(f"cuda:{device}, {name}", seconds, again if device == 0 else {}))
    return 0


def capability_of(device: int) -> tuple[int, int]:
    """Return a GPU's compute capability."""
    properties = import_cupy().cuda.runtime.getDeviceProperties(device)
    return properties["major"], properties["minor"]


def list_units(device: int, dtypes: Sequence[str]) -> list[tuple[str, str]]:
    """Return the files and dtypes that are compiled for a GPU."""
    capability = capability_of(device)
    return [
        (file, dtype) for dtype in dtypes for file in KERNELS if serves(file, dtype, capability)
    ]


def load(device: int, units: Iterable[tuple[str, str]], quiet: bool = False) -> Seconds:
    """Compile, or read from the cache, and load every kernel; return the seconds it took.

    Parameters
    ----------
    device : int
    units : iterable of (str, str)
        Files and dtypes.
    quiet : bool
        Whether to show no progress.
    """
    seconds: Seconds = {}
    with WorkProgress(Console(stderr=True, quiet=quiet)) as progress:
        units = list(units)
        progress.start(f"kernels for cuda:{device}", len(units))
        for file, dtype in units:
            progress.update(len(seconds), f"{file} {dtype}")
            started = time.perf_counter()
            for name in KERNELS[file]:
                kernel(device, file, name, dtype)
            seconds[file, dtype] = time.perf_counter() - started
        progress.update(len(seconds))
    return seconds


def compile_side_by_side(device: int, units: Sequence[tuple[str, str]], processes: int) -> Seconds:
    """Compile units for the cache on disk, so many at a time; return the seconds of each.

    What fails is left out: it fails again where it is loaded, and says why.
    """
    seconds: Seconds = {}
    with (
        WorkProgress(Console(stderr=True)) as progress,
        ThreadPoolExecutor(processes) as pool,
    ):
        progress.start(f"compiling for cuda:{device}", len(units))
        done = [pool.submit(_load_in_fresh_process, device, [unit]) for unit in units]
        for number, future in enumerate(as_completed(done), start=1):
            with contextlib.suppress(subprocess.CalledProcessError):
                seconds |= future.result()
            progress.update(number)
    return seconds


def count_devices(cupy: ModuleType) -> int:
    """Return the number of GPUs; RuntimeError where there is none."""
    try:
        count = int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(f"CuPy is installed but finds no GPU: {error}") from error
    if count == 0:
        raise RuntimeError("CuPy is installed but finds no GPU")
    return count


_FRESH = """\
import json, sys
from cce_cupy.commands.warmup import load
device, units = json.loads(sys.argv[1])
found = load(device, map(tuple, units), quiet=True)
print(json.dumps([[*unit, seconds] for unit, seconds in found.items()]))
"""


def _load_in_fresh_process(device: int, units: Sequence[tuple[str, str]]) -> Seconds:
    command = [sys.executable, "-c", _FRESH, json.dumps([device, units])]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {(file, dtype): value for file, dtype, value in json.loads(output)}


def _complain(reason: str) -> int:
    # A compiler's log has many lines, which here are wanted.
    print(f"cce-cupy warmup: {reason}", file=sys.stderr)
    return 1


def _table(title: str, first: Seconds, again: Seconds) -> Table:
    table = Table(title=title, title_justify="left", caption="Seconds.", caption_justify="left")
    table.add_column("file")
    table.add_column("dtype")
    table.add_column("now", justify="right")
    if again:
        table.add_column("cached", justify="right")
    for (file, dtype), seconds in first.items():
        cells = [f"{again[file, dtype]:.2f}"] if again else []
        table.add_row(file, dtype, f"{seconds:.2f}", *cells)
    return table
