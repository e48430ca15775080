"""The road of arrays in host memory, of any framework, through the CPU backend."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from ..cpu import tokens
from ..cpu.backward import HostGradients, backward
from ..cpu.call import Call, Progress
from ..cpu.columns import seed_from_targets
from ..cpu.forward import Forward, Saved, forward
from ..cpu.tokens import Arrays
from ..plan import COLUMN_CHUNK, EVERY_GRADIENT, ROW_TILE, Plan, Wanted, bit_words
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
        self._forward: Saved | None = None

    def run_forward(
        self, *, keep_columns: bool, statistics: bool = False, once: bool = False
    ) -> None:
        """Compute what everything else is made of; with `once` for one pullback at most."""
        self._forward = forward(
            self.call, keep_columns=keep_columns, statistics=statistics, store=once
        )

    @property
    def saved(self) -> Forward:
        """What the forward left."""
        assert isinstance(self._forward, Forward)
        return self._forward

    def pack(self) -> Array:
        """Return what a backward needs as 64-bit words, `saved_words` of the plan in number."""
        saved, tokens = self.saved, self.problem.tokens
        words = np.zeros(3 * tokens + bit_words(self.problem), np.int64)
        for values, row in zip(
            (saved.lse, saved.nll, saved.reference), self._rows(words), strict=True
        ):
            row[: len(values)] = values
        if saved.bits is not None:
            words[3 * tokens :].view(np.uint8)[: saved.bits.size] = saved.bits.reshape(-1)
        return words

    def unpack(self, words: Array) -> None:
        """Take up what the forward of an equal call has packed, in place of a forward."""
        rows, tokens = len(self.call.rows), self.problem.tokens
        bits = None
        if self.call.plan.gradient_filter is not None:
            shape = -(-rows // ROW_TILE), 4 * -(-self.problem.vocab // COLUMN_CHUNK)
            bits = words[3 * tokens :].view(np.uint8)[: shape[0] * shape[1]].reshape(shape)
        lse, nll, reference = self._rows(words)
        self._forward = Saved(
            lse=lse[:rows],
            nll=nll[:rows],
            bits=bits,
            reference=reference[:rows].astype(self.call.dtype),
            apart=np.zeros(rows, np.bool_),
            stored=None,
            stored_columns=None,
        )

    def _rows(self, words: Array) -> Array:
        tokens = self.problem.tokens
        return words[: 3 * tokens].view(np.float64).reshape(3, tokens)

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
        self, dloss: Array, dlse: Array | None, wanted: Wanted = EVERY_GRADIENT
    ) -> HostGradients:
        """Return the gradients for upstream gradients of the loss and of lse."""
        at, saved = self.call.rows.position, self._forward
        assert saved is not None
        with np.errstate(all="ignore"):
            upstream = np.broadcast_to(dloss.astype(np.float64), self.problem.batch_shape)
            factors = tokens.row_factors(
                self.problem,
                self.weights,
                self.call.classes,
                saved.lse,
                upstream.reshape(-1)[at] * self.normalizer,
                None if dlse is None else dlse.reshape(-1)[at].astype(np.float64),
            )
        # What was stored is gone afterwards: the memory becomes dC.
        self._forward = dataclasses.replace(saved, stored=None, stored_columns=None)
        return backward(self.call, saved, factors, wanted)

    def filter_effect(self) -> tuple[int, int, int, Array]:
        """Return the pairs that pass the filter, all pairs, the tokens, and what is left.

        A pair is of a row tile and a class. What is left are each class's sums of probabilities:
        the gradient of the sum of lse with respect to a bias.
        """
        ones = np.ones(self.problem.batch_shape)
        found = self.pullback(np.zeros(()), ones, Wanted(e=False, c=False, bias=True))
        assert found.bias is not None
        return found.kept, found.pairs, len(self.call.rows), found.bias

    def _at_targets(self, values: Array, dtype: np.dtype[Any], ignored: int = 0) -> Array:
        placed = np.full(self.problem.batch_shape, ignored, dtype)
        with np.errstate(all="ignore"):
            placed.reshape(-1)[self.call.rows.position] = values
        return placed
