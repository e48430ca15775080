"""Others that compute the same loss in PyTorch, as far as they can be imported."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable

import torch
from torch.nn import functional

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""The mean loss of e, c and targets, differentiable."""


class AbsentError(Exception):
    """A peer is not to be had here."""


def materialised(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss by its definition: all logits in memory, and in float32."""
    return functional.cross_entropy((e @ c.T).float(), targets)


def torch_eager() -> Loss:
    return materialised


def torch_compiled() -> Loss:
    # Whoever compiles for many shapes gets the plain function in the end, without a word.
    torch.compiler.reset()
    return torch.compile(materialised, dynamic=False)


def torch_chunked() -> Loss:
    """torch's own loss of this kind with its logits in chunks; newer than many torches."""
    found = getattr(functional, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if found is None or options is None:
        raise AbsentError(f"torch {torch.__version__} has none")
    chosen = options()
    return lambda e, c, targets: found(e, c, targets, options=chosen)


def cut_cross_entropy() -> Loss:
    """The paper's own, with its default filter."""
    _require("cut_cross_entropy")
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def cut_cross_entropy_exact() -> Loss:
    """The same without a filter, and with sums in float32 where this version has that."""
    found = cut_cross_entropy()
    exact: dict[str, object] = {"filter_eps": None}
    if "accum_e_fp32" in inspect.signature(found).parameters:
        exact = {"impl": "cce_exact"}
    return lambda e, c, targets: found(e, c, targets, **exact)


def liger() -> Loss:
    """Liger Kernel's, in Triton; it forms gradients in its forward."""
    _require("liger_kernel")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda e, c, targets: loss(c, e, targets)


def liger_hopper() -> Loss:
    """Liger Kernel's for Hopper, in CuTe; it leaves the reduction to the caller."""
    _require("liger_kernel")
    _require("cutlass")
    # Its check of the targets waits for the device.
    os.environ.setdefault("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "0")
    from liger_kernel.ops.cutedsl.ops import LigerFusedScaledCrossEntropySM90Function

    return lambda e, c, targets: LigerFusedScaledCrossEntropySM90Function.apply(
        e, c, targets
    ).mean()


PEERS: dict[str, Callable[[], Loss]] = {
    "torch eager": torch_eager,
    "torch.compile": torch_compiled,
    "torch chunked": torch_chunked,
    "cut_cross_entropy": cut_cross_entropy,
    "cut_cross_entropy, no filter": cut_cross_entropy_exact,
    "liger_kernel": liger,
    "liger_kernel, Hopper": liger_hopper,
}
"""What makes each; it raises AbsentError, or whatever an import of others' code may."""

ONE_FORWARD = {"cut_cross_entropy, no filter"}
"""Peers whose forward is that of another."""


def _require(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise AbsentError(f"no module {module}")
