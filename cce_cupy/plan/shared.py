"""What the plans of all tiers share: the column plan's constants, the filter, the sweeps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

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


class Wanted(NamedTuple):
    """The gradients that a backward is asked for."""

    e: bool = True
    c: bool = True
    bias: bool = True

    @classmethod
    def of(cls, names: Collection[str]) -> Wanted:
        """Return those of the named arguments."""
        return cls(*(name in names for name in cls._fields))


EVERY_GRADIENT = Wanted()


class Filter(NamedTuple):
    """The filter in force: None, of eps 0.0, for none; the gradients that it filters; and why."""

    kind: str | None
    eps: float
    e: bool
    c: bool
    reason: str


def choose_filter(problem: Problem) -> Filter:
    """Return the filter in force, after ``filter_eps`` and the options that rule a filter out."""

    def off(reason: str) -> Filter:
        return Filter(None, 0.0, False, False, f"off: {reason}")

    sides = problem.filter_e_grad, problem.filter_c_grad
    if problem.gradient_filter is None:
        return off("gradient_filter=None")
    if problem.filter_eps == 0.0:
        return off("filter_eps is None or 0")
    if problem.softcap is not None and problem.label_smoothing > 0.0:
        return off("with softcap, label smoothing reaches every column and is not of rank one")
    if not any(sides):
        return off("filter_e_grad and filter_c_grad are False")
    if problem.filter_eps is not None:
        return Filter(problem.gradient_filter, problem.filter_eps, *sides, "filter_eps as given")
    scale = _AUTO_EPS.get((problem.gradient_filter, problem.dtype))
    if scale is None:
        return off(f"filter_eps='auto' does not filter {problem.dtype}")
    eps = min(scale / max(problem.vocab, 1), LARGEST_AUTO_EPS)
    reason = "filter_eps='auto': near the rounding of the dtype"
    return Filter(problem.gradient_filter, eps, *sides, reason)


def choose_sweeps(chosen: Filter, *, together: bool) -> tuple[Sweep, ...]:
    """Return one sweep for both gradients, or one for each."""
    if together:
        return (Sweep(True, True, chosen.e),)
    return (Sweep(True, False, chosen.e), Sweep(False, True, chosen.c))


def needed_sweeps(sweeps: tuple[Sweep, ...], wanted: Wanted) -> tuple[Sweep, ...]:
    """Return what is left of a plan's sweeps where some gradients are not wanted."""
    by_columns = wanted.c or wanted.bias
    left = (Sweep(s.e and wanted.e, s.c and by_columns, s.filtered) for s in sweeps)
    return tuple(sweep for sweep in left if sweep.e or sweep.c)


def whole(size: int, unit: int) -> int:
    """Round a size up to whole units, and to one unit at least."""
    return max(-(-size // unit), 1) * unit
