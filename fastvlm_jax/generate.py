"""Batched text generation: one prefill, then decoding with a KV cache."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvlm_jax import sharding
from fastvlm_jax.batch import Batch
from fastvlm_jax.models.decoder import Cache, Decoder
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.tokenizer import PAD


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


def prefill(
    model: FastVLM, variables: Any, features: jax.Array | None, batch: Batch, slots: int
) -> tuple[jax.Array, Cache]:
    """Reads the prompts of a batch: (logits [G * R, V] of the token after each row, the cache of its keys and values).

    Args:
      features: what the model's `encode` makes of the batch's images; None for text alone.
      batch: prompts, with tokens [G, R, T]; each row is one segment, padded on the right.
      slots: slots of the cache, at least T: those beyond take further tokens.
    """
    rows = batch.tokens.shape[0] * batch.tokens.shape[1]
    cache = model.apply(variables, rows, slots, method="empty_cache")
    fields = (batch.tokens, batch.image_index, batch.positions, batch.segment_ids)
    return model.apply(variables, features, *fields, cache, method="extend")


def decode_step(
    model: FastVLM, variables: Any, tokens_B: jax.Array, positions_B: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Reads one further token of each row: (logits [B, V] of the token after it, the cache with one more slot filled).

    Args:
      tokens_B, positions_B: int32 ids of the tokens, and their positions in their rows.
      cache: cache of the tokens before them, with a free slot. Under `jax.jit`, donate it: its memory is written to.
    """
    tokens, positions = tokens_B[:, None, None], positions_B[:, None, None]
    fields = (tokens, jnp.full_like(tokens, -1), positions, jnp.ones_like(tokens))
    return model.apply(variables, None, *fields, cache, method="extend")


STATIC = ("model", "max_tokens", "end", "temperature", "top_p", "top_k", "repetition_penalty", "image_id")


@partial(jax.jit, static_argnames=STATIC)
def generate_tokens(
    model: FastVLM,
    variables: Any,
    batch: Batch,
    rng: jax.Array,
    *,
    max_tokens: int,
    end: int | tuple[int, ...],
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    image_id: int | None = None,
) -> jax.Array:
    """Continues every row of a batch by up to `max_tokens` tokens.

    Each row holds one segment, padded on the right. New tokens are appended to the cache after the padding, which the
    segment mask hides, so that all rows write to the same slot:

        slots     P  P  P  .  .  a  b        P prompt, . padding (segment 0), a b generated
        positions 0  1  2        3  4

    Args:
      batch: prompts, with tokens [G, R, T].
      max_tokens: longest answer in tokens.
      end: id of the token that ends an answer, or the ids of several, any of which ends it.
      temperature, top_p, top_k: see `sample`.
      repetition_penalty: see `penalise`; 1 changes nothing.
      image_id: see `seen_in`.

    Returns:
      int32 [G * R, max_tokens]; the rest of a finished row is filled with `end`, the first of several.
    """
    ends = jnp.atleast_1d(jnp.array(end, jnp.int32))
    fill = ends[0]
    G, R, T = batch.tokens.shape
    rows = G * R
    features = (
        model.apply(variables, batch.images, batch.image_mask, method="encode") if batch.images.shape[1] else None
    )
    logits_BV, cache = prefill(model, variables, features, batch, T + max_tokens)
    lengths_B = jnp.sum(batch.segment_ids.reshape(rows, T) > 0, axis=-1)
    seen_BV = None if repetition_penalty == 1 else seen_in(batch, logits_BV.shape[-1], image_id)

    def choose(logits_BV, seen_BV, i):
        """Returns the next token of each row and, with a repetition penalty, the tokens seen after it."""
        if seen_BV is not None:
            logits_BV = penalise(logits_BV, seen_BV, repetition_penalty)
        next_B = sample(logits_BV, jax.random.fold_in(rng, i), temperature, top_p, top_k)
        return next_B, None if seen_BV is None else seen_BV.at[jnp.arange(rows), next_B].set(True)

    first_B, seen_BV = choose(logits_BV, seen_BV, 0)
    tokens = jnp.full((rows, max_tokens), fill, jnp.int32).at[:, 0].set(first_B)

    def unfinished(carry):
        i, _, last_B, done_B, _, _ = carry
        return (i < max_tokens) & ~jnp.all(done_B | jnp.isin(last_B, ends))

    def step(carry):
        i, tokens, last_B, done_B, seen_BV, cache = carry
        done_B |= jnp.isin(last_B, ends)
        logits_BV, cache = decode_step(model, variables, last_B, lengths_B + i - 1, cache)
        next_B, seen_BV = choose(logits_BV, seen_BV, i)
        next_B = jnp.where(done_B, fill, next_B)
        return i + 1, tokens.at[:, i].set(next_B), next_B, done_B, seen_BV, cache

    carry = (jnp.int32(1), tokens, first_B, jnp.zeros(rows, bool), seen_BV, cache)
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
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    length: int | None = None,
    max_length: int | None = None,
) -> list[str]:
    """Generates an answer to each prompt, which any of the processor's `end_ids` ends.

    Decoding is greedy by default. `**processor.sampling` gives the settings in the model's generation_config.json.

    Args:
      images: images that the prompts are about; None or [] for text alone. See Processor.__call__.
      prompts: texts or conversations, or a single one; the last turn of a conversation is the question.
      image_of: number of the image, or numbers of the images, of each prompt; see Processor.__call__.
      max_tokens: longest answer in tokens.
      temperature, top_p, top_k: see `sample`.
      repetition_penalty: see `penalise`.
      seed: seed of the sampling.
      length: tokens to which all prompts are padded; the default is the longest prompt, rounded up to a multiple of 16.
      max_length: most tokens of prompt, image and answer together; by default, and at most, the model's context length.

    Returns:
      The answers as text, one per prompt, without the token that ended them and without surrounding white space.

    Raises:
      MissingImage: an image file does not exist; a FileNotFoundError and a ValueError.
      ValueError: an option is out of range, a prompt leaves no room for `max_tokens` in `max_length`, an image cannot
        be read, or the model lacks its language model, tokenizer or encoder.
    """
    if model.llm_args is None or processor is None:
        raise ValueError(
            "this model has no language model or no tokenizer: load it with both, as vision=DIR,projector=DIR,llm=DIR"
        )
    check_options(max_tokens, temperature, top_p, top_k, repetition_penalty)
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or abs(seed) >= 2**63:
        raise ValueError(f"seed={seed!r} must be a whole number of at most 63 bits")
    limit = answer_limit(model, max_tokens, max_length)
    batch = processor(images, prompts, image_of, length=length)
    if not batch.tokens.shape[1]:
        return []
    if batch.images.shape[1] and model.vision_args is None:
        raise ValueError(
            "this model has no encoder and reads no images: load it with one, as vision=DIR,projector=DIR,llm=DIR"
        )
    longest = int((np.asarray(batch.segment_ids) > 0).sum(-1).max(initial=0))
    if longest > limit:
        raise ValueError(
            f"the prompt is {longest} tokens long, more than the {limit} allowed: shorten it or lower "
            f"max_tokens={max_tokens}, which together may reach {limit + max_tokens} tokens"
        )
    tokenizer, ends = processor.tokenizer, processor.end_ids
    out = generate_tokens(
        model,
        variables,
        batch,
        jax.random.key(seed),
        max_tokens=max_tokens,
        end=ends,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        image_id=None if tokenizer.image == PAD else tokenizer.image_id,  # <|endoftext|> ends texts, none holds it
    )
    return [tokenizer.decode(until(row, ends)).strip() for row in np.asarray(out)]


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


def answer_limit(model: FastVLM, max_tokens: int, max_length: int | None) -> int:
    """Returns how many tokens a prompt may have so that an answer of `max_tokens` fits behind it.

    Raises:
      ValueError: `max_length` is beyond the model's context length, or leaves no room for a prompt.
    """
    context = Decoder(**model.llm_args).context_length
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int | np.integer)):
        raise ValueError(f"max_length={max_length!r} must be a whole number")
    if max_length is not None and max_length > context:
        raise ValueError(
            f"max_length={max_length} is beyond the model's context length of {context} tokens: leave max_length out"
        )
    length = context if max_length is None else max_length
    if max_tokens >= length:
        named = "the model's context length" if max_length is None else "max_length"
        raise ValueError(f"max_tokens={max_tokens} must be less than {named}, {length} tokens, to leave room to ask")
    return length - max_tokens


def until(ids: np.ndarray, end: int | tuple[int, ...]) -> list[int]:
    """Returns the token ids before the first `end`, or the first of several ends; all ids if there is none."""
    ends = np.flatnonzero(np.isin(ids, end))
    return [int(i) for i in (ids[: ends[0]] if len(ends) else ids)]
