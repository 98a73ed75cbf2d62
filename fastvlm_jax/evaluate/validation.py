"""Validates a model during training: the loss on the held-out split, and the accuracy of answers to its questions."""

from functools import partial

import jax

from fastvlm_jax import sharding
from fastvlm_jax.data.load.from_config import eval_batches, open_sources
from fastvlm_jax.evaluate.answers import accuracy, answer_records
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.processor import Processor
from fastvlm_jax.train_state import TrainState
from fastvlm_jax.train_step import eval_step


def make_validation(config, model: FastVLM, processor: Processor, batches):
    """Returns a function that computes {"validation/loss", "validation/accuracy"} of a train state.

    The loss is the mean over supervised tokens of all data sets with a held-out split. The questions, answered by
    greedy decoding, come from the first such data set. Without a held-out split the result is empty.

    Args:
      config: config of the run; its eval_batches and eval_questions say how much to evaluate, 0 leaves the metric out.
      batches: sharding of the batches.
    """
    held_out = open_sources(config.data, "validation")
    everywhere = jax.sharding.NamedSharding(batches.mesh, sharding.spec(()))
    loss_fn = jax.jit(partial(eval_step, model=model), out_shardings=everywhere)

    def validate(state: TrainState) -> dict[str, float]:
        variables, scalars = {"params": state.params, "batch_stats": state.batch_stats}, {}
        if config.eval_batches and held_out:
            total = tokens = 0.0
            loader = eval_batches(
                config.data, processor, "validation", sharding=batches, num_batches=config.eval_batches
            )
            for batch in loader:
                loss, count = loss_fn(variables, batch)
                total, tokens = total + float(loss), tokens + float(count)
            loader.close()
            scalars["validation/loss"] = total / max(tokens, 1)
        if config.eval_questions and held_out:
            results = answer_records(model, variables, processor, held_out[0], limit=config.eval_questions)
            scalars["validation/accuracy"] = accuracy(results)
        return scalars

    return validate
