"""Loss and gradients of PyTorch tensors in a CUDA graph."""

import torch

import cce_cupy

torch.manual_seed(0)
tokens, dim, vocab = 512, 64, 8192
e = torch.randn(tokens, dim, device="cuda")
c = 0.1 * torch.randn(vocab, dim, device="cuda")
targets = torch.randint(0, vocab, (tokens,), device="cuda")

# One call before the capture, on another stream: it compiles and loads the kernels.
warm = torch.cuda.Stream()
warm.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(warm):
    cce_cupy.linear_cross_entropy_value_and_grad(e, c, targets)
torch.cuda.current_stream().wait_stream(warm)

graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(e, c, targets)

# A replay computes on what the tensors hold then: other numbers, other tokens ignored.
for ignored in (0, 100):
    e.normal_()
    targets.random_(vocab)
    targets[:ignored] = -100
    graph.replay()
    replayed = [tensor.clone() for tensor in (loss, gradients.e, gradients.c)]
    called, others = cce_cupy.linear_cross_entropy_value_and_grad(e, c, targets)
    assert all(map(torch.equal, replayed, (called, others.e, others.c)))
    print(f"{ignored} tokens ignored: loss {called:.4f}, the replay gives the same bits")
