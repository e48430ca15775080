"""How far two runs may be apart when they differ in the order of their sums alone.

Cut Cross-Entropy and the full softmax compute the same numbers, so two trainings that differ in
the head alone must follow the same curve, but for float32 rounding. This module says how much
that is, from the dtype, the lengths of the sums and the step; nothing in it is fitted.

One evaluation. A sum of K float32 terms, rounded in a random way at every addition, is wrong by
about u sqrt(K) of the size of its terms, with u = 2**-24 (N. J. Higham, T. Mary, "A new approach
to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41, 2019). In a token's loss,
``lse - z[target]``:

- a logit is a sum of D products. A loss is a difference of logits, so its own size L stands for
  theirs: u sqrt(D) L;
- lse is the logarithm of a sum of V positive terms; a relative error of the sum is an absolute
  one of its logarithm: u sqrt(V).

These are independent from token to token, and the mean over N tokens divides them by sqrt(N).
The mean itself is then rounded to float32, once: u L. Together

    sigma(L) = u (L + (sqrt(D) L + sqrt(V)) / sqrt(N)).

Over the steps. The gradients are sums over the same softmax with the same relative errors, so an
update puts an error into the parameters that moves the next losses by sigma at most, in
proportion to the size of the update. Training damps such errors rather than amplifying them
(`training.Schedule` keeps its rates where that is so), and they are independent from step
to step, so they add in quadrature. Adagrad's r-th update is about 1 / sqrt(r) of the first:
1 + 1/2 + 1/3 + ... + 1/s <= 1 + ln s. With the evaluation itself,

    sigma(L, s) = sigma(L) sqrt(2 + ln s).

The tolerance is five times that, and sqrt(2) times more since both runs are wrong. With the
demo's sizes it is about 1e-5 nats. Measured over 100 steps with three seeds: two runs of the full
softmax whose vocabularies are ordered differently come to 0.04 to 0.16 of it; a gradient of e or
of c that is wrong by 0.1 % moves the curve by 1e-3, a hundred times as much.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

UNIT_ROUNDOFF = 2.0**-24
DEVIATIONS = 5.0

Curve = npt.NDArray[np.float64]


class Agreement(NamedTuple):
    """Two loss curves, compared.

    Attributes
    ----------
    difference : ndarray of float64, shape (steps,)
        Absolute, in nats.
    tolerance : ndarray of float64, shape (steps,)
    worst : int
        Index of the step at which the difference is the largest part of its tolerance.
    agree : bool
    """

    difference: Curve
    tolerance: Curve
    worst: int
    agree: bool


def compare_curves(one: Curve, other: Curve, tokens: int, dim: int, vocab: int) -> Agreement:
    """Compare the losses of two runs that should differ by float32 rounding alone.

    Parameters
    ----------
    one, other : ndarray of float64, shape (steps,)
        Losses, each the mean over the tokens of a step, in nats.
    tokens, dim, vocab : int
        N, D and V.

    Returns
    -------
    Agreement
        ``agree`` is False as soon as one step is beyond its tolerance, or is not a number.
    """
    step = np.arange(1, len(one) + 1)
    with np.errstate(invalid="ignore"):  # losses that are not numbers are reported as such
        size = np.maximum(np.abs(one), np.abs(other))
        per_token = np.sqrt(dim) * size + np.sqrt(vocab)
        evaluation = UNIT_ROUNDOFF * (size + per_token / np.sqrt(tokens))
        tolerance = DEVIATIONS * np.sqrt(2.0) * evaluation * np.sqrt(2.0 + np.log(step))
        difference = np.abs(one - other)
        part = np.where(np.isfinite(difference), difference / tolerance, np.inf)
    worst = int(np.argmax(part))
    return Agreement(difference, tolerance, worst, bool(part[worst] <= 1.0))
