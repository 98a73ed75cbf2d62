"""The loss and the pure functions of one step: no config, no input or output."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from fastvlm_jax import optim
from fastvlm_jax.batch import Batch
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.train_state import TrainState


def inputs(batch: Batch) -> dict[str, jax.Array]:
    """The fields of a batch that the model reads."""
    names = ("images", "image_mask", "tokens", "image_index", "positions", "segment_ids")
    return {name: getattr(batch, name) for name in names}


def mean_by_source(losses: jax.Array, batch: Batch, num_sources: int) -> jax.Array:
    """The mean loss of the supervised tokens of each data set [num_sources], NaN for those not in the batch."""
    own = batch.source[..., None] == jnp.arange(num_sources)
    counts = jnp.sum(own & batch.loss_mask[..., None], axis=(0, 1, 2))
    return jnp.sum(losses[..., None] * own, axis=(0, 1, 2)) / counts


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: FastVLM,
    optimizer: optax.GradientTransformation,
    groups: optim.Groups,
    seed: int,
    num_sources: int = 1,
    accumulate: int = 1,
    shardings: dict | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step; the loss is the mean over the supervised tokens of the global batch.

    Frozen parameters are not differentiated. The randomness of a step is that of (seed, step).

    Args:
      accumulate: parts that the groups are taken in, one after another; their gradients are added, so that the step is
        that of the whole batch. BatchNorm in training mode sees one part at a time.
      shardings: of the trainable parameters, by path: what their gradients are reduced to.

    Returns:
      The new state and device scalars: loss, tokens (supervised), grad_norm (before clipping); of several data sets
      also loss_by_source [num_sources].
    """
    trainable, frozen = optim.split(state.params, groups)
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    tokens = jnp.sum(batch.loss_mask)

    def loss_fn(trainable, batch_stats, part, rng):
        variables = {"params": optim.merge(trainable, frozen), "batch_stats": batch_stats}
        rngs = {"drop_path": rng} if model.vision_args.get("drop_path") else None
        losses, updated = model.apply(
            variables, **inputs(part), targets=part.targets, train=True, mutable=["batch_stats"], rngs=rngs
        )
        losses *= part.loss_mask
        return jnp.sum(losses) / jnp.maximum(tokens, 1), (losses, updated.get("batch_stats", {}))

    def gradients(batch_stats, part, rng):
        (loss, (losses, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            trainable, batch_stats, part, rng
        )
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return loss, losses, batch_stats, sharded(grads)

    def sharded(grads):
        return grads if shardings is None else jax.lax.with_sharding_constraint(grads, shardings)

    if accumulate == 1:
        loss, losses, batch_stats, grads = gradients(state.batch_stats, batch, rng)
    else:

        def add(carry, numbered):
            loss, batch_stats, grads = carry
            i, part = numbered
            more_loss, losses, batch_stats, more = gradients(batch_stats, part, jax.random.fold_in(rng, i))
            return (loss + more_loss, batch_stats, jax.tree.map(jnp.add, grads, more)), losses

        zeros = sharded(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable))
        carry = (jnp.zeros((), jnp.float32), state.batch_stats, zeros)
        parts = jax.tree.map(partial(parts_of, count=accumulate), batch)
        (loss, batch_stats, grads), losses = jax.lax.scan(add, carry, (jnp.arange(accumulate), parts))
        losses = jnp.moveaxis(losses, 0, 1).reshape(batch.tokens.shape)

    with jax.named_scope("optimizer"):  # as traces show it
        updates, opt_state = optimizer.update(grads, state.opt_state, trainable)
        params = optim.merge(optax.apply_updates(trainable, updates), frozen)
    metrics = {"loss": loss, "tokens": tokens, "grad_norm": optax.global_norm(grads)}
    if num_sources > 1:
        metrics["loss_by_source"] = mean_by_source(losses, batch, num_sources)
    return TrainState(state.step + 1, params, batch_stats, opt_state), metrics


def parts_of(x: jax.Array, count: int) -> jax.Array:
    """[G, ...] as `count` parts [count, G / count, ...]; part i has the groups i, i + count, ... of it."""
    return jnp.moveaxis(x.reshape(len(x) // count, count, *x.shape[1:]), 1, 0)


def eval_step(variables: dict, batch: Batch, *, model: FastVLM) -> tuple[jax.Array, jax.Array]:
    """(summed loss, number of supervised tokens) of a batch, with stored BatchNorm statistics."""
    losses = model.apply(variables, **inputs(batch), targets=batch.targets) * batch.loss_mask
    return jnp.sum(losses), jnp.sum(batch.loss_mask)
