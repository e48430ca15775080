"""One call on the host: what its forward and its backward share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..plan import ROW_TILE, Plan
from ..problem import Problem
from .memory import Array, as_sums, take_rows
from .tokens import Arrays, Classes, Rows

ELEMENTWISE_ROWS = 2 * ROW_TILE
"""Rows that elementwise work takes at a time, while they are in cache."""

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, the units of work done and their total."""


@dataclass(frozen=True)
class Call:
    """The inputs that forward and backward share."""

    problem: Problem
    plan: Plan
    arrays: Arrays
    rows: Rows
    classes: Classes
    seed: int
    progress: Progress | None = None

    def embeddings(self, first: int, last: int) -> Array:
        """Return compact rows of e in the dtype of the sums."""
        return as_sums(take_rows(self.arrays.e, self.rows.source[first:last]), self.dtype)

    def classifier(self, columns: slice | Array) -> Array:
        """Return rows of c in the dtype of the sums; those of removed entries as zeros.

        A removed entry is often padding that was never initialised, and zero times NaN is NaN.
        """
        chosen = as_sums(self.arrays.c[columns], self.dtype)
        if self.classes.removed is not None:
            removed = self.classes.removed[columns]
            if removed.any():
                chosen = np.where(removed[:, None], chosen.dtype.type(0), chosen)
        return chosen

    def logits(self, product: Array, columns: slice | Array) -> None:
        """Turn ``e . c`` into logits in place."""
        problem = self.problem
        if problem.logit_scale != 1.0:
            product *= problem.logit_scale
        if self.classes.bias is not None:
            product += self.classes.bias[columns]
        if problem.softcap is not None:
            # tanh would turn an infinity into a number; it must come out as NaN.
            poison = product * product.dtype.type(0)
            product /= problem.softcap
            np.tanh(product, out=product)
            product *= problem.softcap
            product += poison

    def products(self, first: int, last: int) -> list[tuple[int, int]]:
        """Cut rows of a dense group where stored rows end, stored or not.

        BLAS may sum in another order where it is given more rows.
        """
        split = min(max(self.plan.stored_rows, first), last)
        return [span for span in ((first, split), (split, last)) if span[0] < span[1]]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the sums."""
        return np.dtype(self.problem.accumulator)

    def report(self, stage: str, done: int, total: int) -> None:
        """Tell whoever asked for it how far a stage has come."""
        if self.progress is not None:
            self.progress(stage, done, total)


class Stored(NamedTuple):
    """What the forward formed of the first rows, in memory that becomes dC later.

    The exponentials exp(z - reference), 0 at the targets; the logits where there is a softcap,
    whose slope needs them. The two fit into one another column by column: dC of a range of
    columns is as large as they are for as many rows as dC is wide.
    """

    memory: Array
    rows: int

    def block(self, left: int, right: int) -> Array:
        """Return the part of a range of columns, of shape (rows, columns)."""
        width = right - left
        return self.memory[left:right].reshape(-1)[: self.rows * width].reshape(self.rows, width)


def spans(first: int, last: int, size: int) -> list[tuple[int, int]]:
    """Cut [first, last) into pieces of a size."""
    return [(start, min(start + size, last)) for start in range(first, last, size)]
