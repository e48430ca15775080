"""The wheel: what is in it, and that it finds its CUDA sources where it is installed."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cce_cupy
from cce_cupy.compiler import KERNELS, sources_hash, sources_root

ROOT = Path(cce_cupy.__file__).parent.parent

PARTS = ("cce_cupy", "kernels_cu", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy of the checkout, as building leaves files there; install it."""
    if not (ROOT / "setup.cfg").is_file():
        pytest.skip("needs a checkout")
    # Without them the wheel could only be built with access to a network.
    if not (importlib.util.find_spec("pip") and importlib.util.find_spec("setuptools")):
        pytest.skip("needs pip and setuptools: pip install 'cce-cupy[test]'")
    here = tmp_path_factory.mktemp("wheel")
    checkout, target = here / "checkout", here / "installed"
    checkout.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            skipped = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, checkout / part, ignore=skipped)
        else:
            shutil.copy(ROOT / part, checkout)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    build = ["wheel", *offline, "--no-build-isolation", "--wheel-dir", str(here), str(checkout)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = here.glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--target", str(target), str(wheel)], check=True)
    return target / "cce_cupy"


def test_every_module_is_in_the_wheel(installed: Path) -> None:
    package = ROOT / "cce_cupy"
    modules = {path.relative_to(package) for path in package.rglob("*.py")}
    assert modules <= {path.relative_to(installed) for path in installed.rglob("*.py")}
    assert (installed / "py.typed").is_file()


def test_every_cuda_source_is_in_the_wheel(installed: Path) -> None:
    sources = {path.relative_to(sources_root()) for path in sources_root().rglob("*.cu*")}
    assert {Path(file) for file in KERNELS} <= sources
    there = installed / "kernels_cu"
    assert {path.relative_to(there) for path in there.rglob("*.cu*")} == sources


def test_the_installation_finds_its_own_sources(installed: Path) -> None:
    code = (
        "from cce_cupy import compiler;"
        "print(compiler.sources_root(), compiler.sources_hash(), sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed.parent)}
    output = subprocess.check_output(
        [sys.executable, "-c", code], env=environment, cwd=installed.parent, text=True
    )
    assert output.splitlines() == [str(installed / "kernels_cu"), sources_hash()]
