"""A small language model in JAX whose loss head is cce_cupy."""

import jax
import jax.numpy as jnp

import cce_cupy

vocab, dim, batch, length = 4096, 64, 8, 32
keys = jax.random.split(jax.random.key(0), 4)
parameters = {
    "embedding": jax.random.normal(keys[0], (vocab, dim)),
    "inner": jax.random.normal(keys[1], (dim, dim)) / dim**0.5,
    "head": 0.02 * jax.random.normal(keys[2], (vocab, dim)),
}

# A text with a rule to learn: each token follows from the one before.
start = jax.random.randint(keys[3], (batch, 1), 0, 256)
tokens = (start + 17 * jnp.arange(length)) % 256


def loss_of(parameters, tokens):
    """Return the mean loss of predicting each token from the one before."""
    hidden = jax.nn.gelu(parameters["embedding"][tokens] @ parameters["inner"])
    return cce_cupy.linear_cross_entropy(hidden, parameters["head"], tokens, shift=1)


@jax.jit
def train(parameters, tokens):
    """Take one step of gradient descent."""
    loss, gradients = jax.value_and_grad(loss_of)(parameters, tokens)
    return loss, jax.tree.map(lambda p, g: p - 5.0 * g, parameters, gradients)


for step in range(20):
    loss, parameters = train(parameters, tokens)
    if step % 10 == 0 or step == 19:
        print(f"step {step:2d}  loss {loss:.4f}")
