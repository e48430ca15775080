"""``cce-cupy info``: versions, devices, and which tier would serve each dtype."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..plan import GpuDevice, make_gpu_plan, make_plan
from ..problem import FLOAT_DTYPES, ArraySpec, Options, Problem
from ..version import VERSION

CUPY_PACKAGES = {"cupy-cuda13x": 13, "cupy-cuda12x": 12, "cupy": None}
"""With the CUDA version each is for; one built from source does not say."""

NVRTC_PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
OLDEST_CUPY = (14, 2)
OLDEST_CAPABILITY = (7, 5)

SHOWN_PACKAGES = ("ml_dtypes", "torch", "jax", "jaxlib")

EXAMPLE = {"tokens": 8192, "dim": 2048, "vocab": 131072}
"""Sizes for which the plan is shown."""

_NVRTC_FILE = re.compile(r"(?:libnvrtc\.so\.|nvrtc64_)(1\d)")
_TOOLKIT_VARIABLES = ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX")

_COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name and compute capability, such as ``(9, 0)``."""

    name: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class Driver:
    """What the NVIDIA driver says.

    Attributes
    ----------
    cuda : tuple of int
        The newest CUDA version it can run, such as ``(13, 0)``.
    devices : tuple of Gpu
    """

    cuda: tuple[int, int]
    devices: tuple[Gpu, ...]


@dataclass(frozen=True)
class Cupy:
    """An installed CuPy.

    Attributes
    ----------
    package : str
        The name it was installed by.
    version : str
    cuda : int or None
        The CUDA version it is for, 12 or 13, where its package says so.
    """

    package: str
    version: str
    cuda: int | None


def run() -> int:
    """Print what is installed, what it will be used for and what is missing.

    Returns
    -------
    int
        Exit status, 0.
    """
    console = Console()
    driver = find_driver()
    cupy = find_cupy()
    nvrtc = find_nvrtc(cupy.cuda if cupy else _newest_cuda(driver))
    console.print(_versions(cupy, nvrtc))
    console.print(_devices(driver))
    console.print(_tiers(driver))
    lines = missing_for_gpu(driver, cupy, nvrtc)
    if lines:
        lines = ["Missing for arrays on a GPU:", *(f"- {line}" for line in lines)]
    else:
        lines = [
            "Nothing is missing for arrays on a GPU. Its kernels are compiled at the first call "
            "that needs them, or beforehand by: cce-cupy warmup"
        ]
    for line in lines:
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


def find_cupy() -> Cupy | None:
    """Return the CuPy that is installed."""
    for package, cuda in CUPY_PACKAGES.items():
        if version := _version(package):
            return Cupy(package, version, cuda)
    return None


def find_nvrtc(cuda: int | None) -> str | None:
    """Return where the compiler of the kernels is, of a CUDA version or of any; None for nowhere.

    Looks at what pip has installed, at toolkits that the environment names, and where the
    system's loader does.
    """
    return next((place for major, place in _nvrtcs() if cuda in (None, major)), None)


def missing_for_gpu(driver: Driver | None, cupy: Cupy | None, nvrtc: str | None) -> list[str]:
    """Return a line for each thing that stands between this installation and a GPU."""
    lines = []
    extra = f"cuda{_newest_cuda(driver)}x"
    if driver is None:
        lines.append("No NVIDIA driver found.")
    elif not driver.devices:
        lines.append("An NVIDIA driver is installed but shows no GPU.")
    else:
        lines += [
            f"cuda:{number} is of compute capability {_dotted(gpu.capability)}: the kernels need "
            f"{_dotted(OLDEST_CAPABILITY)} or newer."
            for number, gpu in enumerate(driver.devices)
            if gpu.capability < OLDEST_CAPABILITY
        ]
    if cupy is None:
        other = " (cuda12x for a driver of CUDA 12)" if driver is None else ""
        lines.append(f"CuPy is not installed: pip install 'cce-cupy[{extra}]'{other}.")
    else:
        numbers = re.findall(r"\d+", cupy.version)[:2]
        if tuple(int(number) for number in numbers) < OLDEST_CUPY:
            lines.append(
                f"CuPy {cupy.version} is older than {_dotted(OLDEST_CUPY)}: "
                f"pip install '{cupy.package}>={_dotted(OLDEST_CUPY)}'."
            )
        if driver is not None and cupy.cuda is not None and cupy.cuda > driver.cuda[0]:
            lines.append(
                f"{cupy.package} needs a driver of CUDA {cupy.cuda}, this one is of CUDA "
                f"{_dotted(driver.cuda)}: put a newer driver there, or pip uninstall "
                f"{cupy.package} and pip install 'cce-cupy[{extra}]'."
            )
    if nvrtc is None:
        package = f"cupy-{extra}" if cupy is None else cupy.package
        version = "" if cupy is None or cupy.cuda is None else f" of CUDA {cupy.cuda}"
        lines.append(
            f"NVRTC{version}, which compiles the kernels, was not found: it comes with the CUDA "
            f"toolkit or pip install '{package}[ctk]'."
        )
    return lines


def _describe_device(cuda: Any, number: int) -> Gpu:
    device = ctypes.c_int()
    name = ctypes.create_string_buffer(128)
    cuda.cuDeviceGet(ctypes.byref(device), number)
    cuda.cuDeviceGetName(name, len(name), device)
    major, minor = ctypes.c_int(), ctypes.c_int()
    for value, attribute in zip((major, minor), _COMPUTE_CAPABILITY, strict=True):
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return Gpu(name.value.decode(errors="replace"), (major.value, minor.value))


def _nvrtcs() -> Iterator[tuple[int, str]]:
    """Yield the CUDA version and the place of every NVRTC in sight."""
    for package in NVRTC_PACKAGES:
        if version := _version(package):
            yield int(version.partition(".")[0]), f"{version} ({package})"
    for variable in _TOOLKIT_VARIABLES:
        root = os.environ.get(variable)
        for folder in ("lib64", "lib", "bin") if root else ():
            for path in sorted(Path(str(root), folder).glob("*nvrtc*")):
                if found := _NVRTC_FILE.match(path.name):
                    yield int(found[1]), str(path)
    library = ctypes.util.find_library("nvrtc") or ""
    if found := _NVRTC_FILE.match(Path(library).name):
        yield int(found[1]), library


def _newest_cuda(driver: Driver | None) -> int:
    """Return the newest CUDA version that CuPy has a package for and the driver can run."""
    return 13 if driver is None or driver.cuda >= (13, 0) else 12


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


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


def _versions(cupy: Cupy | None, nvrtc: str | None) -> Table:
    table = Table(title="Versions", title_justify="left", show_header=False)
    table.add_row("cce_cupy", VERSION)
    table.add_row("Python", f"{platform.python_version()} ({platform.python_implementation()})")
    table.add_row("NumPy", f"{np.__version__}, {_blas()}")
    for package in SHOWN_PACKAGES:
        table.add_row(package, _version(package) or "not installed")
    table.add_row("CuPy", f"{cupy.version} ({cupy.package})" if cupy else "not installed")
    table.add_row("NVRTC", nvrtc or "not found")
    return table


def _devices(driver: Driver | None) -> Table:
    table = Table(title="Devices", title_justify="left", show_header=False)
    processors = os.cpu_count() or 1
    usable = processors
    if hasattr(os, "sched_getaffinity"):
        usable = len(os.sched_getaffinity(0))
    table.add_row("cpu", f"{platform.machine()}, {usable} of {processors} processors usable")
    for number, device in enumerate(driver.devices if driver else ()):
        capability = _dotted(device.capability)
        table.add_row(f"cuda:{number}", f"{device.name}, compute capability {capability}")
    if driver:
        table.add_row("NVIDIA driver", f"CUDA {_dotted(driver.cuda)}")
    return table


def _tiers(driver: Driver | None) -> Table:
    # Of the first GPU, or of none; the number of processors does not change the tier.
    capability = driver.devices[0].capability if driver and driver.devices else (0, 0)
    device = GpuDevice(1, capability)
    table = Table(
        title="Tier by dtype",
        title_justify="left",
        caption=f"At N = {EXAMPLE['tokens']:,}, D = {EXAMPLE['dim']:,}, "
        f"V = {EXAMPLE['vocab']:,}, default options. sm90 is the kernels for "
        "compute capability 9.0, where rows of e and c start at multiples of 16 bytes; the "
        "backward is portable where the workspace is too small for theirs.",
        caption_justify="left",
    )
    for heading in ("dtype", "CPU", "GPU", "gradient filter", "workspace, CPU"):
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
        on_gpu = make_gpu_plan(problem, device)
        workspace = f"{plan.workspace_bytes / 2**20:.0f} MiB"
        table.add_row(dtype, plan.tier, on_gpu.tier, shown, workspace)
    return table
