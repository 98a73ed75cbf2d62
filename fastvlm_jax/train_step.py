"""Defines the pure function of a training step: it reads no config and no files."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fastvlm_jax import guard, optim
from fastvlm_jax.batch import joined, parts_of
from fastvlm_jax.losses import Loss
from fastvlm_jax.models.lora import Lora, variables_of
from fastvlm_jax.train_state import TrainState


def train_step(
    state: TrainState,
    batch: Any,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    groups: optim.Groups,
    seed: int,
    accumulate: int = 1,
    shardings: dict | None = None,
    rule: guard.Rule | None = None,
    ema: float = 0.0,
    adapters: Lora | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one optimizer step on a global batch.

    Frozen parameters are not differentiated. The step's randomness follows from (seed, step). A step whose update is
    left out counts as a step: parameters, optimizer slots, their counts, batch statistics and averages stay as they
    are.

    Args:
      batch: a Batch or a PairBatch, as the loss reads it.
      loss: loss to minimise; see losses.py.
      accumulate: number of parts of the groups that are computed one after another. The step equals one on the whole
        batch, but for the random numbers of drop path, and for a BatchNorm in training mode that takes statistics of
        the whole batch: it sees one part at a time. Stored statistics move once a step where the loss compares all
        entries (see `cached`), else once a part.
      shardings: shardings of the trainable parameters, by path; their gradients are reduced to these.
      rule: how the step is judged, see guard.py; None does not judge it.
      ema: decay of the moving average, see optim.averaged; 0 keeps none.
      adapters: describes the adapters among the parameters; None if there are none.

    Returns:
      The new state, and device scalars: "loss", "grad_norm" (before clipping) and what the loss reports; with a rule,
      "verdict" too, a guard.Verdict.
    """
    trainable, frozen = optim.split(state.params, groups)
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    size = loss.size(batch)

    def variables(trainable, batch_stats):
        return variables_of(optim.merge(trainable, frozen), batch_stats, adapters, train=True)

    def reduced(grads):
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return grads if shardings is None else jax.lax.with_sharding_constraint(grads, shardings)

    if accumulate == 1:
        found = whole(loss, variables, trainable, state.batch_stats, batch, size, rng, reduced)
    elif loss.embed is None:
        found = added(loss, variables, trainable, state.batch_stats, batch, size, rng, reduced, accumulate)
    else:
        found = cached(loss, variables, trainable, state.batch_stats, batch, rng, reduced, accumulate)
    value, outputs, batch_stats, grads = found

    updated, opt_state = optim.update(optimizer, grads, state.opt_state, trainable)
    updated = loss.settle(updated)
    metrics = {"loss": value, "grad_norm": optax.global_norm(grads), **loss.report(batch, size, outputs, state.step)}
    average = None
    if ema:
        average = optim.averaged(state.average, {"params": updated, "batch_stats": batch_stats}, ema, state.step)
    known = state.guard
    if rule is not None:
        known, verdict = guard.judge(rule, known, value, metrics["grad_norm"], batch_stats)
        metrics["verdict"] = verdict
    if rule is not None and rule.skip:
        new, old = (
            (updated, opt_state, batch_stats, average),
            (trainable, state.opt_state, state.batch_stats, state.average),
        )
        updated, opt_state, batch_stats, average = guard.chosen(verdict.why == guard.FINE, new, old)
    return TrainState(state.step + 1, optim.merge(updated, frozen), batch_stats, opt_state, known, average), metrics


class Found(NamedTuple):
    """Holds what the passes over a batch found: its loss, the outputs, new batch statistics, and gradients by path."""

    value: jax.Array
    outputs: Any
    batch_stats: Any
    grads: dict[str, jax.Array]


def whole(loss: Loss, variables, trainable, batch_stats, batch, size, rng, reduced) -> Found:
    """Differentiates the loss of a batch in one pass.

    Args:
      variables: (trainable parameters by path, batch statistics) -> all variables.
      size: what `loss.size` says of the whole batch.
      reduced: gradients -> the same in float32, each device with its shards.
    """

    def value_of(trainable):
        return loss.value(variables(trainable, batch_stats), batch, size, rng)

    (value, (outputs, batch_stats)), grads = jax.value_and_grad(value_of, has_aux=True)(trainable)
    return Found(value, outputs, batch_stats, reduced(grads))


def added(loss: Loss, variables, trainable, batch_stats, batch, size, rng, reduced, count: int) -> Found:
    """Differentiates the loss of a batch part by part, for a loss whose values add up; see `whole`."""

    def add(carry, numbered):
        value, batch_stats, grads = carry
        i, part = numbered
        more = whole(loss, variables, trainable, batch_stats, part, size, jax.random.fold_in(rng, i), reduced)
        return (value + more.value, more.batch_stats, jax.tree.map(jnp.add, grads, more.grads)), more.outputs

    carry = (jnp.zeros((), jnp.float32), batch_stats, zeros_of(trainable, reduced))
    (value, batch_stats, grads), outputs = jax.lax.scan(add, carry, numbered_parts(batch, count))
    return Found(value, jax.tree.map(joined, outputs), batch_stats, grads)


def cached(loss: Loss, variables, trainable, batch_stats, batch, rng, reduced, count: int) -> Found:
    """Differentiates the loss of a batch part by part, for a loss that compares all entries; see `whole`.

    One pass over the parts computes the features of all entries, and the loss its gradient with respect to them; a
    second pass takes each part's gradient back into the parameters (GradCache, arXiv 2101.06983). Both passes draw the
    same random numbers and begin with the same batch statistics, whose changes are averaged over the parts.
    """

    def embed(trainable, numbered):
        i, part = numbered
        return loss.embed(variables(trainable, batch_stats), part, jax.random.fold_in(rng, i))

    parts = numbered_parts(batch, count)
    _, features = jax.lax.scan(lambda _, numbered: (None, embed(trainable, numbered)[0]), None, parts)

    def value_of(trainable, features):
        return loss.compare(variables(trainable, batch_stats)["params"], batch, features)

    differentiate = jax.value_and_grad(value_of, argnums=(0, 1), has_aux=True)
    (value, outputs), (grads, wanted) = differentiate(trainable, jax.tree.map(joined, features))

    def add(carry, parts):
        grads, moved = carry
        numbered, wanted = parts
        _, pull, part_stats = jax.vjp(partial(embed, numbered=numbered), trainable, has_aux=True)
        grads = jax.tree.map(jnp.add, grads, reduced(*pull(wanted)))
        return (grads, jax.tree.map(lambda total, x: total + x / count, moved, part_stats)), None

    carry = (reduced(grads), jax.tree.map(jnp.zeros_like, batch_stats))
    wanted = jax.tree.map(partial(parts_of, count=count), wanted)
    (grads, moved), _ = jax.lax.scan(add, carry, (parts, wanted))
    return Found(value, outputs, moved, grads)


def zeros_of(trainable, reduced) -> dict[str, jax.Array]:
    """Returns gradients of zeros."""
    return reduced(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable))


def numbered_parts(batch, count: int) -> tuple[jax.Array, Any]:
    """Returns (numbers of the parts, the parts of each array of a batch)."""
    return jnp.arange(count), jax.tree.map(partial(parts_of, count=count), batch)
