"""The loss of a classifier whose vocabulary is spread over shards, in any framework.

Each shard computes the log-sum-exp of its own logits; what belongs together is merged by two
collectives that the caller hands in, a maximum and a sum over the shards. A target belongs to the
one shard that holds its row of the classifier. Shards may have different sizes, also none at all.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, Literal

from . import api
from .problem import ArraySpec, Options, Problem


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard's place in the vocabulary, and its collectives.

    Attributes
    ----------
    first : int or 0-d array of int
        The class index of the shard's first row.
    largest, total : callable
        Elementwise maximum and sum of an array over all shards, the same on each of them.
        ``largest`` is not differentiated; in JAX it takes
        ``jax.lax.pmax(jax.lax.stop_gradient(x), axis)``.
    """

    first: Any
    largest: Callable[[Any], Any]
    total: Callable[[Any], Any]


def linear_cross_entropy(
    shard: Shard,
    e: Any,
    c: Any,
    targets: Any,
    bias: Any = None,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_lse: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weight: Any = None,
    token_weight: Any = None,
    **options: Any,
) -> Any:
    """Cross-entropy of a linear classifier of which this shard holds some rows.

    Every shard calls it, with the same embeddings, targets and options, and gets the same loss. It
    is differentiable where `cce_cupy.linear_cross_entropy` and the collectives are: the gradients
    of c and bias are those of the shard's rows, that of e is the shard's part of a sum over shards.

    Parameters
    ----------
    shard : Shard
        This shard's place, and the collectives.
    e : array, shape (..., D)
        Embeddings.
    c : array, shape (V of this shard, D)
        Its rows of the classifier. Rows with a bias of -inf are padding.
    targets : array of integers, shape (...)
        Class indices over the whole vocabulary, or ignore_index. One that no shard holds makes
        its loss NaN.
    bias : array, shape (V of this shard,), optional
        Of its rows.
    reduction : {"mean", "sum", "none"}
        As on one device.
    return_lse : bool
        Also return each token's log-sum-exp.
    label_smoothing : float
        It spreads over the classes of all shards; not together with a softcap.
    z_loss : float
        As on one device.
    class_weight : array, shape (V of this shard,), optional
        Of its rows.
    token_weight : array, shape of targets, optional
        Weight of each token's whole loss.
    **options
        More of its arguments: ignore_index, softcap, shift, logit_scale, and those of the filter,
        which is applied to a shard's own probabilities.

    Returns
    -------
    loss : array
    lse : array
        Over the whole vocabulary. Only with return_lse.

    Raises
    ------
    TypeError, ValueError
        As for `cce_cupy.linear_cross_entropy`; and for label smoothing with a softcap.
    """
    call = _Call(shard, e, c, targets, bias, class_weight, token_weight, options,
                 _options(reduction, label_smoothing, z_loss, options))  # fmt: skip
    nll, lse = call.empty_shard()
    if call.size:
        nll, lse = api.linear_cross_entropy(
            e, c, call.local_targets, bias, reduction="none", return_lse=True, **options
        )
    loss, lse = call.merge(nll, lse)
    return (loss, lse) if return_lse else loss


def linear_cross_entropy_value_and_grad(
    shard: Shard,
    e: Any,
    c: Any,
    targets: Any,
    bias: Any = None,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_lse: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weight: Any = None,
    token_weight: Any = None,
    **options: Any,
) -> tuple[Any, api.Gradients]:
    """Loss and gradients of a sharded classifier, for frameworks with and without autodiff.

    Parameters
    ----------
    shard, e, c, targets, bias, reduction, return_lse, label_smoothing, z_loss, class_weight
        As for `linear_cross_entropy`; and so are all its keyword arguments.

    Returns
    -------
    loss : array, or tuple of arrays
        ``(loss, lse)`` with return_lse.
    gradients : Gradients
        Of the loss; with ``reduction="none"`` of the sum of the losses. That of e is whole, the
        sum over all shards; those of c and bias belong to the shard's rows.

    Raises
    ------
    TypeError, ValueError
        As for `linear_cross_entropy`.
    """
    call = _Call(shard, e, c, targets, bias, class_weight, token_weight, options,
                 _options(reduction, label_smoothing, z_loss, options))  # fmt: skip
    nll, lse = call.empty_shard()
    pullback = None
    if call.size:
        (nll, lse), pullback = api.linear_cross_entropy_vjp(
            e, c, call.local_targets, bias, reduction="none", return_lse=True, **options
        )
    loss, whole_lse = call.merge(nll, lse)
    if pullback is None:
        zeros = [None if x is None else call.xp.zeros_like(x) for x in (e, c, bias)]
        gradients = api.Gradients(shard.total(zeros[0]), *zeros[1:])
    else:
        gradients = call.gradients(whole_lse, pullback)
    return ((loss, whole_lse) if return_lse else loss), gradients


def _options(reduction: Any, label_smoothing: Any, z_loss: Any, options: dict[str, Any]) -> Problem:
    """Check the options that the shards' own calls do not see."""
    if label_smoothing and options.get("softcap") is not None:
        raise ValueError(
            "label_smoothing with softcap is not supported over shards: through a softcap it "
            "reaches every logit by a different amount"
        )
    if unknown := options.keys() - set(Options._fields):
        raise TypeError(f"unknown arguments: {', '.join(sorted(unknown))}")
    smallest = {
        "e": ArraySpec((2**31, 1), "float32"),
        "c": ArraySpec((1, 1), "float32"),
        "targets": ArraySpec((2**31,), "int32"),
    }
    given = options | {
        "reduction": reduction, "label_smoothing": label_smoothing, "z_loss": z_loss,
    }  # fmt: skip
    return Problem.check(smallest, Options(**given))


class _Call:
    """What one shard knows of a call, and what it makes of all shards' results."""

    def __init__(
        self,
        shard: Shard,
        e: Any,
        c: Any,
        targets: Any,
        bias: Any,
        class_weight: Any,
        token_weight: Any,
        options: dict[str, Any],
        problem: Problem,
    ) -> None:
        self.xp = xp = _namespace(e)
        self.shard, self.problem = shard, problem
        self.e, self.c, self.bias, self.class_weight = e, c, bias, class_weight
        self.size = c.shape[0]
        counted = targets != problem.ignore_index
        if problem.shift:
            counted = counted & (xp.cumsum(xp.ones_like(targets), -1) > problem.shift)
        self.counted = counted
        if _dtype(targets) not in ("int32", "int64"):
            targets = _cast(targets, xp.int32)
        self.owned = counted & (targets >= shard.first) & (targets < shard.first + self.size)
        self.target = xp.where(self.owned, targets - shard.first, 0)
        # Tokens of other shards need a target too; it weighs nothing.
        self.local_targets = xp.where(counted, self.target, -100)
        options["ignore_index"] = -100
        self.present = xp.sum(c[:, :0], -1) == 0
        if bias is not None:
            self.present = bias != -float("inf")
        self.sums = xp.float64 if _dtype(e) == "float64" else xp.float32
        self.token_weight = None if token_weight is None else _cast(token_weight, self.sums)

    def empty_shard(self) -> tuple[Any, Any]:
        """Return nll and lse of a shard without rows."""
        xp = self.xp
        nothing = _cast(xp.zeros_like(self.target), self.sums)
        return nothing, nothing - float("inf")

    def merge(self, nll: Any, lse: Any) -> tuple[Any, Any]:
        """Return the loss and the log-sum-exp over all shards."""
        xp, total = self.xp, self.shard.total
        owner_lse = total(xp.where(self.owned, lse, 0.0))
        owner_nll = total(xp.where(self.owned, nll, 0.0))
        owners = total(_cast(self.owned, self.sums))
        if self.bias is not None:
            # Where all rows are padding there is no log-sum-exp to speak of.
            lse = xp.where(xp.any(self.present), lse, -float("inf"))
        self.lse = lse
        reference = self.shard.largest(lse)
        reference = xp.where(reference == -float("inf"), 0.0, reference)
        whole = reference + xp.log(total(xp.exp(lse - reference)))
        # The others' part of the loss: exact where it is tiny, and never negative. The exponent
        # is bounded where the sum is not used, so that its derivative is a number.
        above = lse - owner_lse
        ratio = xp.exp(xp.where(above > 2, 2.0, above))
        others = total(xp.where(self.owned, 0.0, ratio))
        gap = xp.where(whole - owner_lse <= 1, xp.log1p(others), whole - owner_lse)
        nll = owner_nll + gap

        problem = self.problem
        # A target that no shard holds makes its loss NaN, and whatever it has a part in.
        held = xp.where(self.counted & (owners == 0), float("nan"), xp.ones_like(owners))
        self.weight = held * self._weight_of_target()
        losses = (1.0 - problem.label_smoothing) * self.weight * nll
        if problem.label_smoothing > 0.0:
            self.smoothing, self.smoothing_total = self._smoothing()
            losses = losses + self.smoothing_total * whole - total(self._smoothed_logit())
        if problem.z_loss > 0.0:
            losses = losses + problem.z_loss * self.weight * whole * whole
        self.token_weights = _cast(self.counted, self.sums)
        if self.token_weight is not None:
            self.token_weights = xp.where(self.counted, self.token_weight, 0.0)
        losses = xp.where(self.counted, losses * self.token_weights, 0.0)
        whole = xp.where(self.counted, whole, 0.0)
        self.normalizer: Any = 1.0
        if problem.reduction == "none":
            return losses, whole
        if problem.reduction == "mean":
            weight = xp.sum(self.token_weights * self.weight)
            self.normalizer = xp.where(weight > 0, 1.0 / xp.where(weight > 0, weight, 1.0), 0.0)
        return xp.sum(losses) * self.normalizer, whole

    def gradients(self, whole: Any, pullback: Callable[[Any, Any], api.Gradients]) -> api.Gradients:
        """Return the gradients of the sum of what the loss holds."""
        xp, problem = self.xp, self.problem
        upstream = self.token_weights * self.normalizer
        by_target = (1.0 - problem.label_smoothing) * self.weight
        by_lse = by_target
        if problem.label_smoothing > 0.0:
            by_lse = by_lse + self.smoothing_total
        if problem.z_loss > 0.0:
            by_lse = by_lse + 2.0 * problem.z_loss * self.weight * whole
        # Of this shard's results: its share of the probability, and the targets it owns.
        dloss = xp.where(self.owned, upstream * by_target, 0.0)
        share = xp.where(self.counted, xp.exp(self.lse - whole), 0.0)
        found = pullback(dloss, upstream * by_lse * share - dloss)
        de, dc, dbias = found.e, found.c, found.bias
        if problem.label_smoothing > 0.0:
            at_embeddings = xp.roll(upstream, -problem.shift, -1) if problem.shift else upstream
            flat = _cast(self.e, self.sums).reshape(-1, self.e.shape[-1])
            of_rows = at_embeddings.reshape(-1) @ flat
            scale, smoothing = problem.logit_scale, self.smoothing
            moved = scale * at_embeddings[..., None] * self._smoothed_classifier()
            de = _cast(_cast(de, self.sums) - moved, de.dtype)
            dc = _cast(_cast(dc, self.sums) - scale * smoothing[:, None] * of_rows, dc.dtype)
            if dbias is not None:
                lost = smoothing * xp.sum(upstream)
                dbias = _cast(_cast(dbias, self.sums) - lost, dbias.dtype)
        return api.Gradients(self.shard.total(de), dc, dbias)

    def _weight_of_target(self) -> Any:
        if self.class_weight is None:
            return 1.0
        weight = _cast(self.target, self.sums)  # zeros, where there are no rows
        if self.size:
            weight = _cast(self.class_weight, self.sums)[self.target]
        return self.shard.total(self.xp.where(self.owned, weight, 0.0))

    def _smoothing(self) -> tuple[Any, Any]:
        """Return the weight of each row's log-probability, and the sum over all shards."""
        present = _cast(self.present, self.sums)
        weight = present
        if self.class_weight is not None:
            weight = present * _cast(self.class_weight, self.sums)
        xp = self.xp
        number = self.shard.total(xp.sum(present))
        smoothing = weight * (self.problem.label_smoothing / xp.where(number > 1, number, 1.0))
        return smoothing, self.shard.total(xp.sum(smoothing))

    def _smoothed_classifier(self) -> Any:
        xp = self.xp
        used = xp.where(self.smoothing[:, None] == 0, 0, self.c)
        return self.smoothing @ _cast(used, self.sums)

    def _smoothed_logit(self) -> Any:
        """Return each token's sum of smoothing times logit, over this shard's rows."""
        xp, problem = self.xp, self.problem
        along = problem.logit_scale * (_cast(self.e, self.sums) @ self._smoothed_classifier())
        if problem.shift:
            along = xp.roll(along, problem.shift, -1)
        if self.bias is None:
            return along
        bias = _cast(xp.where(self.present, self.bias, 0), self.sums)
        return along + self.smoothing @ bias


def _namespace(array: Any) -> Any:
    """Return the module whose functions take an array."""
    named = getattr(array, "__array_namespace__", None)
    return named() if named is not None else sys.modules[type(array).__module__.partition(".")[0]]


def _dtype(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def _cast(array: Any, dtype: Any) -> Any:
    return array.astype(dtype) if hasattr(array, "astype") else array.to(dtype)
