"""JAX primitives of the loss: forward and backward, and what transformations make of them.

``forward_p`` is differentiated into itself, now leaving what a backward needs, and ``tangent_p``:
the map from tangents of e, c and bias to those of its results. That map is never computed; only
its transpose is, which is ``backward_p``. So a tangent that is not there costs nothing; and a
loss that is mapped over first and differentiated then folds its batch into the tokens before
anything else is decided, which a ``custom_vjp``, batched as a whole, would not.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from ..problem import Problem
from . import xla_call, xla_cuda, xla_ffi, xla_host

DIFFERENTIABLE = ("e", "c", "bias")
_BY_TOKEN = ("e", "targets", "token_weight")

_FORWARD_MODE = (
    "cce_cupy has no forward-mode derivatives (jax.jvp, jacfwd, hessian): use jax.grad, jax.vjp "
    "or jacrev"
)
_SECOND = "cce_cupy has no second derivatives: its gradients cannot be differentiated again"
_ENTROPY = "the entropy of token_statistics is not differentiable: use jax.lax.stop_gradient on it"

_HANDLERS = {
    (stage, platform): xla_ffi.handler(function, command_buffer=platform == "CUDA")
    for platform, module in (("cpu", xla_host), ("CUDA", xla_cuda))
    for stage, function in (("forward", module.forward), ("backward", module.backward))
}
"""Kept for good: XLA has their addresses."""

for (_stage, _platform), _handler in _HANDLERS.items():
    jax.ffi.register_ffi_target(
        f"cce_cupy_{_stage}", jax.ffi.pycapsule(xla_ffi.address(_handler)), platform=_platform
    )


def _primitive(name: str) -> Primitive:
    primitive = Primitive(f"cce_cupy_{name}")
    primitive.multiple_results = True
    return primitive


forward_p, backward_p = _primitive("forward"), _primitive("backward")
tangent_p, refused_p = _primitive("tangent"), _primitive("refused")


def forward(problem: Problem, arrays: dict[str, Any], outputs: tuple[str, ...]) -> dict[str, Any]:
    """Return outputs by name: ``loss``, ``lse``, ``log_prob``, ``entropy``, ``argmax``, ``saved``.

    ``saved`` are the bytes that `backward` takes; argmax is the int64 in two int32.
    """
    results = forward_p.bind(
        *vary_alike(*arrays.values()), problem=problem, names=tuple(arrays), outputs=outputs
    )
    return dict(zip(outputs, results, strict=True))


def backward(
    problem: Problem,
    arrays: dict[str, Any],
    saved: Any,
    upstream: Sequence[Any],
    wanted: tuple[str, ...],
) -> list[Any]:
    """Return the wanted gradients for the gradients of the loss and, as a second, of lse."""
    return backward_p.bind(  # type: ignore[no-any-return]
        *vary_alike(*arrays.values(), saved, *upstream),
        problem=problem,
        names=tuple(arrays),
        wanted=wanted,
    )


def vary_alike(*values: Any) -> list[Any]:
    """Make the types of a call's values agree on the meshes that they live on.

    In shard_map each varies over the mesh axes that any of them varies over; on a mesh of explicit
    axes each is whole on every device.
    """
    values = tuple(_whole(value) for value in values)
    axes = [_varying(value) for value in values]
    union = frozenset().union(*axes)
    return [
        _vary(value, tuple(sorted(union - has))) if union - has else value
        for value, has in zip(values, axes, strict=True)
    ]


def _whole(value: Any) -> Any:
    typed = jax.typeof(value).sharding
    # Versions without `reshard` gather by themselves.
    if all(axis is None for axis in typed.spec) or not hasattr(jax, "reshard"):
        return value
    concrete = not isinstance(value, jax.core.Tracer)
    mesh = value.sharding.mesh if concrete else typed.mesh
    return jax.reshard(value, NamedSharding(mesh, PartitionSpec()))


def _varying(value: Any) -> frozenset[str]:
    aval = jax.typeof(value)
    # Before JAX 0.10 the type itself named the axes.
    return aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying  # type: ignore[no-any-return]


def _vary(value: Any, axes: tuple[str, ...]) -> Any:
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(value, axes, to="varying")
    return jax.lax.pvary(value, axes)


def _aval(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Return an array's type that varies over the mesh axes that another varies over."""
    sharding = NamedSharding(like.sharding.mesh, PartitionSpec())
    return like.update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding)


def _output_aval(problem: Problem, like: Any, name: str) -> Any:
    shape = problem.batch_shape
    if name == "saved":
        return _aval(like, (xla_call.saved_bytes(problem),), "uint8")
    if name == "argmax":
        return _aval(like, (*shape, 2), "int32")
    if name == "loss" and problem.reduction != "none":
        shape = ()
    return _aval(like, shape, problem.accumulator)


def _gradient_aval(problem: Problem, like: Any, name: str) -> Any:
    shapes = {
        "e": (*problem.batch_shape, problem.dim),
        "c": (problem.vocab, problem.dim),
        "bias": (problem.vocab,),
    }
    return _aval(like, shapes[name], problem.dtype)


def _forward_avals(
    *avals: Any, problem: Problem, names: tuple[str, ...], outputs: tuple[str, ...]
) -> list[Any]:
    return [_output_aval(problem, avals[0], name) for name in outputs]


def _backward_avals(
    *avals: Any, problem: Problem, names: tuple[str, ...], wanted: tuple[str, ...]
) -> list[Any]:
    return [_gradient_aval(problem, avals[0], name) for name in wanted]


def _tangent_avals(*avals: Any, problem: Problem, **_: Any) -> list[Any]:
    return [_output_aval(problem, avals[0], name) for name in ("loss", "lse")]


def _refused_avals(*_: Any, avals: tuple[Any, ...], why: str) -> list[Any]:
    return list(avals)


forward_p.def_abstract_eval(_forward_avals)
backward_p.def_abstract_eval(_backward_avals)
tangent_p.def_abstract_eval(_tangent_avals)
refused_p.def_abstract_eval(_refused_avals)


# Eager calls are compiled once for each problem, like those of JAX's own operations.


@functools.lru_cache(maxsize=4096)
def _compiled(primitive: Primitive, parameters: tuple[tuple[str, Any], ...]) -> Any:
    return jax.jit(functools.partial(primitive.bind, **dict(parameters)))


def _run(primitive: Primitive, *values: Any, **parameters: Any) -> Any:
    return _compiled(primitive, tuple(parameters.items()))(*values)


forward_p.def_impl(functools.partial(_run, forward_p))
backward_p.def_impl(functools.partial(_run, backward_p))


# Compiled code is a call of a handler, with the problem in its attributes.


@functools.cache
def _finish_at_exit() -> None:
    """See to it that XLA ends what it has begun before Python shuts down.

    Its threads, and then XLA itself, would wait for the interpreter forever.
    """

    @atexit.register
    def finish() -> None:
        for array in jax.live_arrays():
            with contextlib.suppress(Exception):  # of the computation, or of a donated array
                array.block_until_ready()
        xla_ffi.drain()


def _lower(
    context: Any, stage: str, operands: Any, extra: list[Any], attributes: dict[str, Any]
) -> list[Any]:
    """Emit a call whose results `extra` come behind those of the primitive and are dropped."""
    _finish_at_exit()
    wide = context.replace(avals_out=[*context.avals_out, *extra])
    results = jax.ffi.ffi_lowering(f"cce_cupy_{stage}")(wide, *operands, **attributes)
    return list(results)[: len(context.avals_out)]


def _forward_on_host(
    context: Any, *operands: Any, problem: Problem, names: Any, outputs: Any
) -> list[Any]:
    xla_host.check(problem)
    attributes = xla_call.attributes_of(problem, arrays=names, outputs=outputs)
    return _lower(context, "forward", operands, [], attributes)


def _backward_on_host(
    context: Any, *operands: Any, problem: Problem, names: Any, wanted: Any
) -> list[Any]:
    attributes = xla_call.attributes_of(problem, arrays=names, wanted=wanted)
    return _lower(context, "backward", operands, [], attributes)


def _forward_on_gpu(
    context: Any, *operands: Any, problem: Problem, names: Any, outputs: Any
) -> list[Any]:
    if problem.check_targets:
        raise ValueError(
            "check_targets=True cannot be kept for traced targets on a GPU, where the host would "
            "have to wait for them: check them outside, or leave it False; then a target out of "
            "range makes the loss NaN"
        )
    attributes = xla_call.attributes_of(problem, arrays=names, outputs=outputs)
    size = xla_cuda.forward_bytes(problem, _gpus(), outputs)
    workspace = _aval(context.avals_in[0], (size,), "uint8")
    return _lower(context, "forward", operands, [workspace], attributes)


def _backward_on_gpu(
    context: Any, *operands: Any, problem: Problem, names: Any, wanted: Any
) -> list[Any]:
    attributes = xla_call.attributes_of(problem, arrays=names, wanted=wanted)
    size = xla_cuda.backward_bytes(problem, _gpus())
    workspace = _aval(context.avals_in[0], (size,), "uint8")
    return _lower(context, "backward", operands, [workspace], attributes)


def _gpus() -> list[int]:
    """Return the numbers of this process's GPUs: a program may run on any of them."""
    return [device.local_hardware_id for device in jax.local_devices(backend="gpu")]


mlir.register_lowering(forward_p, _forward_on_host, platform="cpu")
mlir.register_lowering(backward_p, _backward_on_host, platform="cpu")
mlir.register_lowering(forward_p, _forward_on_gpu, platform="cuda")
mlir.register_lowering(backward_p, _backward_on_gpu, platform="cuda")


# Derivatives.


def _forward_jvp(
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    problem: Problem,
    names: tuple[str, ...],
    outputs: tuple[str, ...],
) -> tuple[list[Any], list[Any]]:
    given = {
        name: tangent
        for name, tangent in zip(names, tangents, strict=True)
        if type(tangent) is not ad.Zero
    }
    for name in given:
        if name not in DIFFERENTIABLE:
            raise TypeError(
                f"the loss is not differentiable in {name}; accepted: e, c and bias. "
                f"Use jax.lax.stop_gradient({name}), or reduction='none' and weigh the losses"
            )
    arrays = dict(zip(names, primals, strict=True))
    found = forward(problem, arrays, tuple(dict.fromkeys((*outputs, "saved"))))
    loss, lse = tangent_p.bind(
        *vary_alike(*primals, found["saved"], *given.values()),
        problem=problem,
        names=names,
        wanted=tuple(given),
    )
    made = {"loss": loss, "lse": lse}
    if "log_prob" in outputs:
        made["log_prob"] = -loss
    if "entropy" in outputs:
        (made["entropy"],) = refused_p.bind(*given.values(), avals=(jax.typeof(lse),), why=_ENTROPY)
    results = [found[name] for name in outputs]
    changes = [
        made.get(name, ad.Zero(jax.typeof(found[name]).to_tangent_aval())) for name in outputs
    ]
    return results, changes


def _tangent_transpose(
    upstream: Sequence[Any],
    *values: Any,
    problem: Problem,
    names: tuple[str, ...],
    wanted: tuple[str, ...],
) -> list[Any]:
    dloss, dlse = upstream
    arrays, saved = dict(zip(names, values, strict=False)), values[len(names)]
    nothing = [None] * (len(names) + 1)
    if type(dloss) is ad.Zero and type(dlse) is ad.Zero:
        return [*nothing, *(ad.Zero(value.aval) for value in values[len(nothing) :])]
    if type(dloss) is ad.Zero:
        dloss = jnp.zeros(dloss.aval.shape, dloss.aval.dtype)
    given = [dloss] if type(dlse) is ad.Zero else [dloss, dlse]
    return [*nothing, *backward(problem, arrays, saved, given, wanted)]


def _backward_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], **parameters: Any
) -> tuple[list[Any], list[Any]]:
    results = backward_p.bind(*primals, **parameters)
    given = [tangent for tangent in tangents if type(tangent) is not ad.Zero]
    avals = tuple(jax.typeof(result) for result in results)
    return results, refused_p.bind(*given, avals=avals, why=_SECOND)


def _refused_transpose(
    upstream: Sequence[Any], *tangents: Any, avals: tuple[Any, ...], why: str
) -> list[Any]:
    if any(type(cotangent) is not ad.Zero for cotangent in upstream):
        raise NotImplementedError(why)
    return [ad.Zero(tangent.aval) for tangent in tangents]


def _refuse_forward_mode(*_: Any, why: str = _FORWARD_MODE, **__: Any) -> Any:
    raise NotImplementedError(why)


ad.primitive_jvps[forward_p] = _forward_jvp
ad.primitive_jvps[backward_p] = _backward_jvp
ad.primitive_transposes[tangent_p] = _tangent_transpose
ad.primitive_transposes[refused_p] = _refused_transpose
for _linear in (tangent_p, refused_p):
    _linear.def_impl(_refuse_forward_mode)
    mlir.register_lowering(_linear, _refuse_forward_mode)
    batching.primitive_batchers[_linear] = _refuse_forward_mode


# vmap.


def _forward_batch(
    values: Sequence[Any],
    axes: Sequence[int | None],
    *,
    problem: Problem,
    names: tuple[str, ...],
    outputs: tuple[str, ...],
) -> tuple[list[Any], list[int]]:
    parameters = {"names": names, "outputs": outputs}
    mapped = {name for name, axis in zip(names, axes, strict=True) if axis is not None}
    if "saved" in outputs or not mapped <= set(_BY_TOKEN):
        return _one_by_one(forward_p, values, axes, problem=problem, **parameters)
    (size,) = {
        value.shape[axis] for value, axis in zip(values, axes, strict=True) if axis is not None
    }
    arrays = {
        name: _batch_first(value, axis, size) if name in _BY_TOKEN else value
        for name, value, axis in zip(names, values, axes, strict=True)
    }
    folded = dataclasses.replace(
        problem, batch_shape=(size, *problem.batch_shape), reduction="none"
    )
    found = forward(folded, arrays, outputs)
    if "loss" in outputs:
        found["loss"] = _reduce(problem, arrays, found["loss"])
    return [found[name] for name in outputs], [0] * len(outputs)


def _batch_first(value: Any, axis: int | None, size: int) -> Any:
    if axis is None:
        return jnp.broadcast_to(value, (size, *value.shape))
    return jnp.moveaxis(value, axis, 0)


def _reduce(problem: Problem, arrays: dict[str, Any], losses: Any) -> Any:
    """Reduce the losses of each of many calls, of shape (calls, *batch_shape)."""
    if problem.reduction == "none":
        return losses
    axes = tuple(range(1, losses.ndim))
    total = losses.sum(axes)
    if problem.reduction == "sum":
        return total
    targets = arrays["targets"]
    counts = jnp.ones(targets.shape, bool)
    limits = jnp.iinfo(targets.dtype)
    if limits.min <= problem.ignore_index <= limits.max:
        counts = targets != problem.ignore_index
    if problem.shift:
        counts &= jnp.arange(targets.shape[-1]) >= problem.shift
    weights = jnp.ones(targets.shape, losses.dtype)
    if "class_weight" in arrays:
        weights = arrays["class_weight"][jnp.where(counts, targets, 0)]
    if "token_weight" in arrays:
        weights = weights * arrays["token_weight"]
    weight = jnp.where(counts, weights, 0).sum(axes)
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)


def _one_by_one(
    primitive: Primitive, values: Sequence[Any], axes: Sequence[int | None], **parameters: Any
) -> tuple[list[Any], list[int]]:
    """Map over a batch by a loop of JAX's."""
    mapped = [jnp.moveaxis(v, a, 0) for v, a in zip(values, axes, strict=True) if a is not None]

    def one(some: list[Any]) -> list[Any]:
        found = iter(some)
        every = [
            next(found) if axis is not None else value
            for value, axis in zip(values, axes, strict=True)
        ]
        return primitive.bind(*every, **parameters)  # type: ignore[no-any-return]

    results = jax.lax.map(one, mapped)
    return results, [0] * len(results)


batching.primitive_batchers[forward_p] = _forward_batch
batching.primitive_batchers[backward_p] = functools.partial(_one_by_one, backward_p)
