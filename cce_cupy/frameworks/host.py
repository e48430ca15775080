"""The road of arrays in host memory, of any framework, through the CPU backend."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ..cpu import tokens
from ..cpu.backward import ALL, HostGradients, backward
from ..cpu.call import Call, Progress
from ..cpu.columns import new_bits, seed_from_targets
from ..cpu.forward import Forward, forward
from ..cpu.tokens import Arrays
from ..plan import Plan
from ..problem import Problem, check_target_values, check_weight_values

__all__ = ["Arrays", "HostCall", "HostGradients", "Progress"]

Array = npt.NDArray[Any]


class HostCall:
    """One call on NumPy arrays: checks values, runs the backend and shapes what it returns.

    Parameters
    ----------
    problem : Problem
    plan : Plan
    arrays : Arrays
    progress : callable, optional
        ``progress(stage, done, total)``.

    Raises
    ------
    ValueError
        For a target out of range or a weight that is negative or not finite.
    """

    def __init__(
        self,
        problem: Problem,
        plan: Plan,
        arrays: Arrays,
        progress: Progress | None = None,
    ) -> None:
        check_target_values(arrays.targets, problem.vocab, problem.ignore_index)
        if arrays.class_weight is not None:
            check_weight_values("class_weight", arrays.class_weight)
        if arrays.token_weight is not None:
            check_weight_values("token_weight", arrays.token_weight)
        self.problem = problem
        rows = tokens.select_rows(arrays.targets, problem.shift, problem.ignore_index)
        classes = tokens.describe_classes(problem, arrays)
        seed = problem.seed
        if seed is None:
            seed = seed_from_targets(rows.target) if plan.gradient_filter == "unbiased" else 0
        self.call = Call(problem, plan, arrays, rows, classes, seed, progress)
        self.weights = tokens.row_weights(arrays, rows, classes)
        self.normalizer = tokens.normalizer(problem.reduction, self.weights)
        self._forward: Forward | None = None

    def run_forward(
        self, *, keep_columns: bool, statistics: bool = False, once: bool = False
    ) -> None:
        """Compute what everything else is made of; with `once` for one pullback at most."""
        self._forward = forward(
            self.call, keep_columns=keep_columns, statistics=statistics, store=once
        )

    def save(self, room: Array) -> None:
        """Leave what a pullback needs of the forward in bytes: 8 for each token, then the bits."""
        lse, bits = self._rooms(room)
        lse[...] = self.saved.lse
        if bits is not None:
            bits[...] = self.saved.bits

    def resume(self, room: Array) -> None:
        """Take what `save` left, in place of a forward; only a pullback can follow."""
        lse, bits = self._rooms(room)
        self._forward = Forward(lse, lse, lse, bits, None, None)

    def _rooms(self, room: Array) -> tuple[Array, Array | None]:
        rows, start = len(self.call.rows), 8 * self.problem.tokens
        lse = room[: 8 * rows].view(np.float64)
        if self.call.plan.gradient_filter is None:
            return lse, None
        shape = new_bits(rows, self.problem.vocab).shape
        return lse, room[start : start + math.prod(shape)].reshape(shape)

    @property
    def saved(self) -> Forward:
        """What the forward left."""
        assert self._forward is not None
        return self._forward

    def loss(self) -> Array:
        """Return the reduced loss."""
        saved = self.saved
        with np.errstate(all="ignore"):
            losses = tokens.token_losses(
                self.problem,
                self.weights,
                self.call.classes,
                saved.nll,
                saved.lse,
                saved.smoothed_logit,
            )
            if self.problem.reduction == "none":
                return self._at_targets(losses, self.call.dtype)
            return np.asarray(losses.sum() * self.normalizer, self.call.dtype)

    def lse(self) -> Array:
        """Return lse in the shape of the targets, 0 at ignored tokens."""
        return self._at_targets(self.saved.lse, self.call.dtype)

    def statistics(self) -> tuple[Array, Array, Array, Array]:
        """Return log_prob, lse, entropy and argmax in the shape of the targets."""
        saved = self.saved
        assert saved.entropy is not None
        assert saved.argmax is not None
        return (
            self._at_targets(0.0 - saved.nll, self.call.dtype),
            self.lse(),
            self._at_targets(saved.entropy, self.call.dtype),
            self._at_targets(saved.argmax, np.dtype(np.int64), ignored=-1),
        )

    def pullback(
        self, dloss: Array, dlse: Array | None, wanted: frozenset[str] = ALL
    ) -> HostGradients:
        """Return the wanted gradients for upstream gradients of the loss and of lse."""
        at = self.call.rows.position
        with np.errstate(all="ignore"):
            upstream = np.broadcast_to(dloss.astype(np.float64), self.problem.batch_shape)
            factors = tokens.row_factors(
                self.problem,
                self.weights,
                self.call.classes,
                self.saved.lse,
                upstream.reshape(-1)[at] * self.normalizer,
                None if dlse is None else dlse.reshape(-1)[at].astype(np.float64),
            )
        saved = self.saved
        # Stored logits are gone afterwards: what they lie in becomes dC.
        self._forward = dataclasses.replace(saved, stored=None)
        return backward(self.call, saved, factors, wanted)

    def _at_targets(self, values: Array, dtype: np.dtype[Any], ignored: int = 0) -> Array:
        placed = np.full(self.problem.batch_shape, ignored, dtype)
        with np.errstate(all="ignore"):
            placed.reshape(-1)[self.call.rows.position] = values
        return placed
