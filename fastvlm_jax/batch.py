"""Defines the contracts between data and model: everything that one training step reads."""

import flax
import jax
import jax.numpy as jnp

Array = jax.Array


@flax.struct.dataclass
class Batch:
    """Holds one global batch of G groups, each a self-contained unit of R text rows and N image slots.

    All shapes are static. An image is stored once and may be read by any row of its group:

        images of the group     slot 0 = cat, slot 1 = dog          (tokens_per_image = 2)
        tokens of one row       <  I  I  what ? cat >  <  I  I  who ? rex >
        image_index             -1 0  1  -1  -1  -1 -1 -1 2  3  -1 -1  -1 -1
        segment_ids              1 1  1   1   1   1  1  2 2  2   2  2   2  2      0 is padding
        loss_mask                0 0  0   0   1   1  0  0 0  0   0  1   1  0      at the position that predicts

    Attributes:
      images: uint8 [G, N, H, W, 3], RGB; the device normalises them. Floats count as already scaled to [0, 1].
      image_mask: bool [G, N]; False marks an empty slot, which counts in no loss and no BatchNorm statistic.
      tokens: int32 [G, R, T]; each image is expanded to its placeholders (any id inside the vocabulary).
      image_index: int32 [G, R, T]; `slot * tokens_per_image + j` at a feature vector's place, -1 at text.
      targets: int32 [G, R, T]; the next token, shifted on the host.
      loss_mask: bool [G, R, T]; True where `targets` is supervised.
      segment_ids: int32 [G, R, T]; a token attends within its segment only; 0 is padding.
      positions: int32 [G, R, T]; position inside the segment, for the rotary embedding.
      source: int32 [G, R, T]; number of the data set that a token comes from, -1 for padding; for metrics only.
    """

    images: Array
    image_mask: Array
    tokens: Array
    image_index: Array
    targets: Array
    loss_mask: Array
    segment_ids: Array
    positions: Array
    source: Array | None = None


@flax.struct.dataclass
class PairBatch:
    """Holds one global batch of stage 0: G groups of N pairs of an image and its texts, none of them empty.

    A pair may have S texts: its caption and, with S = 2, a synthetic one too. T is the text tower's context length, and
    E the width of the features of all teachers together.

    Attributes:
      images: uint8 [G, N, H, W, 3], RGB; the device normalises them.
      texts: int32 [G, N, S, T]; tokens from the start token to the end token, then padding.
      teacher_images: float32 [G, N, E]; features that the teachers have of the same view of each image; None without
        teachers.
      teacher_texts: float32 [G, N, S, E]; those of each text.
    """

    images: Array
    texts: Array
    teacher_images: Array | None = None
    teacher_texts: Array | None = None


def parts_of(x: jax.Array, count: int) -> jax.Array:
    """Splits an array [G, ...] into parts [count, G / count, ...]; part i holds the groups i, i + count, ..."""
    return jnp.moveaxis(x.reshape(len(x) // count, count, *x.shape[1:]), 1, 0)


def joined(parts: jax.Array) -> jax.Array:
    """Joins the parts [count, G / count, ...] that `parts_of` made to [G, ...], in the order of the groups."""
    return jnp.moveaxis(parts, 0, 1).reshape(-1, *parts.shape[2:])
