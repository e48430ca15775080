"""``cce-cupy info``: versions, devices, and which tier would serve each dtype."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..plan import make_plan
from ..problem import FLOAT_DTYPES, ArraySpec, Options, Problem
from ..version import VERSION

CUPY_PACKAGES = ("cupy-cuda13x", "cupy-cuda12x", "cupy")
SHOWN_PACKAGES = ("ml_dtypes", "torch", "jax", "jaxlib")

EXAMPLE = {"tokens": 8192, "dim": 2048, "vocab": 131072}
"""Sizes for which the plan is shown."""

_COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclass(frozen=True)
class Driver:
    """What the NVIDIA driver says.

    Attributes
    ----------
    cuda : tuple of int
        The newest CUDA version it can run, such as ``(13, 0)``.
    devices : tuple of str
        Name and compute capability of each GPU.
    """

    cuda: tuple[int, int]
    devices: tuple[str, ...]


def run() -> int:
    """Print what is installed, what it will be used for and what is missing.

    Returns
    -------
    int
        Exit status, 0.
    """
    console = Console()
    driver = find_driver()
    cupy = _find_cupy()
    console.print(_versions(cupy))
    console.print(_devices(driver))
    console.print(_tiers())
    for line in missing_for_gpu(driver, cupy):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def find_driver() -> Driver | None:
    """Ask the NVIDIA driver for its GPUs; None where there is no driver or it does not answer."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda: Any = ctypes.CDLL(name)
        version, count = ctypes.c_int(), ctypes.c_int()
        if cuda.cuDriverGetVersion(ctypes.byref(version)):
            return None
        devices = []
        # Initialising fails where a driver is installed but no GPU is to be seen.
        if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0:
            devices = [_describe_device(cuda, number) for number in range(count.value)]
    except (OSError, AttributeError):
        return None
    return Driver((version.value // 1000, version.value % 1000 // 10), tuple(devices))


def missing_for_gpu(driver: Driver | None, cupy: str | None) -> list[str]:
    """Return a line for each thing that stands between this installation and a GPU."""
    lines = [
        "This version has no CUDA kernels yet: everything is computed on the CPU, with or "
        "without a GPU."
    ]
    if driver is None:
        lines.append("No NVIDIA driver found.")
    elif not driver.devices:
        lines.append("An NVIDIA driver is installed but shows no GPU.")
    if cupy is None:
        extra = "cuda13x" if driver is None or driver.cuda >= (13, 0) else "cuda12x"
        other = " (cuda12x for a driver of CUDA 12)" if driver is None else ""
        lines.append(f"CuPy is not installed: pip install 'cce-cupy[{extra}]'{other}.")
    return lines


def _describe_device(cuda: Any, number: int) -> str:
    device = ctypes.c_int()
    name = ctypes.create_string_buffer(128)
    cuda.cuDeviceGet(ctypes.byref(device), number)
    cuda.cuDeviceGetName(name, len(name), device)
    capability = []
    for attribute in _COMPUTE_CAPABILITY:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(str(value.value))
    label = name.value.decode(errors="replace")
    return f"{label}, compute capability {'.'.join(capability)}"


def _find_cupy() -> str | None:
    for package in CUPY_PACKAGES:
        if version := _version(package):
            return f"{version} ({package})"
    return None


def _version(package: str) -> str | None:
    # From the package's metadata: importing torch or JAX takes seconds and can fail.
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _blas() -> str:
    try:
        blas: Any = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return f"{blas['name']} {blas['version']}"
    except (KeyError, TypeError):
        return "unknown BLAS"


def _versions(cupy: str | None) -> Table:
    table = Table(title="Versions", title_justify="left", show_header=False)
    table.add_row("cce_cupy", VERSION)
    table.add_row("Python", f"{platform.python_version()} ({platform.python_implementation()})")
    table.add_row("NumPy", f"{np.__version__}, {_blas()}")
    for package in SHOWN_PACKAGES:
        table.add_row(package, _version(package) or "not installed")
    table.add_row("CuPy", cupy or "not installed")
    return table


def _devices(driver: Driver | None) -> Table:
    table = Table(title="Devices", title_justify="left", show_header=False)
    processors = os.cpu_count() or 1
    usable = processors
    if hasattr(os, "sched_getaffinity"):
        usable = len(os.sched_getaffinity(0))
    table.add_row("cpu", f"{platform.machine()}, {usable} of {processors} processors usable")
    for number, device in enumerate(driver.devices if driver else ()):
        table.add_row(f"cuda:{number}", device)
    if driver:
        table.add_row("NVIDIA driver", f"CUDA {driver.cuda[0]}.{driver.cuda[1]}")
    return table


def _tiers() -> Table:
    table = Table(
        title="Tier by dtype",
        title_justify="left",
        caption=f"At N = {EXAMPLE['tokens']:,}, D = {EXAMPLE['dim']:,}, "
        f"V = {EXAMPLE['vocab']:,}, default options.",
        caption_justify="left",
    )
    for heading in ("dtype", "tier", "gradient filter", "workspace"):
        table.add_column(heading)
    for dtype in FLOAT_DTYPES:
        tokens, dim, vocab = EXAMPLE["tokens"], EXAMPLE["dim"], EXAMPLE["vocab"]
        problem = Problem.check(
            {
                "e": ArraySpec((tokens, dim), dtype),
                "c": ArraySpec((vocab, dim), dtype),
                "targets": ArraySpec((tokens,), "int64"),
            },
            Options(),
        )
        plan = make_plan(problem)
        chosen = plan.gradient_filter
        shown = "off" if chosen is None else f"{chosen}, eps {plan.filter_eps:.1e}"
        table.add_row(dtype, plan.tier, shown, f"{plan.workspace_bytes / 2**20:.0f} MiB")
    return table
