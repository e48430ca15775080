"""A model with the loss as a module, compiled whole: one graph, without a break."""

import torch

from cce_cupy.torch import LinearCrossEntropyLoss

torch.manual_seed(0)
vocab, dim, batch, length = 4096, 64, 8, 32


class LanguageModel(torch.nn.Module):
    """Embeddings, one layer, and the loss of the next token."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab, dim)
        self.body = torch.nn.Sequential(torch.nn.Linear(dim, dim), torch.nn.GELU())
        self.loss = LinearCrossEntropyLoss(dim, vocab, shift=1)
        self.loss.linear.weight = self.embedding.weight  # tied

    def forward(self, tokens):
        return self.loss(self.body(self.embedding(tokens)), tokens)


model = LanguageModel()
# The default backend, "inductor", compiles with a C++ compiler; this one runs everywhere.
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

start = torch.randint(0, 256, (batch, 1))
tokens = (start + 17 * torch.arange(length)) % 256

for step in range(20):
    loss = compiled(tokens)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0 or step == 19:
        print(f"step {step:2d}  loss {loss:.4f}")
