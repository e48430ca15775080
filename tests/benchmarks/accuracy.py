"""Errors of loss and gradients against a float64 evaluation of the same inputs."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

import torch
from calibrated import Inputs, logit_chunks

import cce_cupy


class Exact(NamedTuple):
    """A mean loss and its gradients, formed in float64; the gradients are kept in float32."""

    loss: float
    de: torch.Tensor
    dc: torch.Tensor


def evaluate_exactly(inputs: Inputs) -> Exact:
    """Evaluate in float64, some columns at a time; tokens with a negative target are left out."""
    counted = inputs.targets >= 0
    e, c, targets = inputs.e[counted].double(), inputs.c, inputs.targets[counted]
    rows = torch.arange(len(e), device=e.device)
    lse = torch.full((len(e),), -torch.inf, dtype=torch.float64, device=e.device)
    target_logit = torch.empty_like(lse)
    for first, logits in logit_chunks(e, c):
        lse = torch.logaddexp(lse, logits.logsumexp(1))
        here = (targets >= first) & (targets < first + logits.shape[1])
        target_logit[here] = logits[rows[here], targets[here] - first]
    de = torch.zeros_like(e)
    dc = torch.empty(c.shape, dtype=torch.float32, device=c.device)
    for first, logits in logit_chunks(e, c):
        dz = logits.sub_(lse[:, None]).exp_()
        here = (targets >= first) & (targets < first + dz.shape[1])
        dz[rows[here], targets[here] - first] -= 1
        dz /= len(e)
        some = c[first : first + dz.shape[1]].double()
        de += dz @ some
        dc[first : first + dz.shape[1]] = (dz.T @ e).float()
    whole = torch.zeros(inputs.e.shape, dtype=torch.float32, device=e.device)
    whole[counted] = de.float()
    return Exact((lse - target_logit).mean().item(), whole, dc)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the Frobenius norm of the difference as a part of that of the exact one."""
    norm = torch.linalg.vector_norm(exact, dtype=torch.float64)
    # Some rows at a time: the largest of these arrays have a copy of their own nowhere.
    missed = torch.zeros((), dtype=torch.float64, device=exact.device)
    for some, of_exact in zip(found.split(2**14), exact.split(2**14), strict=True):
        missed += (some.float() - of_exact).double().square().sum()
    return float(missed.sqrt() / norm)


def loss_error(found: torch.Tensor, exact: Exact) -> float:
    error = abs(float(found) - exact.loss)
    return error / exact.loss if exact.loss else error


def seed_errors(
    inputs: Inputs, exact: Exact, seeds: int, filter_eps: float | str
) -> dict[str, Any]:
    """Compare the gradients of single seeds of the unbiased filter with their mean.

    Parameters
    ----------
    inputs : Inputs
        Without ignored tokens.
    exact : Exact
        Of these inputs.
    seeds : int
    filter_eps : float or "auto"

    Returns
    -------
    dict
        By gradient ("de", "dc"): the relative error of one seed (a mean), of the mean over the
        seeds, and without a filter, which is rounding alone; and the first two as distances from
        the unfiltered gradient, with their ratio.
    """
    e, c, targets = inputs
    # Of the sum: elements of a mean over many tokens lie below what float16 can hold.
    options = {"filter_eps": filter_eps, "reduction": "sum"}

    def gradients(**more: Any) -> list[torch.Tensor]:
        _, found = cce_cupy.linear_cross_entropy_value_and_grad(
            e, c, targets, **{**options, **more}
        )
        return [array.float() / len(e) for array in found[:2]]

    exacts = (exact.de, exact.dc)
    whole = gradients(gradient_filter=None)
    sums = [torch.zeros_like(array) for array in exacts]
    one: list[list[float]] = [[], []]
    apart: list[list[float]] = [[], []]
    for seed in range(seeds):
        for k, array in enumerate(gradients(seed=seed)):
            sums[k] += array
            one[k].append(relative_error(array, exacts[k]))
            apart[k].append(relative_error(array, whole[k]))
    found = {}
    for k, name in enumerate(("de", "dc")):
        mean = sums[k] / seeds
        single, together = statistics.mean(apart[k]), relative_error(mean, whole[k])
        found[name] = {
            "one": statistics.mean(one[k]),
            "mean": relative_error(mean, exacts[k]),
            "unfiltered": relative_error(whole[k], exacts[k]),
            "one_from_unfiltered": single,
            "mean_from_unfiltered": together,
            "ratio": together / single if single else 0.0,
        }
    return {
        "dtype": str(e.dtype).removeprefix("torch."),
        "filter_eps": filter_eps,
        "seeds": seeds,
        **found,
    }
