"""Computes the mean loss of a state over the held-out split."""

from collections.abc import Callable
from functools import partial

import jax

from fastvlm_jax import sharding
from fastvlm_jax.data.load.from_config import eval_batches
from fastvlm_jax.losses import Loss
from fastvlm_jax.processor import Processor


def make_loss(
    config, loss: Loss, processor: Processor, batches: jax.sharding.Sharding
) -> Callable[[dict, Callable[[], None]], float]:
    """Looks at the held-out split, and returns the function (variables, go_on) -> mean loss.

    It is the mean over the supervised tokens or, in stage 0, over the pairs.

    Args:
      config: config of the run; its eval_batches says how many batches to take.
      loss: what the run minimises.
      batches: sharding of the batches.

    Raises:
      ValueError: the split cannot be used.
    """
    open_batches = partial(
        eval_batches, config.data, processor, "validation", sharding=batches, num_batches=config.eval_batches
    )
    try:
        open_batches().close()
    except ValueError as error:
        raise ValueError(f"the validation split: {error}; or set --config.eval_batches=0") from error
    everywhere = jax.sharding.NamedSharding(batches.mesh, sharding.spec(()))
    held_out = jax.jit(loss.held_out, out_shardings=everywhere)

    def mean(variables: dict, go_on: Callable[[], None]) -> float:
        """Returns the mean loss; calls `go_on`, whose errors end it, after each batch."""
        total = size = 0.0
        loader = open_batches()
        try:
            for batch in loader:
                summed, count = held_out(variables, batch)
                total, size = total + float(summed), size + float(count)
                go_on()
        finally:
            loader.close()
        return total / max(size, 1)

    return mean
