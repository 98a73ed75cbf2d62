"""Turns rows of named columns into records: finds the columns of the images, the questions and the answers.

The first of these layouts that the columns allow is used; column names are compared in lower case:

    conversations, messages   messages of `from` and `value` or `role` and `content`       LLaVA-OneVision
    texts                     pairs of `user` and `assistant`                              The Cauldron, DocMatix
    question + answer(s)      one of each, or a list of each                               VQA sets
    caption, text ...         a text, or several                                           caption sets
    label                     the name of a class                                          classification sets
"""

import collections
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fastvlm_jax.data.readers import Options
from fastvlm_jax.data.readers.conversations import MARK, about_image, text_of, to_turns
from fastvlm_jax.data.record import Record

IMAGES = ("image", "images", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
_MESSAGES = ("conversations", "conversation", "messages")
_QUESTIONS = ("question", "questions", "query", "prompt", "instruction", "problem")
_ANSWERS = ("multiple_choice_answer", "answer", "answers", "response", "output", "solution", "label")
_CAPTIONS = ("caption", "captions", "recaption", "text", "texts", "txt", "description", "sentence", "sentences")
EXPECTED = (
    "an image column and one of: conversations, messages, texts of user and assistant, question and answer, caption, "
    "text, label"
)


class Plan(NamedTuple):
    """Holds the names of the columns that a record is made from."""

    images: tuple[str, ...]
    kind: str  # "messages", "pairs", "answers" or "captions"
    texts: tuple[str, ...]
    id: str | None


def plan(kinds: Mapping[str, str]) -> Plan:
    """Returns the plan for a table's columns.

    Args:
      kinds: column name -> "image", "text", "messages", "pairs" or "other".

    Raises:
      ValueError: the columns fit no known layout; the message names them.
    """
    images = tuple(name for name, kind in kinds.items() if kind == "image")
    named = {name.lower(): name for name in kinds}
    identity = next((named[name] for name in ("id", "image_id", "question_id") if name in named), None)

    def first(names: Iterable[str], kind: str) -> str | None:
        return next((named[name] for name in names if name in named and kinds[named[name]] == kind), None)

    messages = next((name for name, kind in kinds.items() if kind == "messages"), None) or first(_MESSAGES, "text")
    pairs = next((name for name, kind in kinds.items() if kind == "pairs"), None)
    question, answer = first(_QUESTIONS, "text"), first(_ANSWERS, "text")
    caption = first((*_CAPTIONS, "label"), "text")
    if messages:
        return Plan(images, "messages", (messages,), identity)
    if images and pairs:
        return Plan(images, "pairs", (pairs,), identity)
    if images and question and answer:
        return Plan(images, "answers", (question, answer), identity)
    if images and caption:
        return Plan(images, "captions", (caption,), identity)
    raise ValueError(f"the columns are {', '.join(kinds) or 'none'}: expected are {EXPECTED}")


def to_record(key: str, images: Sequence[bytes], row: Mapping[str, Any], plan: Plan, options: Options) -> Record:
    """Returns the record of a row, given the bytes of its images.

    Raises:
      ValueError: the row cannot become a record; the message is a short line that says why.
    """
    extra = {"id": row[plan.id]} if plan.id and isinstance(row.get(plan.id), str | int) else {}
    values = [row[name] for name in plan.texts]
    for name, value in zip(plan.texts, values, strict=True):
        if value is None or (isinstance(value, str | list) and not len(value)):
            raise ValueError(f"{name} is {'null' if value is None else 'empty'}")
    if plan.kind == "messages":
        turns = to_turns(_parsed(plan.texts[0], values[0]), len(images))
    else:
        if not images:
            raise ValueError(f"{' and '.join(plan.images)} {'is' if len(plan.images) == 1 else 'are'} null or empty")
        if plan.kind == "captions":
            captions = [text_of(text, plan.texts[0]) for text in _listed(values[0])]
            if len(captions) > 1:
                extra["captions"] = captions
            if len(images) > 1:
                raise ValueError(f"{len(images)} images have only a caption, not a conversation")
            return Record(key, tuple(images), about_image(captions[0], key, options.questions), extra)
        pairs = _pairs(values[0]) if plan.kind == "pairs" else _answered(*values, extra)
        turns = to_turns(_with_marks(pairs, len(images)), len(images))
    return Record(key, tuple(images), turns, extra)


def _parsed(name: str, value: Any) -> Any:
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is text that is not JSON") from error
    return value


def _listed(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _pairs(value: list) -> list[tuple[Any, Any]]:
    if any(not isinstance(pair, Mapping) for pair in value):
        raise ValueError("texts holds a null")
    return [(pair.get("user"), pair.get("assistant")) for pair in value]


def _answered(questions: Any, answers: Any, extra: dict) -> list[tuple[Any, Any]]:
    """Pairs a question with its most frequent answer, or a list of questions with a list of as many answers."""
    if isinstance(questions, list):
        answers = _listed(answers)
        if len(questions) != len(answers):
            raise ValueError(f"there are {len(questions)} questions and {len(answers)} answers")
        return list(zip(questions, answers, strict=True))
    if isinstance(answers, list):
        answers = [text_of(answer, "an answer") for answer in answers]
        if len(answers) > 1:
            extra["answers"] = answers
        answers = collections.Counter(answers).most_common(1)[0][0]
    return [(questions, answers)]


def _with_marks(pairs: list[tuple[Any, Any]], num_images: int) -> list[dict[str, Any]]:
    """Returns the messages of question-answer pairs; without an image mark, all images open the first question."""
    texts = [
        text_of(text, what) for pair in pairs for text, what in zip(pair, ("a question", "an answer"), strict=True)
    ]
    if not any(MARK in text for text in texts):
        texts[0] = MARK * num_images + texts[0]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
