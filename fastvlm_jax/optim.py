"""Splits parameters into trainable and frozen ones, by groups of paths, and makes their schedule and optimizer."""

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

Groups = Sequence[tuple[str, float, float]]  # (path regex, peak learning rate, weight decay)
DECAYED = ("kernel", "embedding")  # weight decay leaves out biases, norms and layer scales
WHOLE: Mapping[str, np.ndarray] = MappingProxyType({})  # factors of rates none of which is lowered
ADAPTERS = "lora/"  # what the paths of adapters begin with, see models/lora.py
FACTORED = 32  # smallest side of a matrix whose second moments Adafactor keeps as a row and a column


class Course(NamedTuple):
    """Says how learning rates go over a run: a linear warm-up, then a cosine.

    Attributes:
      steps: optimizer steps of the whole run.
      warmup_ratio: fraction of the steps in which the rate rises, rounded up to whole steps; 0 = no warm-up.
      warmup: rate of the first of W steps of warm-up, "transformers" (0) or "open_clip" (1/W of the peak).
      final_rate: rate behind the last step, as a fraction of the peak.
    """

    steps: int
    warmup_ratio: float = 0.0
    warmup: str = "transformers"
    final_rate: float = 0.0


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


def kernel_of(path: str) -> str:
    """Returns the path of the kernel that an adapter belongs to, PATH of lora/PATH/a; other paths as they are."""
    return path.removeprefix(ADAPTERS).rpartition("/")[0] if path.startswith(ADAPTERS) else path


def last_part(path: str) -> str:
    """Returns the last part of a parameter's path; of an adapter's that of its kernel."""
    return kernel_of(path).split("/")[-1]


def schedule(peak: float, course: Course) -> optax.Schedule:
    """Returns step, from 0 -> learning rate: a warm-up, then a cosine (paper, Tables 8 and 9).

    Without a warm-up the first step has the peak.
    """
    warmup = math.ceil(course.steps * course.warmup_ratio)
    decay = optax.cosine_decay_schedule(peak, max(course.steps - warmup, 1), course.final_rate)
    if not warmup:
        return decay
    if course.warmup == "transformers":
        rise = optax.linear_schedule(0.0, peak, warmup)
    else:
        rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(
    params,
    groups: Groups,
    course: Course,
    *,
    beta1: float,
    beta2: float,
    epsilon: float,
    clip_norm: float,
    optimizer: str = "adamw",
    decayed: Sequence[str] = DECAYED,
    moment_dtype: str = "float32",
    factors: Mapping[str, np.ndarray] = WHOLE,
) -> optax.GradientTransformation:
    """Returns an optimizer with a rate and a decay for each group; gradients are first clipped by their global norm.

    The transformation acts on the flat trainable dict that `split` returns, with gradients in float32. Weight decay is
    multiplied by the rate, as in PyTorch.

    Args:
      params: all parameters, or their abstract shapes.
      course: how the rates go.
      beta1, beta2, epsilon: constants of AdamW; the others have no epsilon.
      optimizer: "adamw", "adafactor" (see there), or "lion" (arXiv 2302.06675), which keeps a first moment alone.
      decayed: last parts of the paths of the parameters that decay, see `last_part`.
      moment_dtype: dtype of the first moment; the second stays in float32, because in bfloat16 it would not move.
      factors: path -> factor of the rate, and so of the weight decay, that broadcasts to the parameter; of others 1.

    Raises:
      ValueError: a parameter has no group, a group no parameter (see `assign`), or weight decay no parameter.
    """
    assigned = assign(params, groups)
    trainable, _ = split(params, groups)
    if decayed and any(decay for *_, decay in groups) and not {*map(last_part, assigned)} & {*decayed}:
        raise ValueError(f"decayed={tuple(decayed)} names no parameter, though groups ask for weight decay: correct it")

    def of_group(peak: float, decay: float) -> optax.GradientTransformation:
        def mask(tree):
            return {path: last_part(path) in decayed for path in tree}

        rate = schedule(peak, course)
        if optimizer == "adafactor":
            return adafactor(rate, beta1, beta2, decay, mask, moment_dtype)
        if optimizer == "lion":
            return optax.lion(rate, beta1, beta2, mu_dtype=moment_dtype, weight_decay=decay, mask=mask)
        return optax.adamw(rate, beta1, beta2, epsilon, mu_dtype=moment_dtype, weight_decay=decay, mask=mask)

    transforms = {i: of_group(peak, decay) for i, (_, peak, decay) in enumerate(groups) if peak > 0}
    labels = {path: assigned[path] for path in trainable}
    steps = [optax.clip_by_global_norm(clip_norm), optax.partition(transforms, labels)]
    return optax.chain(*steps, scaled(factors)) if factors else optax.chain(*steps)


def scaled(factors: Mapping[str, np.ndarray]) -> optax.GradientTransformation:
    """Returns a transformation that multiplies the updates of some parameters; see `make_optimizer`."""

    def multiply(updates, _):
        return {path: x * factors[path] if path in factors else x for path, x in updates.items()}

    return optax.stateless(multiply)


def adafactor(
    rate: optax.Schedule, beta1: float, beta2: float, decay: float, mask, moment_dtype: str
) -> optax.GradientTransformation:
    """Returns big_vision's form of Adafactor (arXiv 2106.04560, section 3.5), but for its weight decay.

    A matrix of which both sides have at least FACTORED entries keeps a row and a column of second moments. Their decay
    rises as 1 - t^-0.8, up to `beta2`. The first moment is a plain average of the scaled gradients, which big_vision
    keeps in bfloat16, as moment_dtype="bfloat16" does here. There is no clipping of updates, and no step relative to
    the size of a parameter. big_vision does not multiply weight decay by the peak rate: its 1e-4 is 0.1 here, at a rate
    of 1e-3.
    """

    def rising(step, exponent):
        return jnp.minimum(beta2, 1 - (step.astype(jnp.float32) + 1) ** -exponent)

    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=FACTORED, decay_rate_fn=rising),
        optax.ema(beta1, debias=False, accumulator_dtype=moment_dtype),
        optax.add_decayed_weights(decay, mask),
        optax.scale_by_learning_rate(rate),
    )


def update(optimizer: optax.GradientTransformation, gradients: dict, slots, trainable: dict) -> tuple[dict, Any]:
    """Returns (trainable parameters, optimizer slots) after a step along the gradients."""
    with jax.named_scope("optimizer"):  # the name in traces
        updates, slots = optimizer.update(gradients, slots, trainable)
        return optax.apply_updates(trainable, updates), slots


class Span(NamedTuple):
    """Holds the name of a trainable group in the log, and its lowest and highest peak rate."""

    name: str
    lowest: float
    highest: float


def spans(params, groups: Groups, factors: Mapping[str, np.ndarray] = WHOLE) -> list[Span]:
    """Returns the peak rates of every trainable group, which differ within one by `factors`; see `make_optimizer`.

    Names are made of the letters and digits of the patterns, "vision" of "vision/.*" and "rest" of ".*".
    """
    found: dict[int, list[float]] = {}
    for path, i in assign(params, groups).items():
        if groups[i][1] > 0:
            found.setdefault(i, []).extend(np.ravel(factors.get(path, 1.0)).tolist())
    names: list[str] = []
    for i in sorted(found):
        name = "_".join(re.findall(r"\w+", groups[i][0])) or "rest"
        names.append(name if name not in names else f"{name}_{i}")
    return [
        Span(name, groups[i][1] * min(found[i]), groups[i][1] * max(found[i]))
        for name, i in zip(names, sorted(found), strict=True)
    ]


def learning_rates(step, spans: Sequence[Span], course: Course) -> dict[str, float]:
    """Returns the learning rates at `step` by their names in the log.

    "lr" is the highest of all and, of several groups, "lr/NAME" the highest of one. Where rates differ within a group,
    "lr_lowest/NAME" is its lowest; of a single group "lr_lowest".
    """
    rates = {"lr": float(schedule(max(span.highest for span in spans), course)(step))}
    for span in spans:
        ending = f"/{span.name}" if len(spans) > 1 else ""
        rates[f"lr{ending}"] = float(schedule(span.highest, course)(step))
        if span.lowest < span.highest:
            rates[f"lr_lowest{ending}"] = float(schedule(span.lowest, course)(step))
    return rates


def averaged(average: Any, new: Any, decay: float, step: jax.Array) -> Any:
    """Returns an exponential moving average, a tree of float32 arrays, with `new` values in it.

    The decay of the first steps is lower, (1 + step) / (10 + step), or the average would long hold the random start.

    Args:
      step: number of steps before this one.
    """
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, x: a + (1 - decay) * (x.astype(jnp.float32) - a), average, new)
