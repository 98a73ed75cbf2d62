"""Batched text generation: one prefill, then decoding with a KV cache."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvlm_jax import sharding
from fastvlm_jax.batch import Batch
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.processor import Processor


def sample(logits_BV: jax.Array, rng: jax.Array, temperature: float, top_p: float) -> jax.Array:
    """Chooses the next token of each row, int32 [B].

    Args:
      logits_BV: logits of the next token.
      temperature: 0 chooses the most likely token; otherwise the logits are divided by it and a token is sampled.
      top_p: samples only from the smallest set of most likely tokens whose total probability is at least this.
    """
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV.astype(jnp.float32) / temperature
    if top_p < 1:
        ordered = jnp.sort(logits_BV, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        threshold = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= threshold, logits_BV, -jnp.inf)
    return jax.random.categorical(rng, logits_BV).astype(jnp.int32)


@partial(jax.jit, static_argnames=("model", "max_tokens", "end", "temperature", "top_p"))
def generate_tokens(
    model: FastVLM,
    variables: Any,
    batch: Batch,
    rng: jax.Array,
    *,
    max_tokens: int,
    end: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> jax.Array:
    """Continues every row of a batch by up to `max_tokens` tokens.

    Each row holds one segment, padded on the right. New tokens are appended to the cache after the padding, which the
    segment mask hides, so that all rows write to the same slot:

        slots     P  P  P  .  .  a  b        P prompt, . padding (segment 0), a b generated
        positions 0  1  2        3  4

    Args:
      batch: prompts, with tokens [G, R, T].
      max_tokens: longest answer in tokens.
      end: id of the token that ends an answer.
      temperature, top_p: see `sample`.

    Returns:
      int32 [G * R, max_tokens]; the rest of a finished row is filled with `end`.
    """
    G, R, T = batch.tokens.shape
    rows = G * R
    cache = model.apply(variables, rows, T + max_tokens, method="empty_cache")
    features = (
        model.apply(variables, batch.images, batch.image_mask, method="encode") if batch.images.shape[1] else None
    )
    logits_BTV, cache = model.apply(
        variables, features, batch.tokens, batch.image_index, batch.positions, batch.segment_ids, cache, method="decode"
    )
    lengths_B = jnp.sum(batch.segment_ids.reshape(rows, T) > 0, axis=-1)
    logits_BV = jnp.take_along_axis(logits_BTV, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    first_B = sample(logits_BV, jax.random.fold_in(rng, 0), temperature, top_p)
    tokens = jnp.full((rows, max_tokens), end, jnp.int32).at[:, 0].set(first_B)

    def unfinished(carry):
        i, _, last_B, done_B, _ = carry
        return (i < max_tokens) & ~jnp.all(done_B | (last_B == end))

    def step(carry):
        i, tokens, last_B, done_B, cache = carry
        done_B |= last_B == end
        text = jnp.full((1, rows, 1), -1, jnp.int32)
        ones = jnp.ones((1, rows, 1), jnp.int32)
        logits_B1V, cache = model.apply(
            variables,
            None,
            last_B[None, :, None],
            text,
            (lengths_B + i - 1)[None, :, None],
            ones,
            cache,
            method="decode",
        )
        next_B = sample(logits_B1V[:, 0], jax.random.fold_in(rng, i), temperature, top_p)
        next_B = jnp.where(done_B, end, next_B)
        return i + 1, tokens.at[:, i].set(next_B), next_B, done_B, cache

    carry = (jnp.int32(1), tokens, first_B, jnp.zeros(rows, bool), cache)
    # Replicated on all devices, so that every process can read the tokens.
    return sharding.constrain(jax.lax.while_loop(unfinished, step, carry)[1], (None, None))


def generate(
    model: FastVLM,
    variables: Any,
    processor: Processor,
    images: Any,
    prompts: Any,
    image_of: Any = None,
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    length: int | None = None,
    max_length: int = 8192,
) -> list[str]:
    """Generates an answer to each prompt.

    Args:
      images: images that the prompts are about; None or [] for text alone. See Processor.__call__.
      prompts: texts or conversations, or a single one; the last turn of a conversation is the question.
      image_of: number of the image, or numbers of the images, of each prompt; see Processor.__call__.
      max_tokens: longest answer in tokens.
      temperature, top_p: see `sample`.
      seed: seed of the sampling.
      length: tokens to which all prompts are padded; the default is the longest prompt, rounded up to a multiple of 16.
      max_length: context length in tokens, for prompt, image and answer together.

    Returns:
      The answers as text, one per prompt, without the end token and without surrounding white space.

    Raises:
      MissingImage: an image file does not exist; a FileNotFoundError and a ValueError.
      ValueError: an option is out of range, a prompt leaves no room for `max_tokens` in `max_length`, an image cannot
        be read, or the model lacks its language model, tokenizer or encoder.
    """
    if not 0 < max_tokens < max_length:
        raise ValueError(
            f"max_tokens={max_tokens} must be at least 1 and less than the context length max_length={max_length}"
        )
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature} must be >= 0 and top_p={top_p} in (0, 1]")
    if model.llm_args is None or processor is None:
        raise ValueError(
            "this model has no language model or no tokenizer: load it with both, as vision=DIR,projector=DIR,llm=DIR"
        )
    batch = processor(images, prompts, image_of, length=length, max_length=max_length - max_tokens)
    if not batch.tokens.shape[1]:
        return []
    if batch.images.shape[1] and model.vision_args is None:
        raise ValueError(
            "this model has no encoder and reads no images: load it with one, as vision=DIR,projector=DIR,llm=DIR"
        )
    end = processor.end_id
    out = generate_tokens(
        model,
        variables,
        batch,
        jax.random.key(seed),
        max_tokens=max_tokens,
        end=end,
        temperature=temperature,
        top_p=top_p,
    )
    return [processor.tokenizer.decode(until(row, end)).strip() for row in np.asarray(out)]


def until(ids: np.ndarray, end: int) -> list[int]:
    """Returns the token ids before the first `end`, or all ids if there is none."""
    ends = np.flatnonzero(ids == end)
    return [int(i) for i in (ids[: ends[0]] if len(ends) else ids)]
