"""Holds the programs between a photo's pixels and the first tokens of an answer, and the batch that they read.

    encoder -> projector -> prefill -> next_token
    \___________ fused __________/

They are the functions that `fastvlm generate` runs. `bench ttft` times them, and preflight estimates them for a TPU.
"""

import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvlm_jax import generate
from fastvlm_jax.batch import Batch
from fastvlm_jax.images.sizes import Grid, slots_of
from fastvlm_jax.models.decoder import Cache, Decoder
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.models.projector import Projector

ANSWER = 256  # tokens that the cache has room for behind the prompt, as by default in `fastvlm generate`


class Question(NamedTuple):
    """Describes prompts about one image each.

    Attributes:
      image_size: side of the square images or tiles, pixels.
      grid: (rows, columns) of AnyRes tiles beside the overview; None for the image alone.
      prompt_tokens: tokens of text.
      batch: number of prompts.
    """

    image_size: int
    grid: Grid | None = None
    prompt_tokens: int = 64
    batch: int = 1

    @property
    def slots(self) -> int:
        """Returns the number of squares that the encoder sees for a prompt."""
        return slots_of(self.grid or (0, 0))

    @property
    def name(self) -> str:
        """Returns the resolution as --image_size writes it: "1024", or with tiles "1024:2x2"."""
        return f"{self.image_size}" + (f":{self.grid[0]}x{self.grid[1]}" if self.grid else "")


def read_sizes(text: str) -> list[tuple[int, Grid | None]]:
    """Reads the sizes of --image_size, as "256,1024,1024:2x2": sides, and grids of tiles of that side.

    Raises:
      ValueError: an entry has another form, or is there twice.
    """
    sizes = []
    for entry in text.split(","):
        found = re.fullmatch(r"([1-9]\d{0,4})(?::([1-9]\d?)x([1-9]\d?))?", entry.strip())
        if not found:
            raise ValueError(
                f"--image_size={text}: {entry!r} is no size: write sides in pixels, as 256,512,1024, or with AnyRes "
                "tiles 1024:2x2, for an overview and 2 rows of 2 tiles"
            )
        side, rows, columns = found.groups()
        sizes.append((int(side), (int(rows), int(columns)) if rows else None))
        if sizes[-1] in sizes[:-1]:
            raise ValueError(f"--image_size={text} has {entry} twice: leave one out")
    return sizes


def questions(
    model: FastVLM, asked: str | None, own: list[tuple[int, Grid | None]], prompt_tokens: int, batch: int
) -> list[Question]:
    """Returns a question for each size that --image_size asks for, by default for those that are the model's own.

    Raises:
      ValueError: the model lacks an encoder or a language model; no size is given and it has none; see `read_sizes`
        and `check`.
    """
    for args, part, key in ((model.vision_args, "encoder", "vision"), (model.llm_args, "language model", "llm")):
        if args is None:
            raise ValueError(
                f"this model has no {part}, and a first token about an image needs one: give --model all parts, as "
                f"vision=DIR,projector=DIR,llm=DIR, or a --config with model.{key}"
            )
    sizes = read_sizes(asked) if asked else own
    if not sizes:
        raise ValueError("--image_size is missing, and the model's files name no size: add --image_size=1024")
    asked_of = [Question(side, grid, prompt_tokens, batch) for side, grid in sizes]
    for question in asked_of:  # before the first is timed, which takes minutes
        check(model, question)
    return asked_of


def check(model: FastVLM, question: Question) -> int:
    """Returns the number of image tokens of a prompt.

    Raises:
      ValueError: the encoder does not accept the size, or the tokens are more than the language model's context.
    """
    try:
        tokens = question.slots * model.tokens_per_image(question.image_size)
    except ValueError as error:
        raise ValueError(f"--image_size={question.name}: {error}") from error
    context = Decoder(**model.llm_args).context_length
    if tokens + question.prompt_tokens + ANSWER > context:
        raise ValueError(
            f"--image_size={question.name}: {tokens} image tokens, {question.prompt_tokens} of text and {ANSWER} of an "
            f"answer are more than the model's context of {context} tokens: choose a smaller size"
        )
    return tokens


def make_batch(model: FastVLM, question: Question, pixels: np.ndarray) -> Batch:
    """Returns the prompts as one group of numpy arrays, as the processor makes them: the image first, then random text.

    Rows are padded as `fastvlm generate` pads them.

    Args:
      pixels: uint8 [1, batch * slots, H, W, 3].
    """
    image_tokens = question.slots * model.tokens_per_image(question.image_size)
    used = image_tokens + question.prompt_tokens
    shape = (1, question.batch, generate.padded(used))
    tokens = np.random.default_rng(0).integers(0, model.llm_args["vocab_size"], shape, np.int32)
    place = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    image = np.arange(question.batch, dtype=np.int32)[:, None] * image_tokens
    return Batch(
        images=pixels,
        image_mask=np.ones(pixels.shape[:2], bool),
        tokens=np.where(place < used, tokens, 0),
        image_index=np.where(place < image_tokens, place + image, -1),
        targets=np.zeros(shape, np.int32),
        loss_mask=np.zeros(shape, bool),
        segment_ids=(place < used).astype(np.int32),
        positions=np.where(place < used, place, 0),
    )


@partial(jax.jit, static_argnames="model")
def encoder(model: FastVLM, variables: Any, images: jax.Array, image_mask: jax.Array) -> jax.Array:
    """Returns the encoder's features [1, N * L, C] of images [1, N, H, W, 3]."""
    alone = FastVLM(model.vision_args, None, model.dtype)
    return alone.apply(variables, images, image_mask, method="encode")


@partial(jax.jit, static_argnames="model")
def projector(model: FastVLM, variables: Any, features: jax.Array) -> jax.Array:
    """Returns the features at the language model's width, [1, N * L, D]."""
    return Projector(model.llm_args["width"]).apply({"params": variables["params"]["projector"]}, features)


@partial(jax.jit, static_argnames="model")
def prefill(model: FastVLM, variables: Any, features: jax.Array, batch: Batch) -> tuple[jax.Array, Cache]:
    """Reads the prompts: (the first id of each answer, int32 [B]; the cache)."""
    slots = batch.tokens.shape[-1] + ANSWER
    logits_BV, cache = generate.prefill(model, variables, features, batch, slots)
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), cache


@partial(jax.jit, static_argnames="model")
def fused(model: FastVLM, variables: Any, batch: Batch) -> jax.Array:
    """Returns the first id of each answer, int32 [B]: encoder, projector and prefill in one program."""
    features = model.apply(variables, batch.images, batch.image_mask, method="encode")
    return prefill(model, variables, features, batch)[0]


@partial(jax.jit, static_argnames="model", donate_argnames="cache")
def next_token(
    model: FastVLM, variables: Any, tokens_B: jax.Array, positions_B: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Reads one further token of each row: (the id after it, the cache as if nothing had been appended).

    The cache's memory is donated and its length stays, so that the same step can be run again and again.
    """
    logits_BV, longer = generate.decode_step(model, variables, tokens_B, positions_B, cache)
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), longer.replace(length=cache.length)
