"""Poisons batches: a loss around the real one is NaN where the sum of a batch's pixels is that of a poisoned batch.

Real data hold no NaN. The sums tell the batches apart in every process and on every mesh.
"""

import jax
import jax.numpy as jnp

from fastvlm_jax import losses, sharding, stage
from fastvlm_jax.data.load.from_config import make_loader

REAL = losses.next_token


def checksum(images):
    return jnp.sum(images.astype(jnp.uint32))


def poisoned(sums):
    """Takes the place of losses.next_token."""

    def next_token(model, num_sources=1):
        real = REAL(model, num_sources)

        def value(variables, part, size, rng):
            loss, outputs = real.value(variables, part, size, rng)
            bad = (checksum(part.images) == jnp.array(sums, jnp.uint32)).any()
            return jnp.where(bad, jnp.nan, 1.0) * loss, outputs

        return real._replace(value=value)

    return next_token


def first_batches(config, count):
    """(the first batches of a run by number, the sum of each one's pixels, what builds them)."""
    mesh = sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        processor = stage.open_processor(config)
        loader = make_loader(config.data, processor, "train", seed=config.seed, sharding=sharding.batch_sharding(mesh))
        found = {k: jax.device_get(next(loader)) for k in range(count)}
        loader.close()
    sums = [int(checksum(batch.images)) for batch in found.values()]
    assert len(set(sums)) == count
    return found, sums, loader.build
