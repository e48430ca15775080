"""Every test in this folder needs an NVIDIA GPU and CuPy; elsewhere it is skipped with a reason."""

import os
from pathlib import Path

import pytest
from tolerances import Tolerances

# JAX would take three quarters of the device's memory at its first use; read when it starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

HERE = Path(__file__).parent


def missing():
    """Return what is missing here, in words; None where nothing is."""
    try:
        import cupy
    except ImportError as error:
        return f"needs CuPy: {error}"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"needs an NVIDIA GPU: {error}"
    return None if count else "needs an NVIDIA GPU"


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items):
    ours = [item for item in items if HERE in item.path.parents]
    reason = missing() if ours else None
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="session")
def kernels_of_the_device():
    """On Hopper the backward keeps dz in the inputs' dtype between its two products."""
    import cupy

    Tolerances.rounds_dz = cupy.cuda.Device().compute_capability == "90"
    yield
    Tolerances.rounds_dz = False


@pytest.fixture(autouse=True)
def first_device():
    """Begin each test on the first GPU: XLA leaves that current which it worked on last."""
    import cupy

    cupy.cuda.Device(0).use()


def pytest_report_header():
    if missing() is not None:
        return None
    import cupy

    runtime = cupy.cuda.runtime
    names = [
        runtime.getDeviceProperties(k)["name"].decode() for k in range(runtime.getDeviceCount())
    ]
    return (
        f"GPU: {', '.join(names)}; driver for CUDA {runtime.driverGetVersion()}, "
        f"runtime {runtime.runtimeGetVersion()}, CuPy {cupy.__version__}"
    )
