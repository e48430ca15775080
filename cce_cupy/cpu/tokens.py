"""Which tokens count, what each of them loses, and the factors of its row in the backward.

All of it is O(N + V); the products over N x V are in `forward` and `backward`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..problem import Problem
from .memory import Array


class Arrays(NamedTuple):
    """The array arguments of a call, on the host, as NumPy arrays."""

    e: Array
    c: Array
    targets: Array
    bias: Array | None = None
    class_weight: Array | None = None
    token_weight: Array | None = None


@dataclass(frozen=True)
class Rows:
    """The mapping from compact rows, the tokens that count, to where they stand.

    Attributes
    ----------
    source : ndarray of int64, shape (rows,)
        Row of the flattened e.
    position : ndarray of int64, shape (rows,)
        Place in the flattened targets; differs from `source` by the shift.
    target : ndarray of int64, shape (rows,)
    """

    source: Array
    position: Array
    target: Array

    def __len__(self) -> int:
        return len(self.target)


@dataclass(frozen=True)
class Classes:
    """What belongs to the vocabulary entries, in the dtype of the sums.

    Attributes
    ----------
    bias : ndarray, shape (V,), or None
    removed : ndarray of bool, shape (V,), or None
        Entries with a bias of -inf; None where there are none.
    weight : ndarray, shape (V,), or None
        Class weights.
    smoothing : ndarray, shape (V,), or None
        What each entry's log-probability weighs under label smoothing: alpha / V' times its class
        weight, 0 for removed entries, V' being the number of the others.
    """

    bias: Array | None
    removed: Array | None
    weight: Array | None
    smoothing: Array | None


@dataclass(frozen=True)
class RowFactors:
    """Factors of each compact row in dz = softmax * p - onehot * [v == target] - smoothing * s_v.

    Attributes
    ----------
    softmax, onehot, smoothing : ndarray, shape (rows,)
        s_v is `Classes.smoothing`.
    """

    softmax: Array
    onehot: Array
    smoothing: Array


def select_rows(targets: Array, shift: int, ignore_index: int) -> Rows:
    """Map the tokens that are paired and not ignored to compact rows, in order."""
    paired = targets != ignore_index
    if shift:
        paired = np.array(paired)
        paired[..., :shift] = False
    position = np.flatnonzero(paired)
    target = targets.reshape(-1)[position].astype(np.int64)
    return Rows(source=position - shift, position=position, target=target)


def describe_classes(problem: Problem, arrays: Arrays) -> Classes:
    """Convert bias and class weights, and find the removed entries."""
    dtype = np.dtype(problem.accumulator)
    bias = None if arrays.bias is None else arrays.bias.astype(dtype)
    removed = None if bias is None else bias == -np.inf
    if removed is not None and not removed.any():
        removed = None
    weight = None if arrays.class_weight is None else arrays.class_weight.astype(dtype)
    smoothing = None
    # With a single class there is nothing to smooth, and its loss is to be exactly 0.
    if problem.label_smoothing > 0.0 and problem.vocab > 1:
        smoothing = np.ones(problem.vocab, dtype) if weight is None else weight.copy()
        present = problem.vocab
        if removed is not None:
            smoothing[removed] = 0
            present -= int(np.count_nonzero(removed))
        smoothing *= dtype.type(problem.label_smoothing / max(present, 1))
    return Classes(bias, removed, weight, smoothing)


def row_weights(arrays: Arrays, rows: Rows, classes: Classes) -> tuple[Array, Array]:
    """Return the class weight of each row's target and the row's token weight, in float64."""
    of_class = np.ones(len(rows)) if classes.weight is None else classes.weight[rows.target]
    of_token = np.ones(len(rows))
    if arrays.token_weight is not None:
        of_token = arrays.token_weight.reshape(-1)[rows.position]
    return of_class.astype(np.float64), of_token.astype(np.float64)


def token_losses(
    problem: Problem,
    weights: tuple[Array, Array],
    classes: Classes,
    nll: Array,
    lse: Array,
    smoothed_logit: Array,
) -> Array:
    """Combine what the forward summed into each row's loss, in float64.

    Parameters
    ----------
    weights : tuple of ndarray
        From `row_weights`.
    nll, lse : ndarray of float64, shape (rows,)
    smoothed_logit : ndarray of float64, shape (rows,)
        Sum over v of ``classes.smoothing[v] * z[v]``; 0 without label smoothing.
    """
    of_class, of_token = weights
    loss = of_class * nll
    if classes.smoothing is not None:
        total = classes.smoothing.sum(dtype=np.float64)
        loss = (1.0 - problem.label_smoothing) * loss + (total * lse - smoothed_logit)
    if problem.z_loss > 0.0:
        loss = loss + problem.z_loss * of_class * lse**2
    return np.asarray(of_token * loss)


def normalizer(reduction: str, weights: tuple[Array, Array]) -> float:
    """Return what the sum of the losses is multiplied by: 0 where nothing is left to average."""
    if reduction != "mean":
        return 1.0
    of_class, of_token = weights
    total = float((of_class * of_token).sum())
    return 1.0 / total if total > 0.0 else 0.0


def row_factors(
    problem: Problem,
    weights: tuple[Array, Array],
    classes: Classes,
    lse: Array,
    dloss: Array,
    dlse: Array | None,
) -> RowFactors:
    """Turn upstream gradients into the factors of each row of dz.

    Parameters
    ----------
    lse : ndarray, shape (rows,)
    dloss : ndarray of float64, shape (rows,)
        Gradient of each row's loss, the normalizer included.
    dlse : ndarray of float64, shape (rows,), or None
    """
    of_class, of_token = weights
    weight = dloss * of_token
    onehot = weight * of_class * (1.0 - problem.label_smoothing)
    softmax = onehot
    if classes.smoothing is not None:
        softmax = softmax + weight * classes.smoothing.sum(dtype=np.float64)
    if problem.z_loss > 0.0:
        softmax = softmax + weight * of_class * (2.0 * problem.z_loss) * lse
    if dlse is not None:
        softmax = softmax + dlse
    dtype = np.dtype(problem.accumulator)
    return RowFactors(softmax.astype(dtype), onehot.astype(dtype), weight.astype(dtype))
