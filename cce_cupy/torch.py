"""The loss as a module of torch.

Importing it registers the operators that a saved program of torch may name.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from .api import linear_cross_entropy
from .frameworks import torch_autograd  # noqa: F401
from .problem import ArraySpec, Options, Problem

__all__ = ["LinearCrossEntropyLoss"]


class LinearCrossEntropyLoss(torch.nn.Module):
    """Cross-entropy of a linear classifier that belongs to the module, without its logits.

    Parameters, ``state_dict`` and arguments are those of ``torch.nn.LinearCrossEntropyLoss`` (of
    torch 2.13), which computes the same from the logits, or in chunks. Classes have one axis
    (no ``out_features``), and targets are class indices.

    Parameters
    ----------
    in_features : int
        D, the size of an embedding.
    num_classes : int
        V.
    bias : bool
        Whether the classifier has a bias.
    device, dtype : optional
        Of the classifier.
    reduction : {"mean", "sum", "none"}
        As for `cce_cupy.linear_cross_entropy`.
    weight : torch.Tensor, shape (V,), optional
        Weight of the loss by target class.
    ignore_index : int, optional
        Tokens with this target cost nothing; None stands for -100.
    label_smoothing : float
        In [0, 1].
    **options
        Keyword arguments of `cce_cupy.linear_cross_entropy`: softcap, shift, return_lse,
        filter_eps, gradient_filter, seed, logit_scale, z_loss, filter_e_grad, filter_c_grad,
        check_targets, workspace_bytes.

    Attributes
    ----------
    linear : torch.nn.Linear
        The classifier: ``linear.weight`` (V, D), and ``linear.bias`` (V,) or None. Assigning an
        embedding's weight to ``linear.weight`` ties the two.
    weight : torch.Tensor or None
        The class weights, a buffer.

    Raises
    ------
    TypeError, ValueError
        For an option that `cce_cupy.linear_cross_entropy` would refuse, naming it.

    See Also
    --------
    cce_cupy.linear_cross_entropy

    Examples
    --------
    >>> import torch
    >>> from cce_cupy.torch import LinearCrossEntropyLoss
    >>> loss = LinearCrossEntropyLoss(8, 1000)
    >>> loss(torch.randn(4, 8), torch.arange(4)).backward()
    >>> loss.linear.weight.grad.shape
    torch.Size([1000, 8])
    """

    weight: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
        weight: torch.Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.reduction, self.ignore_index = reduction, ignore_index
        self.label_smoothing, self.options = label_smoothing, options
        self.linear = torch.nn.Linear(in_features, num_classes, bias, device=device, dtype=dtype)
        if weight is not None and weight.shape != (num_classes,):
            raise ValueError(
                f"weight must have shape ({num_classes},), (V,), got {tuple(weight.shape)}"
            )
        self.register_buffer("weight", weight)
        # As many tokens as any shift asks for.
        tokens = (2**62,)
        specs = {
            "e": ArraySpec((*tokens, in_features), "float32"),
            "c": ArraySpec((num_classes, in_features), "float32"),
            "targets": ArraySpec(tokens, "int64"),
        }
        Problem.check(specs, Options(**self._options()))

    def _options(self) -> dict[str, Any]:
        return {
            "reduction": self.reduction,
            "ignore_index": -100 if self.ignore_index is None else self.ignore_index,
            "label_smoothing": self.label_smoothing,
            **self.options,
        }

    def forward(
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        token_weight: torch.Tensor | None = None,
    ) -> Any:
        """Return the loss, or the loss and each token's log-sum-exp.

        Parameters
        ----------
        input : torch.Tensor, shape (..., D)
            Embeddings.
        target : torch.Tensor of integers, shape (...)
            Class indices, or ignore_index.
        token_weight : torch.Tensor, shape of target, optional
            Weight of each token's whole loss.

        Returns
        -------
        torch.Tensor, or tuple of torch.Tensor
            As `cce_cupy.linear_cross_entropy` returns them.
        """
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            self.linear.bias,
            class_weight=self.weight,
            token_weight=token_weight,
            **self._options(),
        )

    def extra_repr(self) -> str:
        """Return what torch's module shows, and the options that were given."""
        shown = {
            "in_features": self.linear.in_features,
            "num_classes": self.linear.out_features,
            "bias": self.linear.bias is not None,
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            **self.options,
        }
        return ", ".join(f"{name}={value}" for name, value in shown.items())
