"""The loss in causal language models of Hugging Face transformers.

A patched model still runs its own forward. While it is given labels, its head computes the loss
from the hidden states and hands on logits without entries, which whatever the model does to its
logits leaves as they are; where the model calls its loss function, it gets that loss.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from .api import linear_cross_entropy

__all__ = ["patch_transformers"]

_OPTIONS = (
    "filter_eps",
    "gradient_filter",
    "seed",
    "label_smoothing",
    "z_loss",
    "filter_e_grad",
    "filter_c_grad",
    "workspace_bytes",
)


def patch_transformers(model: Any, **options: Any) -> Callable[[], None]:
    """Let a causal language model compute its loss without logits.

    ``model(..., labels=labels)`` then computes the loss from the hidden states and the head's
    weight; ``logits`` of its output have no entries (shape (..., 0)). Without labels, as in
    generation, the model is as before.

    What the model does to its logits (a scale, a softcap) is found out by letting its forward
    work on a few made-up logits, without running the decoder, and so is its loss: the
    cross-entropy of labels shifted by one, with ``ignore_index`` and ``num_items_in_batch``.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        A decoder with one linear head, such as Llama's; with tied weights or without. The head
        may have a LoRA adapter without dropout, or be one of PEFT's ``modules_to_save``. Patch it
        after its adapters are added, and before it is wrapped or sharded
        (``DistributedDataParallel``, ``fully_shard``, ``torch.compile``).
    **options
        Keyword arguments of `cce_cupy.linear_cross_entropy`: filter_eps, gradient_filter, seed,
        label_smoothing, z_loss, filter_e_grad, filter_c_grad, workspace_bytes.

    Returns
    -------
    callable
        Called without arguments, ``undo()``, it makes the model what it was. It may be called once.

    Raises
    ------
    TypeError
        For another kind of object, and for an option that is not among these.
    ValueError
        For a model that cannot be served, with the reason.

    See Also
    --------
    cce_cupy.linear_cross_entropy

    Notes
    -----
    Where no label counts, the loss is 0 and not NaN. The loss is formed in float32, or in float64
    for a model in float64, whose unpatched loss transformers rounds to float32.
    """
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"{name} is not an option here; accepted: {', '.join(_OPTIONS)}")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            "model must be a transformers.PreTrainedModel, or a PEFT model of one, got "
            f"{type(model).__module__}.{type(model).__qualname__}: patch it before it is wrapped"
        )
    return _Patch(inner, options).undo


class _Request(NamedTuple):
    """What a forward with labels asks of the head."""

    labels: torch.Tensor
    ignore_index: int
    items: Any


class _Treatment(NamedTuple):
    """What a model makes of its logits: softcap(scale * logits)."""

    scale: float
    softcap: float | None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits that enter the loss."""
        scaled = logits * self.scale
        if self.softcap is None:
            return scaled
        return self.softcap * torch.tanh(scaled / self.softcap)


class _Patch:
    """A patched model: its methods stand in for the model's own.

    Bound methods, not closures: a deep copy of the model has a patch of its own.
    """

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        self.model, self.options, self.name = model, options, type(model).__name__
        if isinstance(getattr(model.forward, "__self__", None), _Patch):
            raise ValueError(f"this {self.name} is patched already: undo that first")
        self.head = _find_head(model)
        _head_weights(self.head, self.name)
        self.position = self._find_labels()
        self.treatment = _examine(model, self.head)
        self.request: _Request | None = None
        self.loss: torch.Tensor | None = None
        self.original = model.forward
        self.original_head = self.head.forward
        self.original_loss = model.loss_function
        self.before = [
            (module, name, module.__dict__.get(name))
            for module, name in (
                (model, "forward"),
                (self.head, "forward"),
                (model, "_loss_function"),
            )
        ]

        @functools.wraps(type(model).forward)  # its signature tells Trainer what it accepts
        def forward(patch: _Patch, *args: Any, **kwargs: Any) -> Any:
            return patch.forward(*args, **kwargs)

        model.forward = types.MethodType(forward, self)
        self.head.forward = self.head_forward
        model._loss_function = self.loss_function

    def undo(self) -> None:
        """Make the model what it was."""
        if not self.before:
            raise ValueError(f"the patch of this {self.name} has been undone already")
        for module, name, value in self.before:
            if value is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = value
        self.before = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own forward; with labels its head computes the loss."""
        labels = args[self.position] if len(args) > self.position else kwargs.get("labels")
        if labels is None:
            return self.original(*args, **kwargs)
        ignore_index = kwargs.get("ignore_index", -100)
        shifted = kwargs.get("shift_labels")
        if shifted is None:
            shifted = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        outer = self.request, self.loss
        self.request = _Request(shifted, ignore_index, kwargs.get("num_items_in_batch"))
        self.loss = None
        try:
            return self.original(*args, **kwargs)
        finally:
            self.request, self.loss = outer

    def head_forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the loss where there are labels, and return logits without entries.

        They depend on the loss, so that hooks on what the head returns, by which FSDP gathers its
        weight for the backward, run before the gradient of the loss.
        """
        request = self.request
        if request is None:
            return self.original_head(hidden, *args, **kwargs)
        if self.loss is not None:
            raise ValueError(f"{self.name} calls its head more than once in a forward with labels")
        weight, bias = _head_weights(self.head, self.name)
        scale, softcap = self.treatment
        if bias is not None and scale != 1.0:
            bias = bias * scale
        loss: torch.Tensor = linear_cross_entropy(
            hidden,
            weight,
            request.labels.to(hidden.device),
            bias,
            ignore_index=request.ignore_index,
            softcap=softcap,
            logit_scale=scale,
            reduction="mean" if request.items is None else "sum",
            **self.options,
        )
        if request.items is not None:
            items = request.items
            loss = loss / (items.to(loss.device) if torch.is_tensor(items) else items)
        self.loss = loss
        return loss.to(hidden.dtype).expand(*hidden.shape[:-1], 1)[..., :0]

    def loss_function(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the loss that the head has computed."""
        if self.request is None or self.loss is None:
            return self.original_loss(logits, *args, **kwargs)
        return self.loss + logits.sum()

    def _find_labels(self) -> int:
        names = list(inspect.signature(self.model.forward).parameters)
        if "labels" not in names:
            raise ValueError(f"{self.name} cannot be served: its forward takes no labels")
        return names.index("labels")


def _find_head(model: Any) -> Any:
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} cannot be served: it is an encoder with a decoder")
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{name} cannot be served: it has no head (get_output_embeddings)")
    return head


def _head_weights(head: Any, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the weight and bias of a head as it is now."""
    kind = type(head)
    if isinstance(head, torch.nn.Linear) and kind.forward is torch.nn.Linear.forward:
        return head.weight, head.bias
    if kind.__module__.partition(".")[0] == "peft":
        return _adapted_weights(head, name)
    raise ValueError(
        f"{name} cannot be served: its head is a {kind.__module__}.{kind.__qualname__}; accepted "
        "are torch.nn.Linear, and with PEFT one with a LoRA adapter or in modules_to_save"
    )


def _adapted_weights(head: Any, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    from peft.tuners.lora import Linear
    from peft.utils import ModulesToSaveWrapper

    if isinstance(head, ModulesToSaveWrapper):
        chosen = head.original_module
        if not head.disable_adapters and head.active_adapters[0] in head.modules_to_save:
            chosen = head.modules_to_save[head.active_adapters[0]]
        return _head_weights(chosen, name)
    if not isinstance(head, Linear):
        raise ValueError(
            f"{name} cannot be served: its head has an adapter of {type(head).__qualname__}; "
            "accepted are LoRA's on a linear layer, and modules_to_save"
        )
    weight, bias = _head_weights(head.get_base_layer(), name)
    if head.disable_adapters or head.merged:
        return weight, bias
    for adapter in head.active_adapters:
        if adapter not in head.lora_A:
            continue
        dropout = getattr(head.lora_dropout[adapter], "p", 0.0)
        variant = adapter in getattr(head, "lora_variant", {})
        if dropout or variant or head.lora_bias[adapter]:
            reason = f"dropout of {dropout}" if dropout else "a variant such as DoRA, or a bias"
            raise ValueError(
                f"{name} cannot be served: the LoRA adapter {adapter!r} of its head has {reason}, "
                "which is not a change of the head's weight"
            )
        delta = head.lora_B[adapter].weight @ head.lora_A[adapter].weight
        weight = weight + (delta * head.scaling[adapter]).to(weight.dtype)
    return weight, bias


class _Decoded(MoeModelOutputWithPast):
    """What a decoder would return: hidden states, and None for all else that models ask for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextlib.contextmanager
def _overridden(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes of modules for a while."""
    before = [(module, name, module.__dict__.get(name)) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            module.__dict__[name] = value
        yield
    finally:
        for module, name, value in before:
            if value is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value


def _examine(model: Any, head: Any) -> _Treatment:
    """Find out what a model's forward makes of logits, and that its loss is the usual one."""
    name, tokens = type(model).__name__, 8
    vocab, dim = _head_weights(head, name)[0].shape
    seen: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []
    loss_function = model.loss_function
    accepted = inspect.signature(model.forward).parameters
    # Routers of experts add to the loss by themselves, and here there are none.
    plain = {"output_router_logits": False} if "output_router_logits" in accepted else {}

    def run(logits: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> None:
        def record(given: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(given)
            losses.append(loss_function(given, *args, **kwargs))
            return losses[-1]

        hidden = torch.zeros(1, tokens, dim, dtype=logits.dtype)
        decoded = _Decoded(last_hidden_state=hidden)

        def decode(*args: Any, **kwargs: Any) -> Any:
            return decoded

        def take_logits(logits: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
            return record(kwargs.pop("logits") if logits is None else logits, *args, **kwargs)

        decoders = {model.base_model, model.get_decoder()} - {model, None}
        changes = [(decoder, "forward", decode) for decoder in decoders]
        changes += [(head, "forward", lambda *_: logits), (model, "_loss_function", take_logits)]
        with _overridden(changes), torch.no_grad():
            model.forward(input_ids=torch.zeros_like(labels), labels=labels, **plain, **kwargs)

    def attempt(logits: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> None:
        before = len(seen)
        try:
            run(logits, labels, **kwargs)
        except Exception as error:
            raise ValueError(
                f"{name} cannot be served: its forward did not get through an examination on "
                f"made-up logits: {type(error).__name__}: {error}"
            ) from error
        if len(seen) != before + 1 or seen[-1].shape != logits.shape:
            raise ValueError(
                f"{name} cannot be served: its forward does not hand its logits to "
                "self.loss_function as the head returns them, or not once"
            )

    # Small enough for any softcap to be a straight line, too large for any, and in between.
    grid = torch.linspace(-80.0, 80.0, tokens * vocab, dtype=torch.float64)
    logits = grid.reshape(1, tokens, vocab)
    small, large = 2.0**-40, 2.0**100
    extremes = torch.full_like(logits, small)
    extremes[:, 1] = large
    labels = torch.arange(tokens)[None] * 7 % vocab
    labels[0, 2] = -100
    attempt(extremes, labels)
    scale, largest = float(seen[-1][0, 0, 0]) / small, abs(float(seen[-1][0, 1, 0]))
    treatment = _Treatment(scale, largest if largest < large / 2**50 else None)
    attempt(logits, labels)
    expected = treatment(logits)
    if not torch.allclose(seen[-1].double(), expected, rtol=1e-5, atol=1e-5):
        raise ValueError(
            f"{name} cannot be served: what it makes of its logits is neither a scale nor a softcap"
        )
    _check_loss(name, expected, labels, losses[-1], None)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        attempt(logits, labels, num_items_in_batch=torch.tensor(11))
        _check_loss(name, expected, labels, losses[-1], 11)
    return treatment


def _check_loss(
    name: str, logits: torch.Tensor, labels: torch.Tensor, found: Any, items: int | None
) -> None:
    expected = torch.nn.functional.cross_entropy(
        logits[0, :-1], labels[0, 1:], reduction="mean" if items is None else "sum"
    )
    expected = expected / (items or 1)
    if not torch.is_tensor(found) or not torch.allclose(found.double(), expected, rtol=1e-4):
        raise ValueError(
            f"{name} cannot be served: its loss is not the cross-entropy of labels shifted by one "
            f"(on made-up logits {found} instead of {float(expected):.6g})"
        )
