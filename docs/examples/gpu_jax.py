"""A training step of a small bfloat16 language model in JAX, jitted, on a GPU."""

import jax
import jax.numpy as jnp

import cce_cupy

device = jax.devices("gpu")[0]
vocab, dim, batch, length = 32768, 256, 8, 128
keys = jax.device_put(jax.random.split(jax.random.key(0), 4), device)
parameters = {
    "embedding": jax.random.normal(keys[0], (vocab, dim)),
    "inner": jax.random.normal(keys[1], (dim, dim)) / dim**0.5,
    "head": 0.02 * jax.random.normal(keys[2], (vocab, dim)),
}
start = jax.random.randint(keys[3], (batch, 1), 0, 256)
tokens = (start + 17 * jnp.arange(length)) % 256


def loss_of(parameters, tokens):
    """Return the mean loss; weights are float32, products bfloat16."""
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), parameters)
    hidden = jax.nn.gelu(half["embedding"][tokens] @ half["inner"])
    return cce_cupy.linear_cross_entropy(hidden, half["head"], tokens, shift=1)


@jax.jit
def train(parameters, tokens):
    """Take one step of gradient descent."""
    loss, gradients = jax.value_and_grad(loss_of)(parameters, tokens)
    return loss, jax.tree.map(lambda p, g: p - 5.0 * g, parameters, gradients)


for step in range(20):
    loss, parameters = train(parameters, tokens)
    assert loss.devices() == {device}
    if step % 10 == 0 or step == 19:
        print(f"step {step:2d}  loss {loss:.4f}")
