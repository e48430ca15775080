"""A small language model in PyTorch on a GPU: float32 weights, the loss head in bfloat16."""

import torch

import cce_cupy

torch.manual_seed(0)
device = torch.device("cuda", torch.cuda.current_device())
vocab, dim, batch, length = 4096, 64, 8, 32

embedding = torch.nn.Embedding(vocab, dim)
body = torch.nn.Sequential(torch.nn.Linear(dim, dim), torch.nn.GELU(), torch.nn.LayerNorm(dim))
head = torch.nn.Linear(dim, vocab, bias=False)
model = torch.nn.ModuleList([embedding, body, head]).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

# A text with a rule to learn: each token follows from the one before.
start = torch.randint(0, 256, (batch, 1), device=device)
tokens = (start + 17 * torch.arange(length, device=device)) % 256

for step in range(20):
    optimizer.zero_grad()
    hidden = body(embedding(tokens))
    # Tensors are plain data here: the call does not record anything for autograd.
    loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(
        hidden.bfloat16(), head.weight.bfloat16(), tokens, shift=1
    )
    assert loss.device == gradients.e.device == device
    head.weight.grad = gradients.c.float()
    hidden.backward(gradients.e.float())  # autograd takes over below the loss head
    optimizer.step()
    if step % 10 == 0 or step == 19:
        print(f"step {step:2d}  loss {loss:.4f}")
