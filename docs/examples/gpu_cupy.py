"""Loss and gradients of CuPy arrays, on a stream of their own."""

import cupy as cp
import numpy as np

import cce_cupy

rng = np.random.default_rng(0)
tokens, dim, vocab = 512, 64, 8192
e = rng.standard_normal((tokens, dim), dtype=np.float32)
c = 0.1 * rng.standard_normal((vocab, dim), dtype=np.float32)
targets = rng.integers(0, vocab, tokens)

# The kernels, and what they allocate, go to the stream that is current; nothing waits for it.
stream = cp.cuda.Stream(non_blocking=True)
with stream:
    on_device = cp.asarray(e), cp.asarray(c), cp.asarray(targets)
    loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(*on_device)
stream.synchronize()
print(f"loss {float(loss):.4f}; dc {gradients.c.shape} on {gradients.c.device}")

# The CPU computes the same, up to rounding.
loss_cpu, gradients_cpu = cce_cupy.linear_cross_entropy_value_and_grad(e, c, targets)
np.testing.assert_allclose(loss.get(), loss_cpu, rtol=1e-5)
np.testing.assert_allclose(gradients.c.get(), gradients_cpu.c, rtol=1e-3, atol=1e-7)
print("loss and gradient agree with the CPU's")

# A target out of range makes its token NaN; check_targets=True waits for the GPU and raises.
targets[7] = vocab
wrong = cp.asarray(targets)
losses = cce_cupy.linear_cross_entropy(*on_device[:2], wrong, reduction="none")
print(f"NaN at {np.flatnonzero(np.isnan(losses.get()))}")
try:
    cce_cupy.linear_cross_entropy(*on_device[:2], wrong, check_targets=True)
except ValueError as error:
    print(f"refused: {error}")
else:
    raise AssertionError("check_targets=True must refuse this")
