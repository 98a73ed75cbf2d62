"""Parameter groups by path, the split of trainable and frozen parameters, the schedule and the optimizer."""

import re
from collections.abc import Sequence

import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

Groups = Sequence[tuple[str, float, float]]  # (path regex, peak learning rate, weight decay)
DECAYED = ("kernel", "embedding")  # biases, norms and layer scales are never decayed


def assign(params, groups: Groups) -> dict[str, int]:
    """The group of every parameter path ("vision/stem_0/..."): the first whose regex matches at the path's start.

    Raises:
      ValueError: a parameter that no pattern matches, or a pattern that no parameter falls to.
    """
    assigned = {}
    for path in flatten_dict(params, sep="/"):
        matches = [i for i, (pattern, _, _) in enumerate(groups) if re.match(pattern, path)]
        if not matches:
            raise ValueError(f"groups: no pattern matches parameter {path}; end the list with ('.*', rate, decay)")
        assigned[path] = matches[0]
    for i, (pattern, _, _) in enumerate(groups):
        if i not in assigned.values():
            raise ValueError(f"groups: pattern {pattern!r} takes no parameter; remove it or mend it")
    return assigned


def split(params, groups: Groups) -> tuple[dict, dict]:
    """(trainable, frozen): flat dicts by path. Frozen are the groups of rate 0: they get no gradient and no slots."""
    assigned = assign(params, groups)
    flat = flatten_dict(params, sep="/")
    trainable = {path: x for path, x in flat.items() if groups[assigned[path]][1] > 0}
    return trainable, {path: x for path, x in flat.items() if path not in trainable}


def merge(trainable: dict, frozen: dict) -> dict:
    """The inverse of `split`."""
    return unflatten_dict({**trainable, **frozen}, sep="/")


def schedule(peak: float, steps: int, warmup_ratio: float) -> optax.Schedule:
    """Linear warm-up over a share of the steps, then cosine to zero (paper, Tables 8 and 9)."""
    warmup = max(1, round(steps * warmup_ratio))
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
    """AdamW with a rate and a decay for each group, after clipping by the global norm of all trainable gradients.

    `params` may be abstract; the transformation acts on the flat trainable dict that `split` returns, with gradients in
    float32. `moment_dtype` is of the first moment alone: the second would not move in bfloat16.
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


def learning_rates(step, groups: Groups, steps: int, warmup_ratio: float) -> dict[str, jnp.ndarray]:
    """The rate of every trainable group at `step`, by pattern, for the log."""
    return {pattern: schedule(peak, steps, warmup_ratio)(step) for pattern, peak, _ in groups if peak > 0}
