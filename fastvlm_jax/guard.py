"""Judges a step inside the compiled step, and takes the update of a bad one back. What the host does: faults.py.

A step is bad if its loss, its gradient or its new batch statistics are not finite, or if its gradient is a spike: so
large that it is clipped, and far above the median of the norms before it. Only steps that are fine enter the median,
which no NaN or spike can move:

    step             40    41    42     43     44         with factor = 10
    gradient norm    2.1   1.9   nan    23.5   2.0
    median           2.0   2.0   2.0    2.0    2.0
                     fine  fine  bad    bad    fine
    skipped          0     0     1      2      2
    in_a_row         0     0     1      2      0
"""

import functools
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp

WINDOW = 128  # norms that the median is taken of
ENOUGH = 16  # with fewer norms no step counts as a spike: the gradients of a young run change fast
FINE, LOSS, GRADIENT, STATISTICS, SPIKE = range(5)  # what is wrong with a step


@flax.struct.dataclass
class Guard:
    """Holds what the next step is judged by."""

    norms: jax.Array  # float32 [WINDOW]: gradient norms of the last steps that were fine, in order; 0 = none yet
    skipped: jax.Array  # int32 []: steps so far whose update was left out
    in_a_row: jax.Array  # int32 []: bad steps since the last one that was fine


class Rule(NamedTuple):
    """Says how steps are judged.

    Attributes:
      factor: a gradient norm of more than so many times the median is a spike; infinity looks for none.
      least: no norm up to this one is a spike. Where a model has learnt nearly all, most gradients are tiny, and a hard
        batch, which is worth learning, is far above them.
      skip: whether the update of a bad step is left out.
    """

    factor: float
    least: float
    skip: bool


class Verdict(NamedTuple):
    """Holds the verdict on a step, as device scalars.

    Attributes:
      why: int32; one of FINE, LOSS, GRADIENT, STATISTICS and SPIKE.
      median: float32; the median of the norms before it, 0 if there are none.
      skipped: int32; steps so far whose update was left out, with this one.
      in_a_row: int32; bad steps since the last one that was fine, with this one.
    """

    why: jax.Array
    median: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array


def begin() -> Guard:
    """Returns the guard of a run that has taken no step."""
    return Guard(jnp.zeros(WINDOW), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def judge(rule: Rule, guard: Guard, loss: jax.Array, norm: jax.Array, batch_stats: Any) -> tuple[Guard, Verdict]:
    """Judges a step: returns the guard behind it, and the verdict.

    Args:
      loss: float32 []; loss of the step.
      norm: float32 []; norm of its gradient. It is not finite if any number in the gradient is not.
      batch_stats: its new batch statistics.
    """
    median, known = median_of(guard.norms), jnp.sum(guard.norms > 0)
    wrong = {
        LOSS: ~jnp.isfinite(loss),
        GRADIENT: ~jnp.isfinite(norm),
        STATISTICS: ~all_finite(batch_stats),
        SPIKE: (known >= ENOUGH) & (norm > rule.least) & (norm > rule.factor * median),
    }
    why = jnp.select(list(wrong.values()), list(wrong), FINE).astype(jnp.int32)
    fine = why == FINE
    norms = jnp.where(fine & (norm > 0), jnp.append(guard.norms[1:], norm), guard.norms)
    skipped, in_a_row = guard.skipped + (~fine & rule.skip), jnp.where(fine, 0, guard.in_a_row + 1)
    return Guard(norms, skipped, in_a_row), Verdict(why, median, skipped, in_a_row)


def median_of(norms: jax.Array) -> jax.Array:
    """Returns the median of the norms above 0, of an even number the lower one of the middle; 0 if there are none."""
    return jnp.sort(norms)[WINDOW - 1 - jnp.sum(norms > 0) // 2]


def all_finite(tree: Any) -> jax.Array:
    """Returns whether all numbers of a tree of arrays are finite, bool []."""
    return functools.reduce(jnp.logical_and, (jnp.isfinite(x).all() for x in jax.tree.leaves(tree)), jnp.array(True))


def chosen(fine: jax.Array, new: Any, old: Any) -> Any:
    """Returns the tree `new` if `fine`, else `old`. Each is read once, where it is used: the choice moves no bytes."""
    return jax.tree.map(lambda x, y: jnp.where(fine, x, y), new, old)
