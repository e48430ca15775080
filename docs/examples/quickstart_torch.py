"""A small language model in PyTorch whose loss head is cce_cupy."""

import torch

import cce_cupy

torch.manual_seed(0)
vocab, dim, batch, length = 4096, 64, 8, 32

embedding = torch.nn.Embedding(vocab, dim)
body = torch.nn.Sequential(torch.nn.Linear(dim, dim), torch.nn.GELU(), torch.nn.LayerNorm(dim))
head = torch.nn.Linear(dim, vocab, bias=False)
parameters = [*embedding.parameters(), *body.parameters(), *head.parameters()]
optimizer = torch.optim.AdamW(parameters, lr=1e-2)

# A text with a rule to learn: each token follows from the one before.
start = torch.randint(0, 256, (batch, 1))
tokens = (start + 17 * torch.arange(length)) % 256

for step in range(20):
    optimizer.zero_grad()
    hidden = body(embedding(tokens))
    # Tensors are plain data here: the call does not record anything for autograd.
    loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(
        hidden, head.weight, tokens, shift=1
    )
    head.weight.grad = gradients.c
    hidden.backward(gradients.e)  # autograd takes over below the loss head
    optimizer.step()
    if step % 10 == 0 or step == 19:
        print(f"step {step:2d}  loss {loss:.4f}")
