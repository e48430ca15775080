"""A small language model in PyTorch on a GPU: float32 weights, the loss head in bfloat16."""

import torch

from cce_cupy import linear_cross_entropy

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
    with torch.autocast("cuda", torch.bfloat16):
        hidden = body(embedding(tokens))
        # The float32 weight is cast as the head itself would cast it.
        loss = linear_cross_entropy(hidden, head.weight, tokens, shift=1)
    assert loss.device == device
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0 or step == 19:
        print(f"step {step:2d}  loss {loss:.4f}")
