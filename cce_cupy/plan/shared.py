"""What the plans of all tiers share: the column plan's constants, the filter, the sweeps."""

from __future__ import annotations

from dataclasses import dataclass

from ..problem import Problem

ROW_TILE = 128
"""Tokens that share one list of kept columns."""

COLUMN_CHUNK = 32
"""Columns that share one random threshold, and one word of the kept-column bitmask."""

MARGIN = 1e-2
"""Slack of the forward's test, in the exponent.

The backward recomputes a logit with another order of sums; no column that its exact test would
keep may be missing from the forward's bits because of that difference.
"""

DEFAULT_WORKSPACE_BYTES = 128 * 2**20

LARGEST_AUTO_EPS = 2.0**-8
"""A small vocabulary has little tail to drop, and 16 / V would start dropping what matters."""

_AUTO_EPS = {
    ("unbiased", "bfloat16"): 16.0,
    ("unbiased", "float16"): 2.0,
    ("threshold", "bfloat16"): 1.0,
    ("threshold", "float16"): 1.0 / 8.0,
}

ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Sweep:
    """One pass of the backward over rows and columns.

    Attributes
    ----------
    e, c : bool
        Which gradients the pass forms (that of the bias comes with c).
    filtered : bool
        Whether it works on the kept columns only.
    """

    e: bool
    c: bool
    filtered: bool


def choose_filter(problem: Problem) -> tuple[str | None, float, str]:
    """Return the filter in force, its eps, and why it is what it is, for people."""
    if problem.gradient_filter is None:
        return None, 0.0, "off: gradient_filter=None"
    if problem.filter_eps == 0.0:
        return None, 0.0, "off: filter_eps is None or 0"
    if problem.softcap is not None and problem.label_smoothing > 0.0:
        return (
            None,
            0.0,
            "off: with softcap, label smoothing reaches every column and is not of rank one",
        )
    if not (problem.filter_e_grad or problem.filter_c_grad):
        return None, 0.0, "off: filter_e_grad and filter_c_grad are False"
    if problem.filter_eps is not None:
        return problem.gradient_filter, problem.filter_eps, "filter_eps as given"
    scale = _AUTO_EPS.get((problem.gradient_filter, problem.dtype))
    if scale is None:
        return None, 0.0, f"off: filter_eps='auto' does not filter {problem.dtype}"
    eps = min(scale / max(problem.vocab, 1), LARGEST_AUTO_EPS)
    return problem.gradient_filter, eps, "filter_eps='auto': near the rounding of the dtype"


def choose_sweeps(filtered_e: bool, filtered_c: bool, *, together: bool) -> tuple[Sweep, ...]:
    """Return one sweep for both gradients, or one for each."""
    if together:
        return (Sweep(True, True, filtered_e),)
    return (Sweep(True, False, filtered_e), Sweep(False, True, filtered_c))


def whole(size: int, unit: int) -> int:
    """Round a size up to whole units, and to one unit at least."""
    return max(-(-size // unit), 1) * unit
