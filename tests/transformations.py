"""What is done to the loss in PyTorch: a check for each row of the table in docs/pytorch.md.

A check takes a `Subject`, and asserts that a transformation gives the gradients that the function
for plain data gives, or raises `Refused` with the error. Devices share the checks.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import cce_cupy
from cce_cupy.torch import LinearCrossEntropyLoss

SHAPE, DIM, VOCAB = (3, 70), 24, 300
FILTERED = {"filter_eps": 0.01, "seed": 3}


class Subject:
    """The function or the module, as one function of e, c and bias."""

    def __init__(self, kind, device="cpu", dtype=torch.float64, **options):
        generator = torch.Generator().manual_seed(1)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(device, dtype)

        targets = torch.randint(VOCAB, SHAPE, generator=generator)
        targets[torch.rand(SHAPE, generator=generator) < 0.2] = -100
        self.kind, self.device, self.targets = kind, device, targets.to(device)
        self.options = FILTERED | {"shift": 1} | options
        self.values = normal(*SHAPE, DIM), normal(VOCAB, DIM), normal(VOCAB)
        self.module = LinearCrossEntropyLoss(
            DIM, VOCAB, bias=True, device=device, dtype=dtype, **self.options
        )

    def leaves(self, *learned):
        """e, c and bias as new leaves: all of them learned, or those that are told."""
        learned = learned or (True, True, True)
        pairs = zip(self.values, learned, strict=True)
        return [value.clone().requires_grad_(learns) for value, learns in pairs]

    def __call__(self, e, c, bias, targets=None):
        targets = self.targets if targets is None else targets
        if self.kind == "LinearCrossEntropyLoss":
            parameters = {"linear.weight": c, "linear.bias": bias}
            return torch.func.functional_call(self.module, parameters, (e, targets))
        return cce_cupy.linear_cross_entropy(e, c, targets, bias, **self.options)

    def expected(self, *values, **options):
        """Loss and gradients, from the function for plain data."""
        e, c, bias = values or self.values
        loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(
            e, c, self.targets, bias, **(self.options | options)
        )
        return loss, list(gradients)


def same(found, expected):
    """Whether tensors are equal bit by bit: the same kernels in the same order."""
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def backward(subject):
    loss, gradients = subject.expected()
    leaves = subject.leaves()
    found = subject(*leaves)
    assert torch.equal(found, loss)
    found.backward()
    assert same([leaf.grad for leaf in leaves], gradients)
    (2 * subject(*leaves)).backward()
    for leaf, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * gradient)


def two_backward_passes(subject):
    leaves = subject.leaves()
    loss = subject(*leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    copies = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()
    assert same(torch.autograd.grad(loss, leaves), copies)
    assert same(copies, subject.expected()[1])


def frozen_inputs(subject):
    _, gradients = subject.expected()
    for learned in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)):
        leaves = subject.leaves(*map(bool, learned))
        subject(*leaves).backward()
        for leaf, gradient, learns in zip(leaves, gradients, learned, strict=True):
            if not learns:
                assert leaf.grad is None
            else:
                torch.testing.assert_close(leaf.grad, gradient)


def gradient_of_lse(subject):
    other = Subject(subject.kind, subject.device, return_lse=True, gradient_filter=None)
    leaves = other.leaves()
    loss, lse = other(*leaves)
    weights = torch.linspace(-1, 1, lse.numel(), device=lse.device, dtype=lse.dtype).view(lse.shape)
    found = torch.autograd.grad(loss * 0.5 + (lse * weights).sum(), leaves)
    _, pullback = cce_cupy.linear_cross_entropy_vjp(
        other.values[0], other.values[1], other.targets, other.values[2], **other.options
    )
    half = torch.tensor(0.5, device=lse.device, dtype=lse.dtype)
    assert same(found, pullback(half, weights))
    # lse alone, and a loss that is not used.
    found = torch.autograd.grad((other(*leaves)[1] * weights).sum(), leaves)
    for gradient, whole in zip(found, pullback(0.0, weights), strict=True):
        torch.testing.assert_close(gradient, whole)


def without_grad_mode(subject):
    leaves = subject.leaves()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = subject(*leaves)
        assert torch.equal(found, subject.expected()[0])
        assert not found.requires_grad


def compiled(subject, **settings):
    torch.compiler.reset()
    function = torch.compile(subject.__call__, fullgraph=True, **settings)
    leaves = subject.leaves()
    loss = function(*leaves)
    assert torch.equal(loss, subject.expected()[0])
    assert same(torch.autograd.grad(loss, leaves), subject.expected()[1])


def compiled_whole(subject):
    compiled(subject, backend="inductor")


def compiled_dynamic(subject):
    """Lengths that change do not compile again, and what is compiled is right for each."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(subject.__call__, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for length in (70, 41, 16, 3):
        e, c, bias = subject.leaves()
        e = e.detach()[:, :length].clone().requires_grad_()
        targets = subject.targets[:, :length].clone()
        loss = function(e, c, bias, targets)
        expected = subject(e, c, bias, targets)
        assert torch.equal(loss, expected)
        found = torch.autograd.grad(loss, (e, c, bias))
        assert same(found, torch.autograd.grad(expected, (e, c, bias)))
        compilations.append(counter.frame_count)
    # The first may be traced twice, as options that are floats become constants.
    assert len(set(compilations)) == 1


def func_grad(subject):
    found = torch.func.grad(subject, argnums=(0, 1, 2))(*subject.values)
    assert same(found, subject.expected()[1])
    found, loss = torch.func.grad_and_value(subject, argnums=1)(*subject.values)
    assert same([found, loss], [subject.expected()[1][1], subject.expected()[0]])


def func_vjp(subject):
    loss, pull = torch.func.vjp(subject, *subject.values)
    assert torch.equal(loss, subject.expected()[0])
    assert same(pull(torch.ones_like(loss)), subject.expected()[1])
    assert same(pull(torch.ones_like(loss)), subject.expected()[1])


def func_vmap(subject):
    e, c, bias = subject.values
    torch.func.vmap(subject, in_dims=(0, None, None, 0))(e, c, bias, subject.targets)


def func_jvp(subject):
    torch.func.jvp(subject, subject.values, subject.values)


def compiled_func_grad(subject):
    torch.compiler.reset()
    torch.compile(torch.func.grad(subject), fullgraph=True, backend="aot_eager")(*subject.values)


def second_derivatives(subject):
    leaves = subject.leaves()
    (gradient,) = torch.autograd.grad(subject(*leaves), leaves[:1], create_graph=True)
    torch.autograd.grad(gradient.sum(), leaves[1:])


def exported(subject):
    class Loss(torch.nn.Module):
        def forward(self, *values):
            return subject(*values)

    values = (*subject.values, subject.targets)
    program = torch.export.export(Loss(), values)
    assert torch.equal(program.module()(*values), subject.expected()[0])


def checkpointed(subject, use_reentrant=False):
    leaves = subject.leaves()
    checkpoint(subject, *leaves, use_reentrant=use_reentrant).backward()
    assert same([leaf.grad for leaf in leaves], subject.expected()[1])


def checkpointed_reentrant(subject):
    checkpointed(subject, use_reentrant=True)


def autocast(subject):
    other = Subject(subject.kind, subject.device, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        leaves = other.leaves()
        with torch.autocast(torch.device(other.device).type, dtype):
            loss = other(*leaves)
        cast = [value.to(dtype) for value in other.values]
        expected, gradients = other.expected(*cast)
        assert torch.equal(loss, expected)
        found = torch.autograd.grad(loss, leaves)
        assert same(found, [gradient.float() for gradient in gradients])
        # As torch's linear does, leave float64 alone.
        with torch.autocast(torch.device(subject.device).type, dtype):
            assert torch.equal(subject(*subject.values), subject.expected()[0])


def cuda_graph(subject):
    """Forward and backward captured once, replayed on other data."""
    if torch.device(subject.device).type != "cuda":
        pytest.skip("CUDA graphs need a GPU; tests/gpu/test_gpu_torch.py checks them")
    leaves = subject.leaves()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(subject(*leaves), leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = subject(*leaves)
        gradients = torch.autograd.grad(loss, leaves)
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.5)
    graph.replay()
    expected, expected_gradients = subject.expected(*(leaf.detach() for leaf in leaves))
    assert torch.equal(loss, expected)
    assert same(gradients, expected_gradients)


ROWS = {
    "`backward()`, `torch.autograd.grad`": backward,
    "`retain_graph`, two backward passes": two_backward_passes,
    "some of `e`, `c`, `bias` frozen": frozen_inputs,
    "gradient of `lse`": gradient_of_lse,
    "`torch.no_grad`, `torch.inference_mode`": without_grad_mode,
    "`torch.compile(fullgraph=True)`": compiled_whole,
    "`torch.compile(fullgraph=True, dynamic=True)`": compiled_dynamic,
    "`torch.export`": exported,
    "`torch.func.grad`": func_grad,
    "`torch.func.vjp`": func_vjp,
    "`checkpoint(use_reentrant=False)`": checkpointed,
    "`checkpoint(use_reentrant=True)`": checkpointed_reentrant,
    "`torch.autocast`": autocast,
    "`torch.cuda.CUDAGraph`": cuda_graph,
    "second derivatives": second_derivatives,
    "`torch.func.jvp`, forward mode": func_jvp,
    "`torch.func.vmap`": func_vmap,
    "`torch.compile` of `torch.func.grad`": compiled_func_grad,
}
REFUSED = {
    second_derivatives: (NotImplementedError, "no second derivatives"),
    func_jvp: (NotImplementedError, "no forward-mode derivative"),
    func_vmap: (NotImplementedError, "no batching rule"),
    compiled_func_grad: (Exception, "functorch|custom_function_call|Unsupported|FX node"),
}
