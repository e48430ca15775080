"""Tokens over the devices, the classifier on each of them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import cce_cupy

mesh = jax.sharding.Mesh(np.array(jax.devices()), ("tokens",))
keys = jax.random.split(jax.random.key(0), 3)
tokens, dim, vocab = 128 * mesh.size, 64, 4096
e = jax.random.normal(keys[0], (tokens, dim))
c = 0.1 * jax.random.normal(keys[1], (vocab, dim))
targets = jax.random.randint(keys[2], (tokens,), 0, vocab)


def mean_loss(e, c, targets):
    """Return the mean over the tokens of all devices; each comes here with its own."""
    total = cce_cupy.linear_cross_entropy(e, c, targets, reduction="sum")
    number = jnp.sum(targets != -100)
    return jax.lax.psum(total, "tokens") / jax.lax.psum(number, "tokens")


spread = jax.shard_map(
    mean_loss, mesh=mesh, in_specs=(P("tokens"), P(), P("tokens")), out_specs=P()
)
loss, (de, dc) = jax.jit(jax.value_and_grad(spread, (0, 1)))(e, c, targets)

alone, gradients = cce_cupy.linear_cross_entropy_value_and_grad(e, c, targets)
print(f"{mesh.size} devices  loss {loss:.4f}, on one {alone:.4f}")
np.testing.assert_allclose(loss, alone, rtol=1e-5)
np.testing.assert_allclose(dc, gradients.c, rtol=1e-3, atol=1e-7)
