"""Computes the softmax losses of contrastive training, CLIP's and the distillation of DataCompDR, block by block.

Of each direction only the running maximum and sum of exponentials of each row are kept, as in flash attention, and the
expected logit under each teacher. The backward pass computes the blocks again. The blocks: pair_blocks.py.

Legend: B pairs of the batch, D width of the features, E widths of all teachers together, K teachers; R rows and C
columns of a block.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fastvlm_jax import sharding
from fastvlm_jax.kernels.pair_blocks import ALL, PAIRS, columns_of, logits, over_texts, product, wide

Array = jax.Array


class Teachers(NamedTuple):
    """Holds what the teachers saw of the same pairs; see `blocked` for their widths and scales.

    Attributes:
      images: [B, E]; features of the images, those of one teacher behind those of the other, each of length 1.
      texts: [B, E]; features of the texts.
    """

    images: Array
    texts: Array


class Losses(NamedTuple):
    """Holds the terms of a contrastive loss, means over the pairs and both directions, float32 [] or wider.

    Attributes:
      hard: cross-entropy against the pairs: the loss of CLIP.
      soft: cross-entropy against the mean of the teachers' probabilities; 0 without teachers.
      found: shares of images and of texts whose partner has the largest logit, [2]; it has no gradient.
    """

    hard: Array
    soft: Array
    found: Array


class _Stats(NamedTuple):
    """Holds what is known of n rows (or columns) after some of their logits z, and teachers' logits t.

    Attributes:
      top, total: [n]; maximum of z, and sum of exp(z - top).
      own: [n]; logit of the partner, once its block came.
      teacher_top, teacher_total, teacher_dot: [n, K]; maximum of t, sums of exp(t - top) and of exp(t - top) z.
    """

    top: Array
    total: Array
    own: Array
    teacher_top: Array
    teacher_total: Array
    teacher_dot: Array


def plain(
    images: Array,
    texts: Array,
    scale: Array,
    teachers: Teachers | None = None,
    widths: Sequence[int] = (),
    scales: Sequence[float] = (),
) -> Losses:
    """Returns what `blocked` does, from whole matrices: the reference."""
    z = scale * (images @ texts.T)
    t = [] if teachers is None else _teacher_logits(*teachers, widths, scales)
    hard, soft, found = 0.0, jnp.zeros((), z.dtype), []
    for axis in (1, 0):  # an image looks for its text, a text for its image
        log = jax.nn.log_softmax(z, axis)
        hard -= jnp.mean(jnp.diag(log)) / 2
        if t:
            target = sum(jax.nn.softmax(x, axis) for x in t) / len(t)
            soft -= jnp.sum(target * log) / (2 * len(z))
        found.append(jnp.mean(jnp.diag(z) >= jnp.max(z, axis)))
    return Losses(hard, soft, jnp.stack(found).astype(z.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def blocked(
    images: Array,
    texts: Array,
    scale: Array,
    teachers: Teachers | None = None,
    widths: Sequence[int] = (),
    scales: Sequence[float] = (),
    block: int = 0,
    ring: bool = False,
) -> Losses:
    """Returns the softmax losses of a batch, whose pairs are sharded along the data axes of the mesh.

    Products have the dtype of the features and are added up in float32 (float64 for float64). Nothing but `images`,
    `texts` and `scale` has a gradient.

    Args:
      images, texts: [B, D]; features of length 1; those at the same place are a pair.
      scale: []; factor of the products of features.
      teachers: what teachers saw of the same pairs.
      widths: width of each teacher's features, K of them, which add up to E.
      scales: factor of each teacher's products, K of them.
      block: columns of a block of logits, 0 for pair_blocks.LOGITS in a block; it changes no result.
      ring: whether the texts move around a ring of the devices instead of being gathered.

    Raises:
      ValueError: the teachers' features have other widths, or there is not one scale for each teacher.
    """
    if len(widths) != len(scales):
        raise ValueError(
            f"teachers of widths {tuple(widths)} and scales {tuple(scales)}: give one width and one scale for each"
        )
    if teachers is not None and {sum(widths)} != {x.shape[1] for x in teachers}:
        found = " and ".join(str(x.shape[1]) for x in teachers)
        raise ValueError(
            f"teachers of widths {tuple(widths)} have features of {sum(widths)}, those given have {found}: give the "
            "width of each teacher, in the order of their features"
        )
    return _forward(images, texts, scale, teachers, widths, scales, block, ring)[0]


def _forward(images, texts, scale, teachers, widths, scales, block, ring):
    def local(x, y, scale, teachers):
        taught = (None, None) if teachers is None else teachers
        ids = sharding.first_of_batch(len(x)) + jnp.arange(len(x))

        def absorb(rows, columns, found):
            y, texts, others = columns
            z, t = logits(x, y, scale), _teacher_logits(taught[0], texts, widths, scales)
            own = jnp.where(ids[:, None] == others, z, 0)
            return _absorbed(rows, z, t, own, axis=1), _absorbed(found, z, t, own, axis=0)

        dtype = wide(x)
        rows, columns = over_texts(
            absorb, _empty(len(x), len(widths), dtype), (y, taught[1], ids),
            partial(_empty, teachers=len(widths), dtype=dtype), _merged, columns_of(block, len(x)), ring,
        )  # fmt: skip
        count = len(x) * sharding.batch_shards()
        hard, soft, found = (jnp.stack(pair) for pair in zip(*map(_terms, (rows, columns)), strict=True))
        means = [sharding.sum_batch(jnp.sum(part, 1)) / count for part in (hard, soft, found)]
        return Losses(jnp.mean(means[0]), jnp.mean(means[1]), means[2]), _norms(rows), _norms(columns)

    taught = None if teachers is None else Teachers(PAIRS, PAIRS)
    out = (Losses(ALL, ALL, ALL), (PAIRS, PAIRS), (PAIRS, PAIRS))
    losses, rows, columns = sharding.on_shards(local, (PAIRS, PAIRS, ALL, taught), out)(images, texts, scale, teachers)
    return losses, (images, texts, scale, teachers, rows, columns)


def _backward(widths, scales, block, ring, kept, gradients):
    images, texts, scale, teachers, rows, columns = kept

    def local(x, y, scale, teachers, rows, columns, hard, soft):
        taught = (None, None) if teachers is None else teachers
        ids = sharding.first_of_batch(len(x)) + jnp.arange(len(x))
        count = len(x) * sharding.batch_shards()

        def add(sums, fixed, dy):
            y, texts, others, norms = fixed
            dx, ds = sums
            z, t = logits(x, y, scale), _teacher_logits(taught[0], texts, widths, scales)
            g = (hard + soft if t else hard) * (jnp.exp(z - rows[0][:, None]) + jnp.exp(z - norms[0]))
            g -= jnp.where(ids[:, None] == others, 2 * hard, 0)
            for k, taught_z in enumerate(t):
                g -= soft / len(t) * (jnp.exp(taught_z - rows[1][:, k, None]) + jnp.exp(taught_z - norms[1][:, k]))
            g /= 2 * count
            dx += product("rc,cd->rd", g, y) * scale
            dy += product("rc,rd->cd", g, x) * scale
            return (dx, ds + jnp.sum(g * z) / scale), dy

        zero = jnp.zeros((), wide(x))
        (dx, ds), dy = over_texts(
            add, (jnp.zeros(x.shape, wide(x)), zero), (y, taught[1], ids, columns),
            lambda count: jnp.zeros((count, x.shape[1]), wide(x)), sharding.scatter_batch,
            columns_of(block, len(x)), ring,
        )  # fmt: skip
        return dx.astype(x.dtype), dy.astype(y.dtype), sharding.sum_batch(ds).astype(scale.dtype)

    taught = None if teachers is None else Teachers(PAIRS, PAIRS)
    norms = (PAIRS, PAIRS)
    axes = (PAIRS, PAIRS, ALL, taught, norms, norms, ALL, ALL)
    on_shards = sharding.on_shards(local, axes, (PAIRS, PAIRS, ALL))
    dx, dy, ds = on_shards(images, texts, scale, teachers, rows, columns, gradients.hard, gradients.soft)
    return dx, dy, ds, None


blocked.defvjp(_forward, _backward)


def teacher_entropy(
    teachers: Teachers, widths: Sequence[int], scales: Sequence[float], block: int = 0, ring: bool = False
) -> Array:
    """Returns the least value of `Losses.soft`: the entropy of the mean of the teachers' probabilities, float32 []."""

    def local(images, texts):
        dtype, empty = wide(images), partial(_empty, teachers=len(widths), dtype=wide(images))

        def absorb(rows, columns, found):
            t = _teacher_logits(images, columns, widths, scales)
            return _absorbed(rows, t[0], t, t[0], axis=1), _absorbed(found, t[0], t, t[0], axis=0)

        rows, columns = over_texts(
            absorb, empty(len(images)), texts, empty, _merged, columns_of(block, len(images)), ring
        )
        rows, columns = _norms(rows)[1], _norms(columns)[1]

        def add(entropy, fixed, nothing):
            texts, columns = fixed
            t = _teacher_logits(images, texts, widths, scales)
            for p in (
                sum(jnp.exp(x - rows[:, k, None]) for k, x in enumerate(t)) / len(t),
                sum(jnp.exp(x - columns[:, k]) for k, x in enumerate(t)) / len(t),
            ):
                entropy += jnp.sum(jax.scipy.special.entr(p))
            return entropy, nothing

        none = partial(jnp.zeros, dtype=dtype)
        entropy, _ = over_texts(
            add, jnp.zeros((), dtype), (texts, columns), none, lambda x: x, columns_of(block, len(images)), ring
        )
        return sharding.sum_batch(entropy) / (2 * len(images) * sharding.batch_shards())

    return sharding.on_shards(local, (PAIRS, PAIRS), ALL)(*teachers)


def _teacher_logits(images: Array | None, texts: Array | None, widths, scales) -> list[Array]:
    """Returns the logits [R, C] of each teacher."""
    ends = [sum(widths[: k + 1]) for k in range(len(widths))]
    parts = [(end - width, end) for width, end in zip(widths, ends, strict=True)]
    return [logits(images[:, i:j], texts[:, i:j], c) for (i, j), c in zip(parts, scales, strict=True)]


def _empty(count: int, teachers: int, dtype) -> _Stats:
    lowest, zeros = jnp.full(count, -jnp.inf, dtype), jnp.zeros(count, dtype)
    many = jnp.zeros((count, teachers), dtype)
    return _Stats(lowest, zeros, zeros, many - jnp.inf, many, many)


def _absorbed(stats: _Stats, z: Array, t: Sequence[Array], own: Array, axis: int) -> _Stats:
    """Returns the stats of rows (axis 1) or columns (axis 0) with those of a block of logits [R, C]."""

    def rise(top, x):
        new = jnp.maximum(top, jnp.max(x, axis))
        return new, jnp.exp(top - new), jnp.exp(x - jnp.expand_dims(new, axis))

    top, shrunk, terms = rise(stats.top, z)
    total, own = stats.total * shrunk + jnp.sum(terms, axis), stats.own + jnp.sum(own, axis)
    taught = []
    for k, taught_z in enumerate(t):
        teacher_top, shrunk, terms = rise(stats.teacher_top[:, k], taught_z)
        sums = (jnp.sum(terms, axis), jnp.sum(terms * z, axis))
        before = (stats.teacher_total[:, k], stats.teacher_dot[:, k])
        taught.append((teacher_top, *(a * shrunk + b for a, b in zip(before, sums, strict=True))))
    if not taught:
        return stats._replace(top=top, total=total, own=own)
    return _Stats(top, total, own, *(jnp.stack(x, 1) for x in zip(*taught, strict=True)))


def _merged(stats: _Stats) -> _Stats:
    """Returns, of stats that each device has of all columns, those of this device's columns over all rows."""
    top, teacher_top = sharding.max_batch(stats.top), sharding.max_batch(stats.teacher_top)
    less, teacher_less = jnp.exp(stats.top - top), jnp.exp(stats.teacher_top - teacher_top)
    sums = (stats.total * less, stats.own, stats.teacher_total * teacher_less, stats.teacher_dot * teacher_less)
    total, own, teacher_total, teacher_dot = map(sharding.scatter_batch, sums)
    top, teacher_top = map(sharding.own_of_batch, (top, teacher_top))
    return _Stats(top, total, own, teacher_top, teacher_total, teacher_dot)


def _norms(stats: _Stats) -> tuple[Array, Array]:
    """Returns the logarithms of the summed exponentials: of the logits [n], and of each teacher's [n, K]."""
    return stats.top + jnp.log(stats.total), stats.teacher_top + jnp.log(stats.teacher_total)


def _terms(stats: _Stats) -> tuple[Array, Array, Array]:
    """Returns (hard, soft, found) of each row, [n] each."""
    norm = stats.top + jnp.log(stats.total)
    expected = stats.teacher_dot / stats.teacher_total
    soft = norm - jnp.mean(expected, 1) if expected.shape[1] else jnp.zeros_like(norm)
    return norm - stats.own, soft, (stats.own >= stats.top).astype(norm.dtype)
