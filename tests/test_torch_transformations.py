"""Each cell of the table of transformations in docs/pytorch.md, on the CPU."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases

torch = pytest.importorskip("torch")

from torch._dynamo.testing import CompileCounter  # noqa: E402
from transformations import REFUSED, ROWS, SHAPE, Subject  # noqa: E402

import cce_cupy  # noqa: E402

PAGE = (Path(__file__).parents[1] / "docs" / "pytorch.md").read_text("utf-8")


def table():
    """Return the cells by row and column, from the page."""
    lines = PAGE[PAGE.index("| transformation |") :].split("\n\n")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {
        (row[0], column.strip("`")): cell
        for row in rows
        for column, cell in zip(header[1:], row[1:], strict=True)
    }


CELLS = table()


def test_the_table_and_the_checks_name_the_same_rows():
    assert {row for row, _ in CELLS} == set(ROWS)
    assert {column for _, column in CELLS} == {"linear_cross_entropy", "LinearCrossEntropyLoss"}


def check_cell(row, subject, cell):
    """Run a row's check, and compare what happens with what the table says."""
    check = ROWS[row]
    if cell == "error":
        error, match = REFUSED[check]
        with pytest.raises(error, match=match):
            check(subject)
    else:
        assert cell == "yes"
        check(subject)


@pytest.mark.parametrize(("row", "column"), CELLS, ids=lambda name: name.strip("`"))
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
def test_cell(row, column):
    check_cell(row, Subject(column), CELLS[row, column])


def arguments(dtype=torch.float32, learn=True, device="cpu"):
    subject = Subject("linear_cross_entropy", device, dtype)
    e, c, bias = subject.leaves() if learn else subject.values
    return [e, c, subject.targets, bias, None, None]


OPTIONS = {"plain": (-100, None, "mean", 0, False, None, "unbiased", None, 1.0, 0.0, 0.0)}
OPTIONS["odd"] = (-100, 5.0, "none", 1, True, 0.05, "threshold", None, 0.5, 0.1, 1e-3)
OPTIONS["filtered"] = (-100, None, "sum", 2, True, 0.05, "unbiased", 3, 0.5, 0.1, 1e-3)
REST = True, True, False, None


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(options, dtype):
    """Torch's own examination: schema, fake implementation, autograd, compilation."""
    forward = torch.ops.cce_cupy.linear_cross_entropy.default
    torch.library.opcheck(forward, (*arguments(dtype), *options, *REST, True))
    given = arguments(dtype, learn=False)
    loss, lse, saved = forward(*given, *options, *REST, True)
    backward = torch.ops.cce_cupy.linear_cross_entropy_backward.default
    dlse = torch.ones_like(lse) if options[4] else None
    for wanted in ((True, True, True), (True, False, False), (False, True, True)):
        upstream = (torch.ones_like(loss), dlse, saved, *wanted)
        torch.library.opcheck(backward, (*given, *options, *REST, *upstream))


def test_gradients_that_are_not_wanted_are_not_formed(monkeypatch):
    """Neither memory nor products: what a frozen classifier and frozen embeddings save."""
    from cce_cupy.frameworks import host

    seen, real = [], host.backward

    def spy(*arguments):
        found = real(*arguments)
        seen.append([gradient is not None for gradient in found[:3]])
        return found

    monkeypatch.setattr(host, "backward", spy)
    for learned in ((True, False, False), (False, True, False), (False, False, True)):
        subject = Subject("linear_cross_entropy")
        subject(*subject.leaves(*learned)).backward()
        assert seen.pop() == list(learned)


def test_what_is_saved_is_small():
    """References to the inputs, and 64-bit words: three for each token, and the kept bits."""
    subject = Subject("linear_cross_entropy")
    leaves, packed = subject.leaves(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        subject(*leaves)
    own = {tensor.data_ptr() for tensor in (*leaves, subject.targets)}
    (saved,) = [tensor for tensor in packed if tensor.data_ptr() not in own]
    tokens = SHAPE[0] * SHAPE[1]
    chunks, tiles = -(-300 // 32), -(-tokens // 128)
    assert saved.dtype == torch.int64
    assert saved.numel() == 3 * tokens + -(-tiles * chunks // 2)


def test_a_call_that_was_not_to_be_differentiated():
    given = arguments()
    loss, _, saved = torch.ops.cce_cupy.linear_cross_entropy(
        *given, *OPTIONS["plain"], *REST, False
    )
    assert saved.numel() == 0
    with pytest.raises(RuntimeError, match="would not be differentiated"):
        loss.backward()


@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**63, 2**64 - 1])
def test_seeds_of_64_bits_arrive(seed):
    subject = Subject("linear_cross_entropy", filter_eps=0.1, seed=seed)
    leaves = subject.leaves()
    found = torch.autograd.grad(subject(*leaves), leaves)
    assert all(map(torch.equal, found, subject.expected()[1]))


def test_an_ignore_index_beyond_64_bits_is_refused():
    subject = Subject("linear_cross_entropy")
    e, c, _ = subject.leaves()
    with pytest.raises(ValueError, match=rf"ignore_index .* got {2**63}"):
        cce_cupy.linear_cross_entropy(e, c, subject.targets, ignore_index=2**63)
    # No target is equal to it, and nothing has to be recorded.
    plain = e.detach(), c.detach(), subject.targets.clamp(min=0)
    cce_cupy.linear_cross_entropy(*plain, ignore_index=2**63)


@pytest.mark.parametrize(
    "option", [{"softcap": -1.0}, {"reduction": "max"}, {"shift": 70}, {"filter_eps": "some"}]
)
def test_a_compiler_passes_the_complaint_on(option):
    subject = Subject("linear_cross_entropy")
    e, c, _ = subject.values
    torch.compiler.reset()
    compiled = torch.compile(cce_cupy.linear_cross_entropy, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=f"{next(iter(option))} must be"):
        compiled(e, c, subject.targets, **option)


def test_options_that_equal_valid_ones_are_still_checked():
    """True equals 1.0: a cache of checked calls must not take one for the other."""
    subject = Subject("linear_cross_entropy")
    e, c, _ = subject.values
    cce_cupy.linear_cross_entropy(e, c, subject.targets, softcap=1.0)
    with pytest.raises(TypeError, match="softcap"):
        cce_cupy.linear_cross_entropy(e, c, subject.targets, softcap=True)


def test_seeds_may_change_without_compiling_again():
    subject = Subject("linear_cross_entropy")
    e, c, bias = subject.values
    torch.compiler.reset()
    counter = CompileCounter()

    def loss(e, seed):
        return cce_cupy.linear_cross_entropy(
            e, c, subject.targets, bias, filter_eps=0.1, gradient_filter="unbiased", seed=seed
        )

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for seed in range(3, 9):
        leaves = [e.clone().requires_grad_() for _ in range(2)]
        found = torch.autograd.grad(compiled(leaves[0], seed), leaves[0])
        assert torch.equal(found[0], torch.autograd.grad(loss(leaves[1], seed), leaves[1])[0])
    assert counter.frame_count <= 2  # the second time the compiler learns that it changes


@pytest.mark.parametrize("function", ["linear_cross_entropy_value_and_grad", "token_statistics"])
def test_functions_for_plain_data_stay_out_of_a_graph(function):
    subject = Subject("linear_cross_entropy")
    e, c, _ = subject.values
    torch.compiler.reset()
    plain = getattr(cce_cupy, function)
    compiled = torch.compile(lambda *given: plain(*given)[1], backend="eager")
    found, expected = compiled(e, c, subject.targets), plain(e, c, subject.targets)[1]
    assert re.sub("grad_fn", "", repr(found)) == repr(expected)


def tensor(array):
    array = np.array(array, order="C")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@settings(max_examples=max(settings().max_examples // 2, 1))
@given(
    case=cases(),
    wanted=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    gradient_filter=st.sampled_from(["unbiased", "threshold", None]),
    eps=st.sampled_from([0.0, 1e-3, 0.1]),
)
def test_autograd_is_the_pullback(case, wanted, gradient_filter, eps):
    """For all kinds of problems, and whichever gradients are asked for."""
    e, c, targets = map(tensor, case.arrays)
    options = {**case.options, "gradient_filter": gradient_filter, "filter_eps": eps}
    for name in ("bias", "class_weight", "token_weight"):
        if name in options:
            options[name] = tensor(options[name])
    result, pullback = cce_cupy.linear_cross_entropy_vjp(e, c, targets, **options, return_lse=True)
    generator = torch.Generator().manual_seed(0)
    upstream = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in result]
    gradients = pullback(*upstream)
    arrays = e, c, options.get("bias")
    learned = [
        (array.requires_grad_(), gradient)
        for array, gradient, wants in zip(arrays, gradients, wanted, strict=True)
        if wants and array is not None
    ]
    found = cce_cupy.linear_cross_entropy(e, c, targets, **options, return_lse=True)
    for value, plain in zip(found, result, strict=True):
        torch.testing.assert_close(value.detach(), plain, equal_nan=True)
        assert value.requires_grad == bool(learned)
    if learned:
        leaves, expected = zip(*learned, strict=True)
        torch.testing.assert_close(
            torch.autograd.grad(found, leaves, upstream), expected, equal_nan=True
        )


def test_batches_of_gradients():
    """Torch differentiates for each of a batch in turn, out of functorch's sight."""
    subject = Subject("linear_cross_entropy", reduction="none")
    leaves = subject.leaves()
    loss = subject(*leaves)
    upstream = torch.rand(3, *loss.shape, dtype=loss.dtype)
    found = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True, retain_graph=True)
    for k, one in enumerate(upstream):
        expected = torch.autograd.grad(loss, leaves, one, retain_graph=True)
        assert all(torch.equal(a[k], b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("learn", [True, False])
def test_a_negated_view_is_read_negated(learn):
    subject = Subject("linear_cross_entropy")
    e, c, bias = subject.values
    expected, gradients = subject.expected()
    leaf = (-e).requires_grad_(learn)
    loss = subject(torch._neg_view(leaf), c, bias)
    assert torch.equal(loss, expected)
    if learn:
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], -gradients[0])


@pytest.mark.parametrize("learn", [True, False])
def test_a_mode_of_dispatch_sees_the_operators(learn):
    """Counters of operations and selective checkpointing look at operators."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(function.name())
            return function(*args, **(kwargs or {}))

    subject = Subject("linear_cross_entropy")
    leaves = subject.leaves() if learn else subject.values
    with Seen() as seen:
        loss = subject(*leaves)
        if learn:
            loss.backward()
    ours = [name for name in seen.names if name.startswith("cce_cupy::")]
    names = ["cce_cupy::linear_cross_entropy", "cce_cupy::linear_cross_entropy_backward"]
    assert ours == names[: 1 + learn]


@pytest.mark.parametrize("learn", [True, False])
def test_a_torch_without_the_private_names_goes_through_the_operators(monkeypatch, learn):
    from cce_cupy.frameworks import torch_autograd

    monkeypatch.delattr(torch._C, "_dispatch_keys")
    assert torch_autograd._keys_of_stand_ins() is None
    monkeypatch.setattr(torch_autograd, "_STANDS_FOR_OTHERS", None)
    subject = Subject("linear_cross_entropy")
    expected, gradients = subject.expected()
    leaves = subject.leaves() if learn else subject.values
    loss = subject(*leaves)
    assert torch.equal(loss, expected)
    if learn:
        found = torch.autograd.grad(loss, leaves)
        assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))


def test_a_tensor_that_outlives_its_transformation():
    from cce_cupy.frameworks import torch_autograd

    subject = Subject("linear_cross_entropy")
    expected, gradients = subject.expected()
    leaves, kept = subject.leaves(), []

    def leaks(value):
        kept.append(value * 1)
        return value.sum()

    torch.func.grad(leaks)(leaves[0].detach())
    # It has no address of its own, which a GPU's kernels would be given.
    assert not torch_autograd._are_plain(kept)
    loss = subject(kept[0], *leaves[1:])
    assert torch.equal(loss, expected)
    found = torch.autograd.grad(loss, leaves[1:])
    assert all(torch.equal(a, b) for a, b in zip(found, gradients[1:], strict=True))
