"""What XLA's handlers share: a call's problem in its attributes, and the arrays by name.

A problem travels as what the caller asked for: each option that is not the default is an attribute
of its own, so that the compiled program says what it computes, in any process.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..plan import saved_words
from ..problem import ArraySpec, Options, Problem
from .xla_ffi import Attribute, Buffer, Call

_SHAPED = ("return_lse", "check_targets")  # what the results and the caller have settled
_DEFAULTS = {name: value for name, value in Options._field_defaults.items() if name not in _SHAPED}


def attributes_of(problem: Problem, **lists: tuple[str, ...]) -> dict[str, Any]:
    """Return the attributes of a call: options that are not defaults, and lists of names."""
    given: dict[str, Any] = {}
    for name, default in _DEFAULTS.items():
        value = getattr(problem, name)
        if name == "filter_eps" and value is None:
            value = "auto"
        if value != default:
            given[name] = _encode(value)
    return given | {name: " ".join(names) for name, names in lists.items()}


def _encode(value: Any) -> Any:
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, float):
        return np.float64(value)
    if isinstance(value, int):
        # XLA's integers have 64 bits; a seed is unsigned, and ignore_index any integer.
        return np.int64(value) if -(2**63) <= value < 2**63 else str(value)
    return "None" if value is None else value


def _decode(name: str, value: Attribute) -> Any:
    if value == "None":
        return None
    return int(value) if name in ("ignore_index", "seed") else value


@functools.lru_cache(maxsize=256)
def saved_bytes(problem: Problem) -> int:
    """Return the size of what a forward leaves for a backward, on any platform.

    The platform is not known where a program is traced; the larger of the two serves both.
    """
    places = (dataclasses.replace(problem, device=device) for device in ("cpu", "cuda:0"))
    return max(8 * saved_words(place) for place in places)


class XlaCall(NamedTuple):
    """A call of a handler: its problem, the named arrays, and the rest of its buffers."""

    problem: Problem
    lists: Mapping[str, tuple[str, ...]]
    arrays: dict[str, Buffer]
    others: tuple[Buffer, ...]
    results: tuple[Buffer, ...]


def read(call: Call) -> XlaCall:
    """Return what a call of a handler asks for.

    The attribute ``arrays`` names the first arguments.
    """
    specs = tuple((buffer.dtype, buffer.shape) for buffer in call.arguments)
    problem, lists = _problem(call.attributes, specs)
    names = lists["arrays"]
    arrays = dict(zip(names, call.arguments, strict=False))
    return XlaCall(problem, lists, arrays, call.arguments[len(names) :], call.results)


@functools.lru_cache(maxsize=256)
def _problem(
    attributes: tuple[tuple[str, Attribute], ...], specs: tuple[tuple[str, tuple[int, ...]], ...]
) -> tuple[Problem, dict[str, tuple[str, ...]]]:
    options, lists = {}, {}
    for name, value in attributes:
        if name in _DEFAULTS:
            options[name] = _decode(name, value)
        else:
            lists[name] = tuple(str(value).split())
    arrays = {
        name: ArraySpec(shape, dtype)
        for name, (dtype, shape) in zip(lists["arrays"], specs, strict=False)
    }
    return Problem.check(arrays, Options(**options)), lists
