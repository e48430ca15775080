"""NumPy arrays, and the road from any framework's host arrays through the CPU backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..cpu import tokens
from ..cpu.backward import HostGradients, backward
from ..cpu.call import Call, Progress
from ..cpu.columns import seed_from_targets
from ..cpu.forward import Forward, forward
from ..plan import Plan
from ..problem import (
    ArraySpec,
    Problem,
    check_target_values,
    check_upstream,
    check_weight_values,
)

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Evaluation:
    """A loss that has been computed.

    Attributes
    ----------
    loss, lse : array
        Of the caller's kind; lse has the shape of the targets.
    pullback : callable
        ``pullback(dloss, dlse) -> (de, dc, dbias)``, of the caller's kind; dlse and dbias may be
        None.
    gradients : callable
        The pullback of ones: the gradients of the sum of what the loss holds.
    """

    loss: Any
    lse: Any
    pullback: Callable[[Any, Any], tuple[Any, Any, Any]]
    gradients: Callable[[], tuple[Any, Any, Any]]


class HostFramework:
    """A framework whose arrays are in host memory.

    Subclasses say what an array looks like and convert it to and from NumPy without copying
    where that is possible.
    """

    name: str

    @staticmethod
    def owns(array: Any) -> bool:
        """Tell whether an object is an array of this framework."""
        raise NotImplementedError

    def takes(self, array: Any) -> bool:
        """Tell whether a gradient may be handed back as this object."""
        return self.owns(array)

    def describe(self, name: str, array: Any) -> ArraySpec:
        """Return what an argument looks like; TypeError when it cannot be plain data."""
        raise NotImplementedError

    def to_host(self, array: Any) -> Array:
        """Return a NumPy array of the same elements, a view where possible."""
        raise NotImplementedError

    def from_host(self, array: Array, like: Any) -> Any:
        """Return an array of the framework, on the device of `like`."""
        raise NotImplementedError

    def refuse_autodiff(self, arrays: Mapping[str, Any]) -> None:
        """Raise where the framework would record a call that it cannot differentiate yet."""

    def evaluate(
        self,
        problem: Problem,
        plan: Plan,
        arrays: Mapping[str, Any],
        *,
        differentiate: bool,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Compute a loss, and with `differentiate` what its pullback needs."""
        like = arrays["e"]
        host = HostCall(problem, plan, self._host_arrays(arrays), progress)
        host.run_forward(keep_columns=differentiate)

        def pullback(dloss: Any, dlse: Any) -> tuple[Any, Any, Any]:
            shape = problem.batch_shape if problem.reduction == "none" else ()
            upstream = self._upstream("dloss", dloss, shape, problem.device)
            upstream_lse = None
            if dlse is not None:
                upstream_lse = self._upstream("dlse", dlse, problem.batch_shape, problem.device)
            return returned(host.pullback(upstream, upstream_lse))

        def returned(gradients: HostGradients) -> tuple[Any, Any, Any]:
            return (
                self.from_host(gradients.e, like),
                self.from_host(gradients.c, like),
                None if gradients.bias is None else self.from_host(gradients.bias, like),
            )

        return Evaluation(
            loss=self.from_host(host.loss(), like),
            lse=self.from_host(host.lse(), like),
            pullback=pullback,
            gradients=lambda: returned(host.pullback(np.ones(()), None)),
        )

    def statistics(
        self, problem: Problem, plan: Plan, arrays: Mapping[str, Any]
    ) -> tuple[Any, Any, Any, Any]:
        """Return log_prob, lse, entropy and argmax of each token."""
        host = HostCall(problem, plan, self._host_arrays(arrays))
        host.run_forward(keep_columns=False, statistics=True)
        like = arrays["e"]
        log_prob, lse, entropy, argmax = (self.from_host(a, like) for a in host.statistics())
        return log_prob, lse, entropy, argmax

    def _host_arrays(self, arrays: Mapping[str, Any]) -> tokens.Arrays:
        return tokens.Arrays(**{name: self.to_host(array) for name, array in arrays.items()})

    def _upstream(self, name: str, given: Any, shape: tuple[int, ...], device: str) -> Array:
        if isinstance(given, int | float) and not isinstance(given, bool) and shape == ():
            return np.asarray(float(given))
        if not self.takes(given):
            kind = type(given)
            raise TypeError(
                f"{name} must be an array of {self.name} of shape {shape}, "
                f"got {kind.__module__}.{kind.__qualname__}"
            )
        check_upstream(name, self.describe(name, given), shape, device)
        return self.to_host(given)


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
        arrays: tokens.Arrays,
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

    def run_forward(self, *, keep_columns: bool, statistics: bool = False) -> None:
        """Compute what everything else is made of."""
        self._forward = forward(self.call, keep_columns=keep_columns, statistics=statistics)

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

    def pullback(self, dloss: Array, dlse: Array | None) -> HostGradients:
        """Return the gradients for upstream gradients of the loss and of lse."""
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
        return backward(self.call, self.saved, factors)

    def _at_targets(self, values: Array, dtype: np.dtype[Any], ignored: int = 0) -> Array:
        placed = np.full(self.problem.batch_shape, ignored, dtype)
        with np.errstate(all="ignore"):
            placed.reshape(-1)[self.call.rows.position] = values
        return placed


class NumpyFramework(HostFramework):
    """NumPy arrays and scalars."""

    name = "NumPy"

    @staticmethod
    def owns(array: Any) -> bool:
        """Tell whether an object is an array of this framework."""
        return isinstance(array, np.ndarray | np.generic)

    def describe(self, name: str, array: Any) -> ArraySpec:
        """Return what an argument looks like."""
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(
                f"{name} is a masked array, whose mask would be lost: mark tokens to leave out "
                "by ignore_index in targets and pass plain arrays"
            )
        return ArraySpec(array.shape, array.dtype.name)

    def to_host(self, array: Any) -> Array:
        """Return the array itself, in native byte order."""
        plain = np.asarray(array)
        return np.require(plain, plain.dtype.newbyteorder("="), "A")

    def from_host(self, array: Array, like: Any) -> Any:
        """Return the array itself."""
        return array
