"""Answers questions by greedy decoding, in batches of few shapes, and scores the answers."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sources import RecordSource
from fastvlm_jax.evaluate.exact_match import matches
from fastvlm_jax.evaluate.record_questions import Question, collect
from fastvlm_jax.generate import generate
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.processor import Processor

# Numbers of rows and images that a batch may have; it is padded to one of them.
ROWS = (8, 24, 48, 96, 192)
IMAGES = (1, 2, 4, 8, 16)
MAX_LOGITS = 2**30  # logits of all tokens of a batch, which a prefill holds at once: 4 GiB in float32


@dataclasses.dataclass(frozen=True)
class Result:
    """Holds one question, its reference answer and the model's answer.

    Attributes:
      key: key of the record.
      images: encoded images that the question is about.
      question: text of the question.
      truth: reference answer.
      answer: the model's answer.
    """

    key: str
    images: tuple[bytes, ...]
    question: str
    truth: str
    answer: str

    @property
    def right(self) -> bool:
        """Returns whether the answer matches the reference; see exact_match.py."""
        return matches(self.answer, self.truth)


def answer_records(
    model: FastVLM,
    variables: Any,
    processor: Processor,
    records: RecordSource | Sequence[Record],
    *,
    limit: int | None = None,
    max_tokens: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[Result]:
    """Asks the model each question of the records alone, without earlier turns, and returns the results in order.

    Args:
      limit: number of questions to ask; None asks all.
      max_tokens: longest answer in tokens.
      progress: function that is called after each batch with the number of questions in it.

    Raises:
      ValueError: a record cannot be asked about; see questions.collect.
    """
    asked = collect(records, processor, limit=limit, max_tokens=max_tokens)
    for key, reason in asked.left_out:
        raise ValueError(f"record {key} cannot be scored: {reason}" if key else reason)
    return answer(model, variables, processor, asked.questions, max_tokens=max_tokens, progress=progress)


def answer(
    model: FastVLM,
    variables: Any,
    processor: Processor,
    asked: Sequence[Question],
    *,
    max_tokens: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[Result]:
    """Lets the model answer the questions, and returns the results in order.

    All batches but the last have the same shape, and the last no more rows than it needs, so that the decoder is
    compiled at most twice. A batch encodes each of its images once.

    Args:
      max_tokens: longest answer in tokens.
      progress: function that is called after each batch with the number of questions in it; what it raises ends this.
    """
    length = -(-max((question.length for question in asked), default=1) // 8) * 8
    most_rows = max(1, min(ROWS[-1], MAX_LOGITS // (length * model.llm_args["vocab_size"])))
    # With AnyRes tiles or aspect buckets the shape of a batch depends on its images: one image per batch.
    several_sizes = bool(processor.grids or processor.sizes)
    batches = list(batched(asked, most_rows, 1 if several_sizes else IMAGES[-1]))
    results: list[Result] = []
    for number, batch in enumerate(batches):
        alike = batches[:-1] if number < len(batches) - 1 else [batch]
        rows = min(fit(max(map(len, alike)), ROWS), most_rows)
        images = images_of(batch)
        slots = len(images) if several_sizes else fit(max(len(images_of(other)) for other in alike), IMAGES)
        padding = rows - len(batch)
        image_of = [[images.index(image) for image in question.images] for question in batch]
        answers = generate(
            model,
            variables,
            processor,
            images + images[:1] * (slots - len(images)),
            [question.turns for question in batch] + [batch[0].turns] * padding,
            image_of + image_of[:1] * padding,
            max_tokens=max_tokens,
            length=length,
        )
        results += [
            Result(question.key, question.images, question.text, question.truth, text)
            for question, text in zip(batch, answers, strict=False)
        ]
        if progress:
            progress(len(batch))
    return results


def batched(asked: Sequence[Question], most_rows: int, most_images: int) -> Iterator[list[Question]]:
    """Yields consecutive questions in batches of at most so many rows and images; a question alone may have more."""
    batch: list[Question] = []
    for question in asked:
        if batch and (len(batch) == most_rows or len(images_of([*batch, question])) > most_images):
            yield batch
            batch = []
        batch.append(question)
    if batch:
        yield batch


def images_of(batch: Sequence[Question]) -> list[bytes]:
    """Returns the images of questions in order, each once."""
    return list(dict.fromkeys(image for question in batch for image in question.images))


def fit(count: int, sizes: Sequence[int]) -> int:
    """Returns the smallest of `sizes` that holds `count`, or `count` itself if it is 0 or above all."""
    return next((size for size in sizes if size >= count), count) if count else 0


def accuracy(results: Sequence[Result]) -> float:
    """Returns the fraction of answers that match the reference answer; 0 without results."""
    return sum(result.right for result in results) / max(len(results), 1)


def standard_error(share: float, count: int) -> float:
    """Returns the standard error of a share of `count` independent questions; 0 without any."""
    return math.sqrt(share * (1 - share) / count) if count else 0.0
