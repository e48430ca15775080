"""The problem: shapes, dtypes and options of one call, checked once.

Every complaint about an argument is raised here, before any work, and says which argument it is
about, what was given and what is accepted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16")
INTEGER_DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
REDUCTIONS = ("mean", "sum", "none")
GRADIENT_FILTERS = ("unbiased", "threshold")
DEVICES = ("cpu", "cuda")
UNPLACED = "unplaced"
"""The device of arrays that are traced: a compiler will choose it."""


class ArraySpec(NamedTuple):
    """What an array argument looks like from outside, in any framework.

    Attributes
    ----------
    shape : tuple of int
    dtype : str
        The dtype's common name, such as ``"bfloat16"``.
    device : str
        ``"cpu"``, ``"cuda:0"``, ... or `UNPLACED`.
    """

    shape: tuple[int, ...]
    dtype: str
    device: str = "cpu"


class Options(NamedTuple):
    """The options of a call as the caller gave them; `Problem` is what they mean once checked."""

    ignore_index: Any = -100
    softcap: Any = None
    reduction: Any = "mean"
    shift: Any = 0
    return_lse: Any = False
    filter_eps: Any = "auto"
    gradient_filter: Any = "unbiased"
    seed: Any = None
    logit_scale: Any = 1.0
    label_smoothing: Any = 0.0
    z_loss: Any = 0.0
    filter_e_grad: Any = True
    filter_c_grad: Any = True
    check_targets: Any = False
    workspace_bytes: Any = None


@dataclass(frozen=True)
class Problem:
    """One call, checked.

    Attributes
    ----------
    batch_shape : tuple of int
        Shape of the targets. ``e`` has shape ``(*batch_shape, dim)``.
    dim, vocab : int
        D and V.
    dtype : str
        The one floating dtype of e, c and bias, a member of `FLOAT_DTYPES`.
    device : str
    has_bias : bool
    shift : int
        ``e[..., :-shift, :]`` is paired with ``targets[..., shift:]``.
    filter_eps : float or None
        None stands for ``"auto"``, 0.0 for no filter.
    gradient_filter : str or None
    seed : int or None
        None: derived from the targets.
    workspace_bytes : int or None
        None: the plan's default.
    """

    batch_shape: tuple[int, ...]
    dim: int
    vocab: int
    dtype: str
    device: str
    has_bias: bool
    ignore_index: int
    softcap: float | None
    reduction: str
    shift: int
    return_lse: bool
    filter_eps: float | None
    gradient_filter: str | None
    seed: int | None
    logit_scale: float
    label_smoothing: float
    z_loss: float
    filter_e_grad: bool
    filter_c_grad: bool
    check_targets: bool
    workspace_bytes: int | None

    def __hash__(self) -> int:
        """Hash once: a call looks up what was made for problems like its own."""
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in dataclasses.fields(self)))

    @functools.cached_property
    def tokens(self) -> int:
        """Number of targets, ignored ones included."""
        return math.prod(self.batch_shape)

    @functools.cached_property
    def accumulator(self) -> str:
        """Dtype of sums, of the loss and of lse: float64 for float64, else float32."""
        return "float64" if self.dtype == "float64" else "float32"

    @classmethod
    def check(cls, arrays: dict[str, ArraySpec], options: Options) -> Problem:
        """Check the arguments of a call against each other.

        Parameters
        ----------
        arrays : dict of str to ArraySpec
            ``e``, ``c`` and ``targets``; ``bias``, ``class_weight`` and ``token_weight`` where
            given.
        options : Options

        Returns
        -------
        Problem

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was given and what is accepted.
        """
        e, c, targets = arrays["e"], arrays["c"], arrays["targets"]
        _check_devices(arrays)
        _check_dtypes(arrays)
        _check_shapes(arrays)
        shift = _integer("shift", options.shift, low=0)
        if shift:
            if not targets.shape:
                raise ValueError("shift needs a sequence axis; targets have shape (), accepted: 0")
            if shift >= targets.shape[-1]:
                raise ValueError(
                    f"shift must be smaller than the sequence length {targets.shape[-1]} "
                    f"(the last axis of targets), got {shift}"
                )
        return cls(
            batch_shape=targets.shape,
            dim=e.shape[-1],
            vocab=c.shape[0],
            dtype=e.dtype,
            device=e.device,
            has_bias="bias" in arrays,
            ignore_index=_integer("ignore_index", options.ignore_index),
            softcap=_softcap(options.softcap),
            reduction=_choice("reduction", options.reduction, REDUCTIONS),
            shift=shift,
            return_lse=_flag("return_lse", options.return_lse),
            filter_eps=read_filter_eps(options.filter_eps),
            gradient_filter=(
                None
                if options.gradient_filter is None
                else _choice("gradient_filter", options.gradient_filter, GRADIENT_FILTERS, "None")
            ),
            seed=(
                None
                if options.seed is None
                else _integer("seed", options.seed, low=0, high=2**64 - 1, also="None")
            ),
            logit_scale=_real("logit_scale", options.logit_scale),
            label_smoothing=_real("label_smoothing", options.label_smoothing, low=0.0, high=1.0),
            z_loss=_real("z_loss", options.z_loss, low=0.0),
            filter_e_grad=_flag("filter_e_grad", options.filter_e_grad),
            filter_c_grad=_flag("filter_c_grad", options.filter_c_grad),
            check_targets=_flag("check_targets", options.check_targets),
            workspace_bytes=(
                None
                if options.workspace_bytes is None
                else _integer("workspace_bytes", options.workspace_bytes, low=1, also="None")
            ),
        )


def check_target_values(targets: npt.NDArray[Any], vocab: int, ignore_index: int) -> None:
    """Raise ValueError for the first target that is neither in [0, vocab) nor ignore_index.

    Parameters
    ----------
    targets : ndarray of integers, any shape
    vocab, ignore_index : int
    """
    wrong = (targets < 0) | (targets >= vocab)
    wrong &= targets != ignore_index
    if wrong.any():
        position = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
        where = ", ".join(str(int(i)) for i in position)
        raise ValueError(
            f"targets must lie in [0, {vocab}) or equal ignore_index={ignore_index}, "
            f"got {int(targets[position])} at targets[{where}]"
        )


def check_weight_values(name: str, weight: npt.NDArray[Any]) -> None:
    """Raise ValueError for the first weight that is negative, NaN or infinite."""
    wrong = ~(np.isfinite(weight) & (weight >= 0))
    if wrong.any():
        position = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
        where = ", ".join(str(int(i)) for i in position)
        raise ValueError(
            f"{name} must be non-negative and finite, got {float(weight[position])} "
            f"at {name}[{where}]"
        )


def check_upstream(name: str, given: ArraySpec, shape: tuple[int, ...], device: str) -> None:
    """Check a gradient handed to a pullback: `name` is ``dloss`` or ``dlse``."""
    if given.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must have a dtype of {_list(FLOAT_DTYPES)}, got {given.dtype}")
    if given.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {given.shape}")
    if given.device != device and UNPLACED not in (given.device, device):
        raise ValueError(f"{name} must be on {device} like e, got {given.device}")


def read_filter_eps(value: Any) -> float | None:
    """Return the option as `Problem` has it: None for ``"auto"``, 0.0 for no filter."""
    what = "filter_eps must be 'auto', None (no filter) or a number in [0, 1)"
    if value is None:
        return 0.0
    if isinstance(value, str):
        if value == "auto":
            return None
        raise ValueError(f"{what}, got {value!r}")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{what}, got {_show(value)}")
    number = float(value)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"{what}, got {number}")
    return number


def _check_dtypes(arrays: dict[str, ArraySpec]) -> None:
    for name in ("e", "c", "bias"):
        if name in arrays and arrays[name].dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{name} must have a dtype of {_list(FLOAT_DTYPES)}, got {arrays[name].dtype}"
            )
    for name in ("c", "bias"):
        if name in arrays and arrays[name].dtype != arrays["e"].dtype:
            raise TypeError(
                f"{name} must have the dtype of e, {arrays['e'].dtype}, got {arrays[name].dtype}"
            )
    if arrays["targets"].dtype not in INTEGER_DTYPES:
        raise TypeError(
            f"targets must have an integer dtype (class indices), got {arrays['targets'].dtype}"
        )
    for name in ("class_weight", "token_weight"):
        if name in arrays and arrays[name].dtype not in (*FLOAT_DTYPES, *INTEGER_DTYPES, "bool"):
            raise TypeError(
                f"{name} must have a floating, integer or bool dtype, got {arrays[name].dtype}"
            )


def _check_devices(arrays: dict[str, ArraySpec]) -> None:
    placed = {name: spec.device for name, spec in arrays.items() if spec.device != UNPLACED}
    if not placed:
        return
    first, device = next(iter(placed.items()))
    for name, other in placed.items():
        if other != device:
            raise ValueError(
                f"all arrays must be on one device: {first} is on {device}, {name} on {other}"
            )
    if device.partition(":")[0] not in DEVICES:
        raise ValueError(
            f"{first} is on {device}; this version computes on {_list(DEVICES)}: "
            "move the arrays there"
        )


def _check_shapes(arrays: dict[str, ArraySpec]) -> None:
    e, c, targets = arrays["e"], arrays["c"], arrays["targets"]
    if len(e.shape) < 1:
        raise ValueError("e must have shape (..., D), got a 0-d array")
    if len(c.shape) != 2:
        raise ValueError(f"c must have shape (V, D), got {len(c.shape)}-d shape {c.shape}")
    if e.shape[-1] != c.shape[1]:
        raise ValueError(
            f"c must have shape (V, D) with D = {e.shape[-1]}, the last axis of e {e.shape}, "
            f"got {c.shape}"
        )
    if targets.shape != e.shape[:-1]:
        raise ValueError(
            f"targets must have shape {e.shape[:-1]}, that of e {e.shape} without its last axis, "
            f"got {targets.shape}"
        )
    expected = {
        "bias": ((c.shape[0],), "(V,)"),
        "class_weight": ((c.shape[0],), "(V,)"),
        "token_weight": (targets.shape, "that of targets"),
    }
    for name, (shape, meaning) in expected.items():
        if name in arrays and arrays[name].shape != shape:
            raise ValueError(f"{name} must have shape {shape}, {meaning}, got {arrays[name].shape}")


def _list(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]


def _choice(name: str, value: Any, accepted: tuple[str, ...], also: str = "") -> str:
    quoted = tuple(repr(choice) for choice in accepted) + ((also,) if also else ())
    if not isinstance(value, str):
        raise TypeError(f"{name} must be {_list(quoted)}, got {_show(value)}")
    if value not in accepted:
        raise ValueError(f"{name} must be {_list(quoted)}, got {value!r}")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {_show(value)}")
    return bool(value)


def _integer(
    name: str, value: Any, low: int | None = None, high: int | None = None, also: str = ""
) -> int:
    what = "an integer" if low is None else f"an integer of at least {low}"
    if high is not None:
        what = f"an integer from {low} to {high}"
    if also:
        what += f" or {also}"
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be {what}, got {_show(value)}") from None
    if (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"{name} must be {what}, got {number}")
    return int(number)


def _real(name: str, value: Any, low: float | None = None, high: float | None = None) -> float:
    what = "a finite number"
    if low is not None:
        what += f" of at least {low:g}" if high is None else f" from {low:g} to {high:g}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {what}, got {_show(value)}")
    number = float(value)
    in_range = (low is None or number >= low) and (high is None or number <= high)
    if not (math.isfinite(number) and in_range):
        raise ValueError(f"{name} must be {what}, got {number}")
    return number


def _softcap(value: Any) -> float | None:
    what = "softcap must be a positive finite number or None (no softcap)"
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{what}, got {_show(value)}")
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{what}, got {number}")
    return number


def _show(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
