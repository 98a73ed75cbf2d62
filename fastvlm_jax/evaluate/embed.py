"""Computes the embeddings of pictures and texts with two towers, over any mesh and any number of processes.

Every batch has the same shape, so that each tower is compiled once: what lacks in the last one is filled up and dropped
again, and counts nowhere. Each process decodes the pictures of its own devices; all get all embeddings.
"""

import concurrent.futures
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from fastvlm_jax import sharding
from fastvlm_jax.evaluate.answers import gathered
from fastvlm_jax.evaluate.benchmark import Picture
from fastvlm_jax.evaluate.placing import inside, one_ahead, placed, places_here
from fastvlm_jax.models.clip import CLIP
from fastvlm_jax.pair_processor import PairProcessor

BATCH = 64  # pictures that a data shard embeds at once, by default
TEXTS = 4  # times as many texts


def embed_pictures(
    model: CLIP,
    variables: Any,
    processor: PairProcessor,
    pictures: Sequence[Picture],
    *,
    mesh: jax.sharding.Mesh | None = None,
    batch_size: int | None = None,
    look: Callable[[int], None] = lambda count: None,
) -> tuple[np.ndarray, list[str]]:
    """Returns the embeddings of pictures, float32 [pictures, F] of length 1, and the digest of each picture's bytes.

    Args:
      variables: variables of the model, laid out on the mesh in any way.
      mesh: mesh of the variables; without it one device computes.
      batch_size: most pictures that a data shard embeds at once.
      look: function that is called with the number of pictures that a batch brought, in all processes.

    Raises:
      ValueError: a picture cannot be read; the message names it.
    """
    digests: dict[int, str] = {}

    def row(number: int) -> np.ndarray:
        picture = pictures[number]
        try:
            data = picture.read()
            view = processor.view(data, picture.name)
        except ValueError as error:
            raise ValueError(str(error) if picture.name in str(error) else f"{picture.name}: {error}") from error
        digests[number] = hashlib.sha256(data).hexdigest()[:16]
        return view

    found = _embed("embed_images", model, variables, row, len(pictures), mesh, batch_size or BATCH, look)
    digests = gathered(digests)
    return found, [digests[number] for number in range(len(pictures))]


def embed_texts(
    model: CLIP,
    variables: Any,
    tokens: np.ndarray,
    *,
    mesh: jax.sharding.Mesh | None = None,
    batch_size: int | None = None,
    look: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Returns the embeddings of texts, float32 [texts, F] of length 1, from their tokens, int32 [texts, length].

    See `embed_pictures`; a batch has TEXTS times as many texts as pictures.
    """
    size = TEXTS * (batch_size or BATCH)
    return _embed("embed_texts", model, variables, tokens.__getitem__, len(tokens), mesh, size, look)


def _embed(
    method: str,
    model: CLIP,
    variables: Any,
    row: Callable[[int], np.ndarray],
    count: int,
    mesh: jax.sharding.Mesh | None,
    size: int,
    look: Callable[[int], None],
) -> np.ndarray:
    """Returns what `method` makes of the rows 0 to count - 1, `size` of them at a time on each data shard."""
    with inside(mesh):
        shards = sharding.batch_shards()
    layout = None if mesh is None else sharding.batch_sharding(mesh)
    mine, _ = places_here(layout, shards)
    size = min(size, max(1, -(-count // shards)))
    found, compute = [], _compiled(model, method, mesh)
    with (
        concurrent.futures.ThreadPoolExecutor(1) as ahead,
        concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as decoders,
    ):

        def build(start: int) -> dict[int, np.ndarray]:
            parts = {}
            for place in mine:
                first = start + place * size
                rows = list(decoders.map(row, range(min(first, count - 1), min(first + size, count))))
                parts[place] = np.stack([*rows, *rows[-1:] * (size - len(rows))])
            return parts

        starts = range(0, count, shards * size)
        for start, parts in zip(starts, one_ahead(ahead, build, starts), strict=True):
            with inside(mesh):
                out = np.asarray(compute(variables, placed(parts, shards, layout)))
            found.append(out[: count - start])
            look(len(found[-1]))
    return np.concatenate(found)


@functools.lru_cache(maxsize=8)
def _compiled(model: CLIP, method: str, mesh: jax.sharding.Mesh | None) -> Callable:
    """Returns the jitted function (variables, rows [shards, size, ...]) -> embeddings [shards * size, F]."""

    def compute(variables: Any, rows: jax.Array) -> jax.Array:
        inputs = rows if method == "embed_images" else rows.reshape(-1, rows.shape[-1])
        return model.apply(variables, inputs, method=method)

    # Embeddings are whole on every device, so that every process can read them.
    whole = None if mesh is None else jax.sharding.NamedSharding(mesh, sharding.spec(()))
    return jax.jit(compute, out_shardings=whole)
