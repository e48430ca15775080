"""``cce-cupy loss FILE``: loss and gradients of the user's own arrays, in bounded memory."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from ..frameworks.numpy import NumpyFramework
from ..plan import make_plan
from ..problem import Options, Problem
from .arrays import Arrays, check_suffix, check_writable, read_arrays, write_arrays
from .errors import CommandError
from .progress import WorkProgress

REQUIRED = ("e", "c", "targets")
OPTIONAL = ("bias", "class_weight", "token_weight")

MIB = 2**20


def run(file: Path, out: Path | None, gradients: bool, options: Options) -> int:
    """Compute the loss of the arrays in a file, and write it with its gradients to another.

    Parameters
    ----------
    file : Path
        A .npz or .safetensors with ``e``, ``c`` and ``targets``, and where wanted ``bias``,
        ``class_weight`` and ``token_weight``.
    out : Path, optional
        Gets ``loss``, ``lse`` and with `gradients` ``grad_e``, ``grad_c`` and, where there is a
        bias, ``grad_bias``. By default FILE with ``.grad`` before its suffix.
    gradients : bool
    options : Options
        As for `cce_cupy.linear_cross_entropy`.

    Returns
    -------
    int
        Exit status, 0.

    Raises
    ------
    CommandError
        For files and arrays that cannot be used.
    """
    out = out or file.with_name(f"{file.stem}.grad{check_suffix(file)}")
    arrays, others = read_arrays(file, REQUIRED + OPTIONAL)
    check_writable(out, file)
    missing = [name for name in REQUIRED if name not in arrays]
    if missing:
        raise CommandError(
            f"{file} has no array named {' nor '.join(missing)}; it must hold e, c and targets "
            "and may hold bias, class_weight and token_weight; its other arrays: "
            + (", ".join(others) or "none")
        )
    try:
        results, seconds, peak, problem = _compute(arrays, gradients, options)
    except (TypeError, ValueError) as error:
        raise CommandError(f"{file}: {error}") from None
    write_arrays(out, results)
    console = Console()
    for label, value in _report(problem, arrays, results, seconds, peak):
        console.print(f"{label:<18} {value}", markup=False, highlight=False, soft_wrap=True)
    if others:
        console.print(
            f"{'not used':<18} {', '.join(others)}", markup=False, highlight=False, soft_wrap=True
        )
    console.print(f"{'written to':<18} {out}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _compute(
    arrays: Arrays, gradients: bool, options: Options
) -> tuple[Arrays, float, int, Problem]:
    framework = NumpyFramework()
    problem = Problem.check(
        {name: framework.describe(name, array) for name, array in arrays.items()}, options
    )
    plan = make_plan(problem)
    # NumPy reports its allocations to tracemalloc; these are few and large, so it costs nothing.
    tracemalloc.start()
    began = time.perf_counter()
    try:
        with WorkProgress() as progress:
            evaluation = framework.evaluate(
                problem,
                plan,
                arrays,
                differentiate=gradients,
                once=True,
                progress=progress.callback,
            )
            results = {"loss": evaluation.loss, "lse": evaluation.lse}
            if gradients:
                names = ("grad_e", "grad_c", "grad_bias")
                computed = dict(zip(names, evaluation.gradients(), strict=True))
                results |= {name: array for name, array in computed.items() if array is not None}
        seconds = time.perf_counter() - began
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return results, seconds, peak, problem


def _report(
    problem: Problem, arrays: Arrays, results: Arrays, seconds: float, peak: int
) -> list[tuple[str, str]]:
    """Return the lines of the report: label and value."""
    loss = results["loss"]
    if problem.reduction == "none":
        total = float(loss.sum(dtype=np.float64))
        value = f"one a token, in the file; their sum is {total:.9g}"
    else:
        value = f"{float(loss):.9g} ({problem.reduction})"
    written = sum(array.nbytes for array in results.values())
    return [
        ("loss", value),
        ("e, c", f"{arrays['e'].shape}, {arrays['c'].shape}, {problem.dtype}"),
        ("tokens", f"{problem.tokens:,}"),
        ("ignored", f"{_ignored(problem, arrays['targets']):,}"),
        ("time", f"{seconds:.2f} s"),
        ("peak extra memory", f"{peak / MIB:.1f} MiB, {written / MIB:.1f} MiB of it the results"),
    ]


def _ignored(problem: Problem, targets: npt.NDArray[Any]) -> int:
    """Count the tokens without a loss: ignored ones, and those that shift leaves unpaired."""
    paired = targets[..., problem.shift :] if problem.shift else targets
    return problem.tokens - int(np.count_nonzero(paired != problem.ignore_index))
