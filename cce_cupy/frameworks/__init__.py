"""One module a framework: what its arrays look like, and how a call travels to a backend and back.

A framework is imported only when the caller's arrays are of it, so it has been imported already.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from .framework import Framework
from .numpy import NumpyFramework

__all__ = ["Framework", "select"]


def select(arrays: Mapping[str, Any]) -> Framework:
    """Return the framework that all arrays of a call are of.

    Parameters
    ----------
    arrays : mapping of str to array
        By argument name.

    Raises
    ------
    TypeError
        When an argument is not an array, or the arrays come from several frameworks.
    """
    chosen: Framework | None = None
    first = ""
    for name, array in arrays.items():
        framework = _of_type.get(type(array)) or _framework_of(name, array)
        if framework is chosen:
            continue
        if chosen is None:
            chosen, first = framework, name
        elif framework.name != chosen.name:
            raise TypeError(
                f"all arrays must come from one framework: {first} is of {chosen.name}, "
                f"{name} of {framework.name}"
            )
    assert chosen is not None
    return chosen


_of_type: dict[type, Framework] = {}
"""Frameworks by the type of their arrays, as they are met."""


def _framework_of(name: str, array: Any) -> Framework:
    found = _named_framework(array)
    if found is None:
        return _dlpack_framework(name, array)
    _of_type[type(array)] = found
    return found


def _named_framework(array: Any) -> Framework | None:
    if NumpyFramework.owns(array):
        return NumpyFramework()
    if "torch" in sys.modules:
        from .torch_autograd import TorchAutogradFramework

        if TorchAutogradFramework.owns(array):
            return TorchAutogradFramework()
    if "jax" in sys.modules:
        from .jax import JaxFramework

        if JaxFramework.owns(array):
            return JaxFramework()
    if "cupy" in sys.modules:
        from .cupy import CupyFramework

        if CupyFramework.owns(array):
            return CupyFramework()
    return None


def _dlpack_framework(name: str, array: Any) -> Framework:
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        from .dlpack import DlpackFramework

        return DlpackFramework(array)
    raise TypeError(
        f"{name} must be an array of NumPy, torch, JAX or another framework with __dlpack__, "
        f"got {type(array).__name__}"
    )
