"""Defines what a training step minimises: for the VLM stages, next-token cross-entropy. Stage 0: pair_loss.py."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fastvlm_jax.batch import Batch
from fastvlm_jax.models import lora
from fastvlm_jax.models.fastvlm import FastVLM


class Loss(NamedTuple):
    """Holds a loss as pure functions that `train_step` calls.

    Attributes:
      size: batch -> int32 []; the number by which the summed losses of a whole batch are divided.
      value: (variables, part of the batch, size, rng) -> (float32 [], (outputs, batch statistics)). `outputs` are
        arrays, which `report` reads. Without `embed`, the values of the parts of a batch add up to the loss of the
        whole, and the leading axis of each output counts groups.
      report: (batch, size, outputs of the whole batch, number of steps before) -> device scalars to log beside "loss"
        and "grad_norm"; those that are NaN are not logged.
      held_out: (variables, batch) -> (summed loss, the number to divide it by), with stored BatchNorm statistics.
      embed: for a loss that compares all entries of a batch: (variables, part of the batch, rng) -> (features, batch
        statistics); the leading axis of the features counts groups. None for a loss that adds up.
      compare: with `embed`, (parameters, batch, its features) -> (float32 [], outputs): the loss of a whole batch.
      settle: trainable parameters by path -> those that are kept, behind every update.
    """

    size: Callable[[Any], jax.Array]
    value: Callable[[dict, Any, jax.Array, jax.Array], tuple[jax.Array, tuple[Any, dict]]]
    report: Callable[[Any, jax.Array, Any, jax.Array], dict[str, jax.Array]]
    held_out: Callable[[dict, Any], tuple[jax.Array, jax.Array]]
    embed: Callable[[dict, Any, jax.Array], tuple[Any, dict]] | None = None
    compare: Callable[[dict, Any, Any], tuple[jax.Array, Any]] | None = None
    settle: Callable[[dict], dict] = lambda trainable: trainable


def next_token(model: FastVLM, num_sources: int = 1) -> Loss:
    """Returns the mean cross-entropy over the supervised tokens of the global batch.

    Its report holds "tokens", the number of supervised tokens, and with several data sets "loss_by_source"
    [num_sources].
    """

    def size(batch: Batch) -> jax.Array:
        return jnp.sum(batch.loss_mask)

    def value(variables, part: Batch, tokens, rng):
        rngs = {"drop_path": rng} if model.vision_args.get("drop_path") else {}
        if lora.NAME in variables:
            rngs[lora.NAME] = rng
        losses, updated = model.apply(
            variables, **inputs(part), targets=part.targets, train=True, mutable=["batch_stats"], rngs=rngs
        )
        losses *= part.loss_mask
        return jnp.sum(losses) / jnp.maximum(tokens, 1), (losses, updated.get("batch_stats", {}))

    def report(batch: Batch, tokens, losses, _) -> dict[str, jax.Array]:
        by_source = {"loss_by_source": mean_by_source(losses, batch, num_sources)} if num_sources > 1 else {}
        return {"tokens": tokens, **by_source}

    def held_out(variables, batch: Batch):
        losses = model.apply(variables, **inputs(batch), targets=batch.targets) * batch.loss_mask
        return jnp.sum(losses), jnp.sum(batch.loss_mask)

    return Loss(size, value, report, held_out)


def inputs(batch: Batch) -> dict[str, jax.Array]:
    """Returns the fields of a batch that the model reads, as arguments of `model.apply`."""
    names = ("images", "image_mask", "tokens", "image_index", "positions", "segment_ids")
    return {name: getattr(batch, name) for name in names}


def mean_by_source(losses: jax.Array, batch: Batch, num_sources: int) -> jax.Array:
    """Returns the mean loss of each data set's supervised tokens, [num_sources]; NaN if the batch has none of them."""
    own = batch.source[..., None] == jnp.arange(num_sources)
    counts = jnp.sum(own & batch.loss_mask[..., None], axis=(0, 1, 2))
    return jnp.sum(losses[..., None] * own, axis=(0, 1, 2)) / counts
