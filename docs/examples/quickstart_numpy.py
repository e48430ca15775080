"""Loss, gradients and statistics of a linear classifier in NumPy."""

import ml_dtypes
import numpy as np

import cce_cupy

rng = np.random.default_rng(0)
tokens, dim, vocab = 512, 64, 8192
c = 0.1 * rng.standard_normal((vocab, dim), dtype=np.float32)
targets = rng.integers(0, vocab, tokens)
e = 5.0 * c[targets] + rng.standard_normal((tokens, dim), dtype=np.float32)
targets[:32] = -100  # ignore_index: these tokens count for nothing

# The loss alone.
loss = cce_cupy.linear_cross_entropy(e, c, targets)
print(f"loss {loss:.4f}, {loss.dtype}, shape {loss.shape}")

# The loss and its gradients: here, ten steps of plain gradient descent on the classifier.
for _ in range(10):
    loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(e, c, targets)
    c -= 10.0 * gradients.c
print(f"after ten steps {loss:.4f}; de {gradients.e.shape}, dc {gradients.c.shape}")

# bfloat16 comes from ml_dtypes. Sums are float32; the gradients come back in bfloat16.
e_bf16, c_bf16 = e.astype(ml_dtypes.bfloat16), c.astype(ml_dtypes.bfloat16)
loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(e_bf16, c_bf16, targets)
print(f"in bfloat16 {loss:.4f}; gradients in {gradients.e.dtype}")

# What else the forward pass knows about each token.
statistics = cce_cupy.token_statistics(e, c, targets)
valid = targets != -100
accuracy = np.mean(statistics.argmax[valid] == targets[valid])
print(f"accuracy {accuracy:.3f}, mean entropy {statistics.entropy[valid].mean():.3f} nats")
