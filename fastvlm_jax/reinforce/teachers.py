"""Opens teachers, CLIPs of any layout, and lets them embed views and texts in batches of one shape.

rows    0 1 2 3 4 5 6          a batch is as large for the first rows as for the last, so that one program is
batch   0 0 0 0 1 1 1 .        compiled; "." is a row of zeros, whose embedding is left out
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from fastvlm_jax import model_io, sharding
from fastvlm_jax.evaluate import fingerprint
from fastvlm_jax.models.clip import CLIP, clamped
from fastvlm_jax.models.text_tower import TextTower
from fastvlm_jax.pair_processor import PairProcessor

Coming = list[list[jax.Array]]  # embeddings that are being computed: of each teacher its batches, [batch, width]


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Holds a CLIP on the devices.

    Attributes:
      source: what `--teacher` names it.
      model, variables, processor: see model_io.load.
      digest: fingerprint of the three, hexadecimal.
    """

    source: str
    model: CLIP
    variables: dict[str, Any]
    processor: PairProcessor
    digest: str

    @property
    def features(self) -> int:
        """Returns the width of its embeddings."""
        return TextTower(**self.model.text_args).features

    @property
    def factor(self) -> float:
        """Returns the factor of its logits."""
        return math.exp(float(clamped(self.variables["params"]["logit_scale"])))


def open_teachers(sources: Sequence[str], mesh: Mesh) -> list[Teacher]:
    """Reads teachers, and lays each out on the mesh.

    Raises:
      FileNotFoundError, ValueError: there is no such model, it has no text tower or no tokenizer, or is named twice.
    """
    if not all(sources):
        raise ValueError(f"--teacher {','.join(sources)} has an empty name: write MODEL or MODEL,MODEL")
    places = [pathlib.Path(source).expanduser().resolve() for source in sources]
    if twice := [source for number, source in enumerate(sources) if places[number] in places[:number]]:
        raise ValueError(f"--teacher names {twice[0]} twice: its features would count twice")
    return [_open(source, mesh) for source in sources]


def _open(source: str, mesh: Mesh) -> Teacher:
    loaded = model_io.read(source)
    if not loaded.config.get("text"):
        held = " and ".join(part for part in model_io.PARTS if loaded.config.get(part))
        raise ValueError(f"--teacher {source} holds {held} alone: a teacher is a CLIP, with an image and a text tower")
    if not isinstance(loaded.processor, PairProcessor):
        raise ValueError(
            f"--teacher {source} has no tokenizer: put CLIP's vocabulary, bpe_simple_vocab_16e6.txt.gz or merges.txt, "
            "into the directory of open_clip or ml-mobileclip that it was read from"
        )
    tower, processor = TextTower(**loaded.config["text"]), loaded.processor
    if processor.tokenizer.vocab_size > tower.vocab_size or processor.context_length != tower.context_length:
        raise ValueError(
            f"--teacher {source}: its tokenizer has {processor.tokenizer.vocab_size} ids and texts of "
            f"{processor.context_length} tokens, its text tower {tower.vocab_size} and {tower.context_length}: put the "
            "files of its own tokenizer there"
        )
    model, variables = model_io.put(loaded, mesh=mesh)
    digest = fingerprint.of_model(model, variables, loaded.processor, mesh)
    return Teacher(source, model, variables, loaded.processor, digest)


def embed_views(teachers: Sequence[Teacher], views: dict[int, np.ndarray], batch_size: int, mesh: Mesh) -> Coming:
    """Starts to embed views.

    Args:
      views: views at the size of each teacher, uint8 [N, size, size, 3].
      batch_size: views that a teacher sees at once.
      mesh: mesh of the teachers, whose data shards divide `batch_size`.
    """
    inputs = [views[teacher.processor.image_size][:, None] for teacher in teachers]
    return _embed(teachers, inputs, batch_size, mesh, "embed_images")


def embed_texts(teachers: Sequence[Teacher], texts: Sequence[str], batch_size: int, mesh: Mesh) -> Coming:
    """Starts to embed texts; as `embed_views` does."""
    inputs = [teacher.processor.texts(texts) for teacher in teachers]
    return _embed(teachers, inputs, batch_size, mesh, "embed_texts")


def wait_for(coming: Coming, count: int) -> np.ndarray:
    """Returns the embeddings of `count` rows once they are there, float32 [count, sum of the teachers' widths]."""
    return np.concatenate([np.concatenate([np.asarray(x) for x in own])[:count] for own in coming], axis=1)


def _embed(
    teachers: Sequence[Teacher], inputs: Sequence[np.ndarray], batch_size: int, mesh: Mesh, method: str
) -> Coming:
    layout = sharding.batch_sharding(mesh)

    def embed(teacher: Teacher, rows: np.ndarray) -> jax.Array:
        return _apply(teacher.model, teacher.variables, jax.device_put(_padded(rows, batch_size), layout), method)

    with jax.set_mesh(mesh):
        return [
            [embed(teacher, rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
            for teacher, rows in zip(teachers, inputs, strict=True)
        ]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _apply(model: CLIP, variables: dict[str, Any], rows: jax.Array, method: str) -> jax.Array:
    return model.apply(variables, rows, method=method)


def _padded(rows: np.ndarray, count: int) -> np.ndarray:
    """Returns `count` rows: those given, and zeros behind them."""
    return np.pad(rows, [(0, count - len(rows))] + [(0, 0)] * (rows.ndim - 1)) if len(rows) < count else rows
