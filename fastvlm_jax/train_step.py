"""The state, the loss and the pure functions of one step: no config, no input or output."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from fastvlm_jax import optim
from fastvlm_jax.batch import Batch
from fastvlm_jax.models.fastvlm import FastVLM


@flax.struct.dataclass
class TrainState:
    """All that the next step depends on, beside its batch."""

    step: jax.Array  # int32 []: optimizer steps done, and batches consumed
    params: Any  # nested dicts: vision/, projector/, llm/
    batch_stats: Any  # BatchNorm statistics of vision/
    opt_state: Any  # slots of the trainable parameters only


def inputs(batch: Batch) -> dict[str, jax.Array]:
    """The fields of a batch that the model reads."""
    names = ("images", "image_mask", "tokens", "image_index", "positions", "segment_ids")
    return {name: getattr(batch, name) for name in names}


def cross_entropy(logits: jax.Array, batch: Batch) -> jax.Array:
    """The loss of each token [G, R, T], 0 where it is not supervised; logits [G, R, T, V], computed in float32."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch.targets)
    return losses * batch.loss_mask


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
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step; the loss is the mean over the supervised tokens of the global batch.

    Frozen parameters are not differentiated. The randomness of a step is that of (seed, step).

    Returns:
      The new state and device scalars: loss, tokens (supervised), grad_norm (before clipping); of several data sets
      also loss_by_source [num_sources].
    """
    trainable, frozen = optim.split(state.params, groups)
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    rngs = {"drop_path": rng} if model.vision_args.get("drop_path") else None

    def loss_fn(trainable):
        variables = {"params": optim.merge(trainable, frozen), "batch_stats": state.batch_stats}
        logits, updated = model.apply(variables, **inputs(batch), train=True, mutable=["batch_stats"], rngs=rngs)
        losses, tokens = cross_entropy(logits, batch), jnp.sum(batch.loss_mask)
        return jnp.sum(losses) / jnp.maximum(tokens, 1), (losses, tokens, updated.get("batch_stats", {}))

    (loss, (losses, tokens, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable)
    updates, opt_state = optimizer.update(grads, state.opt_state, trainable)
    params = optim.merge(optax.apply_updates(trainable, updates), frozen)
    metrics = {"loss": loss, "tokens": tokens, "grad_norm": optax.global_norm(grads)}
    if num_sources > 1:
        metrics["loss_by_source"] = mean_by_source(losses, batch, num_sources)
    return TrainState(state.step + 1, params, batch_stats, opt_state), metrics


def eval_step(variables: dict, batch: Batch, *, model: FastVLM) -> tuple[jax.Array, jax.Array]:
    """(summed loss, number of supervised tokens) of a batch, with stored BatchNorm statistics."""
    losses = cross_entropy(model.apply(variables, **inputs(batch)), batch)
    return jnp.sum(losses), jnp.sum(batch.loss_mask)
