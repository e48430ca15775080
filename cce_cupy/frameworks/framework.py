"""A framework of arrays, and the two roads of a call: over the host, or over a device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..plan import Plan, choose_filter, make_plan
from ..problem import ArraySpec, Options, Problem, check_upstream
from . import gpu
from .host import Arrays, HostCall, HostGradients, Progress

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


def _check(specs: tuple[tuple[str, ArraySpec], ...], *options: Any) -> Problem:
    return Problem.check(dict(specs), Options(*options))


# The calls of a training run are alike. Typed: True equals 1, but is no softcap.
_checked = functools.lru_cache(maxsize=256, typed=True)(_check)
_planned = functools.lru_cache(maxsize=256)(make_plan)


class Framework:
    """What a call needs of the framework that its arrays are of.

    Subclasses say what an array looks like; how its host memory is seen by NumPy, without copying
    where that is possible; and what its devices do for the kernels.
    """

    name: str
    waits_on_device = False
    """Whether a call waits for its kernels: where memory that the framework takes back is not
    ordered after them."""

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

    def check_options(self, options: Options) -> None:
        """Raise for an option that the framework cannot take the value of."""

    def to_host(self, array: Any) -> Array:
        """Return a NumPy array of the same elements, a view where possible."""
        raise NotImplementedError

    def from_host(self, array: Array, like: Any) -> Any:
        """Return an array of the framework, on the device of `like`."""
        raise NotImplementedError

    def device_memory(self, like: Any) -> gpu.DeviceMemory:
        """Return what the kernels need of a framework on the device of `like`."""
        raise NotImplementedError

    def device_view(self, array: Any) -> Any:
        """Return a device array as one of the framework that `device_memory` speaks for."""
        return array

    def from_device(self, array: Any, like: Any) -> Any:
        """Return an array of this framework over the memory of a result."""
        return array

    def problem(self, arrays: Mapping[str, Any], options: Options) -> Problem:
        """Check the arguments of a call, or find them checked."""
        specs = tuple([(name, self.describe(name, array)) for name, array in arrays.items()])
        try:
            return _checked(specs, *options)
        except TypeError:
            try:
                hash((specs, options))
            except TypeError:
                # Sizes that are symbolic, or an option of a kind that no cache can hold.
                return _check(specs, *options)
            raise

    def plan(self, problem: Problem) -> Plan | None:
        """Plan a call on the host; that on a GPU depends on the device."""
        return _planned(problem) if problem.device == "cpu" else None

    def check(self, arrays: Mapping[str, Any], options: Options) -> tuple[Problem, Plan | None]:
        """Check the arguments of a call, and plan it where that needs no device."""
        problem = self.problem(arrays, options)
        return problem, self.plan(problem)

    def loss(self, arrays: Mapping[str, Any], options: Options) -> tuple[Any, Any]:
        """Return the loss, and lse: what autodiff may see of a call."""
        problem, plan = self.check(arrays, options)
        evaluation = self.evaluate(problem, plan, arrays, differentiate=False)
        return evaluation.loss, evaluation.lse

    def evaluate(
        self,
        problem: Problem,
        plan: Plan | None,
        arrays: Mapping[str, Any],
        *,
        differentiate: bool,
        once: bool = False,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Compute a loss, and with `differentiate` what its pullback needs.

        With `once` there will be one pullback at most, which may use up what it needs. A plan is
        made for the host; without one the arrays are on a device.
        """
        like = arrays["e"]
        if plan is None:
            return self._evaluate_on_device(problem, arrays, differentiate)
        host = HostCall(problem, plan, self._host_arrays(arrays), progress)
        host.run_forward(keep_columns=differentiate, once=once and differentiate)

        def pullback(dloss: Any, dlse: Any) -> tuple[Any, Any, Any]:
            shape = problem.batch_shape if problem.reduction == "none" else ()
            upstream = self._upstream("dloss", dloss, shape, problem.device)
            upstream_lse = None
            if dlse is not None:
                upstream_lse = self._upstream("dlse", dlse, problem.batch_shape, problem.device)
            return returned(host.pullback(upstream, upstream_lse))

        def returned(gradients: HostGradients) -> tuple[Any, Any, Any]:
            e, c, bias = (
                None if gradient is None else self.from_host(gradient, like)
                for gradient in (gradients.e, gradients.c, gradients.bias)
            )
            return e, c, bias

        return Evaluation(
            loss=self.from_host(host.loss(), like),
            lse=self.from_host(host.lse(), like),
            pullback=pullback,
            gradients=lambda: returned(host.pullback(np.ones(()), None)),
        )

    def statistics(
        self, problem: Problem, plan: Plan | None, arrays: Mapping[str, Any]
    ) -> tuple[Any, Any, Any, Any]:
        """Return log_prob, lse, entropy and argmax of each token."""
        if plan is None:
            like = arrays["e"]
            views = {name: self.device_view(array) for name, array in arrays.items()}
            memory = self.device_memory(like)
            found = gpu.statistics(memory, problem, views)
            if self.waits_on_device:
                memory.wait()
            log_prob, lse, entropy, argmax = (self.from_device(a, like) for a in found)
            return log_prob, lse, entropy, argmax
        host = HostCall(problem, plan, self._host_arrays(arrays))
        host.run_forward(keep_columns=False, statistics=True)
        like = arrays["e"]
        log_prob, lse, entropy, argmax = (self.from_host(a, like) for a in host.statistics())
        return log_prob, lse, entropy, argmax

    def filter_statistics(
        self, problem: Problem, plan: Plan | None, arrays: Mapping[str, Any]
    ) -> tuple[str | None, float, float, float | None]:
        """Return the filter in force, its eps, the fraction it keeps, and what it leaves out."""
        chosen = choose_filter(problem)
        if chosen.kind is None:
            return None, 0.0, 1.0, 0.0
        passed, pairs, tokens, left = self._filter_effect(problem, plan, arrays)
        missing = None if problem.softcap is not None else 1.0 - left / tokens if tokens else 0.0
        return chosen.kind, chosen.eps, passed / pairs if pairs else 0.0, missing

    def _filter_effect(
        self, problem: Problem, plan: Plan | None, arrays: Mapping[str, Any]
    ) -> tuple[int, int, int, float]:
        """Return the pairs that pass the filter, all pairs, the tokens, and the probability left.

        A pair is of a row tile and a class; the probability that the filtered gradients stand for
        is summed over the tokens.
        """
        if plan is None:
            views = {name: self.device_view(array) for name, array in arrays.items()}
            memory = self.device_memory(arrays["e"])
            *numbers, left = gpu.filter_effect(memory, problem, views)
            passed, pairs, tokens = numbers
            return passed, pairs, tokens, self.device_total(left)
        host_arrays = self._host_arrays(arrays)
        if host_arrays.bias is None:
            bias = np.zeros(problem.vocab, host_arrays.e.dtype)
            host_arrays = host_arrays._replace(bias=bias)
            problem = dataclasses.replace(problem, has_bias=True)
        host = HostCall(problem, plan, host_arrays)
        host.run_forward(keep_columns=True)
        passed, pairs, tokens, sums = host.filter_effect()
        return passed, pairs, tokens, float(sums.astype(np.float64).sum())

    def device_total(self, array: Any) -> float:
        """Return the sum of an array that `device_memory` has made."""
        return float(array.get().astype(np.float64).sum())

    def _evaluate_on_device(
        self, problem: Problem, arrays: Mapping[str, Any], differentiate: bool
    ) -> Evaluation:
        like = arrays["e"]
        memory = self.device_memory(like)
        views = {name: self.device_view(array) for name, array in arrays.items()}
        loss, lse, _, call = gpu.evaluate(memory, problem, views, differentiate=differentiate)
        if self.waits_on_device:
            memory.wait()
        by_token = problem.batch_shape if problem.reduction == "none" else ()

        def checked(name: str, given: Any, shape: tuple[int, ...]) -> Any:
            if isinstance(given, int | float) and not isinstance(given, bool) and shape == ():
                return memory.full((), problem.accumulator, float(given))
            self._check_taken(name, given, shape)
            check_upstream(name, self.describe(name, given), shape, problem.device)
            return self.device_view(given)

        def returned(gradients: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            if self.waits_on_device:
                self.device_memory(like).wait()
            e, c, bias = (
                None if gradient is None else self.from_device(gradient, like)
                for gradient in gradients
            )
            return e, c, bias

        def pullback(dloss: Any, dlse: Any) -> tuple[Any, Any, Any]:
            upstream = checked("dloss", dloss, by_token)
            upstream_lse = None if dlse is None else checked("dlse", dlse, problem.batch_shape)
            return returned(call.pullback(self.device_memory(like), upstream, upstream_lse))

        return Evaluation(
            loss=self.from_device(loss, like),
            lse=None if lse is None else self.from_device(lse, like),
            pullback=pullback,
            gradients=lambda: returned(call.pullback(memory, None, None)),
        )

    def _check_taken(self, name: str, given: Any, shape: tuple[int, ...]) -> None:
        if not self.takes(given):
            kind = type(given)
            raise TypeError(
                f"{name} must be an array of {self.name} of shape {shape}, "
                f"got {kind.__module__}.{kind.__qualname__}"
            )

    def _host_arrays(self, arrays: Mapping[str, Any]) -> Arrays:
        return Arrays(**{name: self.to_host(array) for name, array in arrays.items()})

    def _upstream(self, name: str, given: Any, shape: tuple[int, ...], device: str) -> Array:
        if isinstance(given, int | float) and not isinstance(given, bool) and shape == ():
            return np.asarray(float(given))
        self._check_taken(name, given, shape)
        check_upstream(name, self.describe(name, given), shape, device)
        return self.to_host(given)
