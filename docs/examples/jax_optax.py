"""An attention language model in plain JAX, trained by optax, with tied embeddings."""

import jax
import jax.numpy as jnp
import optax

import cce_cupy

vocab, dim, heads, batch, length = 4096, 64, 4, 8, 32
keys = jax.random.split(jax.random.key(0), 4)
scale = dim**-0.5
parameters = {
    "embedding": scale * jax.random.normal(keys[0], (vocab, dim)),
    "mix": scale * jax.random.normal(keys[1], (3, heads, dim, dim // heads)),
    "out": scale * jax.random.normal(keys[2], (heads, dim // heads, dim)),
}
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
state = optimizer.init(parameters)

# A text with a rule to learn, and padding that is not to be learned.
start = jax.random.randint(keys[3], (batch, 1), 0, 256)
tokens = (start + 17 * jnp.arange(length)) % 256
targets = jnp.where(jnp.arange(length) < length - 4, tokens, -100)


@jax.checkpoint  # forget the body's activations, and compute them again in the backward
def body(parameters, tokens):
    """Return the hidden states, shape (batch, length, dim)."""
    x = parameters["embedding"][tokens] / scale
    query, key, value = jnp.einsum("bld,chdk->cblhk", x, parameters["mix"])
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    x = x + jnp.einsum("blhk,hkd->bld", mixed, parameters["out"])
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def loss_of(parameters, tokens, targets):
    """Return the mean loss over the tokens that are not padding."""
    hidden = body(parameters, tokens)
    return cce_cupy.linear_cross_entropy(
        hidden, parameters["embedding"], targets, shift=1, z_loss=1e-4
    )


@jax.jit
def train(parameters, state, tokens, targets):
    """Take one step of the optimizer."""
    loss, gradients = jax.value_and_grad(loss_of)(parameters, tokens, targets)
    updates, state = optimizer.update(gradients, state, parameters)
    return loss, optax.apply_updates(parameters, updates), state


for step in range(30):
    loss, parameters, state = train(parameters, state, tokens, targets)
    if step % 10 == 0 or step == 29:
        print(f"step {step:2d}  loss {loss:.4f}")
