"""Defines the pure functions of a training or validation step: they read no config and no files."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from fastvlm_jax import guard, optim
from fastvlm_jax.batch import Batch
from fastvlm_jax.losses import Loss, inputs
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.train_state import TrainState


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    groups: optim.Groups,
    seed: int,
    accumulate: int = 1,
    shardings: dict | None = None,
    rule: guard.Rule | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one optimizer step on a global batch.

    Frozen parameters are not differentiated. The step's randomness follows from (seed, step). A step whose update is
    left out counts as a step: parameters, optimizer slots, their counts and batch statistics stay as they are.

    Args:
      loss: loss to minimise; see losses.py.
      accumulate: number of parts of the groups that are computed one after another. Their gradients are added, so the
        step equals one on the whole batch; only BatchNorm in training mode sees one part at a time.
      shardings: shardings of the trainable parameters, by path; their gradients are reduced to these.
      rule: how the step is judged, see guard.py; None does not judge it.

    Returns:
      The new state, and device scalars: "loss", "grad_norm" (before clipping) and what the loss reports; with a rule,
      "verdict" too, a guard.Verdict.
    """
    trainable, frozen = optim.split(state.params, groups)
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    size = loss.size(batch)

    def value_of(trainable, batch_stats, part, rng):
        variables = {"params": optim.merge(trainable, frozen), "batch_stats": batch_stats}
        return loss.value(variables, part, size, rng)

    def gradients(batch_stats, part, rng):
        (value, (outputs, batch_stats)), grads = jax.value_and_grad(value_of, has_aux=True)(
            trainable, batch_stats, part, rng
        )
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return value, outputs, batch_stats, sharded(grads)

    def sharded(grads):
        return grads if shardings is None else jax.lax.with_sharding_constraint(grads, shardings)

    if accumulate == 1:
        value, outputs, batch_stats, grads = gradients(state.batch_stats, batch, rng)
    else:

        def add(carry, numbered):
            value, batch_stats, grads = carry
            i, part = numbered
            more_value, outputs, batch_stats, more = gradients(batch_stats, part, jax.random.fold_in(rng, i))
            return (value + more_value, batch_stats, jax.tree.map(jnp.add, grads, more)), outputs

        zeros = sharded(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable))
        carry = (jnp.zeros((), jnp.float32), state.batch_stats, zeros)
        parts = jax.tree.map(partial(parts_of, count=accumulate), batch)
        (value, batch_stats, grads), outputs = jax.lax.scan(add, carry, (jnp.arange(accumulate), parts))
        outputs = jax.tree.map(joined, outputs)

    updated, opt_state = optim.update(optimizer, grads, state.opt_state, trainable)
    metrics = {"loss": value, "grad_norm": optax.global_norm(grads), **loss.report(batch, size, outputs)}
    known = state.guard
    if rule is not None:
        known, verdict = guard.judge(rule, known, value, metrics["grad_norm"], batch_stats)
        metrics["verdict"] = verdict
    if rule is not None and rule.skip:
        new, old = (updated, opt_state, batch_stats), (trainable, state.opt_state, state.batch_stats)
        updated, opt_state, batch_stats = guard.chosen(verdict.why == guard.FINE, new, old)
    return TrainState(state.step + 1, optim.merge(updated, frozen), batch_stats, opt_state, known), metrics


def parts_of(x: jax.Array, count: int) -> jax.Array:
    """Splits an array [G, ...] into parts [count, G / count, ...]; part i holds the groups i, i + count, ..."""
    return jnp.moveaxis(x.reshape(len(x) // count, count, *x.shape[1:]), 1, 0)


def joined(parts: jax.Array) -> jax.Array:
    """Joins the parts [count, G / count, ...] that `parts_of` made to [G, ...], in the order of the groups."""
    return jnp.moveaxis(parts, 0, 1).reshape(-1, *parts.shape[2:])


def eval_step(variables: dict, batch: Batch, *, model: FastVLM) -> tuple[jax.Array, jax.Array]:
    """Returns (summed loss, number of supervised tokens) of a batch, with stored BatchNorm statistics."""
    losses = model.apply(variables, **inputs(batch), targets=batch.targets) * batch.loss_mask
    return jnp.sum(losses), jnp.sum(batch.loss_mask)
