"""A model of Hugging Face transformers, patched: labels in, loss out, and no logits between."""

import torch
import transformers

from cce_cupy.transformers import patch_transformers

torch.manual_seed(0)
config = transformers.Gemma2Config(
    vocab_size=4096,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    final_logit_softcapping=30.0,
)
model = transformers.Gemma2ForCausalLM(config).train()
undo = patch_transformers(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

start = torch.randint(0, 256, (8, 1))
tokens = (start + 17 * torch.arange(32)) % 256

for step in range(20):
    output = model(input_ids=tokens, labels=tokens)
    optimizer.zero_grad()
    output.loss.backward()
    optimizer.step()
    if step % 10 == 0 or step == 19:
        print(f"step {step:2d}  loss {output.loss:.4f}")

print("logits", tuple(output.logits.shape))
undo()
print("logits", tuple(model(input_ids=tokens, labels=tokens).logits.shape))
