"""Reads the questions in a source of records, and leaves out those that a model cannot be asked, with the reason."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastvlm_jax.data.record import Record
from fastvlm_jax.data.rejected import most_frequent
from fastvlm_jax.data.sources import RecordSource
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.conversation import Turn, questions, split_system

TURNS = ("conversation", "separate")
MAX_LENGTH = 8192  # most tokens of a prompt and its answer, as in generate


@dataclasses.dataclass(frozen=True)
class Question:
    """Holds a question as a model is asked it.

    Attributes:
      key: key of the record.
      images: encoded images that the turns name.
      turns: conversation that ends with the question; numbers are indices into `images`.
      truth: reference answer.
      length: number of tokens of the prompt, with the placeholders of its images.
    """

    key: str
    images: tuple[bytes, ...]
    turns: tuple[Turn, ...]
    truth: str
    length: int

    @property
    def text(self) -> str:
        """Returns the text of the question, without its images and earlier turns."""
        return question_text(self.turns)


class Asked(NamedTuple):
    """Holds the questions to ask, and why records were left out.

    Attributes:
      questions: the questions, in the order of the records.
      left_out: (key of a record, reason) of each record that cannot be asked about.
    """

    questions: list[Question]
    left_out: list[tuple[str, str]]

    def describe_left_out(self) -> str:
        """Returns the reasons in a line, the most frequent first: "2 x it has no image; 1 x ..."."""
        _, reasons = most_frequent(reason for _, reason in self.left_out)
        return "; ".join(f"{count} x {reason}" for count, reason in reasons)


def collect(
    records: RecordSource | Sequence[Record],
    processor: Processor,
    *,
    limit: int | None = None,
    max_tokens: int = 16,
    turns: str = "separate",
) -> Asked:
    """Reads the questions of the records in order, and prepares each record once to see that it can be asked about.

    A record is left out whole if it is damaged, its turns do not alternate between user and assistant, one of its
    images cannot be read, the model's template or encoder cannot take it, or a prompt is too long.

    Args:
      records: a split of a data set, or a list of records.
      processor: processor of the model.
      limit: number of questions to read; None reads all.
      max_tokens: longest answer in tokens, for which a prompt leaves room.
      turns: "separate" asks each question alone, with the images of the first turn; "conversation" asks it with the
        earlier questions and their reference answers before it. Both as `data.turns` makes samples of a record.
    """
    asked, left_out = [], []
    for i in range(len(records)):
        if limit is not None and len(asked) >= limit:
            break
        key = ""
        try:
            record = records[i]
            key = record.key
            asked += _questions_of(record, processor, max_tokens, turns)
        except ValueError as error:
            left_out.append((key, str(error)))
    return Asked(asked[:limit], left_out)


def question_text(turns: Sequence[Turn]) -> str:
    """Returns the text of the last turn, without its images."""
    return _text(turns[-1])


def _questions_of(record: Record, processor: Processor, max_tokens: int, turns: str) -> list[Question]:
    talks = questions(record.turns)
    if turns == "conversation":
        system, talk = split_system(record.turns)
        talks = [(*system, *talk[: 2 * i + 2]) for i in range(len(talk) // 2)]
    truths = [_text(talk[-1]) for talk in talks]
    named = [sorted({part for _, content in talk[:-1] for part in content if isinstance(part, int)}) for talk in talks]
    prompts = [_renumbered(talk[:-1], numbers) for talk, numbers in zip(talks, named, strict=True)]
    if record.images and not processor.image_size:
        raise ValueError("it has images, which this model does not read")
    batch = processor(list(record.images) or None, prompts, named, max_length=MAX_LENGTH - max_tokens)
    lengths = np.sum(batch.segment_ids[0] > 0, axis=-1).tolist()
    return [
        Question(record.key, tuple(record.images[n] for n in numbers), prompt, truth, length)
        for numbers, prompt, truth, length in zip(named, prompts, truths, lengths, strict=True)
    ]


def _text(turn: Turn) -> str:
    return "".join(part for part in turn[1] if isinstance(part, str))


def _renumbered(talk: Sequence[Turn], numbers: Sequence[int]) -> tuple[Turn, ...]:
    """Returns turns whose images are counted from 0 in the order of `numbers`."""
    return tuple(
        (role, tuple(part if isinstance(part, str) else numbers.index(part) for part in content))
        for role, content in talk
    )
