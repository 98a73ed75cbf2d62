"""Scores the two towers of stage 0 on a benchmark: all pictures and texts are embedded, then compared."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fastvlm_jax.evaluate.benchmark import Benchmark, Protocol, Row
from fastvlm_jax.evaluate.embed import embed_pictures, embed_texts
from fastvlm_jax.evaluate.run import Progress, Scored, check_same_rows
from fastvlm_jax.models.clip import CLIP
from fastvlm_jax.models.kinds import Model
from fastvlm_jax.pair_processor import PairProcessor
from fastvlm_jax.processor import Processor


class Prepared(NamedTuple):
    """Holds the rows of a benchmark, and the tokens of the texts that they are compared with, int32 [texts, length]."""

    rows: Sequence[Row]
    tokens: np.ndarray


def check_kind(model: Model, processor: Processor | PairProcessor | None, benchmark: Benchmark) -> None:
    """Raises ValueError if a benchmark is for two towers and the model is none, or the other way round."""
    towers = isinstance(model, CLIP)
    if benchmark.protocols[0].matching is None and towers:
        raise ValueError(
            f"{benchmark.name}: the two towers of stage 0 answer no questions: their benchmarks are zero-shot and "
            "retrieval"
        )
    if benchmark.protocols[0].matching and not towers:
        raise ValueError(f"{benchmark.name} is for the two towers of stage 0, and this model has no text tower")
    if towers and processor is None:
        raise ValueError("this model has no tokenizer, so it reads no texts: put one beside its weights")


def prepare(rows: Sequence[Row], protocol: Protocol, processor: PairProcessor) -> Prepared:
    """Returns rows with the tokens of their texts, which may be scored again and again."""
    return Prepared(rows, processor.texts(protocol.matching.texts(rows)))


def score(
    model: CLIP,
    variables: Any,
    processor: PairProcessor,
    protocol: Protocol,
    prepared: Prepared,
    *,
    mesh: jax.sharding.Mesh | None = None,
    batch_size: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Scored:
    """Embeds pictures and texts, and returns what their comparison gives, the same in all processes.

    Args:
      variables, mesh, batch_size: see embed.py.
      progress: function that is called before the first and after every batch, in all processes, with the number of
        pictures and texts; what it raises ends this between two batches.

    Raises:
      ValueError: a picture cannot be read, or an embedding is not finite.
    """
    start, done = time.monotonic(), 0
    check_same_rows([[row.id, row.references] for row in prepared.rows])
    pictures = [row.pictures[0] for row in prepared.rows]
    total = len(pictures) + len(prepared.tokens)

    def look(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(Progress(done, total, done, None, time.monotonic() - start))

    look(0)
    options = {"mesh": mesh, "batch_size": batch_size, "look": look}
    texts = embed_texts(model, variables, prepared.tokens, **options)
    images, digests = embed_pictures(model, variables, processor, pictures, **options)
    results = protocol.matching.results(prepared.rows, images, texts, digests)
    return Scored(results, [], len(results), time.monotonic() - start)
