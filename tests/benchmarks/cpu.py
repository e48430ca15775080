"""Loss and gradients on the CPU against torch eager: times, ratios, memory, kept columns.

All in one process and in turns, so that the ratios hold on a machine whose speed drifts.
Run by ``make bench``; ``--json FILE`` also records the figures.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peaked import Peaked, peaked
from rich.console import Console
from rich.table import Table

import cce_cupy
from cce_cupy.cpu.tokens import Arrays
from cce_cupy.frameworks.host import HostCall
from cce_cupy.plan import make_plan
from cce_cupy.problem import ArraySpec, Options, Problem

MEBIBYTE = 2**20


def main() -> None:
    """Measure, print, and record where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=640)
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds after one to warm up")
    parser.add_argument("--json", help="file to record the figures in")
    parser.add_argument("--resident", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = {"tokens": options.tokens, "dim": options.dim, "vocab": options.vocab}

    data = peaked(options.tokens, options.dim, options.vocab)
    # The eps that "auto" gives bfloat16; it leaves float32 unfiltered.
    filters = {
        "no filter": {"gradient_filter": None},
        "unbiased, 16 / V": {"gradient_filter": "unbiased", "filter_eps": 16 / options.vocab},
        "threshold, 1 / V": {"gradient_filter": "threshold", "filter_eps": 1 / options.vocab},
    }
    runs: dict[str, Callable[[], Any]] = {"torch eager": torch_eager(data)}
    for name, choice in filters.items():
        runs[name] = lambda choice=choice: cce_cupy.linear_cross_entropy_value_and_grad(
            *data, **choice
        )
    runs["forward alone"] = lambda: cce_cupy.linear_cross_entropy(*data)
    if options.resident:
        print_resident(runs[options.resident])
        return
    case = [f"--{name}={size}" for name, size in sizes.items()]
    times = time_in_turns(runs, options.rounds)
    # Both gradients are outputs; what a run holds beyond them is extra.
    outputs = data.e.nbytes + data.c.nbytes
    logits = 4 * options.tokens * options.vocab
    rows = []
    for name, run in runs.items():
        out = 0 if name == "forward alone" else outputs
        kept = kept_fraction(data, filters[name]) if name in filters else None
        rows.append(
            {
                "run": name,
                "seconds": statistics.median(times[name]),
                # Of the rounds' own ratios: both sides of each saw the same machine.
                "ratio": statistics.median(
                    own / base for own, base in zip(times[name], times["torch eager"], strict=True)
                ),
                "kept": kept,
                "allocated_mib": None if name == "torch eager" else allocated(run, out),
                "resident_mib": resident(name, case, out),
            }
        )
    record = {
        "case": sizes,
        "logits_mib": logits / MEBIBYTE,
        "cores": len(os.sched_getaffinity(0)),
        "versions": {
            "cce_cupy": cce_cupy.__version__,
            "numpy": np.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "rows": rows,
    }
    show(record)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)


def torch_eager(data: Peaked) -> Callable[[], Any]:
    """Return loss and gradients as torch computes them with its logits stored."""
    e, c = torch.from_numpy(data.e).requires_grad_(), torch.from_numpy(data.c).requires_grad_()
    targets = torch.from_numpy(data.targets)

    def run() -> Any:
        e.grad = c.grad = None
        loss = torch.nn.functional.cross_entropy(e @ c.T, targets)
        loss.backward()
        return loss.detach(), e.grad, c.grad

    return run


def time_in_turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Time every run once a round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            gc.collect()
            start = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def allocated(run: Callable[[], Any], outputs: int) -> float:
    """Return the peak of what NumPy allocated in a run beyond its outputs, in MiB."""
    gc.collect()
    tracemalloc.start()
    kept = run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del kept
    return (peak - outputs) / MEBIBYTE


def resident(name: str, case: list[str], outputs: int) -> float:
    """Return by how much the resident set of a fresh process peaks in a run, in MiB.

    A process that has run before holds freed memory, which would hide part of the peak.
    """
    command = [sys.executable, __file__, *case, "--resident", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return (int(done.stdout) - outputs) / MEBIBYTE


def print_resident(run: Callable[[], Any]) -> None:
    """Print the growth of this process's peak resident set over one run, in bytes."""
    gc.collect()
    # What was freed but not yet returned would be taken again unseen.
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # resets the peak to the present size
    before = _status("VmRSS")
    kept = run()
    print(_status("VmHWM") - before)
    del kept


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def kept_fraction(data: Peaked, choice: dict[str, Any]) -> float:
    """Return the part of the (row tile, column) pairs that enter the products."""
    specs = {name: ArraySpec(a.shape, a.dtype.name) for name, a in data._asdict().items()}
    problem = Problem.check(specs, Options(**choice))
    call = HostCall(problem, make_plan(problem), Arrays(*data))
    call.run_forward(keep_columns=True)
    gradients = call.pullback(np.ones(()), None)
    return gradients.kept / gradients.pairs if gradients.pairs else 1.0


def show(record: dict[str, Any]) -> None:
    case = record["case"]
    table = Table(
        title=f"float32, N {case['tokens']}, D {case['dim']}, V {case['vocab']}, "
        f"{record['cores']} cores; the logits are {record['logits_mib']:.0f} MiB"
    )
    for heading in ("run", "seconds", "of torch", "kept", "allocated MiB", "resident MiB"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for row in record["rows"]:
        table.add_row(
            row["run"],
            f"{row['seconds']:.3f}",
            f"{row['ratio']:.2f}x",
            "" if row["kept"] is None else f"{100 * row['kept']:.1f} %",
            "" if row["allocated_mib"] is None else f"{row['allocated_mib']:.1f}",
            f"{row['resident_mib']:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
