"""Tells digests of each batch of stage 0 as metrics: `told` takes the place of pair_loss.pairs.

A digest is a sum of all numbers of an array, each times an odd number of its place: equal ones mean equal arrays.
"""

import jax
import jax.numpy as jnp

from fastvlm_jax import pair_loss

REAL = pair_loss.pairs
NAMES = ("digest_images", "digest_texts")


def digest(array):
    factors = jax.random.bits(jax.random.key(7), array.shape, jnp.uint32) | 1
    return jnp.sum((array.astype(jnp.uint32) + 1) * factors, dtype=jnp.uint32)


def told(*args, **settings):
    real = REAL(*args, **settings)

    def report(batch, size, outputs, step):
        found = dict(zip(NAMES, (digest(batch.images), digest(batch.texts)), strict=True))
        return {**real.report(batch, size, outputs, step), **found}

    return real._replace(report=report)
