"""Answers the questions of a record set by greedy decoding, and scores the answers."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from fastvlm_jax.data.sources import RecordSource
from fastvlm_jax.generate import generate
from fastvlm_jax.images.decode import size_of
from fastvlm_jax.images.sizes import slots_of
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.conversation import questions

IMAGES_PER_BATCH = 16
ROWS_PER_BATCH = 192


@dataclasses.dataclass(frozen=True)
class Result:
    """One question of a record with the true and the given answer."""

    key: str
    image: bytes
    question: str
    truth: str
    answer: str


def answer_records(
    model: FastVLM,
    variables: Any,
    processor: Processor,
    records: RecordSource,
    *,
    limit: int | None = None,
    max_tokens: int = 16,
    progress=None,
) -> list[Result]:
    """Asks every question of the records alone, in order; each image is encoded once a batch.

    All batches have one shape, so that the decoder is compiled once; `progress` is called with the questions done.
    """
    asked = list(ask(records, limit))
    longest = max((prompt_length(processor, image, talk) for _, image, talk, _ in asked), default=1)
    length = -(-longest // 8) * 8
    # Images that take tiles, or sizes by their shape, do not share a batch of one shape.
    images_per_batch = 1 if processor.grids or processor.sizes else IMAGES_PER_BATCH
    results: list[Result] = []
    for batch in batched(asked, images_per_batch):
        images = list(dict.fromkeys(key for key, *_ in batch))
        pictures = {key: image for key, image, *_ in batch}
        texts = [question_text(talk) for _, _, talk, _ in batch]
        image_of = [images.index(key) for key, *_ in batch]
        padding = ROWS_PER_BATCH - len(batch)
        answers = generate(
            model,
            variables,
            processor,
            [pictures[key] for key in images] + [pictures[images[0]]] * (images_per_batch - len(images)),
            texts + texts[:1] * padding,
            image_of + [0] * padding,
            max_tokens=max_tokens,
            length=length,
        )
        results += [
            Result(key, image, text, truth, answer)
            for (key, image, _, truth), text, answer in zip(batch, texts, answers, strict=False)
        ]
        if progress:
            progress(len(batch))
    return results


def ask(records: RecordSource, limit: int | None) -> Iterator[tuple[str, bytes, tuple, str]]:
    """(record key, image, the user's turn, true answer) of the first `limit` questions that are about one image."""
    count = 0
    for i in range(len(records)):
        record = records[i]
        for talk in questions(record.turns):
            if count == limit:
                return
            (role, _), (_, answer) = talk[-2:]
            if role != "user" or len(record.images) != 1:
                raise ValueError(f"record {record.key} is not questions about one image: it cannot be scored")
            yield record.key, record.images[0], talk[:-1], "".join(answer)
            count += 1


def prompt_length(processor: Processor, image: bytes, talk: tuple) -> int:
    """Tokens of a question with its image."""
    size, grids = processor.layout([size_of(image)])
    return len(processor.segment(talk, True, tuple(map(slots_of, grids)), size.tokens).tokens)


def batched(asked: Sequence[tuple], images_per_batch: int) -> Iterator[list[tuple]]:
    """Runs of questions about at most `images_per_batch` images and of at most ROWS_PER_BATCH rows."""
    batch: list[tuple] = []
    for item in asked:
        images = {key for key, *_ in batch} | {item[0]}
        if len(batch) == ROWS_PER_BATCH or len(images) > images_per_batch:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def question_text(talk: tuple) -> str:
    """The text of the last user turn."""
    return "".join(part for part in talk[-1][1] if isinstance(part, str))


def accuracy(results: Sequence[Result]) -> float:
    """Share of answers equal to the truth."""
    return sum(r.answer == r.truth for r in results) / max(len(results), 1)
