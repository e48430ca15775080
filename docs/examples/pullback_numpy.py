"""Your own function of the per-token losses, through the pullback."""

import numpy as np

import cce_cupy

rng = np.random.default_rng(0)
sequences, length, dim, vocab = 4, 48, 32, 2048
e = rng.standard_normal((sequences, length, dim), dtype=np.float32)
c = 0.2 * rng.standard_normal((vocab, dim), dtype=np.float32)
targets = rng.integers(0, vocab, (sequences, length))

# shift=1: position i predicts the target at i + 1, without slicing or copying.
(losses, lse), pullback = cce_cupy.linear_cross_entropy_vjp(
    e, c, targets, shift=1, reduction="none", return_lse=True
)
print(f"losses {losses.shape}; the first of each sequence is unpaired: {losses[:, 0]}")

# The objective: each sequence weighs one, whatever its length, and lse is pulled towards 0.
lengths = np.array([48, 40, 30, 20])
counts = (np.arange(length) < lengths[:, None]) & (np.arange(length) >= 1)
weight = counts / counts.sum(axis=1, keepdims=True)
objective = np.sum(weight * (losses + 0.5e-4 * lse**2))

# Its derivatives with respect to losses and lse are what the pullback wants.
gradients = pullback(weight, weight * 1e-4 * lse)
print(f"objective {objective:.4f}; |de| {np.linalg.norm(gradients.e):.4f}")
print(f"positions past a sequence's end get no gradient: {np.all(gradients.e[3, 20:] == 0)}")
