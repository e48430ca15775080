"""What a record says of its machine, and how records get to the disk."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import cce_cupy
from cce_cupy.compiler import sources_hash

PACKAGES = ("torch", "triton", "jax", "cupy-cuda13x", "cupy-cuda12x", "numpy", "optax")
PEERS = {"cut-cross-entropy": "cut_cross_entropy", "liger-kernel": "liger_kernel"}


def describe_machine(commit: str | None = None) -> dict[str, Any]:
    """Return date, device, driver, versions and commit; `commit` where this is no checkout."""
    fields = ("name", "compute_cap", "memory.total", "driver_version", "power.limit")
    query = f"--query-gpu={','.join((*fields, 'clocks.max.sm'))}"
    smi = _output("nvidia-smi", query, "--format=csv,noheader", "--id=0")
    names = ("device", "capability", "memory", "driver", "power_limit", "clock_limit")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    found = _output("git", "rev-parse", "HEAD")
    return {
        "date": time.strftime("%Y-%m-%d"),
        **dict(zip(names, smi.split(", "), strict=False)),
        "versions": _versions(),
        "commit": commit or (found and found + (" with changes" if changed else "")) or None,
        "kernels": sources_hash(),
    }


def write_record(path: Path, record: Any) -> None:
    """Replace a record as a whole: whoever is stopped while writing leaves the one before."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_record(path: Path) -> Any:
    """Return what `write_record` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def _versions() -> dict[str, str]:
    found = {"cce_cupy": cce_cupy.__version__, "python": platform.python_version()}
    for package in (*PACKAGES, *PEERS):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    # A peer's sources on the path, without what an installer writes beside them.
    missing = [package for package in PEERS if package not in found]
    for package in missing if "torch" in sys.modules else ():
        with suppress(Exception):
            found[package] = import_module(PEERS[package]).__version__
    return found


def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
