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


class StoredColumns(NamedTuple):
    """Exponentials of kept columns, and what they are relative to, in memory that becomes dC later.

    The part of dC of a column block is cut into a slot for each row tile. It is zero but for what
    is stored, and where too many columns are kept nothing is.
    """

    memory: Array
    block: int
    sizes: Array
    """Elements in use, int64 of shape (row tiles, column blocks)."""

    def slot(self, tile: int, left: int, right: int) -> Array:
        """Return the room of a row tile in the column block [left, right)."""
        room = self.memory[left:right].reshape(-1)
        size = len(room) // len(self.sizes)
        return room[tile * size : (tile + 1) * size]

    def put(self, tile: int, left: int, z: Array, reference: Array, keep: Array) -> None:
        """Store the kept columns of ``z = exp(logits - reference)``, as far as there is room."""
        rows, slot = len(z), self.slot(tile, left, left + z.shape[1])
        kept = np.flatnonzero(keep)
        size = rows * (len(kept) + 1)
        if size > len(slot):
            return
        slot[:rows] = reference
        np.take(z, kept, axis=1, out=slot[rows:size].reshape(rows, len(kept)), mode="clip")
        self.sizes[tile, left // self.block] = size

    def take(self, out: Array, tile: int, columns: tuple[int, int], reference: Array) -> bool:
        """Read all kept columns of a range, relative to another reference; False if one lacks."""
        blocks = spans(*columns, self.block)
        number, rows, at = columns[0] // self.block, len(out), 0
        if not self.sizes[tile, number : number + len(blocks)].all():
            return False
        for place, (left, right) in enumerate(blocks, number):
            stored = self.slot(tile, left, right)[: self.sizes[tile, place]].reshape(-1, rows)
            width = len(stored) - 1
            scale = np.exp(stored[0].astype(np.float64) - reference).astype(out.dtype)
            values = stored[1:].reshape(rows, width)
            np.multiply(values, scale[:, None], out=out[:, at : at + width])
            at += width
        return True

    def clear(self, left: int, right: int) -> None:
        """Make a range of the memory zero again."""
        for begin, end in spans(left, right, self.block):
            for tile, size in enumerate(self.sizes[:, begin // self.block]):
                self.slot(tile, begin, end)[:size] = 0


def spans(first: int, last: int, size: int) -> list[tuple[int, int]]:
    """Cut [first, last) into pieces of a size."""
    return [(start, min(start + size, last)) for start in range(first, last, size)]
