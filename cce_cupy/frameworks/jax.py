"""JAX arrays, concrete or traced by its transformations, on the CPU and on GPUs.

All calls take one road, eager ones too: primitives of `jax_primitives`, which XLA compiles to
calls of the NumPy backend or of the kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..plan import Plan
from ..problem import (
    UNPLACED,
    ArraySpec,
    Options,
    Problem,
    check_target_values,
    check_upstream,
    check_weight_values,
)
from . import jax_primitives
from .framework import Evaluation, Framework
from .host import Progress

_PLATFORMS = {"gpu": "cuda"}
"""JAX's names of platforms where ours differ."""


class JaxFramework(Framework):
    """JAX's arrays and tracers."""

    name = "JAX"

    @staticmethod
    def owns(array: Any) -> bool:
        """Tell whether an object is an array of this framework."""
        return isinstance(array, jax.Array)

    def describe(self, name: str, array: Any) -> ArraySpec:
        """Return what an argument looks like."""
        if isinstance(array, jax.core.Tracer):
            return ArraySpec(tuple(array.shape), array.dtype.name, UNPLACED)
        # XLA gathers what is spread over several.
        place = min(map(_place, array.devices()))
        return ArraySpec(tuple(array.shape), array.dtype.name, place)

    def check_options(self, options: Options) -> None:
        """Raise for options that are traced: they decide what is compiled."""
        for name, value in options._asdict().items():
            if isinstance(value, jax.core.Tracer):
                raise TypeError(
                    f"{name} is traced, but options decide what is compiled: pass a Python value, "
                    f"for an argument of a jitted function by static_argnames={name!r}"
                )

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
        """Compute a loss, and with `differentiate` what its pullback needs."""
        problem, given = _prepare(problem, arrays)
        outputs = ["loss"]
        if problem.return_lse:
            outputs.append("lse")
        if differentiate:
            outputs.append("saved")
        found = jax_primitives.forward(problem, given, tuple(outputs))
        wanted = tuple(name for name in jax_primitives.DIFFERENTIABLE if name in given)
        shape = found["loss"].shape

        def pulled_back(*upstream: Any) -> tuple[Any, Any, Any]:
            gradients = jax_primitives.backward(problem, given, found["saved"], upstream, wanted)
            named = dict(zip(wanted, gradients, strict=True))
            return named["e"], named["c"], named.get("bias")

        def checked(name: str, value: Any, shape: tuple[int, ...]) -> Any:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number and shape == ()):
                self._check_taken(name, value, shape)
                spec = self.describe(name, value)
                check_upstream(name, spec, shape, self.describe("e", arrays["e"]).device)
            return jnp.asarray(value, problem.accumulator)

        def pullback(dloss: Any, dlse: Any) -> tuple[Any, Any, Any]:
            upstream = [checked("dloss", dloss, shape)]
            if dlse is not None:
                upstream.append(checked("dlse", dlse, problem.batch_shape))
            return pulled_back(*upstream)

        return Evaluation(
            loss=found["loss"],
            lse=found.get("lse"),
            pullback=pullback,
            gradients=lambda: pulled_back(jnp.ones(shape, problem.accumulator)),
        )

    def statistics(
        self, problem: Problem, plan: Plan | None, arrays: Mapping[str, Any]
    ) -> tuple[Any, Any, Any, Any]:
        """Return log_prob, lse, entropy and argmax of each token."""
        problem, given = _prepare(dataclasses.replace(problem, reduction="none"), arrays)
        names = ("log_prob", "lse", "entropy", "argmax")
        found = jax_primitives.forward(problem, given, names)
        words = found["argmax"]
        argmax = words[..., 0]
        if jax.dtypes.canonicalize_dtype(np.int64) == np.int64:
            argmax = jax.lax.bitcast_convert_type(words, np.int64)
        return found["log_prob"], found["lse"], found["entropy"], argmax


def _prepare(problem: Problem, arrays: Mapping[str, Any]) -> tuple[Problem, dict[str, Any]]:
    """Check the values that are there, and convert weights to the dtype of the sums.

    A program does not depend on the device that its arrays happened to be on.
    """
    checked = _check_values(problem, arrays)
    given = {
        name: array.astype(problem.accumulator) if name.endswith("_weight") else array
        for name, array in arrays.items()
    }
    check_targets = problem.check_targets and not checked
    return dataclasses.replace(problem, device=UNPLACED, check_targets=check_targets), given


def _check_values(problem: Problem, arrays: Mapping[str, Any]) -> bool:
    """Raise for wrong values of concrete arrays, where the host can see them without waiting.

    Return whether targets were checked.
    """
    checked = False
    for name in ("targets", "class_weight", "token_weight"):
        array = arrays.get(name)
        if array is None or isinstance(array, jax.core.Tracer) or not array.is_fully_addressable:
            continue
        on_host = all(device.platform == "cpu" for device in array.devices())
        if name != "targets":
            if on_host:
                check_weight_values(name, np.asarray(array))
        elif on_host or problem.check_targets:
            check_target_values(np.asarray(array), problem.vocab, problem.ignore_index)
            checked = True
    return checked


def _place(device: Any) -> str:
    platform = _PLATFORMS.get(device.platform, device.platform)
    return platform if platform == "cpu" else f"{platform}:{device.local_hardware_id}"
