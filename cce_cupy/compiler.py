"""From the sources in kernels_cu to loaded kernels, compiled at run time for the device at hand."""

from __future__ import annotations

import functools
import hashlib
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

from .signatures import PARAMETERS

DTYPES = {"float64": 0, "float32": 1, "float16": 2, "bfloat16": 3}
"""CCE_DTYPE of kernels_cu/number.cuh."""

KERNELS = {file: tuple(kernels) for file, kernels in PARAMETERS.items()}
"""The kernels of each source file."""

_HOPPER_SHARED_BYTES = 231_424
_BACKWARD_SHARED_BYTES = 228_352


def shared_bytes(file: str, name: str) -> int:
    """Return the shared memory that a launch must ask for; 0 where a kernel declares its own."""
    if file.startswith("sm90/backward"):
        return _BACKWARD_SHARED_BYTES
    needs = file.startswith("sm90/") and name.startswith(("forward_", "dense_"))
    return _HOPPER_SHARED_BYTES if needs else 0


def serves(file: str, dtype: str, capability: tuple[int, int]) -> bool:
    """Tell whether a source file is compiled for a dtype and compute capability."""
    if file.startswith("sm90/"):
        return capability == (9, 0) and dtype in ("float16", "bfloat16")
    return True


def sources_root() -> Path:
    """Return the folder of the CUDA sources: the installed one, or the checkout's."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "kernels_cu", package.parent / "kernels_cu"):
        if (candidate / "number.cuh").is_file():
            return candidate
    raise FileNotFoundError(
        f"the CUDA sources are missing: no kernels_cu in {package} or beside it; "
        "install cce-cupy again"
    )


@functools.cache
def sources_hash() -> str:
    """Return a hash of all CUDA sources.

    It is part of the compile options: CuPy's cache on disk looks at the source it is given and at
    the options, not at the files that the source includes.
    """
    root = sources_root()
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.cu*")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_options(file: str, dtype: str) -> tuple[str, ...]:
    """Return the options of NVRTC for a source file and dtype.

    CuPy adds the architecture of the device, where they name none.
    """
    root = sources_root()
    # The matrix unit is not part of plain sm_90; this stands against CuPy's own choice, which is.
    target = ("-arch=sm_90a",) if file.startswith("sm90/") else ()
    return (
        *target,
        "-std=c++17",
        f"-DCCE_DTYPE={DTYPES[dtype]}",
        f"-DCCE_SOURCES=0x{sources_hash()}",
        f"-I{(root / file).parent}",
        f"-I{root}",
    )


def import_cupy() -> ModuleType:
    """Return CuPy, or say how to get it.

    Raises
    ------
    ImportError
        When CuPy is not installed or does not load.
    """
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            "arrays on a GPU need CuPy, which compiles and launches the kernels: "
            "pip install 'cce-cupy[cuda13x]' (or cuda12x, as the driver allows). "
            f"Python says: {error}"
        ) from error
    return cupy  # type: ignore[no-any-return]


class KernelError(RuntimeError):
    """A kernel did not compile; the message carries the compiler's log."""


_lock = threading.Lock()
_kernels: dict[tuple[int, str, str, str], Any] = {}


def kernel(device: int, file: str, name: str, dtype: str) -> Any:
    """Return a kernel, compiled and loaded on a device at the first request for it.

    Parameters
    ----------
    device : int
    file : str
        Such as ``"portable/forward.cu"``.
    name : str
        An ``extern "C"`` function of the file.
    dtype : str
        One of `DTYPES`.

    Raises
    ------
    KernelError
        When NVRTC is missing or refuses the source.
    """
    key = (device, file, name, dtype)
    found = _kernels.get(key)
    if found is not None:
        return found
    cupy = import_cupy()
    with _lock, cupy.cuda.Device(device):
        if key not in _kernels:
            try:
                module = cupy.RawModule(
                    code=(sources_root() / file).read_text(encoding="utf-8"),
                    options=compile_options(file, dtype),
                )
                function = module.get_function(name)
                # Resolving an attribute loads the kernel, which a graph capture must not do.
                _ = function.num_regs
                if shared := shared_bytes(file, name):
                    function.max_dynamic_shared_size_bytes = shared
            except cupy.cuda.compiler.CompileException as error:
                raise KernelError(f"{file} did not compile for {dtype}:\n{error}") from error
            except RuntimeError as error:
                raise KernelError(
                    f"{file} could not be compiled: {error}. NVRTC comes with the CUDA toolkit or "
                    "pip install 'cupy-cuda13x[ctk]'"
                ) from error
            _kernels[key] = function
        return _kernels[key]
