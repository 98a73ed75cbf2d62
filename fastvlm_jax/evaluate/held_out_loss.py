"""Computes the mean loss of a state over the held-out split."""

from collections.abc import Callable
from functools import partial

import jax

from fastvlm_jax import sharding
from fastvlm_jax.data.load.from_config import eval_batches
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.processor import Processor
from fastvlm_jax.train_step import eval_step


def make_loss(
    config, model: FastVLM, processor: Processor, batches: jax.sharding.Sharding
) -> Callable[[dict, Callable[[], None]], float]:
    """Looks at the held-out split, and returns the function (variables, go_on) -> mean loss over supervised tokens.

    Args:
      config: config of the run; its eval_batches says how many batches to take.
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
    loss_fn = jax.jit(partial(eval_step, model=model), out_shardings=everywhere)

    def loss(variables: dict, go_on: Callable[[], None]) -> float:
        """Returns the mean loss; calls `go_on`, whose errors end it, after each batch. See `eval_step`."""
        total = tokens = 0.0
        loader = open_batches()
        try:
            for batch in loader:
                loss, count = loss_fn(variables, batch)
                total, tokens = total + float(loss), tokens + float(count)
                go_on()
        finally:
            loader.close()
        return total / max(tokens, 1)

    return loss
