"""``cce-cupy warmup``: compile what this machine's GPUs will need, before it is needed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from types import ModuleType

from rich.console import Console
from rich.table import Table

from ..compiler import DTYPES, KERNELS, KernelError, import_cupy, kernel, serves
from .progress import WorkProgress

Seconds = dict[tuple[str, str], float]
"""By source file and dtype."""


def run(dtypes: Sequence[str] = tuple(DTYPES)) -> int:
    """Compile and load every kernel on every GPU in sight, and print how long it took.

    The compiled kernels stay in CuPy's cache on disk, which the next process reads. The times of
    such a process are the second column of the table.

    Parameters
    ----------
    dtypes : sequence of str
        Those of the arrays to come.

    Returns
    -------
    int
        Exit status: 0, or 1 after one line on the standard error where there is no CuPy, no GPU
        or no compiler.
    """
    try:
        cupy = import_cupy()
        devices = count_devices(cupy)
    except (ImportError, RuntimeError) as error:
        return _complain(str(error))
    try:
        first = [load(device, dtypes) for device in range(devices)]
    except KernelError as error:
        return _complain(str(error))
    again = _load_in_fresh_process(dtypes)
    console = Console()
    for device, seconds in enumerate(first):
        name = cupy.cuda.runtime.getDeviceProperties(device)["name"].decode(errors="replace")
        # One process is enough to time the cache: it holds one entry for GPUs of one kind.
        console.print(_table(f"cuda:{device}, {name}", seconds, again if device == 0 else {}))
    return 0


def load(device: int, dtypes: Sequence[str], quiet: bool = False) -> Seconds:
    """Compile, or read from the cache, and load every kernel; return the seconds it took.

    Parameters
    ----------
    device : int
    dtypes : sequence of str
    quiet : bool
        Whether to show no progress.
    """
    seconds: Seconds = {}
    properties = import_cupy().cuda.runtime.getDeviceProperties(device)
    capability = properties["major"], properties["minor"]
    with WorkProgress(Console(stderr=True, quiet=quiet)) as progress:
        needed = [
            (file, dtype) for dtype in dtypes for file in KERNELS if serves(file, dtype, capability)
        ]
        progress.start(f"kernels for cuda:{device}", len(needed))
        for file, dtype in needed:
            progress.update(len(seconds), f"{file} {dtype}")
            started = time.perf_counter()
            for name in KERNELS[file]:
                kernel(device, file, name, dtype)
            seconds[file, dtype] = time.perf_counter() - started
        progress.update(len(seconds))
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
print(json.dumps([[*key, value] for key, value in load(0, sys.argv[1:], quiet=True).items()]))
"""


def _load_in_fresh_process(dtypes: Sequence[str]) -> Seconds:
    command = [sys.executable, "-c", _FRESH, *dtypes]
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
