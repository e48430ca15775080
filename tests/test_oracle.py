"""The oracle against PyTorch in float64, the tolerances against imitations of the library."""

import itertools

import numpy as np
import pytest
import torch
from oracle import Oracle
from tolerances import Tolerances, excess

N, D, V = 7, 5, 11
# Two float64 programs that sum at most V = 11 terms of magnitude about 10 in different orders.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def arrays(seed=0, ignored=(2, 5)):
    rng = np.random.default_rng(seed)
    e, c, bias = rng.normal(size=(N, D)), rng.normal(size=(V, D)), rng.normal(size=V)
    targets = rng.integers(0, V, size=N)
    targets[list(ignored)] = -100
    return e, c, targets, bias


def leaves(*given):
    return [torch.tensor(array, requires_grad=True) for array in given]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_oracle_is_torch_cross_entropy(reduction, smoothing, weighted):
    e, c, targets, bias = arrays()
    class_weight = np.linspace(0, 2, V) if weighted else None
    oracle = Oracle(
        e,
        c,
        targets,
        bias,
        reduction=reduction,
        label_smoothing=smoothing,
        class_weight=class_weight,
    )
    inputs = leaves(e, c, bias)
    loss = torch.nn.functional.cross_entropy(
        inputs[0] @ inputs[1].T + inputs[2],
        torch.tensor(targets),
        weight=None if class_weight is None else torch.tensor(class_weight),
        reduction=reduction,
        label_smoothing=smoothing,
    )
    np.testing.assert_allclose(oracle.loss, loss.detach().numpy(), **CLOSE)

    dloss = np.linspace(-1, 2, N) if reduction == "none" else 1.7
    loss.backward(torch.tensor(dloss, dtype=torch.float64))
    for ours, leaf in zip(oracle.gradients(dloss), inputs, strict=True):
        np.testing.assert_allclose(ours, leaf.grad.numpy(), **CLOSE)


def plain_loss(e, c, bias, targets, options):
    """The definition, token by token, for autograd: returns the losses and lse of all tokens."""
    x = options["logit_scale"] * (e @ c.T) + bias
    cap = options["softcap"]
    z = x if cap is None else cap * torch.tanh(x / cap)
    lse = torch.logsumexp(z, dim=1)
    a, weight = options["label_smoothing"], torch.tensor(options["class_weight"])
    losses = []
    for i, target in enumerate(targets):
        if target == -100:
            losses.append(torch.zeros((), dtype=torch.float64))
            continue
        smooth = (weight * (lse[i] - z[i])).sum() / len(weight)
        losses.append(
            options["token_weight"][i]
            * (
                (1 - a) * weight[target] * (lse[i] - z[i, target])
                + a * smooth
                + options["z_loss"] * weight[target] * lse[i] ** 2
            )
        )
    return torch.stack(losses), lse


@pytest.mark.parametrize(
    ("softcap", "logit_scale", "label_smoothing", "z_loss"),
    list(itertools.product([None, 2.0], [1.0, -0.7], [0.0, 0.2], [0.0, 0.01])),
)
@pytest.mark.parametrize("removed", [(), (0, 7)])
def test_oracle_is_autograd_of_the_definition(
    softcap, logit_scale, label_smoothing, z_loss, removed
):
    e, c, targets, bias = arrays(seed=1)
    present = np.setdiff1d(np.arange(V), removed)
    targets = np.where(np.isin(targets, removed), present[0], targets)
    bias[list(removed)] = -np.inf
    options = {
        "softcap": softcap,
        "logit_scale": logit_scale,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "class_weight": np.linspace(0.5, 2, V),
        "token_weight": np.linspace(0, 3, N),
    }
    oracle = Oracle(e, c, targets, bias, reduction="none", **options)

    # A removed entry is one that the classifier does not have.
    fewer = options | {"class_weight": options["class_weight"][present]}
    compact = [t if t == -100 else int(np.searchsorted(present, t)) for t in targets]
    inputs = leaves(e, c[present], bias[present])
    loss, lse = plain_loss(inputs[0], inputs[1], inputs[2], compact, fewer)
    np.testing.assert_allclose(oracle.loss, loss.detach().numpy(), **CLOSE)
    valid = targets != -100
    np.testing.assert_allclose(
        oracle.scatter(oracle.lse)[valid], lse.detach().numpy()[valid], **CLOSE
    )

    dloss, dlse = np.linspace(-1, 2, N), np.where(valid, np.linspace(3, -1, N), 0)
    (loss @ torch.tensor(dloss) + lse @ torch.tensor(dlse)).backward()
    de, dc, dbias = oracle.gradients(dloss, dlse)
    np.testing.assert_allclose(de, inputs[0].grad.numpy(), **CLOSE)
    np.testing.assert_allclose(dc[present], inputs[1].grad.numpy(), **CLOSE)
    np.testing.assert_allclose(dbias[present], inputs[2].grad.numpy(), **CLOSE)
    assert not dc[list(removed)].any()
    assert not dbias[list(removed)].any()


def test_oracle_statistics_are_those_of_log_softmax():
    e, c, targets, bias = arrays(seed=2)
    log_prob, lse, entropy, argmax = Oracle(e, c, targets, bias).statistics()
    logits = torch.tensor(e @ c.T + bias)
    expected = torch.distributions.Categorical(logits=logits)
    valid = targets != -100
    np.testing.assert_allclose(
        log_prob[valid], expected.log_prob(torch.tensor(targets * valid)).numpy()[valid], **CLOSE
    )
    np.testing.assert_allclose(lse[valid], torch.logsumexp(logits, 1).numpy()[valid], **CLOSE)
    np.testing.assert_allclose(entropy[valid], expected.entropy().numpy()[valid], **CLOSE)
    np.testing.assert_array_equal(argmax[valid], logits.argmax(1).numpy()[valid])
    for values, fill in ((log_prob, 0), (lse, 0), (entropy, 0), (argmax, -1)):
        assert (values[~valid] == fill).all()


def test_oracle_pairs_shifted_tokens():
    rng = np.random.default_rng(3)
    e, c = rng.normal(size=(2, 6, D)), rng.normal(size=(V, D))
    targets = rng.integers(0, V, size=(2, 6))
    shifted = Oracle(e, c, targets, reduction="none", shift=2)
    sliced = Oracle(e[:, :-2], c, targets[:, 2:], reduction="none")
    np.testing.assert_array_equal(shifted.loss[:, 2:], sliced.loss)
    assert not shifted.loss[:, :2].any()
    np.testing.assert_array_equal(shifted.gradients()[0][:, :-2], sliced.gradients()[0])
    assert not shifted.gradients()[0][:, -2:].any()


def imitation(e, c, targets, half_sums):
    """A plain float32 program; with half_sums the logits and their sums are bfloat16."""
    dtype = torch.bfloat16 if half_sums else torch.float32
    e, c = (torch.tensor(a.astype(np.float32), requires_grad=True) for a in (e, c))
    loss = torch.nn.functional.cross_entropy(
        e.to(dtype) @ c.to(dtype).T, torch.tensor(targets), reduction="none"
    )
    loss.sum().backward()
    return loss.detach().float().numpy(), e.grad.numpy(), c.grad.numpy()


@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_tolerances_accept_float32_and_refuse_bfloat16_sums(spread):
    rng = np.random.default_rng(4)
    e, c = rng.normal(size=(64, 16)) * spread, rng.normal(size=(1000, 16)) / 4
    # Exact in bfloat16, so that only the arithmetic differs.
    e, c = (torch.tensor(a).bfloat16().double().numpy() for a in (e, c))
    targets = rng.integers(0, 1000, size=64)
    oracle = Oracle(e, c, targets, reduction="none")
    tolerances = Tolerances(oracle, "float32")
    expected = (oracle.loss, *oracle.gradients()[:2])
    allowed = (tolerances.loss(), *tolerances.gradients()[:2])
    for half_sums in (False, True):
        found = imitation(e, c, targets, half_sums)
        worst = [excess(f, x, a) for f, x, a in zip(found, expected, allowed, strict=True)]
        assert (min(worst) > 1) if half_sums else (max(worst) <= 1), worst
