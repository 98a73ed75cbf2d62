"""Scores answers on the questions of one's own data set, a folder of shards, by exact match."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from fastvlm_jax.data.rejected import most_frequent
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.evaluate import record_answers as answers
from fastvlm_jax.evaluate.benchmark import Benchmark, Mark, Protocol, Result, Row
from fastvlm_jax.evaluate.exact_match import RULE, identical, matches, normalise
from fastvlm_jax.evaluate.record_questions import Asked, collect
from fastvlm_jax.evaluate.records import own_prompt, rows_of


def benchmark(split: str = "validation", turns: str = "conversation", limit: int | None = None) -> Benchmark:
    """Returns the benchmark of one's own data.

    Args:
      split: split of the shards.
      turns: "conversation" asks every question of a record with the earlier questions and their reference answers
        before it; "separate" asks each alone.
      limit: number of questions that are read; None reads all.
    """
    own = Protocol(
        name="own",
        version="fastvlm_jax",
        prompt=own_prompt,
        score=score,
        max_tokens=128,
        rule=RULE,
        figures=functools.partial(figures, split=split, turns=turns),
    )
    return Benchmark(
        name="qa",
        title="your own data",
        read=functools.partial(read_rows, split=split, turns=turns, limit=limit),
        protocols=(own,),
        metric="exact match, %",
        size=0,
        files=("a folder of shards, as `fastvlm data write` writes it",),
        source="you",
        strict=False,
    )


def read_rows(
    folder: epath.Path, split: str = "validation", turns: str = "conversation", limit: int | None = None
) -> list[Row]:
    """Returns the questions of a split of a data set; see records.rows_of.

    Raises:
      FileNotFoundError: there is no such data set.
      ValueError: it has no such split, or none of the split's records can be asked about.
    """
    rows = rows_of(read_shards(folder, split), turns, limit)
    broken = [row.fields["unusable"] for row in rows if "unusable" in row.fields]
    if len(broken) == len(rows):
        why = "; ".join(f"{count} x {reason}" for count, reason in most_frequent(broken)[1])
        why = why or "it holds no records; choose another --split"
        raise ValueError(f"no question of the split {split!r} of {folder} can be asked: {why}")
    return rows


def score(answer: str, row: Row) -> Mark:
    """Returns the mark of an answer by exact match."""
    return Mark(float(matches(answer, row.references[0])), normalise(answer))


def figures(results: Sequence[Result], split: str, turns: str) -> dict[str, Any]:
    """Returns further figures: "accuracy_exact" counts answers that are the same but for white space at the ends."""
    exact = [identical(result.answer, result.row.references[0]) for result in results]
    return {"split": split, "turns": turns, "accuracy_exact": sum(exact) / max(len(exact), 1)}


BENCHMARKS = (benchmark(),)


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
) -> tuple[dict[str, Any], list[answers.Result]]:
    """Answers and scores the questions.

    Args:
      asked: what `read` returned.
      progress: function that is called after each batch with the number of questions in it.

    Returns:
      (summary, results). "accuracy" counts the answers that match by the "rule", with its "standard_error" over the
      questions; "accuracy_exact" counts those that are the same but for white space at the ends.
    """
    results = answers.answer(
        model, variables, processor, asked.questions, max_tokens=settings.max_tokens, progress=progress
    )
    right, count = answers.accuracy(results), len(results)
    encode = processor.tokenizer.encode
    return {
        "benchmark": "qa",
        "split": settings.split,
        "turns": settings.turns,
        "max_tokens": settings.max_tokens,
        "questions": count,
        "accuracy": right,
        "standard_error": answers.standard_error(right, count),
        "accuracy_exact": sum(identical(result.answer, result.truth) for result in results) / count,
        "rule": RULE,
        "references_over_max_tokens": sum(len(encode(result.truth)) > settings.max_tokens for result in results),
        "records_left_out": len(asked.left_out),
        "left_out_because": asked.describe_left_out(),
    }, results


def wrong_answers(results: list[answers.Result]) -> list[dict[str, str]]:
    """Returns key, question, reference and answer of each wrong answer."""
    return [
        {"key": result.key, "question": result.question, "truth": result.truth, "answer": result.answer}
        for result in results
        if not result.right
    ]
