"""The house: which module may import what, read from the sources' own imports.

Imports run one way,

    {__init__, distributed} -> api -> frameworks -> {launcher, cpu}
        -> {compiler, recording, tensor_map, plan} -> problem

and each foreign framework is imported in one place only.
"""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import cce_cupy

PACKAGE = Path(cce_cupy.__file__).parent
KERNELS = PACKAGE.parent / "kernels_cu"


class Room(NamedTuple):
    """What a module may import: modules of ours, and packages besides those of `EVERYWHERE`."""

    ours: str = ""
    foreign: str = ""


EVERYWHERE = {"numpy", "ml_dtypes", *sys.stdlib_module_names}

# One row a module. A row ending in ".*" is one room for a whole folder: all of its modules may
# import each other, and those without a row of their own what the row says. Under ours, a folder's
# name stands for all of its modules. All imports count: at the top of a file, in a function, and
# those for type checkers only.
HOUSE = {
    "version": Room(),
    "problem": Room(),
    "driver": Room(),
    "signatures": Room("driver"),
    "tensor_map": Room("driver"),
    "plan.*": Room("problem"),
    "compiler": Room("problem signatures", foreign="cupy"),
    "cpu.*": Room("plan problem", foreign="threadpoolctl"),
    "recording": Room("driver tensor_map"),
    "launcher": Room(
        "compiler driver recording signatures tensor_map plan problem", foreign="cupy"
    ),
    "hopper_launcher": Room("launcher plan tensor_map"),
    "frameworks.xla_ffi": Room(),
    "frameworks.host": Room("cpu plan problem"),
    "frameworks.gpu": Room("hopper_launcher launcher recording plan problem"),
    "frameworks.framework": Room("frameworks.host frameworks.gpu plan problem"),
    "frameworks.numpy": Room("frameworks.framework problem"),
    "frameworks.cupy": Room(
        "frameworks.framework frameworks.gpu compiler plan problem", foreign="cupy"
    ),
    "frameworks.dlpack": Room("frameworks.framework frameworks.cupy plan problem"),
    "frameworks.torch": Room("frameworks.framework frameworks.gpu plan problem", foreign="torch"),
    "frameworks.torch_autograd": Room(
        "frameworks.torch frameworks.framework frameworks.gpu frameworks.host plan problem",
        foreign="torch",
    ),
    "frameworks.xla_call": Room("frameworks.xla_ffi plan problem"),
    "frameworks.xla_host": Room(
        "frameworks.host frameworks.xla_call frameworks.xla_ffi plan problem"
    ),
    "frameworks.xla_cuda": Room(
        "frameworks.cupy frameworks.gpu frameworks.xla_call frameworks.xla_ffi compiler plan "
        "problem"
    ),
    "frameworks.jax_primitives": Room(
        "frameworks.xla_call frameworks.xla_cuda frameworks.xla_ffi frameworks.xla_host problem",
        foreign="jax",
    ),
    "frameworks.jax": Room(
        "frameworks.framework frameworks.host frameworks.jax_primitives plan problem", foreign="jax"
    ),
    "frameworks": Room(
        "frameworks.framework frameworks.numpy frameworks.dlpack frameworks.cupy "
        "frameworks.torch_autograd frameworks.jax"
    ),
    "api": Room("frameworks plan problem"),
    "distributed": Room("api problem"),
    "__init__": Room("api version"),
    "torch": Room("api frameworks.torch_autograd problem", foreign="torch"),
    "transformers": Room("api", foreign="torch transformers peft"),
    "commands.*": Room("__init__ api frameworks plan problem version", "rich safetensors"),
    "commands.corpus": Room(foreign="tokenizers"),
    "commands.warmup": Room("compiler", foreign="rich"),
    "commands.bench": Room("api compiler plan problem", foreign="rich"),
    "commands.picture": Room(foreign="matplotlib"),
    "__main__": Room("commands api frameworks plan problem version", "rich safetensors"),
}


def row_of(module: str) -> str | None:
    """Return the row of `HOUSE` that speaks for a module ("cpu" being ``cpu/__init__.py``)."""
    folder = module.partition(".")[0]
    return next((row for row in (module, f"{folder}.*") if row in HOUSE), None)


def imported(source: str, module: str, is_folder: bool) -> Iterator[tuple[int, str]]:
    """Yield line and absolute dotted name of everything a source imports.

    ``from a import b`` yields ``a.b``: only the reader of the name can tell whether b is a module.
    """
    here = ["cce_cupy", *module.split(".")] if module != "__init__" else ["cce_cupy"]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + is_folder] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else None
            name = node.func.id if isinstance(node.func, ast.Name) else name
            if name in ("import_module", "__import__"):
                constant = node.args and isinstance(node.args[0], ast.Constant)
                yield node.lineno, str(node.args[0].value) if constant else "a computed name"


def complaints(sources: dict[str, str]) -> list[str]:
    """Check sources, by module name ("api", "cpu.__init__", "frameworks.torch") against `HOUSE`."""
    found = []
    modules = {name.removesuffix(".__init__") for name in sources}
    for name, source in sources.items():
        module = name.removesuffix(".__init__")
        row = row_of(module)
        if row is None:
            found.append(
                f"{module} has no row in HOUSE: add one on purpose, saying what it may use"
            )
            continue
        room, folder = HOUSE[row], module.partition(".")[0]
        is_folder = name.endswith("__init__")
        for line, full in imported(source, module, is_folder):
            top, _, rest = full.partition(".")
            if top != "cce_cupy":
                if top not in EVERYWHERE and top not in room.foreign.split():
                    found.append(f"{module}, line {line}: may not import {full}")
                continue
            # Of "cpu.call.forward", the part that is a module; else it is a public name.
            parts = rest.split(".")
            names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
            target = next((name for name in names if name in modules), "__init__")
            allowed = {target, target.partition(".")[0]} & set(room.ours.split())
            roommate = f"{folder}.*" in HOUSE and target.partition(".")[0] == folder
            if not (allowed or roommate):
                found.append(f"{module}, line {line}: may not import {target} of ours")
    return found


def sources() -> dict[str, str]:
    """Return the package's sources by module name."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text()
        for path in PACKAGE.rglob("*.py")
    }


def test_imports_run_one_way() -> None:
    found = sources()
    assert {"__init__", "api", "problem", "frameworks.numpy"} <= found.keys()
    assert complaints(found) == []


def test_the_table_itself_runs_one_way() -> None:
    graph = {}
    for row, room in HOUSE.items():
        meant = [
            {other for other in HOUSE if other == name or other.startswith(f"{name}.")} - {row}
            for name in room.ours.split()
        ]
        assert all(meant), f"{row} may import a module that has no row"
        graph[row] = set().union(*meant)
    order = list(TopologicalSorter(graph).static_order())  # raises for a cycle
    assert order[-1] == "__main__"


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("problem", "from .plan import Plan", "may not import plan"),
        ("problem", "def f():\n    from . import plan", "line 2: may not import plan"),
        ("plan", "from cce_cupy.api import token_statistics", "may not import api"),
        ("plan", "import cce_cupy", "may not import __init__"),
        ("plan", "from cce_cupy import token_statistics", "may not import __init__"),
        ("tensor_map", "from . import problem", "may not import problem"),
        ("version", "from .problem import Problem", "may not import problem"),
        ("cpu.forward", "from ..frameworks import numpy", "may not import frameworks.numpy"),
        ("cpu.forward", "from ..frameworks.numpy import f", "may not import frameworks.numpy"),
        ("cpu.forward", "import cupy", "may not import cupy"),
        ("cpu.forward", "from scipy.special import logsumexp", "may not import scipy"),
        ("api", "import torch", "may not import torch"),
        ("api", "from jax import numpy", "may not import jax"),
        ("api", "if TYPE_CHECKING:\n    import torch.nn", "line 2: may not import torch.nn"),
        ("api", "import importlib\nimportlib.import_module('torch')", "may not import torch"),
        ("api", "__import__(name)", "may not import a computed name"),
        ("api", "from .cpu import forward", "may not import cpu.forward"),
        ("torch", "from .cpu import forward", "may not import cpu.forward"),
        ("frameworks.numpy", "import torch", "may not import torch"),
        ("frameworks.torch", "from jax import dlpack", "may not import jax"),
        ("frameworks.torch", "from ..api import f", "may not import api"),
        ("frameworks.xla_ffi", "from .numpy import f", "may not import frameworks.numpy"),
        ("frameworks.xla_ffi", "from .. import problem", "may not import problem"),
        ("frameworks.tensorflow", "", "frameworks.tensorflow has no row in HOUSE"),
        ("launcher", "from .cpu import forward", "may not import cpu.forward"),
        ("__init__", "from .commands import demo", "may not import commands.demo"),
        ("commands.info", "import tokenizers", "may not import tokenizers"),
        ("commands.demo", "import matplotlib", "may not import matplotlib"),
        ("commands.demo", "import torch", "may not import torch"),
        ("commands.demo", "from ..cpu import forward", "may not import cpu.forward"),
        ("utils", "import math", "utils has no row in HOUSE: add one on purpose"),
    ],
)
def test_the_checker_can_fail(module: str, source: str, complaint: str) -> None:
    names = (
        "__init__ api problem plan cpu.forward frameworks.numpy frameworks.framework commands.demo"
    )
    found = complaints({**dict.fromkeys(names.split(), ""), module: source})
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("__init__", "from .api import token_statistics\nfrom .version import VERSION"),
        (
            "api",
            "from .frameworks.numpy import f\nfrom .problem import Problem\nimport numpy as np",
        ),
        ("frameworks.torch", "import torch\nfrom ..plan import f\nfrom . import framework"),
        ("frameworks.__init__", "from .numpy import f"),
        ("frameworks.jax", "import jax.numpy as jnp\nfrom . import framework\nimport ctypes"),
        ("cpu.__init__", "from .forward import f\nfrom ..plan import Plan"),
        ("cpu.forward", "import ml_dtypes\nfrom ..problem import Problem"),
        ("commands.corpus", "import tokenizers\nfrom .demo import f"),
        ("commands.picture", "from matplotlib.figure import Figure"),
        ("commands.info", "from rich.table import Table\nfrom cce_cupy import token_statistics"),
        ("commands.info", "from .demo import main\nfrom ..plan import make_plan"),
    ],
)
def test_the_checker_lets_the_rest_pass(module: str, source: str) -> None:
    names = (
        "__init__ api problem plan cpu.forward frameworks.numpy frameworks.framework "
        "commands.demo version"
    )
    assert complaints({**dict.fromkeys(names.split(), ""), module: source}) == []


def included_units(source: str) -> list[str]:
    """Return the ``.cu`` files that a CUDA source includes."""
    return re.findall(r'^\s*#\s*include\s*["<]([^">]*\.cu)[">]', source, re.MULTILINE)


def test_no_cu_file_is_included() -> None:
    """A ``.cu`` is a unit of compilation; what several need stands in a ``.cuh``."""
    assert included_units('# include "../logits.cu"\n#include <x.cu>') == ["../logits.cu", "x.cu"]
    assert included_units('#include "logits.cuh"\n// see forward.cu') == []
    for path in [*KERNELS.rglob("*.cu"), *KERNELS.rglob("*.cuh")]:
        assert included_units(path.read_text()) == [], path


def test_public_names() -> None:
    public = {
        "linear_cross_entropy",
        "linear_cross_entropy_value_and_grad",
        "linear_cross_entropy_vjp",
        "token_statistics",
        "filter_statistics",
        "FilterStatistics",
        "Gradients",
        "TokenStatistics",
    }
    assert set(cce_cupy.__all__) - {"__version__"} == public
    there = {
        name
        for name, value in vars(cce_cupy).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert there == public
    assert all(getattr(cce_cupy, name).__doc__ for name in public)


@pytest.fixture(scope="module")
def fresh_import() -> tuple[float, set[str]]:
    """Import the package in fresh processes: least seconds of five, and the modules loaded."""
    code = (
        "import sys, time; started = time.process_time(); import cce_cupy;"
        "seconds = time.process_time() - started; import json;"
        "print(json.dumps([seconds, sorted(sys.modules)]))"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]),
        "PYTHONDONTWRITEBYTECODE": "",  # what an installation has compiled need not be again
    }
    runs = []
    for _ in range(5):
        command = [sys.executable, "-c", code]
        output = subprocess.check_output(command, env=environment, text=True)
        runs.append(json.loads(output))
    # Processor time: tests that run at the same moment do not slow it down.
    return min(seconds for seconds, _ in runs), set(runs[0][1])


def test_import_is_quick(fresh_import: tuple[float, set[str]]) -> None:
    assert fresh_import[0] < 0.3


def test_import_is_light(fresh_import: tuple[float, set[str]]) -> None:
    heavy = ["cupy", "torch", "jax", "jaxlib", "matplotlib", "rich", "tokenizers", "safetensors"]
    assert "numpy" in fresh_import[1]
    assert fresh_import[1].isdisjoint(heavy)


@pytest.mark.skipif("CI" not in os.environ, reason="a developer may do without some of them")
@pytest.mark.parametrize("package", ["torch", "transformers", "peft", "jax", "array_api_strict"])
def test_nothing_is_skipped_in_ci(package: str) -> None:
    """Where all is meant to be installed, a test that skips for want of it would hide a hole."""
    assert importlib.util.find_spec(package)
