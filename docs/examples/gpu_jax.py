"""A small language model in JAX on a GPU whose loss head is cce_cupy."""

import os

# Workspace and results of the loss head come from CuPy: leave room for them on the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp

import cce_cupy

device = jax.devices("gpu")[0]
vocab, dim, batch, length = 4096, 64, 8, 32
keys = jax.device_put(jax.random.split(jax.random.key(0), 4), device)
parameters = {
    "embedding": jax.random.normal(keys[0], (vocab, dim)),
    "inner": jax.random.normal(keys[1], (dim, dim)) / dim**0.5,
}
head = 0.02 * jax.random.normal(keys[2], (vocab, dim))

# A text with a rule to learn: each token follows from the one before.
start = jax.random.randint(keys[3], (batch, 1), 0, 256)
tokens = (start + 17 * jnp.arange(length)) % 256


@jax.jit
def body(parameters, tokens):
    """Return the hidden states, shape (batch, length, dim)."""
    return jax.nn.gelu(parameters["embedding"][tokens] @ parameters["inner"])


for step in range(20):
    hidden, pull_back = jax.vjp(lambda p: body(p, tokens), parameters)
    # The call stands outside jit and grad, and returns when its kernels are done.
    loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(hidden, head, tokens, shift=1)
    assert loss.devices() == gradients.c.devices() == {device}
    (update,) = pull_back(gradients.e)
    parameters = jax.tree.map(lambda p, g: p - 5.0 * g, parameters, update)
    head = head - 5.0 * gradients.c
    if step % 10 == 0 or step == 19:
        print(f"step {step:2d}  loss {loss:.4f}")
