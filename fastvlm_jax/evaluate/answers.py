"""Answers the questions in a source of records by greedy decoding, and scores the answers."""

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
    """Holds one question, its reference answer and the model's answer.

    Attributes:
      key: key of the record.
      image: encoded image that the question is about.
      question: text of the question.
      truth: reference answer.
      answer: the model's answer.
    """

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
    """Asks the model each question of the records alone, without earlier turns, and returns the results in order.

    All batches have the same shape, so that the decoder is compiled once. A batch encodes each of its images once.

    Args:
      limit: number of questions to ask; None asks all.
      max_tokens: longest answer in tokens.
      progress: function that is called after each batch with the number of questions in it.

    Raises:
      ValueError: a record's turns do not alternate between user and assistant, or it has no image or several.
    """
    asked = list(ask(records, limit))
    longest = max((prompt_length(processor, image, turns) for _, image, turns, _ in asked), default=1)
    length = -(-longest // 8) * 8
    # With AnyRes tiles or aspect buckets the shape of a batch depends on its images: one image per batch.
    images_per_batch = 1 if processor.grids or processor.sizes else IMAGES_PER_BATCH
    results: list[Result] = []
    for batch in batched(asked, images_per_batch):
        images = list(dict.fromkeys(key for key, *_ in batch))
        pictures = {key: image for key, image, *_ in batch}
        prompts = [turns for _, _, turns, _ in batch]  # as turns, in which a typed <image> stays text
        image_of = [images.index(key) for key, *_ in batch]
        padding = ROWS_PER_BATCH - len(batch)
        answers = generate(
            model,
            variables,
            processor,
            [pictures[key] for key in images] + [pictures[images[0]]] * (images_per_batch - len(images)),
            prompts + prompts[:1] * padding,
            image_of + [0] * padding,
            max_tokens=max_tokens,
            length=length,
        )
        results += [
            Result(key, image, question_text(turns), truth, answer)
            for (key, image, turns, truth), answer in zip(batch, answers, strict=False)
        ]
        if progress:
            progress(len(batch))
    return results


def ask(records: RecordSource, limit: int | None) -> Iterator[tuple[str, bytes, tuple, str]]:
    """Yields (record key, image, turns of the question, reference answer) for the first `limit` questions.

    Raises:
      ValueError: a record's turns do not alternate between user and assistant, or it has no image or several.
    """
    count = 0
    for i in range(len(records)):
        record = records[i]
        for turns in questions(record.turns):
            if count == limit:
                return
            (role, _), (_, answer) = turns[-2:]
            if role != "user" or len(record.images) != 1:
                raise ValueError(
                    f"record {record.key} cannot be scored: it must hold user questions about exactly one image"
                )
            yield record.key, record.images[0], turns[:-1], "".join(answer)
            count += 1


def prompt_length(processor: Processor, image: bytes, turns: tuple) -> int:
    """Returns the number of tokens in a question, including the placeholders of its image and the generation prompt."""
    size, grids = processor.layout([size_of(image)])
    return len(processor.segment(turns, True, tuple(map(slots_of, grids)), size.tokens).tokens)


def batched(asked: Sequence[tuple], images_per_batch: int) -> Iterator[list[tuple]]:
    """Yields consecutive questions in batches of at most `images_per_batch` images and ROWS_PER_BATCH questions."""
    batch: list[tuple] = []
    for item in asked:
        images = {key for key, *_ in batch} | {item[0]}
        if len(batch) == ROWS_PER_BATCH or len(images) > images_per_batch:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def question_text(turns: tuple) -> str:
    """Returns the text of the last turn, without its images."""
    return "".join(part for part in turns[-1][1] if isinstance(part, str))


def accuracy(results: Sequence[Result]) -> float:
    """Returns the fraction of answers that equal the reference answer; 0 without results."""
    return sum(r.answer == r.truth for r in results) / max(len(results), 1)
