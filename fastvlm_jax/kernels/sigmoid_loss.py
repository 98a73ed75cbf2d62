"""Computes the sigmoid loss of SigLIP (arXiv 2303.15343) block by block, as pair_blocks.py describes."""

from functools import partial

import jax
import jax.numpy as jnp

from fastvlm_jax import sharding
from fastvlm_jax.kernels.pair_blocks import ALL, PAIRS, columns_of, logits, over_texts, product, wide

Array = jax.Array


def plain(images: Array, texts: Array, scale: Array, bias: Array) -> Array:
    """Returns what `blocked` does, from whole matrices: the reference."""
    z = scale * (images @ texts.T) + bias
    return -jnp.sum(jax.nn.log_sigmoid(jnp.where(jnp.eye(len(z), dtype=bool), z, -z))) / len(z)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def blocked(images: Array, texts: Array, scale: Array, bias: Array, block: int = 0, ring: bool = False) -> Array:
    """Returns the sigmoid loss of SigLIP: a sum over the texts, a mean over the images; see contrastive.blocked.

    Args:
      bias: []; added to all logits.
    """
    return _forward(images, texts, scale, bias, block, ring)[0]


def _forward(images, texts, scale, bias, block, ring):
    def local(x, y, scale, bias):
        ids = sharding.first_of_batch(len(x)) + jnp.arange(len(x))

        def add(loss, fixed, nothing):
            y, others = fixed
            z = logits(x, y, scale) + bias
            return loss - jnp.sum(jax.nn.log_sigmoid(jnp.where(ids[:, None] == others, z, -z))), nothing

        none = partial(jnp.zeros, dtype=wide(x))
        loss, _ = over_texts(add, jnp.zeros((), wide(x)), (y, ids), none, lambda x: x, columns_of(block, len(x)), ring)
        return sharding.sum_batch(loss) / (len(x) * sharding.batch_shards())

    loss = sharding.on_shards(local, (PAIRS, PAIRS, ALL, ALL), ALL)(images, texts, scale, bias)
    return loss, (images, texts, scale, bias)


def _backward(block, ring, kept, gradient):
    def local(x, y, scale, bias, gradient):
        ids = sharding.first_of_batch(len(x)) + jnp.arange(len(x))
        count = len(x) * sharding.batch_shards()

        def add(sums, fixed, dy):
            y, others = fixed
            dx, ds, db = sums
            z = logits(x, y, scale)
            own = ids[:, None] == others
            g = jnp.where(own, -jax.nn.sigmoid(-z - bias), jax.nn.sigmoid(z + bias)) * gradient / count
            dx += product("rc,cd->rd", g, y) * scale
            dy += product("rc,rd->cd", g, x) * scale
            return (dx, ds + jnp.sum(g * z) / scale, db + jnp.sum(g)), dy

        zero = jnp.zeros((), wide(x))
        (dx, ds, db), dy = over_texts(
            add, (jnp.zeros(x.shape, wide(x)), zero, zero), (y, ids),
            lambda count: jnp.zeros((count, x.shape[1]), wide(x)), sharding.scatter_batch,
            columns_of(block, len(x)), ring,
        )  # fmt: skip
        ds, db = sharding.sum_batch(ds).astype(scale.dtype), sharding.sum_batch(db).astype(bias.dtype)
        return dx.astype(x.dtype), dy.astype(y.dtype), ds, db

    axes = (PAIRS, PAIRS, ALL, ALL, ALL)
    return sharding.on_shards(local, axes, (PAIRS, PAIRS, ALL, ALL))(*kept, gradient)


blocked.defvjp(_forward, _backward)
