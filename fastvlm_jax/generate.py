"""Batched text generation: one prefill, then decoding with a KV cache."""

import functools
from collections.abc import Iterator
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from fastvlm_jax import sharding
from fastvlm_jax.batch import Batch
from fastvlm_jax.models.decoder import Cache, Decoder
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.processor import Processor
from fastvlm_jax.sampling import Choice, check_options, penalise, sample, seen_in
from fastvlm_jax.text.tokenizer import PAD
from fastvlm_jax.text.unfinished import certain


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


@flax.struct.dataclass
class Answers:
    """Holds the answers of B rows while they are written.

    Attributes:
      tokens: int32 [B, N]: the ids chosen so far; beyond them, and in the rest of a finished row, the first end.
      count: int32 []: number of ids chosen in each row, those behind its end included.
      last: int32 [B]: the id chosen last.
      lengths: int32 [B]: lengths of the prompts.
      seen: bool [B, V]: tokens in the prompt or the answer so far; None without a repetition penalty.
      cache: keys and values of prompt and answer.
    """

    tokens: jax.Array
    count: jax.Array
    last: jax.Array
    lengths: jax.Array
    seen: jax.Array | None
    cache: Cache

    def chosen(self, logits_BV: jax.Array, cache: Cache, rng: jax.Array, choice: Choice) -> "Answers":
        """Returns the answers with one more id in each row, chosen by the logits after the last one."""
        rows, ends = jnp.arange(len(logits_BV)), jnp.array(choice.end, jnp.int32)
        if self.seen is not None:
            logits_BV = penalise(logits_BV, self.seen, choice.repetition_penalty)
        key = jax.random.fold_in(rng, self.count)
        next_B = sample(logits_BV, key, choice.temperature, choice.top_p, choice.top_k)
        seen = None if self.seen is None else self.seen.at[rows, next_B].set(True)
        next_B = jnp.where(jnp.isin(self.last, ends), ends[0], next_B)
        tokens = self.tokens.at[:, self.count].set(next_B)
        return Answers(tokens, self.count + 1, next_B, self.lengths, seen, cache)

    def readable(self) -> "Answers":
        """Returns the answers with their ids replicated on all devices, so that every process can read them."""
        return self.replace(tokens=sharding.constrain(self.tokens, (None, None)))


@functools.partial(jax.jit, static_argnames=("model", "room", "choice"))
def begin(model: FastVLM, variables: Any, batch: Batch, rng: jax.Array, *, room: int, choice: Choice) -> Answers:
    """Encodes the images of a batch, each once, reads its prompts and chooses the first id of each answer.

    Each row holds one segment, padded on the right. New tokens are appended to the cache after the padding, which the
    segment mask hides, so that all rows write to the same slot:

        slots     P  P  P  .  .  a  b        P prompt, . padding (segment 0), a b generated
        positions 0  1  2        3  4

    Args:
      batch: prompts, with tokens [G, R, T].
      room: most ids of an answer, N.
    """
    G, R, T = batch.tokens.shape
    images = batch.images.shape[1]
    features = model.apply(variables, batch.images, batch.image_mask, method="encode") if images else None
    logits_BV, cache = prefill(model, variables, features, batch, T + room)
    lengths = jnp.sum(batch.segment_ids.reshape(G * R, T) > 0, axis=-1)
    answers = Answers(
        tokens=jnp.full((G * R, room), choice.end[0], jnp.int32),
        count=jnp.int32(0),
        last=jnp.where(lengths > 0, -1, choice.end[0]).astype(jnp.int32),  # an empty row has ended: none waits for it
        lengths=lengths,
        seen=None if choice.repetition_penalty == 1 else seen_in(batch, logits_BV.shape[-1], choice.image_id),
        cache=cache,
    )
    return answers.chosen(logits_BV, cache, rng, choice).readable()


@functools.partial(jax.jit, static_argnames=("model", "choice"), donate_argnames="answers")
def advance(
    model: FastVLM, variables: Any, answers: Answers, rng: jax.Array, count: jax.Array | int, *, choice: Choice
) -> Answers:
    """Continues answers, whose memory it takes over, until each has `count` ids or all have ended."""

    def unfinished(answers: Answers) -> jax.Array:
        ended = jnp.isin(answers.last, jnp.array(choice.end, jnp.int32))
        return (answers.count < count) & ~jnp.all(ended)

    def step(answers: Answers) -> Answers:
        positions_B = answers.lengths + answers.count - 1
        logits_BV, cache = decode_step(model, variables, answers.last, positions_B, answers.cache)
        return answers.chosen(logits_BV, cache, rng, choice)

    return jax.lax.while_loop(unfinished, step, answers).readable()


def generate_tokens(
    model: FastVLM,
    variables: Any,
    batch: Batch,
    rng: jax.Array,
    *,
    max_tokens: int,
    end: int | tuple[int, ...],
    **choice,
) -> jax.Array:
    """Continues every row of a batch by up to `max_tokens` ids; programs are shared by similar numbers of them.

    Args:
      batch: prompts, with tokens [G, R, T]; see `begin`.
      max_tokens: longest answer in tokens.
      end: id of the token that ends an answer, or the ids of several, any of which ends it.
      **choice: further fields of `Choice`.

    Returns:
      int32 [G * R, max_tokens]; the rest of a finished row is filled with `end`, the first of several.
    """
    chosen = Choice(end if isinstance(end, tuple) else (end,), **choice)
    answers = begin(model, variables, batch, rng, room=padded(max_tokens), choice=chosen)
    return advance(model, variables, answers, rng, max_tokens, choice=chosen).tokens[:, :max_tokens]


def padded(length: int) -> int:
    """Returns the length to which so many tokens are padded: a multiple of 32, beyond 256 in larger steps.

    A step is at least an eighth and at most a quarter of the length: 32, 64, ... 256, 320, ... 512, 640, ... 1024. So
    another length seldom needs another program.
    """
    step = max(32, 2 ** ((length - 1).bit_length() - 3))
    return -(-length // step) * step


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
      length: tokens to which all prompts are padded; by default as `padded` says for the longest prompt.
      max_length: most tokens of prompt, image and answer together; by default, and at most, the model's context length.

    Returns:
      The answers as text, one per prompt, without the token that ended them and without surrounding white space.

    Raises:
      MissingImage: an image file does not exist; a FileNotFoundError and a ValueError.
      ValueError: an option is out of range, a prompt leaves no room for `max_tokens` in `max_length`, an image cannot
        be read, or the model lacks its language model, tokenizer or encoder.
    """
    batch, choice = _asked(
        model, processor, images, prompts, image_of, max_tokens=max_tokens, temperature=temperature, top_p=top_p,
        top_k=top_k, repetition_penalty=repetition_penalty, seed=seed, length=length, max_length=max_length,
    )  # fmt: skip
    if not batch.tokens.shape[1]:
        return []
    rng = jax.random.key(seed)
    out = generate_tokens(model, variables, batch, rng, max_tokens=max_tokens, **choice._asdict())
    return [processor.tokenizer.decode(until(row, choice.end)).strip() for row in np.asarray(out)]


def stream(
    model: FastVLM, variables: Any, processor: Processor, images: Any, prompts: Any, image_of: Any = None, **options
) -> Iterator[tuple[int, str]]:
    """Yields the answers of `generate` in pieces, as they are written: (number of the prompt, further text).

    The prompts are answered side by side; the pieces of each follow those of the one before. A piece ends where the
    text so far is certain: a character whose bytes are incomplete, and white space that may end the answer, wait.

    Args:
      model, variables, processor, images, prompts, image_of, **options: as in `generate`.

    Raises:
      MissingImage, ValueError: as in `generate`, before the first piece.
    """
    options = generate.__kwdefaults__ | options
    batch, choice = _asked(model, processor, images, prompts, image_of, **options)
    rows, most, rng = batch.tokens.shape[1], options["max_tokens"], jax.random.key(options["seed"])
    if not rows:
        return
    tokenizer = processor.tokenizer
    answers = begin(model, variables, batch, rng, room=padded(most), choice=choice)
    row, shown = 0, ""
    while True:
        count, tokens = int(answers.count), np.asarray(answers.tokens)
        ids = [until(own[:count], choice.end) for own in tokens]
        whole = count >= most or all(len(own) < count for own in ids)
        while row < rows:
            done = whole or len(ids[row]) < count
            text = tokenizer.decode(ids[row]).strip() if done else certain(tokenizer, ids[row])
            if len(text) > len(shown):
                yield row, text[len(shown) :]
            shown = "" if done else text
            if not done:
                break
            row += 1
        if row == rows:
            return
        answers = advance(model, variables, answers, rng, count + 1, choice=choice)


def _asked(
    model: FastVLM, processor: Processor, images: Any, prompts: Any, image_of: Any, *, max_tokens: int,
    temperature: float, top_p: float, top_k: int, repetition_penalty: float, seed: int, length: int | None,
    max_length: int | None,
) -> tuple[Batch, Choice]:  # fmt: skip
    """Checks the arguments of `generate`; returns the prompts as a batch, and how answers are chosen."""
    check_answers(model, processor)
    check_options(max_tokens, temperature, top_p, top_k, repetition_penalty)
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or abs(seed) >= 2**63:
        raise ValueError(f"seed={seed!r} must be a whole number of at most 63 bits")
    limit = answer_limit(model, max_tokens, max_length)
    batch = processor(images, prompts, image_of, length=length)
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
    choice = choice_of(processor, temperature, top_p, top_k, repetition_penalty)
    return batch if length else _lengthened(batch, padded(longest)), choice


def check_answers(model: FastVLM, processor: Processor | None) -> None:
    """Raises ValueError for a model that answers nothing: without a language model, or without its tokenizer."""
    if model.llm_args is None or processor is None:
        raise ValueError(
            "this model has no language model or no tokenizer: load it with both, as vision=DIR,projector=DIR,llm=DIR"
        )


def choice_of(processor: Processor, temperature: float, top_p: float, top_k: int, repetition_penalty: float) -> Choice:
    """Returns how the tokens of a model's answers are chosen and which end them."""
    tokenizer = processor.tokenizer
    image_id = None if tokenizer.image == PAD else tokenizer.image_id  # <|endoftext|> ends texts, none holds it
    return Choice(processor.end_ids, temperature, top_p, top_k, repetition_penalty, image_id)


def _lengthened(batch: Batch, length: int) -> Batch:
    """Returns a batch whose rows are padded to `length` tokens."""
    more = ((0, 0), (0, 0), (0, max(0, length - batch.tokens.shape[-1])))
    names = ("tokens", "targets", "loss_mask", "segment_ids", "positions")
    rows = {name: np.pad(getattr(batch, name), more) for name in names}
    return batch.replace(**rows, image_index=np.pad(batch.image_index, more, constant_values=-1))


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
