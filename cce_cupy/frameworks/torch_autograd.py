"""The loss as operators of torch: what autograd, compilers and torch.func see of it.

The forward and the backward are pure functions of tensors and plain options. What one leaves for
the other, lse and the kept-column bits, is one tensor of 64-bit words whose size the plan knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from ..plan import Plan, Wanted, saved_words
from ..problem import Options, Problem, read_filter_eps
from . import gpu
from .framework import Evaluation
from .host import Arrays, HostCall
from .torch import TorchFramework

_TENSORS = ("e", "c", "targets", "bias", "class_weight", "token_weight")
_TENSORS_SCHEMA = (
    "Tensor e, Tensor c, Tensor targets, Tensor? bias, Tensor? class_weight, Tensor? token_weight"
)
_OPTIONS_SCHEMA = (
    "int ignore_index, float? softcap, str reduction, int shift, bool return_lse, "
    "float? filter_eps, str? gradient_filter, SymInt? seed, float logit_scale, "
    "float label_smoothing, float z_loss, bool filter_e_grad, bool filter_c_grad, "
    "bool check_targets, int? workspace_bytes"
)
"""The fields of `Options` in their order; None for a filter_eps of "auto"."""

_INTEGER_LIMIT = 2**63
_PLAIN = (torch.Tensor, torch.nn.Parameter)


_STAND_INS = ("Negative", "ZeroTensor", "Batched")
"""Dispatch keys by which torch has a tensor's data computed from other data. Batched is what
`torch.autograd.grad` makes of a batch of gradients, out of functorch's sight."""

_LEFT_BEHIND = ("FuncTorchBatched", "FuncTorchGradWrapper")
"""Dispatch keys of tensors that a transformation hands out and that may outlive it."""


def _keys_of_stand_ins() -> int | None:
    """Return the bits of the dispatch keys of tensors that are not their memory.

    None where this torch lacks a name that the look at tensors takes, which are private: all calls
    that it differentiates then go through the operators.
    """
    try:
        for place, name in (
            (torch._C, "_are_functorch_transforms_active"),
            (torch._C, "_len_torch_dispatch_stack"),
            (torch._C, "_dispatch_keys"),
            (forward_ad, "_current_level"),
        ):
            getattr(place, name)
        bits = 0
        for key in (*_STAND_INS, *_LEFT_BEHIND):
            bits |= torch._C.DispatchKeySet(torch._C._dispatch_key_parse(key)).raw_repr()
        return bits
    except (AttributeError, RuntimeError):
        return None


_STANDS_FOR_OTHERS = _keys_of_stand_ins()


class TorchAutogradFramework(TorchFramework):
    """Tensors, with a loss that torch differentiates, compiles and transforms."""

    def loss(self, arrays: Mapping[str, Any], options: Options) -> tuple[Any, Any]:
        """Return the loss and lse, through the operators where torch looks on."""
        recorded = torch.is_grad_enabled()
        for name in ("class_weight", "token_weight"):
            if name in arrays and recorded and arrays[name].requires_grad:
                raise ValueError(
                    f"{name} requires grad, but no gradient is formed for weights: "
                    f"pass {name}.detach()"
                )
        arrays = _autocast(arrays)
        differentiate = recorded and (
            arrays["e"].requires_grad
            or arrays["c"].requires_grad
            or ("bias" in arrays and arrays["bias"].requires_grad)
        )
        if torch.compiler.is_compiling():
            # The operator's fake implementation complains of the rest.
            tensors = [arrays.get(name) for name in _TENSORS]
            given, function = _to_schema(options), torch.ops.cce_cupy.linear_cross_entropy
            loss, lse, _ = function(*tensors, *given, differentiate)
            return loss, lse
        problem = TorchFramework.problem(self, arrays, options)
        if not _are_plain(arrays.values()):
            # torch.func meets a Function where it is called, not within an operator.
            tensors = [arrays.get(name) for name in _TENSORS]
            given = _options_of(_in_schema(problem))
            loss, lse, _ = _Forward.apply(*tensors, *given, differentiate)
        elif differentiate:
            learned = arrays["e"], arrays["c"], arrays.get("bias")
            loss, lse = _apply_plain(*learned, arrays, _in_schema(problem))
        else:
            loss, lse, _, _ = _compute(problem, arrays, differentiate=False)
        return loss, lse

    # The functions that take tensors as plain data stay out of a compiler's graph: it would take
    # NumPy code for code of the caller, to be rewritten.
    check = torch.compiler.disable(TorchFramework.check)

    def problem(self, arrays: Mapping[str, Any], options: Options) -> Problem:
        """Check the arguments of a call, or find them checked; anew while a compiler looks on."""
        if torch.compiler.is_compiling():
            specs = {name: self.describe(name, array) for name, array in arrays.items()}
            return Problem.check(specs, options)
        return super().problem(arrays, options)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def evaluate(self, *arguments: Any, **options: Any) -> Evaluation:
        """Compute a loss, and with `differentiate` what its pullback needs."""
        found = super().evaluate(*arguments, **options)
        untraced = _Untraced(found)
        return Evaluation(found.loss, found.lse, untraced.pullback, untraced.gradients)

    statistics = torch.compiler.disable(TorchFramework.statistics)


class _Untraced:
    """An evaluation's pullbacks, out of a compiler's sight."""

    def __init__(self, found: Evaluation) -> None:
        self._found = found

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def pullback(self, dloss: Any, dlse: Any) -> tuple[Any, Any, Any]:
        return self._found.pullback(dloss, dlse)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def gradients(self) -> tuple[Any, Any, Any]:
        return self._found.gradients()


def _are_plain(tensors: Iterable[torch.Tensor]) -> bool:
    """Tell whether tensors are their memory and nobody looks on: no transformation, no mode."""
    if _STANDS_FOR_OTHERS is None:
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    # Without a level there are no tangents.
    tangents = forward_ad._current_level >= 0
    for x in tensors:
        if type(x) not in _PLAIN or torch._C._dispatch_keys(x).raw_repr() & _STANDS_FOR_OTHERS:
            return False
        if tangents and forward_ad.unpack_dual(x).tangent is not None:
            return False
    return True


def _in_schema(problem: Problem) -> Problem:
    """Refuse what the operators cannot take."""
    if not -_INTEGER_LIMIT <= problem.ignore_index < _INTEGER_LIMIT:
        raise ValueError(
            "ignore_index must be an integer of 64 bits with sign for tensors that require grad, "
            f"got {problem.ignore_index}"
        )
    return problem


def _autocast(arrays: Mapping[str, Any]) -> Mapping[str, Any]:
    """Cast what torch's linear would cast where autocast is on."""
    e = arrays["e"]
    device = "cuda" if e.is_cuda else "cpu"
    if not (e.is_cuda or e.is_cpu) or not torch.is_autocast_enabled(device):
        return arrays
    dtype = torch.get_autocast_dtype(device)
    cast = dict(arrays)
    for name in ("e", "c", "bias"):
        if name in cast and cast[name].is_floating_point() and cast[name].dtype != torch.float64:
            cast[name] = cast[name].to(dtype)
    return cast


def _to_schema(options: Options) -> tuple[Any, ...]:
    """Return options that nobody has checked as the operators take them."""
    return _options_of(options, read_filter_eps(options.filter_eps))


def _options_of(given: Any, filter_eps: float | None = None) -> tuple[Any, ...]:
    """Return the options of a problem as the operators take them, in the order of `Options`."""
    seed = given.seed
    if seed is not None and seed >= _INTEGER_LIMIT:
        seed -= 2 * _INTEGER_LIMIT
    return (
        given.ignore_index,
        given.softcap,
        given.reduction,
        given.shift,
        given.return_lse,
        given.filter_eps if isinstance(given, Problem) else filter_eps,
        given.gradient_filter,
        seed,
        given.logit_scale,
        given.label_smoothing,
        given.z_loss,
        given.filter_e_grad,
        given.filter_c_grad,
        given.check_targets,
        given.workspace_bytes,
    )


class _Call:
    """What an operator was called with, checked."""

    def __init__(self, arguments: Sequence[Any], *, symbolic: bool = False) -> None:
        self.arrays = _by_name(arguments[: len(_TENSORS)])
        given = Options(*arguments[len(_TENSORS) :])
        # No size depends on the seed, and a symbol would become a constant in a check.
        seed = None if symbolic or given.seed is None else given.seed % (2 * _INTEGER_LIMIT)
        filter_eps = "auto" if given.filter_eps is None else given.filter_eps
        options = given._replace(seed=seed, filter_eps=filter_eps)
        self.problem = TorchAutogradFramework().problem(self.arrays, options)

    def empty(self, dtype: str | None = None) -> torch.Tensor:
        """Return a tensor of no elements, for a result that was not asked for."""
        chosen = None if dtype is None else getattr(torch, dtype)
        return self.arrays["e"].new_empty(0, dtype=chosen)


_FRAMEWORK = TorchFramework()


def _host(problem: Problem, plan: Plan, arrays: Mapping[str, Any]) -> HostCall:
    """Return a call on the arrays' memory on the host."""
    on_host = {name: _FRAMEWORK.to_host(array) for name, array in arrays.items()}
    return HostCall(problem, plan, Arrays(**on_host))


def _compute(
    problem: Problem, arrays: Mapping[str, Any], *, differentiate: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, gpu.Found | None]:
    """Return the loss, lse where it is returned, and what a backward needs where there is one.

    That is a tensor and, on a device, what was found out about the arrays.
    """
    plan = _FRAMEWORK.plan(problem)
    if plan is None:
        memory = _FRAMEWORK.device_memory(arrays["e"])
        loss, lse, saved, call = gpu.evaluate(memory, problem, arrays, differentiate=differentiate)
        return loss, lse, saved, call.found(arrays) if differentiate else None
    host, to_tensor = _host(problem, plan, arrays), _FRAMEWORK.from_host
    host.run_forward(keep_columns=differentiate)
    return (
        to_tensor(host.loss(), None),
        to_tensor(host.lse(), None) if problem.return_lse else None,
        to_tensor(host.pack(), None) if differentiate else None,
        None,
    )


def _compute_gradients(
    problem: Problem,
    arrays: Mapping[str, Any],
    dloss: torch.Tensor,
    dlse: torch.Tensor | None,
    saved: torch.Tensor,
    wanted: Wanted,
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of e, c and bias that are wanted."""
    plan = _FRAMEWORK.plan(problem)
    if plan is None:
        memory = _FRAMEWORK.device_memory(arrays["e"])
        return gpu.GpuCall(memory, problem, arrays, saved).pullback(memory, dloss, dlse, wanted)
    host, view = _host(problem, plan, arrays), _FRAMEWORK.to_host
    host.unpack(view(saved))
    gradients = host.pullback(view(dloss), None if dlse is None else view(dlse), wanted)[:3]
    return tuple(None if g is None else _FRAMEWORK.from_host(g, None) for g in gradients)


def _forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss, lse where it is returned, and what a backward needs where there is one."""
    *given, differentiate = arguments
    call = _Call(given)
    loss, lse, saved, _ = _compute(call.problem, call.arrays, differentiate=differentiate)
    return (
        loss,
        call.empty(call.problem.accumulator) if lse is None else lse,
        call.empty("int64") if saved is None else saved,
    )


def _fake_forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *given, differentiate = arguments
    call = _Call(given, symbolic=True)
    problem, like = call.problem, call.arrays["e"]
    sums = getattr(torch, problem.accumulator)
    by_token = problem.batch_shape
    return (
        like.new_empty(by_token if problem.reduction == "none" else (), dtype=sums),
        like.new_empty(by_token if problem.return_lse else 0, dtype=sums),
        like.new_empty(saved_words(problem) if differentiate else 0, dtype=torch.int64),
    )


def _backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    """Return the gradients of e, c and bias; without elements where they are not wanted."""
    *given, dloss, dlse, saved, wants_e, wants_c, wants_bias = arguments
    call, wanted = _Call(given), Wanted(wants_e, wants_c, wants_bias)
    gradients = _compute_gradients(call.problem, call.arrays, dloss, dlse, saved, wanted)
    return tuple(call.empty() if gradient is None else gradient for gradient in gradients)


def _fake_backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    *given, _, _, _, wants_e, wants_c, wants_bias = arguments
    e, c, bias = given[0], given[1], given[3]
    wanted = ((e, wants_e), (c, wants_c), (bias, wants_bias and bias is not None))
    return tuple(
        tensor.new_empty(tensor.shape) if wants else e.new_empty(0) for tensor, wants in wanted
    )


class _Forward(torch.autograd.Function):
    """The loss and lse, differentiable."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[torch.Tensor, ...]:
        """Call the operator itself."""
        with torch._C._AutoDispatchBelowAutograd():
            found: tuple[torch.Tensor, ...] = torch.ops.cce_cupy.linear_cross_entropy(*arguments)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Keep references to the inputs, and what the forward left."""
        *given, ctx.differentiate = inputs
        ctx.options = given[len(_TENSORS) :]
        ctx.save_for_backward(*given[: len(_TENSORS)], output[2])
        ctx.set_materialize_grads(False)
        returns_lse = ctx.options[4]
        ctx.mark_non_differentiable(*output[1 + returns_lse :])

    @staticmethod
    def backward(
        ctx: Any, dloss: torch.Tensor | None, dlse: torch.Tensor | None, _: None
    ) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the inputs that require them."""
        if not ctx.differentiate:
            raise RuntimeError(
                "this call of torch.ops.cce_cupy.linear_cross_entropy was told that it would not "
                "be differentiated: call cce_cupy.linear_cross_entropy"
            )
        *tensors, saved = ctx.saved_tensors
        wanted = tuple(ctx.needs_input_grad[at] for at in (0, 1, 3))
        e, c, bias = None, None, None
        if dloss is None and dlse is not None:
            dloss = dlse.new_zeros(dlse.shape if ctx.options[2] == "none" else ())
        if dloss is not None:
            found = _Backward.apply(*tensors, *ctx.options, dloss, dlse, saved, *wanted)
            e, c, bias = (g if wants else None for g, wants in zip(found, wanted, strict=True))
        return e, c, None, bias, *((None,) * (len(ctx.needs_input_grad) - 4))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Refuse."""
        raise NotImplementedError(
            "linear_cross_entropy has no forward-mode derivative (jvp): use grad or vjp"
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        """Refuse."""
        return _refuse_vmap(info, in_dims, *arguments)


class _PlainForward(torch.autograd.Function):
    """The loss and lse of tensors that stand for themselves: nobody else looks on.

    Without an operator, and without `setup_context`, which torch binds the arguments anew for.
    Torch runs the backward of a GPU in a thread of its own, on another core whose caches know
    nothing of it: what the forward has found out is not looked for again.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute; keep references to the inputs, and what a backward needs.

        The arguments are e, c and bias, which may be differentiated by, all arrays by name, and
        the problem.
        """
        *_, arrays, problem = arguments
        loss, lse, saved, ctx.found = _compute(problem, arrays, differentiate=True)
        ctx.problem, ctx.names = problem, tuple(arrays)
        ctx.save_for_backward(*arrays.values(), saved)
        ctx.set_materialize_grads(False)
        return loss, lse

    @staticmethod
    def backward(
        ctx: Any, dloss: torch.Tensor | None, dlse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the inputs that require them."""
        *tensors, saved = ctx.saved_tensors
        problem, wanted = ctx.problem, Wanted(*ctx.needs_input_grad[:3])
        if dloss is None:
            if dlse is None:
                return (None,) * 5
            dloss = dlse.new_zeros(problem.batch_shape if problem.reduction == "none" else ())
        arrays = dict(zip(ctx.names, tensors, strict=True))
        # With grad enabled somebody may differentiate the gradients, and is told that he cannot.
        plain = not torch.is_grad_enabled() and _are_plain(
            (dloss,) if dlse is None else (dloss, dlse)
        )
        call = _call_again(problem, arrays, saved, ctx.found) if plain else None
        if call is not None:
            e, c, bias = call.pullback(call.memory, dloss, dlse, wanted)
        elif plain and _are_plain(tensors):
            e, c, bias = _compute_gradients(problem, arrays, dloss, dlse, saved, wanted)
        else:
            given = [arrays.get(name) for name in _TENSORS]
            found = _Backward.apply(*given, *_options_of(problem), dloss, dlse, saved, *wanted)
            e, c, bias = (g if wants else None for g, wants in zip(found, wanted, strict=True))
        return e, c, bias, None, None


# What `Function.apply` does beyond torch's own is for transformations, and for what they leave
# behind: neither is plain.
_apply_plain = super(torch.autograd.Function, _PlainForward).apply


def _call_again(
    problem: Problem,
    arrays: Mapping[str, torch.Tensor],
    saved: torch.Tensor,
    found: gpu.Found | None,
) -> gpu.GpuCall | None:
    """Return the call of a forward on a device for its pullback.

    None where its tensors are not those that were found plain: whoever registers hooks for saved
    tensors may hand back others.
    """
    if found is None:
        return None
    for x in arrays.values():
        if type(x) not in _PLAIN or x.is_neg():
            return None
    memory = _FRAMEWORK.device_memory(arrays["e"])
    if not found.fits(memory, arrays):
        return None
    return gpu.GpuCall(memory, problem, arrays, saved, found)


def _by_name(tensors: Iterable[torch.Tensor | None]) -> dict[str, torch.Tensor]:
    return {name: x for name, x in zip(_TENSORS, tensors, strict=True) if x is not None}


class _Backward(torch.autograd.Function):
    """The gradients, which are not differentiable."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[torch.Tensor, ...]:
        """Call the operator itself."""
        with torch._C._AutoDispatchBelowAutograd():
            found: tuple[torch.Tensor, ...] = torch.ops.cce_cupy.linear_cross_entropy_backward(
                *arguments
            )
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Refuse."""
        raise NotImplementedError(
            "linear_cross_entropy has no second derivatives: its gradient is a result, not a "
            "function that autograd differentiates. Form the logits and call "
            "torch.nn.functional.cross_entropy where they are needed"
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        """Refuse."""
        return _refuse_vmap(info, in_dims, *arguments)


def _refuse_vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
    raise NotImplementedError(
        "linear_cross_entropy has no batching rule for vmap: put the batch into the leading axes "
        'of e and targets (with reduction="none" for a loss each), or loop over classifiers'
    )


# Not torch.library.custom_op: torch.func.grad refuses the autograd.Function that it makes.
_LIBRARY = torch.library.Library("cce_cupy", "DEF")
_RETURNS = "-> (Tensor, Tensor, Tensor)"
for _name, _extra, _run, _fake, _function in (
    ("linear_cross_entropy", "bool differentiate", _forward, _fake_forward, _Forward),
    (
        "linear_cross_entropy_backward",
        "Tensor dloss, Tensor? dlse, Tensor saved, bool wants_e, bool wants_c, bool wants_bias",
        _backward,
        _fake_backward,
        _Backward,
    ),
):
    _LIBRARY.define(
        f"{_name}({_TENSORS_SCHEMA}, {_OPTIONS_SCHEMA}, {_extra}) {_RETURNS}",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _run, _key)
    _LIBRARY.impl(_name, _function.apply, "Autograd")
    torch.library.register_fake(f"cce_cupy::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_vmap(f"cce_cupy::{_name}", _refuse_vmap, lib=_LIBRARY)
