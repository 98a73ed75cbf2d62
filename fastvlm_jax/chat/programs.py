"""Holds the programs that answer one conversation turn by turn: the encoder, a turn read into a cache, a further token.

They compute what `generate` computes for the whole conversation. The cache has no gaps, so a token's slot is its
position, and a turn may begin anywhere in what the cache holds:

    slots       0  1  2  3  4  5  6  7  8
    first turn  P  P  P  a  b  .  .  .  .        P prompt, a b answer, . free
    next turn   P  P  P  a  b  Q  Q  .  .        Q what the next prompt has behind them
"""

import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp

from fastvlm_jax.generate import Answers, decode_step
from fastvlm_jax.models.decoder import Cache
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.sampling import Choice


@flax.struct.dataclass
class Unread:
    """Holds the tokens of a prompt that the cache does not hold, and how the answer begins.

    Attributes:
      tokens, image_index: int32 [1, 1, T], padded on the right; see Batch.
      start: int32 []: number of tokens before them, which the cache holds.
      count: int32 []: number of tokens without the padding.
      seen: bool [1, V]: tokens of the whole prompt; None without a repetition penalty.
      rng: key of the sampling.
      temperature: float32 []: what the logits are divided by.
    """

    tokens: jax.Array
    image_index: jax.Array
    start: jax.Array
    count: jax.Array
    seen: jax.Array | None
    rng: jax.Array
    temperature: jax.Array


@functools.partial(jax.jit, static_argnames="model")
def encode(model: FastVLM, variables: Any, images: jax.Array) -> jax.Array:
    """Returns the features [1, N * L, D] of the views of an image, uint8 [1, N, H, W, 3]."""
    return model.apply(variables, images, jnp.ones(images.shape[:2], bool), method="encode")


@functools.partial(jax.jit, static_argnames=("model", "slots", "choice"))
def begin(
    model: FastVLM, variables: Any, features: jax.Array | None, unread: Unread, *, slots: int, choice: Choice
) -> Answers:
    """Reads a prompt into an empty cache of `slots` slots and chooses the first id of its answer.

    Args:
      features: features [1, N * L, D] to which `unread.image_index` points; None for text alone.
      choice: its temperature is 0 for greedy answers, else 1: `unread.temperature` counts.
    """
    cache = model.apply(variables, 1, slots, method="empty_cache")
    return _read(model, variables, cache, features, unread, choice, further=False)


@functools.partial(jax.jit, static_argnames=("model", "choice"), donate_argnames="cache")
def go_on(
    model: FastVLM, variables: Any, cache: Cache, features: jax.Array | None, unread: Unread, *, choice: Choice
) -> Answers:
    """Reads a prompt as `begin` does, behind the first `unread.start` tokens of a cache, whose memory it takes over."""
    return _read(model, variables, cache, features, unread, choice, further=True)


@functools.partial(jax.jit, static_argnames=("model", "choice"), donate_argnames="answers")
def step(
    model: FastVLM, variables: Any, answers: Answers, rng: jax.Array, temperature: jax.Array, *, choice: Choice
) -> Answers:
    """Returns the answer, whose memory it takes over, with one more id."""
    positions_B = answers.lengths + answers.count - 1
    logits_BV, cache = decode_step(model, variables, answers.last, positions_B, answers.cache)
    return answers.chosen(logits_BV / temperature, cache, rng, choice)


@functools.partial(jax.jit, static_argnames="slots")
def grown(cache: Cache, *, slots: int) -> Cache:
    """Returns a cache with free slots behind its own, `slots` in all."""

    def longer(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, slots - x.shape[-1])])

    keys, values = (tuple(map(longer, each)) for each in (cache.keys, cache.values))
    return Cache(keys, values, longer(cache.segment_ids), cache.length)


def _read(model, variables, cache: Cache, features, unread: Unread, choice: Choice, further: bool) -> Answers:
    slots, places = jnp.arange(cache.segment_ids.shape[-1]), jnp.arange(unread.tokens.shape[-1])[None, None]
    before = jnp.where(slots < unread.start, cache.segment_ids, 0)  # what follows is of another answer
    cache = cache.replace(segment_ids=before, length=unread.start)
    fields = (unread.tokens, unread.image_index, unread.start + places, (places < unread.count).astype(jnp.int32))
    logits_BV, cache = model.apply(variables, features, *fields, cache, further, method="extend")
    length = unread.start + unread.count
    answers = Answers(
        tokens=jnp.zeros((1, 1), jnp.int32),
        count=jnp.int32(0),
        last=jnp.full((1,), -1, jnp.int32),
        lengths=length[None],
        seen=unread.seen,
        cache=cache,
    )
    # The answer takes the slots of the padding.
    return answers.chosen(logits_BV / unread.temperature, cache.replace(length=length), unread.rng, choice)
