"""The examples of the documentation and of the README run as they stand there."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cce_cupy.api

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "examples"
GPU_EXAMPLES = sorted(FOLDER.glob("gpu_*.py"))  # run by tests/gpu/test_gpu_examples.py
EXAMPLES = sorted(set(FOLDER.glob("*.py")) - set(GPU_EXAMPLES))
LEARNING = (
    "quickstart_torch",
    "torch_compile",
    "torch_transformers",
    "quickstart_jax",
    "jax_optax",
    "gpu_torch",
    "gpu_jax",
)
PAGES = "".join(path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
README_BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)


def run(code: str, directory: Path, platform: str = "cpu") -> str:
    """Run Python code in a fresh interpreter, with JAX on a platform; return what it printed."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": platform}
    # The problems are small, and threads that wait for a shared core take longer than the work.
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path, tmp_path: Path) -> None:
    source = example.read_text("utf-8")
    for module in ("torch", "transformers", "jax", "optax"):
        if f"import {module}\n" in source:
            pytest.importorskip(module)
    check_printed(example, run(source, tmp_path))


def check_printed(example: Path, printed: str) -> None:
    """Check what an example printed, and that a model has learned where there is one."""
    assert printed
    if example.stem in LEARNING:
        losses = [float(loss) for loss in re.findall(r"step +\d+  loss (\S+)", printed)]
        assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("example", EXAMPLES + GPU_EXAMPLES, ids=lambda path: path.stem)
def test_example_is_shown(example: Path) -> None:
    assert f"{{literalinclude}} examples/{example.name}\n" in PAGES


def test_readme_example_runs(tmp_path: Path) -> None:
    assert README_BLOCKS
    for block in README_BLOCKS:
        assert run(block, tmp_path)


def test_docstring_examples() -> None:
    outcome = doctest.testmod(cce_cupy.api)
    assert outcome.attempted > 0
    assert outcome.failed == 0
