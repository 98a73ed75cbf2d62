"""Splits parameters into trainable and frozen ones, by groups of paths, and makes their schedule and optimizer."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

Groups = Sequence[tuple[str, float, float]]  # (path regex, peak learning rate, weight decay)
DECAYED = ("kernel", "embedding")  # biases, norms and layer scales are never decayed


def assign(params, groups: Groups) -> dict[str, int]:
    """Returns parameter path ("vision/stem_0/...") -> number of its group, the first whose regex matches its start.

    Raises:
      ValueError: no pattern matches a parameter, or a pattern gets no parameter; the message names it.
    """
    assigned = {}
    for path in flatten_dict(params, sep="/"):
        matches = [i for i, (pattern, _, _) in enumerate(groups) if re.match(pattern, path)]
        if not matches:
            raise ValueError(f"groups: no pattern matches parameter {path}; end the list with ('.*', rate, decay)")
        assigned[path] = matches[0]
    for i, (pattern, _, _) in enumerate(groups):
        if i not in assigned.values():
            raise ValueError(f"groups: pattern {pattern!r} matches no parameter that is left; remove or correct it")
    return assigned


def split(params, groups: Groups) -> tuple[dict, dict]:
    """Returns (trainable, frozen) parameters as flat dicts by path.

    Groups of rate 0 are frozen: they get no gradient and no optimizer slots.
    """
    assigned = assign(params, groups)
    flat = flatten_dict(params, sep="/")
    trainable = {path: x for path, x in flat.items() if groups[assigned[path]][1] > 0}
    return trainable, {path: x for path, x in flat.items() if path not in trainable}


def merge(trainable: dict, frozen: dict) -> dict:
    """Returns the nested parameters that `split` took apart."""
    return unflatten_dict({**trainable, **frozen}, sep="/")


def schedule(peak: float, steps: int, warmup_ratio: float) -> optax.Schedule:
    """Returns a linear warm-up over a fraction of the steps, then a cosine to zero (paper, Tables 8 and 9).

    The warm-up takes the fraction rounded up, as in transformers; of 0 steps, it leaves the first step at the peak.
    """
    warmup = math.ceil(steps * warmup_ratio)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))


def make_optimizer(
    params,
    groups: Groups,
    *,
    steps: int,
    warmup_ratio: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    clip_norm: float,
    moment_dtype: str = "float32",
) -> optax.GradientTransformation:
    """Returns AdamW with a rate and a decay for each group; the gradients are first clipped by their global norm.

    The transformation acts on the flat trainable dict that `split` returns, with gradients in float32.

    Args:
      params: all parameters, or their abstract shapes.
      steps: optimizer steps of the whole run.
      moment_dtype: dtype of the first moment; the second stays in float32, because in bfloat16 it would not move.
    """
    assigned = assign(params, groups)
    trainable, _ = split(params, groups)

    def adamw(peak: float, decay: float) -> optax.GradientTransformation:
        def decayed(tree):
            return {path: path.split("/")[-1] in DECAYED for path in tree}

        rate = schedule(peak, steps, warmup_ratio)
        return optax.adamw(rate, beta1, beta2, epsilon, mu_dtype=moment_dtype, weight_decay=decay, mask=decayed)

    transforms = {i: adamw(peak, decay) for i, (_, peak, decay) in enumerate(groups) if peak > 0}
    labels = {path: assigned[path] for path in trainable}
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.partition(transforms, labels))


def update(optimizer: optax.GradientTransformation, gradients: dict, slots, trainable: dict) -> tuple[dict, Any]:
    """Returns (trainable parameters, optimizer slots) after a step along the gradients."""
    with jax.named_scope("optimizer"):  # the name in traces
        updates, slots = optimizer.update(gradients, slots, trainable)
        return optax.apply_updates(trainable, updates), slots


def learning_rates(step, groups: Groups, steps: int, warmup_ratio: float) -> dict[str, jnp.ndarray]:
    """Returns pattern -> learning rate at `step` of every trainable group, for the log."""
    return {pattern: schedule(peak, steps, warmup_ratio)(step) for pattern, peak, _ in groups if peak > 0}
