"""Everything that the documents' records of a GPU are made from, one run after the other.

    python tests/benchmarks/record.py FOLDER [--seconds 600] [--only cases training] [--arrays FILE]

A run whose record is in the folder already is left out, so that what time did not suffice for can
go on later; one that is cut off leaves nothing. Then `report.py take FOLDER` and `report.py fill`.
Nothing else may run on the machine meanwhile: these are timings.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
CASES = ("gemma3-like", "smollm2", "gemma2-2b", "wide", "llama3-8b")
COMPARED = ("gemma3-like", "gemma2-2b", "wide")
"""Cases that peers are measured on."""

SEEDED = ("gemma3-like", "smollm2")
"""Cases that the mean over seeds is formed on."""

SWEEPS = {
    "tokens": ("512", "1024", "2048", "4096", "8192", "16384", "32768", "65536"),
    "few-tokens": ("1", "16", "64", "128"),
    "vocab": ("32768", "65536", "131072", "262144", "524288"),
}
ARMS = ("plain", "unfiltered", "unbiased", "threshold")
SEEDS = range(3)
KINDS = ("cases", "training", "sweeps", "peers", "overhead")
_BURSTS = ["--burst", "0.3", "--block", "0.15", "--least", "3"]


class Run(NamedTuple):
    """What writes one record: a script, its arguments, and the record's name in the folder."""

    script: str
    arguments: list[str]
    record: str


def runs(kinds: Sequence[str], arrays: Path | None, tokens: Path) -> Iterator[Run]:
    """Yield the runs of some kinds, in the order in which they are wanted."""
    makers = {
        "cases": _cases(arrays),
        "training": _training(tokens),
        "sweeps": _sweeps(),
        "peers": _peers(),
        "overhead": _overhead(),
    }
    for kind in kinds:
        yield from makers[kind]


def _of_case(name: str, arrays: Path | None) -> list[str] | None:
    """Return the arguments that name a case; None for one whose arrays are not there."""
    if name != "smollm2":
        return ["--case", name]
    return None if arrays is None else ["--case", name, "--arrays", str(arrays)]


def _cases(arrays: Path | None) -> Iterator[Run]:
    for name in CASES:
        if (case := _of_case(name, arrays)) is not None:
            more = ["--workspaces", "--options", "--ignored", "--accuracy"]
            more += ["--seeds", "32"] if name in SEEDED else []
            yield Run("gpu.py", [*case, *more, *_BURSTS, "--json"], f"case-{name}.json")


def _peers() -> Iterator[Run]:
    for name in COMPARED:
        more = ["--peers-only", "--peers", "--accuracy"]
        yield Run("gpu.py", ["--case", name, *more, *_BURSTS, "--json"], f"peers-{name}.json")


def _sweeps() -> Iterator[Run]:
    for name, steps in SWEEPS.items():
        sweep = ["--sweep", name.rpartition("-")[2], "--steps", *steps, "--no-unfiltered"]
        arguments = ["--case", "gemma2-2b", *sweep, *_BURSTS, "--json"]
        yield Run("gpu.py", arguments, f"sweep-{name}.json")


def _overhead() -> Iterator[Run]:
    for name in ("torch", "jax"):
        yield Run(f"{name}_overhead.py", ["--json"], f"{name}_overhead.json")


def _training(tokens: Path) -> Iterator[Run]:
    # The same text for all: which packages are installed decides what it is.
    yield Run("training.py", ["text"], str(tokens))
    for seed in SEEDS:
        for arm in ARMS:
            how = ["--arm", arm, "--seed", str(seed)]
            yield Run("training.py", ["run", str(tokens), *how], f"{arm}-{seed}.json")
    yield Run("training.py", ["speed", str(tokens)], "speed.json")
    yield Run("jax_training.py", ["--results"], "jax_training.json")


def make_records(listed: Sequence[Run], folder: Path, seconds: float) -> Iterator[tuple[str, str]]:
    """Make the records that are not there yet; yield each one's name, and what became of it."""
    deadline = time.monotonic() + seconds
    for run in listed:
        record = folder / run.record
        if record.exists():
            yield run.record, "there already"
            continue
        left = deadline - time.monotonic()
        if left <= 0:
            yield run.record, "no time"
            continue
        # A record is written row by row: only a whole one gets its name.
        part = record.with_name(f"unfinished-{record.name}")
        command = [sys.executable, str(HERE / run.script), *run.arguments, str(part)]
        began = time.monotonic()
        try:
            status = subprocess.run(command, timeout=left, check=False).returncode
        except subprocess.TimeoutExpired:
            outcome = "cut off"
        else:
            outcome = f"status {status}"
        if outcome == "status 0" and part.exists():
            part.rename(record)
            outcome = f"{time.monotonic() - began:.0f} s"
        else:
            part.unlink(missing_ok=True)
        yield run.record, outcome


def main(arguments: Sequence[str] | None = None) -> None:
    """Make records until the time is over, and say what became of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="for the records; made if need be")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--arrays", type=Path, help="what hidden_states.py made, for smollm2")
    parser.add_argument("--tokens", type=Path, help="the text of the trainings, made if need be")
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    tokens = (given.tokens or given.folder / "tokens.npz").resolve()
    for name, outcome in make_records(
        list(runs(given.only, given.arrays, tokens)), given.folder.resolve(), given.seconds
    ):
        print(f"{name}: {outcome}", flush=True)


if __name__ == "__main__":
    main()
