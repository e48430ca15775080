"""LinearCrossEntropyLoss: names, state, representation and numbers as torch's own module."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from cce_cupy.torch import LinearCrossEntropyLoss  # noqa: E402

OPTIONS = [
    {},
    {"bias": True, "reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "ignore_index": 3, "weight": torch.linspace(0, 2, 40).double()},
]
needs_torchs = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch has its own since 2.13"
)


def pair(**options):
    torch.manual_seed(0)
    ours = LinearCrossEntropyLoss(12, 40, dtype=torch.float64, **options)
    theirs = torch.nn.LinearCrossEntropyLoss(12, 40, dtype=torch.float64, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@needs_torchs
@pytest.mark.parametrize("options", OPTIONS)
def test_the_same_names_and_numbers_as_torch(options):
    ours, theirs = pair(**options)
    names = [name for name, _ in ours.named_parameters()]
    assert names == [name for name, _ in theirs.named_parameters()]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    e = torch.randn(30, 12, dtype=torch.float64)
    targets = torch.randint(40, (30,))
    losses = ours(e, targets), theirs(e, targets)
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.sum().backward()
    for parameters in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameters[0].grad, parameters[1].grad)


@needs_torchs
@pytest.mark.parametrize("options", OPTIONS)
def test_the_same_representation_as_torch(options):
    ours, theirs = (str(module).splitlines() for module in pair(**options))
    shown = theirs[1].replace(" out_features=(),", "").replace(", options=None", "")
    assert ours == [theirs[0], shown, *theirs[2:]]


def test_the_representation_shows_further_options():
    loss = LinearCrossEntropyLoss(8, 9, softcap=30.0, shift=1)
    assert "ignore_index=None, label_smoothing=0.0, softcap=30.0, shift=1" in repr(loss)


def test_a_tied_classifier():
    embedding = torch.nn.Embedding(50, 8)
    loss = LinearCrossEntropyLoss(8, 50)
    loss.linear.weight = embedding.weight
    targets = torch.randint(50, (20,))
    loss(embedding(targets), targets.roll(1)).backward()
    found = embedding.weight.grad.clone()
    embedding.weight.grad = None
    logits = embedding(targets) @ embedding.weight.T
    torch.nn.functional.cross_entropy(logits, targets.roll(1)).backward()
    torch.testing.assert_close(found, embedding.weight.grad)


def test_copies_and_pickles():
    loss = LinearCrossEntropyLoss(8, 50, bias=True, softcap=5.0)
    e, targets = torch.randn(6, 8), torch.randint(50, (6,))
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(e, targets), loss(e, targets))


def test_lse_and_token_weights_come_through():
    loss = LinearCrossEntropyLoss(8, 50, return_lse=True, reduction="sum")
    e, targets = torch.randn(6, 8), torch.randint(50, (6,))
    value, lse = loss(e, targets, token_weight=torch.zeros(6))
    assert value == 0
    torch.testing.assert_close(lse, loss.linear(e).logsumexp(-1))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"reduction": "max"}, ValueError, "reduction"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"soft_cap": 1.0}, TypeError, "soft_cap"),
        ({"shift": -1}, ValueError, "shift"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing"),
        ({"weight": torch.ones(3)}, ValueError, r"weight .*\(50,\).* got \(3,\)"),
    ],
)
def test_options_are_checked_when_the_module_is_made(options, error, match):
    with pytest.raises(error, match=match):
        LinearCrossEntropyLoss(8, 50, **options)
