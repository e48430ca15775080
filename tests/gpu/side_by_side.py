"""Everything that is run of the kernels on a GPU, side by side: suites, large profile, sanitizer.

    python tests/gpu/side_by_side.py LOGS [--seconds 600] [--places 8] [--devices 2]
        [--only suites sanitizer]

One after the other they take an hour, nearly all of it Python's on one core. What has not ended
when the time is over is ended, and counts as failed. LOGS is a folder for what each has printed.
The suites need pytest-xdist besides. All kernels are compiled before, each once: processes that
begin together would each compile them all.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TOOLS = ("racecheck", "memcheck", "initcheck", "synccheck")
DTYPES = ("bfloat16", "float16", "float32", "float64")
FILTERS = range(4)
"""Of sanitize.py, which these take one by one: together racecheck takes half an hour."""
KINDS = ("suites", "large", "sanitizer")


class Job(NamedTuple):
    """A process, and what it sees of the environment besides."""

    name: str
    command: list[str]
    environment: dict[str, str] = {}


class Outcome(NamedTuple):
    """How a job ended: its status, or None where it did not in time; seconds; its last line."""

    job: Job
    status: int | None
    seconds: float
    last: str


def jobs(kinds: Sequence[str], places: int) -> Iterator[Job]:
    """Yield what is to be run, the long ones first."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    if "suites" in kinds:
        yield Job("suites", [*pytest, "-n", str(places), "--dist", "worksteal", str(HERE)])
    if "large" in kinds:
        workers = ["-n", str(max(places // 2, 1)), "--dist", "worksteal"]
        properties = str(HERE / "test_gpu_properties.py")
        yield Job("large", [*pytest, *workers, properties], {"HYPOTHESIS_PROFILE": "large"})
    if "sanitizer" in kinds:
        for tool, dtype, number in itertools.product(TOOLS, DTYPES, FILTERS):
            script = [sys.executable, str(HERE / "sanitize.py")]
            part = ["--dtypes", dtype, "--filters", str(number)]
            sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
            yield Job(f"{tool} {dtype} {number}", [*sanitizer, *script, *part])


def spread(listed: Sequence[Job], devices: int) -> list[Job]:
    """Give jobs a GPU each in turn; suites see all of them, the first of which they work on."""
    numbers = itertools.cycle(reversed(range(devices)))
    return [
        job
        if job.name == "suites" or devices == 1
        else job._replace(
            environment={**job.environment, "CUDA_VISIBLE_DEVICES": str(next(numbers))}
        )
        for job in listed
    ]


def run_side_by_side(
    listed: Sequence[Job], logs: Path, seconds: float, places: int
) -> Iterator[Outcome]:
    """Run jobs, so many at a time, until the time is over; yield how each ended, in their order."""
    deadline = time.monotonic() + seconds

    def run(job: Job) -> Outcome:
        began = time.monotonic()
        if began >= deadline:
            return Outcome(job, None, 0.0, "not begun")
        log = logs / f"{job.name.replace(' ', '-')}.txt"
        with log.open("w") as file:
            process = subprocess.Popen(
                job.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **ENVIRONMENT, **job.environment},
                start_new_session=True,
            )
            status: int | None
            try:
                status = process.wait(deadline - began)
            except subprocess.TimeoutExpired:
                # Its own processes too.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = None
        lines = log.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        return Outcome(job, status, time.monotonic() - began, last.strip())

    with ThreadPoolExecutor(places) as pool:
        yield from pool.map(run, listed)


ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    # Many processes share the device and the cores.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "2",
}


def warm_up() -> None:
    """Compile all kernels, on all cores; one that does not compile fails in the jobs."""
    command = [sys.executable, "-m", "cce_cupy", "warmup"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, check=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all, print a line for each, and return 1 where any failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("logs", type=Path, help="folder for what each prints; made if need be")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--places", type=int, default=max((os.cpu_count() or 2) // 2, 1))
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--devices", type=int, default=1, help="GPUs to spread the jobs over")
    given = parser.parse_args(arguments)
    given.logs.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    warm_up()
    given.seconds -= time.monotonic() - began
    listed = spread(list(jobs(given.only, given.places)), given.devices)
    failed = 0
    for outcome in run_side_by_side(listed, given.logs, given.seconds, given.places):
        failed += outcome.status != 0
        how = "not in time" if outcome.status is None else f"status {outcome.status}"
        print(f"{outcome.job.name}: {how}, {outcome.seconds:.0f} s: {outcome.last}", flush=True)
    print(f"{len(listed) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
