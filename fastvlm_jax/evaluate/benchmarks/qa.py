"""Scores answers on the questions of one's own data set, a folder of shards, by exact match."""

import dataclasses
from collections.abc import Callable
from typing import Any

from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.evaluate.answers import Result, accuracy, answer, standard_error
from fastvlm_jax.evaluate.exact_match import RULE, identical
from fastvlm_jax.evaluate.questions import Asked, collect


@dataclasses.dataclass(frozen=True)
class Settings:
    """Holds what is asked.

    Attributes:
      split: split of the data set.
      limit: number of questions to ask; None asks all.
      max_tokens: longest answer in tokens.
      turns: "conversation" asks every question of a record with the earlier questions and their reference answers
        before it; "separate" asks each alone.
    """

    split: str = "validation"
    limit: int | None = None
    max_tokens: int = 128
    turns: str = "conversation"


def read(processor, data: str, settings: Settings) -> Asked:
    """Reads the questions of a data set.

    Raises:
      FileNotFoundError: there is no such data set.
      ValueError: it has no such split, or none of the split's records can be asked about.
    """
    records = read_shards(data, settings.split)
    asked = collect(records, processor, limit=settings.limit, max_tokens=settings.max_tokens, turns=settings.turns)
    if not asked.questions:
        why = asked.describe_left_out() or "it holds no records; choose another --split"
        raise ValueError(f"no question of the split {settings.split!r} of {data} can be asked: {why}")
    return asked


def evaluate(
    model,
    variables,
    processor,
    asked: Asked,
    settings: Settings,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Any], list[Result]]:
    """Answers and scores the questions.

    Args:
      asked: what `read` returned.
      progress: function that is called after each batch with the number of questions in it.

    Returns:
      (summary, results). "accuracy" counts the answers that match by the "rule", with its "standard_error" over the
      questions; "accuracy_exact" counts those that are the same but for white space at the ends.
    """
    results = answer(model, variables, processor, asked.questions, max_tokens=settings.max_tokens, progress=progress)
    right, count = accuracy(results), len(results)
    encode = processor.tokenizer.encode
    return {
        "benchmark": "qa",
        "split": settings.split,
        "turns": settings.turns,
        "max_tokens": settings.max_tokens,
        "questions": count,
        "accuracy": right,
        "standard_error": standard_error(right, count),
        "accuracy_exact": sum(identical(result.answer, result.truth) for result in results) / count,
        "rule": RULE,
        "references_over_max_tokens": sum(len(encode(result.truth)) > settings.max_tokens for result in results),
        "records_left_out": len(asked.left_out),
        "left_out_because": asked.describe_left_out(),
    }, results


def wrong_answers(results: list[Result]) -> list[dict[str, str]]:
    """Returns key, question, reference and answer of each wrong answer."""
    return [
        {"key": result.key, "question": result.question, "truth": result.truth, "answer": result.answer}
        for result in results
        if not result.right
    ]
