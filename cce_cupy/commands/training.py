"""The training of a language model: order of the data, steps, optimizer."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .language_model import Model, Sizes
from .loss_heads import Floats, Ids, LossHead

# Rows are updated in blocks of this many elements, which stay in the cache through all passes.
BLOCK = 2**16


@dataclass(frozen=True)
class Schedule:
    """How to train.

    The rates are those at which the loss falls fast and without large jumps: there, later steps
    damp an error in the parameters. At a few times these rates the first steps are chaotic, and
    rounding alone makes two runs differ visibly.

    Attributes
    ----------
    tokens : int
        N, tokens of one step.
    rate : float
        Rate of the embeddings and of the classifier with its bias.
    hidden_rate : float
        Rate of the hidden layer, where every weight has a part in every token.
    warm_up : int
        Steps over which the rates rise to their full size.
    """

    tokens: int = 1024
    rate: float = 0.15
    hidden_rate: float = 0.0075
    warm_up: int = 10


class Adagrad:
    """The optimizer of one parameter array.

    Adagrad divides by the root of the sum of all squared gradients so far. That suits the
    comparison of two runs: the divisor never falls, so it never amplifies an error later on, and
    the steps shrink like 1 / sqrt(step). The sum starts at a positive value: if it started at
    0, the first step would be the sign of the gradient, and where the gradient is so small that
    it is mostly rounding, that would be noise at full size.

    Parameters
    ----------
    value : ndarray of float32
        Changed in place.
    rate : float
    """

    INITIAL_SUM = 3e-6

    def __init__(self, value: Floats, rate: float) -> None:
        self._value = value
        self._rate = rate
        self._sum = np.full_like(value, self.INITIAL_SUM)

    def step(self, gradient: Floats, warmth: float) -> None:
        """Move against the gradient; warmth, from 0 to 1, scales the rate."""
        rate = np.float32(self._rate * warmth)
        rows = max(BLOCK // max(self._value[:1].size, 1), 1)
        for first in range(0, len(self._value), rows):
            block = slice(first, first + rows)
            _descend(self._value[block], self._sum[block], gradient[block], rate)

    def step_rows(self, rows: npt.NDArray[np.intp], gradient: Floats, warmth: float) -> None:
        """Move some rows only: for the others, of gradient 0, Adagrad stands still."""
        value, squares = self._value[rows], self._sum[rows]
        _descend(value, squares, gradient, np.float32(self._rate * warmth))
        self._value[rows], self._sum[rows] = value, squares


class Training:
    """A model on its way: the same seed gives the same start and the same order of the data.

    Parameters
    ----------
    ids : ndarray of int32, shape (tokens,)
        The text.
    sizes : Sizes
    head : callable
        The loss head.
    seed : int
    schedule : Schedule, optional
    """

    def __init__(
        self, ids: Ids, sizes: Sizes, head: LossHead, seed: int, schedule: Schedule | None = None
    ) -> None:
        self._ids = ids
        self._head = head
        self._schedule = schedule = schedule or Schedule()
        self._steps = 0
        self._look_back = np.arange(1, sizes.context + 1)
        rng = np.random.default_rng(seed)
        self._order = rng.permutation(len(ids) - sizes.context) + sizes.context
        self.model = model = Model(sizes, rng)
        self._embedding = Adagrad(model.embedding, schedule.rate)
        self._hidden = Adagrad(model.hidden, schedule.hidden_rate)
        self._hidden_bias = Adagrad(model.hidden_bias, schedule.hidden_rate)
        self._output = Adagrad(model.output, schedule.hidden_rate)
        self._classifier = Adagrad(model.classifier, schedule.rate)
        self._bias = Adagrad(model.bias, schedule.rate)

    def step(self) -> float:
        """Train on the next tokens and return their loss, in nats a token."""
        loss, gradients = self.model.loss_and_gradients(*self.next_tokens(), self._head)
        self._steps += 1
        warmth = min(self._steps / self._schedule.warm_up, 1.0)
        self._embedding.step_rows(gradients.embedding_rows, gradients.embedding, warmth)
        self._hidden.step(gradients.hidden, warmth)
        self._hidden_bias.step(gradients.hidden_bias, warmth)
        self._output.step(gradients.output, warmth)
        self._classifier.step(gradients.classifier, warmth)
        self._bias.step(gradients.bias, warmth)
        return loss

    def next_tokens(self) -> tuple[Ids, Ids]:
        """Return contexts and targets of the step to come: places all over the text."""
        first = self._steps * self._schedule.tokens
        places = np.arange(first, first + self._schedule.tokens)
        at = self._order.take(places, mode="wrap")
        return self._ids[at[:, None] - self._look_back], self._ids[at]

    def head_memory(self) -> int:
        """Return the most bytes that the loss head allocates in a step, its results included.

        NumPy reports its allocations to tracemalloc, which slows them down: so this runs the
        head once more, on the next tokens, and nothing is trained.
        """
        contexts, targets = self.next_tokens()
        e = self.model.forward(contexts)[2]
        tracing = tracemalloc.is_tracing()
        if not tracing:
            tracemalloc.start()
        try:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            self._head(e, self.model.classifier, targets, self.model.bias)
            return tracemalloc.get_traced_memory()[1] - before
        finally:
            if not tracing:
                tracemalloc.stop()


def _descend(value: Floats, squares: Floats, gradient: Floats, rate: np.float32) -> None:
    scratch = gradient * gradient
    squares += scratch
    np.sqrt(squares, out=scratch)
    np.divide(gradient, scratch, out=scratch)
    scratch *= rate
    value -= scratch
