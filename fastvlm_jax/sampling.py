"""Chooses the next token of each row: greedily, or sampled by temperature, top_k, top_p and a repetition penalty."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvlm_jax.batch import Batch


class Choice(NamedTuple):
    """Describes how tokens are chosen and which of them end an answer.

    Attributes:
      end: ids of the tokens that end an answer; the rest of a finished row is filled with the first.
      temperature, top_p, top_k: see `sample`.
      repetition_penalty: see `penalise`; 1 changes nothing.
      image_id: see `seen_in`.
    """

    end: tuple[int, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    image_id: int | None = None


def sample(logits_BV: jax.Array, rng: jax.Array, temperature: float, top_p: float, top_k: int = 0) -> jax.Array:
    """Chooses the next token of each row, int32 [B]; transformers applies temperature, top_k and top_p in this order.

    Args:
      logits_BV: logits of the next token.
      temperature: below 1e-6 chooses the most likely token; else the logits are divided by it and a token is sampled.
      top_p: samples only from the smallest set of most likely tokens whose total probability is at least this.
      top_k: samples only from this many most likely tokens; 0 sets no limit.
    """
    if temperature < 1e-6:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV.astype(jnp.float32) / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        least = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= least, logits_BV, -jnp.inf)
    if top_p < 1:
        ordered = jnp.sort(logits_BV, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        threshold = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= threshold, logits_BV, -jnp.inf)
    return jax.random.categorical(rng, logits_BV).astype(jnp.int32)


def penalise(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Makes the tokens that a row has seen less likely (CTRL, section 4.1), as transformers' `repetition_penalty` does.

    Args:
      logits_BV: logits of the next token.
      seen_BV: bool, whether the prompt or the answer so far holds the token.
      penalty: positive logits of seen tokens are divided by it, negative ones multiplied.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    return jnp.where(seen_BV, jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def seen_in(batch: Batch, vocab_size: int, image_id: int | None) -> jax.Array:
    """Returns which tokens each prompt holds, bool [G * R, vocab_size].

    A placeholder of an image counts as `image_id`; with None it does not count.
    """
    rows = batch.tokens.shape[0] * batch.tokens.shape[1]
    tokens, image_index = batch.tokens.reshape(rows, -1), batch.image_index.reshape(rows, -1)
    counted = batch.segment_ids.reshape(rows, -1) > 0
    if image_id is None:
        counted &= image_index < 0
    else:
        tokens = jnp.where(image_index < 0, tokens, image_id)
    # A token that does not count goes to a column behind the vocabulary.
    columns = jnp.where(counted, tokens, vocab_size)
    seen = jnp.zeros((rows, vocab_size + 1), bool).at[jnp.arange(rows)[:, None], columns].set(True)
    return seen[:, :vocab_size]


def check_options(max_tokens: int, temperature: float, top_p: float, top_k: int, repetition_penalty: float) -> None:
    """Raises ValueError for an option of `generate` that is out of range."""
    whole = {"max_tokens": (max_tokens, 1), "top_k": (top_k, 0)}
    for name, (value, least) in whole.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number, at least {least}")
    numbers = {"temperature": temperature, "top_p": top_p, "repetition_penalty": repetition_penalty}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
            raise ValueError(f"{name}={value!r} must be a number")
    if temperature < 0 or not 0 < top_p <= 1 or repetition_penalty <= 0:
        raise ValueError(
            f"temperature={temperature} must be >= 0, top_p={top_p} in (0, 1] and "
            f"repetition_penalty={repetition_penalty} > 0"
        )
