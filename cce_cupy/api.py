"""The public functions: a docstring, a check and one delegation each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

from .frameworks import Framework, select
from .frameworks.framework import Evaluation
from .plan import Plan
from .problem import Options, Problem

P = ParamSpec("P")
R = TypeVar("R")

_ARRAYS = ("e", "c", "targets", "bias", "class_weight", "token_weight")
_OPTIONS = Options._fields


class Gradients(NamedTuple):
    """Gradients with the shapes and dtypes of the inputs, in the caller's framework.

    Attributes
    ----------
    e : array, shape (..., D)
    c : array, shape (V, D)
    bias : array, shape (V,), or None
        None where no bias was given.
    """

    e: Any
    c: Any
    bias: Any


class TokenStatistics(NamedTuple):
    """What the model says about each token, each of the shape of the targets.

    Attributes
    ----------
    log_prob : array
        Log-probability of the target, in nats; 0 at ignored tokens.
    lse : array
        Log-sum-exp of the logits; 0 at ignored tokens.
    entropy : array
        Entropy of the predicted distribution, in nats; 0 at ignored tokens.
    argmax : array of int64
        The first index of the largest logit; -1 at ignored tokens. (int32 in JAX without x64.)
    """

    log_prob: Any
    lse: Any
    entropy: Any
    argmax: Any


class FilterStatistics(NamedTuple):
    """What the gradient filter does to a call.

    Attributes
    ----------
    gradient_filter : str or None
        The filter in force: None where the options or the dtype switch it off.
    filter_eps : float
        Its scale; 0.0 where there is none.
    kept : float
        The fraction of (128 tokens, class) pairs that the backward works on.
    missing : float
        The probability, a mean over the tokens that count, that filtered gradients do not stand
        for: of "threshold" what it drops; of "unbiased", whose weights make up for that, 0 in
        expectation over seeds, and of either sign. None with a softcap, whose slope stands in the
        way of summing it up.
    """

    gradient_filter: str | None
    filter_eps: float
    kept: float
    missing: float | None


def linear_cross_entropy(
    e: Any,
    c: Any,
    targets: Any,
    bias: Any = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    shift: int = 0,
    return_lse: bool = False,
    filter_eps: float | Literal["auto"] | None = "auto",
    *,
    gradient_filter: Literal["unbiased", "threshold"] | None = "unbiased",
    seed: int | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weight: Any = None,
    token_weight: Any = None,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    check_targets: bool = False,
    workspace_bytes: int | None = None,
) -> Any:
    """Cross-entropy of a linear classifier, without storing its logits.

    The logits are ``z = softcap(logit_scale * e @ c.T + bias)`` with
    ``softcap(x) = softcap * tanh(x / softcap)``; the loss of a token is
    ``logsumexp(z) - z[target]``. Memory beyond inputs and outputs does not grow with N * V.

    On torch tensors the loss, and lse where it is returned, are differentiable with respect to e,
    c and bias, and the call works under ``torch.compile`` and ``torch.func.grad``.

    All arrays come from one framework (NumPy, CuPy, torch, JAX, or any other with
    ``__dlpack__``) and one device, the CPU or an NVIDIA GPU. They are never written to.
    Non-contiguous arrays work.

    Parameters
    ----------
    e : array, shape (..., D)
        Embeddings: float64, float32, float16 or bfloat16.
    c : array, shape (V, D)
        Classifier, of the dtype of e.
    targets : array of integers, shape (...)
        Class indices in [0, V), or ignore_index.
    bias : array, shape (V,), optional
        Of the dtype of e. An entry of -inf removes that class: probability 0, no gradient, no
        part in label smoothing, whatever its row of c holds.
    ignore_index : int
        Tokens with this target cost nothing and count for nothing.
    softcap : float, optional
        Bound on the absolute logits, positive.
    reduction : {"mean", "sum", "none"}
        "mean" divides by the number of tokens that are not ignored, or with weights by the sum
        of ``class_weight[target] * token_weight``; where that is 0 the loss is 0 and so are its
        gradients. "none" gives the shape of the targets, with 0 at ignored tokens.
    shift : int
        Pairs ``e[..., :-shift, :]`` with ``targets[..., shift:]`` without a copy. Results of a
        token stand where its target stands; the first `shift` positions count as ignored.
    return_lse : bool
        Also return each token's log-sum-exp, in the shape of the targets, 0 at ignored tokens.
    filter_eps : float or "auto" or None
        Scale of the gradient filter, in [0, 1): probabilities below it are where it acts. None
        and 0 switch it off. "auto" filters bfloat16 (16 / V unbiased, 1 / V threshold) and
        float16 (2 / V, 1 / (8 V)), at most 2**-8: for vocabularies of 50 000 and more the filter's
        error is about the rounding of the dtype or below it, for smaller ones up to three times
        that. It does not filter float32 and float64.
    gradient_filter : {"unbiased", "threshold"} or None
        Which columns the backward works on, for each row tile of 128 tokens. With m the largest
        probability of the column in the tile: "threshold" drops a column with m < filter_eps.
        "unbiased" keeps it with probability ``min(1, m / filter_eps)`` and weighs it by the
        inverse, so that the expectation over seeds is the exact gradient. Targets are always
        kept. It never changes the loss. A softcap together with label smoothing switches it
        off, since every column then has a gradient that is not of rank one.
    seed : int, optional
        In [0, 2**64), for "unbiased". By default it derives from the targets, so it changes from
        batch to batch and stays a pure function of the inputs.
    logit_scale : float
        Factor of ``e @ c.T``, before the bias.
    label_smoothing : float
        In [0, 1]: this much of the target's weight is spread evenly over the classes that are
        present, as in ``torch.nn.functional.cross_entropy`` (class weights included).
    z_loss : float
        Adds ``z_loss * lse**2`` to each token's loss, weighted like it.
    class_weight : array, shape (V,), optional
        Weight of the loss by target class, non-negative and finite.
    token_weight : array, shape of targets, optional
        Weight of each token's whole loss, non-negative and finite.
    filter_e_grad, filter_c_grad : bool
        Whether the filter applies to the gradient of e, and to those of c and bias. They count
        in the functions that return gradients.
    check_targets : bool
        On the CPU targets are always checked. On a GPU a target out of range makes its token NaN,
        and with it whatever its token has a part in; True raises the ValueError instead, which
        waits for the device.
    workspace_bytes : int, optional
        Most memory to use beyond inputs, outputs, one bit for each row tile and class, and a few
        words a token. Default 128 MiB, or the least that is possible where that is more. On the
        CPU it never changes a bit of a result; on a GPU it may change the last bits of gradients.

    Returns
    -------
    loss : array
        float32, or float64 for float64 inputs; 0-d for "mean" and "sum".
    lse : array
        Only with return_lse.

    Raises
    ------
    TypeError, ValueError
        Before any work, naming the argument, what was given and what is accepted. Among others
        for the first target that is out of range, on a GPU with check_targets only.
    ImportError
        For arrays on a GPU without CuPy.

    See Also
    --------
    linear_cross_entropy_value_and_grad, linear_cross_entropy_vjp, token_statistics

    Notes
    -----
    Sums are formed in float64 for float64 inputs and in float32 for all others. The loss is
    formed so that it is never negative (without smoothing) and exact where it is tiny. NaN and
    infinity in the inputs come out as NaN in whatever depends on them.

    References
    ----------
    .. [1] E. Wijmans, B. Huval, A. Hertzberg, V. Koltun, P. Krähenbühl, "Cut Your Losses in
       Large-Vocabulary Language Models", 2024, arXiv:2411.09009.

    Examples
    --------
    >>> import numpy as np
    >>> import cce_cupy
    >>> e = np.zeros((4, 8), np.float32)
    >>> c = np.zeros((1000, 8), np.float32)
    >>> loss = cce_cupy.linear_cross_entropy(e, c, np.arange(4))
    >>> round(float(loss), 4)  # log(1000)
    6.9078
    """
    options = Options(
        ignore_index=ignore_index,
        softcap=softcap,
        reduction=reduction,
        shift=shift,
        return_lse=return_lse,
        filter_eps=filter_eps,
        gradient_filter=gradient_filter,
        seed=seed,
        logit_scale=logit_scale,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        filter_e_grad=filter_e_grad,
        filter_c_grad=filter_c_grad,
        check_targets=check_targets,
        workspace_bytes=workspace_bytes,
    )
    arrays = _given(e, c, targets, bias, class_weight, token_weight)
    framework = select(arrays)
    framework.check_options(options)
    loss, lse = framework.loss(arrays, options)
    return (loss, lse) if return_lse else loss


def _same_arguments(reference: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Give a function of one dict the signature of another: its arguments arrive by name."""
    signature = inspect.signature(reference)
    parameters = signature.parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    names = signature.parameters.keys()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    def decorate(function: Callable[..., R]) -> Callable[P, R]:
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            given = dict(zip(positional, args, strict=False)) | kwargs
            arguments = defaults | given
            if len(given) < len(args) + len(kwargs) or arguments.keys() != names:
                _complain(signature, function.__name__, *args, **kwargs)
            return function(arguments)

        for name in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(wrapper, name, getattr(function, name))
        wrapper.__signature__ = signature.replace(  # type: ignore[attr-defined]
            return_annotation=function.__annotations__["return"]
        )
        return wrapper

    return decorate


def _complain(signature: inspect.Signature, name: str, *args: Any, **kwargs: Any) -> None:
    """Raise for arguments that do not fit: to bind those of every call so takes too long."""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}() {error}") from None


@_same_arguments(linear_cross_entropy)
def linear_cross_entropy_value_and_grad(arguments: dict[str, Any]) -> tuple[Any, Gradients]:
    """Loss and gradients in one call, for frameworks with and without autodiff.

    Parameters
    ----------
    e, c, targets, bias, ignore_index, softcap, reduction, shift, return_lse, filter_eps
        As for `linear_cross_entropy`; and so are all its keyword arguments.

    Returns
    -------
    loss : array, or tuple of arrays
        ``(loss, lse)`` with return_lse.
    gradients : Gradients
        Of the loss; with ``reduction="none"`` of the sum of the losses. Exactly 0 at the rows of
        e whose token is ignored, and at the rows of c that no token touches.

    Raises
    ------
    TypeError, ValueError
        As for `linear_cross_entropy`.

    See Also
    --------
    linear_cross_entropy, linear_cross_entropy_vjp

    Examples
    --------
    >>> import numpy as np
    >>> import cce_cupy
    >>> rng = np.random.default_rng(0)
    >>> e, c = rng.normal(size=(4, 8)), rng.normal(size=(1000, 8))
    >>> loss, grad = cce_cupy.linear_cross_entropy_value_and_grad(e, c, np.arange(4))
    >>> grad.e.shape, grad.c.shape, grad.bias
    ((4, 8), (1000, 8), None)
    """
    prepared = _prepare(arguments)
    evaluation = prepared.evaluate(differentiate=True, once=True)
    return prepared.result(evaluation), Gradients(*evaluation.gradients())


@_same_arguments(linear_cross_entropy)
def linear_cross_entropy_vjp(
    arguments: dict[str, Any],
) -> tuple[Any, Callable[..., Gradients]]:
    """Loss and a function that pulls gradients of the loss back to the inputs.

    Parameters
    ----------
    e, c, targets, bias, ignore_index, softcap, reduction, shift, return_lse, filter_eps
        As for `linear_cross_entropy`; and so are all its keyword arguments.

    Returns
    -------
    loss : array, or tuple of arrays
        ``(loss, lse)`` with return_lse.
    pullback : callable
        ``pullback(dloss, dlse=None) -> Gradients``. dloss is 0-d (an array or a number) for
        "mean" and "sum" and has the shape of the targets for "none"; dlse, the gradient of each
        token's log-sum-exp, has the shape of the targets. Both are of a floating dtype and have
        no effect at ignored tokens. It may be called any number of times. It refers to the
        arrays of the call, which must not change until then.

    Raises
    ------
    TypeError, ValueError
        As for `linear_cross_entropy`; the pullback raises them for dloss and dlse.

    See Also
    --------
    linear_cross_entropy, linear_cross_entropy_value_and_grad

    Examples
    --------
    >>> import numpy as np
    >>> import cce_cupy
    >>> rng = np.random.default_rng(0)
    >>> e, c = rng.normal(size=(4, 8)), rng.normal(size=(1000, 8))
    >>> loss, pullback = cce_cupy.linear_cross_entropy_vjp(e, c, np.arange(4))
    >>> pullback(2.0).c.shape
    (1000, 8)
    """
    prepared = _prepare(arguments)
    evaluation = prepared.evaluate(differentiate=True)

    def pullback(dloss: Any, dlse: Any = None) -> Gradients:
        return Gradients(*evaluation.pullback(dloss, dlse))

    return prepared.result(evaluation), pullback


def token_statistics(
    e: Any,
    c: Any,
    targets: Any,
    bias: Any = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    shift: int = 0,
    *,
    logit_scale: float = 1.0,
    check_targets: bool = False,
    workspace_bytes: int | None = None,
) -> TokenStatistics:
    """Log-probability of the target, log-sum-exp, entropy and argmax of each token.

    Parameters
    ----------
    e, c, targets, bias, ignore_index, softcap, shift, logit_scale, check_targets, workspace_bytes
        As for `linear_cross_entropy`.

    Returns
    -------
    TokenStatistics

    Raises
    ------
    TypeError, ValueError
        As for `linear_cross_entropy`.

    See Also
    --------
    linear_cross_entropy

    Examples
    --------
    >>> import numpy as np
    >>> import cce_cupy
    >>> e, c = np.ones((1, 2)), np.array([[0.0, 0.0], [1.0, 1.0]])
    >>> statistics = cce_cupy.token_statistics(e, c, np.array([0]))
    >>> int(statistics.argmax[0])
    1
    """
    prepared = _prepare(locals())
    return TokenStatistics(
        *prepared.framework.statistics(prepared.problem, prepared.plan, prepared.arrays)
    )


def filter_statistics(
    e: Any,
    c: Any,
    targets: Any,
    bias: Any = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    shift: int = 0,
    filter_eps: float | Literal["auto"] | None = "auto",
    *,
    gradient_filter: Literal["unbiased", "threshold"] | None = "unbiased",
    seed: int | None = None,
    logit_scale: float = 1.0,
    check_targets: bool = False,
    workspace_bytes: int | None = None,
) -> FilterStatistics:
    """How many columns the gradient filter keeps, and how much probability it leaves out.

    It costs what a loss and most of its backward cost, and waits for the device.

    Parameters
    ----------
    e, c, targets, bias, ignore_index, softcap, shift, filter_eps, gradient_filter, seed
        As for `linear_cross_entropy`, and so are logit_scale, check_targets and workspace_bytes.

    Returns
    -------
    FilterStatistics
        Plain numbers. ``missing`` is a sum of numbers rounded to the dtype of e.

    Raises
    ------
    TypeError, ValueError
        As for `linear_cross_entropy`.

    See Also
    --------
    linear_cross_entropy, token_statistics

    Examples
    --------
    >>> import numpy as np
    >>> import cce_cupy
    >>> e, c = np.eye(4), np.array([[9.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    >>> found = cce_cupy.filter_statistics(
    ...     e[:1], c, np.array([0]), gradient_filter="threshold", filter_eps=0.01
    ... )
    >>> round(found.kept, 4)  # one of three classes
    0.3333
    """
    prepared = _prepare(locals())
    return FilterStatistics(
        *prepared.framework.filter_statistics(prepared.problem, prepared.plan, prepared.arrays)
    )


class _Prepared(NamedTuple):
    """A call that has been checked and planned."""

    framework: Framework
    problem: Problem
    plan: Plan | None
    arrays: dict[str, Any]

    def evaluate(self, *, differentiate: bool, once: bool = False) -> Evaluation:
        return self.framework.evaluate(
            self.problem, self.plan, self.arrays, differentiate=differentiate, once=once
        )

    def result(self, evaluation: Evaluation) -> Any:
        if self.problem.return_lse:
            return evaluation.loss, evaluation.lse
        return evaluation.loss


def _prepare(arguments: dict[str, Any]) -> _Prepared:
    """Sort the arguments of a public function, check and plan."""
    framework, arrays, options = _sort(arguments)
    return _Prepared(framework, *framework.check(arrays, options), arrays)


def _sort(arguments: dict[str, Any]) -> tuple[Framework, dict[str, Any], Options]:
    """Sort the arguments of a public function into arrays and options."""
    options = Options(**{name: arguments[name] for name in _OPTIONS if name in arguments})
    arrays = _given(*[arguments.get(name) for name in _ARRAYS])
    framework = select(arrays)
    framework.check_options(options)
    return framework, arrays, options


def _given(
    e: Any, c: Any, targets: Any, bias: Any, class_weight: Any, token_weight: Any
) -> dict[str, Any]:
    """Return the array arguments by name; optional ones where they were given."""
    arrays = {"e": e, "c": c, "targets": targets}
    if bias is not None:
        arrays["bias"] = bias
    if class_weight is not None:
        arrays["class_weight"] = class_weight
    if token_weight is not None:
        arrays["token_weight"] = token_weight
    return arrays
