"""A small language model in NumPy, with hand-written gradients.

It predicts a token from the few before it: their embeddings, side by side, pass a hidden layer,
and what comes out is compared with every token of the vocabulary by a loss head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .loss_heads import Floats, Ids, LossHead


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model.

    Attributes
    ----------
    vocab : int
        V.
    context : int
        Tokens that the model looks back.
    dim : int
        D, the size of embeddings on both ends.
    hidden : int
        Units of the hidden layer.
    """

    vocab: int
    context: int = 4
    dim: int = 64
    hidden: int = 128


class Gradients(NamedTuple):
    """Gradients of the parameters of the same names.

    That of the embedding has only the rows of the tokens that were seen.
    """

    embedding_rows: npt.NDArray[np.intp]
    embedding: Floats
    hidden: Floats
    hidden_bias: Floats
    output: Floats
    classifier: Floats
    bias: Floats


class Model:
    """The parameters, and the way forward and back.

    Parameters
    ----------
    sizes : Sizes
    rng : Generator
        For the start.

    Attributes
    ----------
    embedding : ndarray of float32, shape (V, D)
    hidden : ndarray of float32, shape (context * D, hidden)
    hidden_bias : ndarray of float32, shape (hidden,)
    output : ndarray of float32, shape (hidden, D)
    classifier : ndarray of float32, shape (V, D)
    bias : ndarray of float32, shape (V,)
    """

    def __init__(self, sizes: Sizes, rng: np.random.Generator) -> None:
        def normal(rows: int, columns: int, scale: float) -> Floats:
            return rng.standard_normal((rows, columns), np.float32) * np.float32(scale)

        inputs = sizes.context * sizes.dim
        self._dim = sizes.dim
        self.embedding = normal(sizes.vocab, sizes.dim, 0.1)
        # Inputs of 0.1 and weights that leave 0.3 of them: tanh starts in its straight part.
        self.hidden = normal(inputs, sizes.hidden, 3 * inputs**-0.5)
        self.hidden_bias: Floats = np.zeros(sizes.hidden, np.float32)
        self.output = normal(sizes.hidden, sizes.dim, sizes.hidden**-0.5)
        # Small, so that the first prediction is the uniform one, at a loss of ln V.
        self.classifier = normal(sizes.vocab, sizes.dim, 0.02)
        self.bias: Floats = np.zeros(sizes.vocab, np.float32)

    def forward(self, contexts: Ids) -> tuple[Floats, Floats, Floats]:
        """Return inputs, hidden units and e for contexts (N, context), the last token first."""
        x = self.embedding[contexts].reshape(len(contexts), -1)
        hidden = np.tanh(x @ self.hidden + self.hidden_bias)
        # The last token's embedding goes straight to e too: pairs of words are learnt at once.
        return x, hidden, hidden @ self.output + x[:, : self._dim]

    def loss_and_gradients(
        self, contexts: Ids, targets: Ids, head: LossHead
    ) -> tuple[float, Gradients]:
        """Return the mean loss of N tokens and the gradients of all parameters.

        Parameters
        ----------
        contexts : ndarray of int32, shape (N, context)
        targets : ndarray of int32, shape (N,)
        head : callable
        """
        x, hidden, e = self.forward(contexts)
        result = head(e, self.classifier, targets, self.bias)
        d_hidden = (result.e @ self.output.T) * (1 - hidden * hidden)
        dx = d_hidden @ self.hidden.T
        dx[:, : self._dim] += result.e
        rows, embedding = _sum_by_row(contexts.ravel(), dx.reshape(-1, self._dim))
        return result.loss, Gradients(
            embedding_rows=rows,
            embedding=embedding,
            hidden=x.T @ d_hidden,
            hidden_bias=d_hidden.sum(axis=0),
            output=hidden.T @ result.e,
            classifier=result.c,
            bias=result.bias,
        )


def _sum_by_row(rows: Ids, values: Floats) -> tuple[npt.NDArray[np.intp], Floats]:
    """Add up the values of the same row, always in the same order; return rows and sums."""
    order = np.argsort(rows, kind="stable")
    unique, first = np.unique(rows[order], return_index=True)
    return unique.astype(np.intp), np.add.reduceat(values[order], first, axis=0)
