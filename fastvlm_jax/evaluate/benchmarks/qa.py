"""Scores answers on the questions of one's own data set, a folder of shards, by exact match."""

import functools
from collections.abc import Sequence
from typing import Any

from etils import epath

from fastvlm_jax.data.rejected import most_frequent
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.evaluate.benchmark import Benchmark, Mark, Protocol, Result, Row
from fastvlm_jax.evaluate.exact_match import RULE, identical, matches, normalise
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
