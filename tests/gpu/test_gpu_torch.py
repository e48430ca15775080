"""PyTorch on a GPU: each cell of the table in docs/pytorch.md, and what only a device can show."""

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU", allow_module_level=True)

from test_torch_transformations import CELLS, OPTIONS, REST, arguments, check_cell  # noqa: E402
from transformations import Subject, same  # noqa: E402

import cce_cupy  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
LEARNED = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)]


@pytest.mark.parametrize(("row", "column"), CELLS, ids=lambda name: name.strip("`"))
def test_cell(row, column):
    check_cell(row, Subject(column, "cuda"), CELLS[row, column])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(options, dtype):
    forward = torch.ops.cce_cupy.linear_cross_entropy.default
    # Not its comparison of two runs bit by bit: what is saved has gaps that nobody writes.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    given = (*arguments(dtype, device="cuda"), *options, *REST, True)
    torch.library.opcheck(forward, given, test_utils=checks)
    given = arguments(dtype, learn=False, device="cuda")
    loss, lse, saved = forward(*given, *options, *REST, True)
    backward = torch.ops.cce_cupy.linear_cross_entropy_backward.default
    dlse = torch.ones_like(lse) if options[4] else None
    for wanted in ((True, True, True), (True, False, False), (False, False, True)):
        upstream = (torch.ones_like(loss), dlse, saved, *wanted)
        torch.library.opcheck(backward, (*given, *options, *REST, *upstream))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shift": 0, "label_smoothing": 0.1, "filter_eps": None},
        {"label_smoothing": 0.1, "z_loss": 1e-3},
        {"softcap": 4.0, "label_smoothing": 0.1},
        {"filter_e_grad": False},
        {"filter_c_grad": False},
        # Ranges of columns and parts of rows: the least for float64 is twice 1024 D + 67000 bytes.
        {"workspace_bytes": 200_000},
        {"workspace_bytes": 200_000, "label_smoothing": 0.1, "filter_eps": None},
    ],
)
@pytest.mark.parametrize("learned", LEARNED)
def test_some_gradients(options, learned):
    """In one sweep or two, whole or in parts; a bias alone is formed without dC."""
    subject = Subject("linear_cross_entropy", "cuda", **options)
    leaves = subject.leaves(*map(bool, learned))
    subject(*leaves).backward()
    for leaf, gradient, learns in zip(leaves, subject.expected()[1], learned, strict=True):
        if learns:
            torch.testing.assert_close(leaf.grad, gradient)
        else:
            assert leaf.grad is None


def large(dtype=torch.bfloat16, n=4096, d=256, v=65536):
    generator = torch.Generator("cuda").manual_seed(0)
    e = torch.randn(n, d, generator=generator, device="cuda").to(dtype)
    c = (torch.randn(v, d, generator=generator, device="cuda") / d**0.5).to(dtype)
    targets = torch.randint(v, (n,), generator=generator, device="cuda")
    return e, c, targets


def test_memory():
    """Less than the logits would take; saved are the inputs, lse, the bits and a few words."""
    e, c, targets = large()
    e.requires_grad_(), c.requires_grad_()
    cce_cupy.linear_cross_entropy(e, c, targets).backward()  # kernels loaded
    e.grad = c.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = cce_cupy.linear_cross_entropy(e, c, targets)
    tokens, vocab = len(e), len(c)
    bits = tokens // 128 * vocab // 8
    assert torch.cuda.memory_allocated() - before < bits + 64 * tokens + 2**16
    loss.backward()
    gradients = 2 * (e.numel() + c.numel())
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < gradients + bits + 128 * 2**20 + 600 * tokens + 2**20
    assert peak < 2 * tokens * vocab


def test_frozen_classifier_takes_no_memory_for_its_gradient():
    e, c, targets = large(v=262144)
    e.requires_grad_()
    cce_cupy.linear_cross_entropy(e, c, targets).backward()
    e.grad = None
    torch.cuda.synchronize()
    loss = cce_cupy.linear_cross_entropy(e, c, targets)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 128 * 2**20 + 2 * e.numel() + 600 * len(e) + 2**20


def test_bfloat16_like_plain_data():
    """The tier of tensor cores: the same bits as the function for plain data."""
    e, c, targets = large()
    loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(e, c, targets)
    leaves = e.clone().requires_grad_(), c.clone().requires_grad_()
    found = cce_cupy.linear_cross_entropy(*leaves, targets)
    assert torch.equal(found, loss)
    assert same(torch.autograd.grad(found, leaves), gradients[:2])


def test_backward_on_the_forwards_stream():
    """Autograd runs the backward on the forward's stream, from a thread of its own."""
    subject = Subject("linear_cross_entropy", "cuda")
    expected = subject.expected()[1]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        leaves = subject.leaves()
        loss = subject(*leaves)
    torch.cuda.current_stream().wait_stream(stream)
    loss.backward()
    torch.cuda.synchronize()
    assert same([leaf.grad for leaf in leaves], expected)


def test_no_host_synchronisation():
    subject = Subject("linear_cross_entropy", "cuda")
    leaves = subject.leaves()
    subject(*leaves).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        subject(*leaves).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_into_cuda_graphs():
    subject = Subject("LinearCrossEntropyLoss", "cuda")
    torch.compiler.reset()
    function = torch.compile(subject.__call__, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        leaves = subject.leaves()
        loss = function(*leaves)
        found = torch.autograd.grad(loss, leaves)
        assert torch.equal(loss, subject.expected()[0])
        assert same(found, subject.expected()[1])


def test_targets_out_of_range():
    subject = Subject("linear_cross_entropy", "cuda", check_targets=True)
    leaves = subject.leaves()
    subject(*leaves).backward()
    subject.targets[1, 3] = 5000
    with pytest.raises(ValueError, match=r"targets must lie in .* number 73"):
        subject(*leaves)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Cohere", "Granite", "Phi"])
def test_transformers(name):
    pytest.importorskip("transformers")
    from test_transformers import assert_equal, batch, evaluate, make

    from cce_cupy.transformers import patch_transformers

    model = make(name, torch.float32).cuda()
    inputs = {key: value.cuda() for key, value in batch().items()}
    expected = evaluate(model, **inputs)
    patch_transformers(model)
    assert_equal(evaluate(model, **inputs), expected, 1e-4)
    model.bfloat16()
    loss, gradients = evaluate(model, **inputs)
    assert loss.dtype == torch.float32
    assert all(gradient.isfinite().all() for gradient in gradients.values())
