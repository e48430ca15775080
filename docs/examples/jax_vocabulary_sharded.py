"""The vocabulary over the devices, all tokens on each of them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import cce_cupy
from cce_cupy.distributed import Shard, linear_cross_entropy

mesh = jax.sharding.Mesh(np.array(jax.devices()), ("vocabulary",))
keys = jax.random.split(jax.random.key(0), 3)
tokens, dim, vocab = 128, 64, 4095  # does not divide evenly
e = jax.random.normal(keys[0], (tokens, dim))
c = 0.1 * jax.random.normal(keys[1], (vocab, dim))
targets = jax.random.randint(keys[2], (tokens,), 0, vocab)

rows = -(-vocab // mesh.size)
filler = rows * mesh.size - vocab
padded = jnp.pad(c, ((0, filler), (0, 0)))
bias = jnp.pad(jnp.zeros(vocab), (0, filler), constant_values=-jnp.inf)


def loss_of(e, c, targets, bias):
    """Return the mean loss; each device comes here with its rows of c and bias."""
    shard = Shard(
        first=jax.lax.axis_index("vocabulary") * rows,
        largest=lambda x: jax.lax.pmax(jax.lax.stop_gradient(x), "vocabulary"),
        total=lambda x: jax.lax.psum(x, "vocabulary"),
    )
    return linear_cross_entropy(shard, e, c, targets, bias, label_smoothing=0.1)


over = P("vocabulary")
spread = jax.shard_map(loss_of, mesh=mesh, in_specs=(P(), over, P(), over), out_specs=P())
loss, (de, dc) = jax.jit(jax.value_and_grad(spread, (0, 1)))(e, padded, targets, bias)

alone, gradients = cce_cupy.linear_cross_entropy_value_and_grad(e, c, targets, label_smoothing=0.1)
print(f"{mesh.size} devices  loss {loss:.4f}, on one {alone:.4f}")
np.testing.assert_allclose(loss, alone, rtol=1e-5)
np.testing.assert_allclose(de, gradients.e, rtol=1e-3, atol=1e-6)
np.testing.assert_allclose(dc[:vocab], gradients.c, rtol=1e-3, atol=1e-6)
