"""Validates a model during training: the loss on the held-out split, and the accuracy of answers to its questions."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
from absl import logging

from fastvlm_jax import sharding
from fastvlm_jax.data.load.from_config import eval_batches, open_sources
from fastvlm_jax.data.sources import RecordSource
from fastvlm_jax.evaluate.record_answers import accuracy, answer
from fastvlm_jax.evaluate.record_questions import Question, collect
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.processor import Processor
from fastvlm_jax.train_state import TrainState
from fastvlm_jax.train_step import eval_step

# Computes {"validation/loss", "validation/accuracy"} of a state, or None if the function, asked after every batch, says
# that the run is to stop.
Validate = Callable[[TrainState, Callable[[], bool]], dict[str, float] | None]


class _Stopped(Exception):
    """Raised to leave a validation between two batches."""


def make_validation(config, model: FastVLM, processor: Processor, batches: jax.sharding.Sharding) -> Validate | None:
    """Looks at all that validation needs, and returns the function that validates; None if there is nothing to do.

    The loss is the mean over supervised tokens of all data sets with a held-out split. The questions, answered by
    greedy decoding, come from the first such data set that holds some; they are asked as `data.turns` makes samples.

    Args:
      config: config of the run; its eval_batches and eval_questions say how much to evaluate, 0 leaves the metric out.
      batches: sharding of the batches.

    Raises:
      ValueError: the held-out split cannot be used for the loss, or none of its records for questions.
    """
    if not config.eval_batches and not config.eval_questions:
        return None
    held_out = open_sources(config.data, "validation")
    if not held_out:
        _say(
            "this run has no validation: no data set has records in a split 'validation'; `fastvlm data write "
            "--validation_share 0.05` sets some aside"
        )
        return None
    open_batches = partial(
        eval_batches, config.data, processor, "validation", sharding=batches, num_batches=config.eval_batches
    )
    if config.eval_batches:
        _check(open_batches)
    asked = read_questions(config, processor, held_out) if config.eval_questions else []
    everywhere = jax.sharding.NamedSharding(batches.mesh, sharding.spec(()))
    loss_fn = jax.jit(partial(eval_step, model=model), out_shardings=everywhere)

    def validate(state: TrainState, stopped: Callable[[], bool]) -> dict[str, float] | None:
        def go_on(*_) -> None:
            if stopped():
                raise _Stopped

        variables, scalars = {"params": state.params, "batch_stats": state.batch_stats}, {}
        try:
            if config.eval_batches:
                scalars["validation/loss"] = mean_loss(loss_fn, variables, open_batches(), go_on)
            if asked:
                max_tokens = config.eval_max_tokens
                results = answer(model, variables, processor, asked, max_tokens=max_tokens, progress=go_on)
                scalars["validation/accuracy"] = accuracy(results)
        except _Stopped:
            return None
        return scalars

    return validate


def mean_loss(loss_fn: Callable, variables: dict, loader, go_on: Callable[[], None]) -> float:
    """Returns the mean loss over the supervised tokens of a loader's batches, and closes it; see `eval_step`."""
    total = tokens = 0.0
    try:
        for batch in loader:
            loss, count = loss_fn(variables, batch)
            total, tokens = total + float(loss), tokens + float(count)
            go_on()
    finally:
        loader.close()
    return total / max(tokens, 1)


def read_questions(config, processor: Processor, held_out: Sequence[RecordSource]) -> list[Question]:
    """Returns the questions to ask, from the first data set that holds some, and says what is left out.

    Raises:
      ValueError: no data set holds a question that can be asked; the message says why.
    """
    for source in held_out:
        asked = collect(
            source, processor, limit=config.eval_questions, max_tokens=config.eval_max_tokens, turns=config.data.turns
        )
        if asked.left_out and asked.questions:
            _say(f"validation leaves out {len(asked.left_out)} records of {source.folder}: {asked.describe_left_out()}")
        if asked.questions:
            break
    else:
        raise ValueError(
            f"eval_questions={config.eval_questions}: none of the {sum(map(len, held_out))} validation records can be "
            f"asked about ({asked.describe_left_out()}); set --config.eval_questions=0, or hold out other records"
        )
    long = sum(len(processor.tokenizer.encode(q.truth)) > config.eval_max_tokens for q in asked.questions)
    if long:
        _say(
            f"{long} of {len(asked.questions)} answers to the validation questions are longer than eval_max_tokens="
            f"{config.eval_max_tokens} and cannot be matched: raise it"
        )
    return asked.questions


def _check(open_batches: Callable) -> None:
    """Opens the batches of the validation loss once, so that what is wrong with them shows before the first step."""
    try:
        open_batches().close()
    except ValueError as error:
        raise ValueError(f"the validation split: {error}; or set --config.eval_batches=0") from error


def _say(line: str) -> None:
    if jax.process_index() == 0:
        logging.warning("%s", line)
