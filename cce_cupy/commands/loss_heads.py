"""The two loss heads that the demo compares: Cut Cross-Entropy and the full softmax.

A loss head takes what a model says about N tokens, e, to their mean loss and its gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .. import linear_cross_entropy_value_and_grad

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]


class HeadResult(NamedTuple):
    """Mean loss over the tokens of a step, in nats, and its gradients."""

    loss: float
    e: Floats
    c: Floats
    bias: Floats


LossHead = Callable[[Floats, Floats, Ids, Floats], HeadResult]
"""``head(e, c, targets, bias)`` with e (N, D), c (V, D), targets (N,) and bias (V,)."""


def cut_cross_entropy(e: Floats, c: Floats, targets: Ids, bias: Floats) -> HeadResult:
    """Loss and gradients by this library, in blocks: no (N, V) matrix."""
    loss, gradients = linear_cross_entropy_value_and_grad(e, c, targets, bias)
    return HeadResult(float(loss), gradients.e, gradients.c, gradients.bias)


def full_softmax(e: Floats, c: Floats, targets: Ids, bias: Floats) -> HeadResult:
    """Loss and gradients the plain way: the (N, V) matrix of logits, turned into p, into dz.

    It is as frugal as that way can be: one matrix, changed in place.
    """
    rows = np.arange(len(targets))
    z: Floats = e @ c.T
    z += bias
    z -= z.max(axis=1, keepdims=True)
    target_logit = z[rows, targets]
    np.exp(z, out=z)
    sums = z.sum(axis=1, keepdims=True)
    loss = np.mean(np.log(sums[:, 0]) - target_logit)
    z /= sums  # p
    z[rows, targets] -= 1
    z /= np.float32(len(targets))  # dz of the mean
    return HeadResult(float(loss), z @ c, z.T @ e, z.sum(axis=0))
