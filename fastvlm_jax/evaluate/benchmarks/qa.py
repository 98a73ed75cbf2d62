"""Scores answers to one's own questions: a folder of shards, or a list; each question by a metric of its own."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from etils import epath

from fastvlm_jax.data.rejected import most_frequent
from fastvlm_jax.data.sources import MANIFEST, read_shards
from fastvlm_jax.evaluate.benchmark import Benchmark, Mark, Protocol, Result, Row
from fastvlm_jax.evaluate.benchmarks import options, own_list
from fastvlm_jax.evaluate.exact_match import RULE, identical, mark, normalise
from fastvlm_jax.evaluate.records import own_prompt, rows_of
from fastvlm_jax.evaluate.scores import anls, evalai, letters, relaxed_accuracy, token_f1, vqa_accuracy

SPLIT = "validation"  # of shards, by default


class Metric(NamedTuple):
    """Describes a metric: its rule, in a line, and the function that marks an answer to a row."""

    rule: str
    score: Callable[[str, Row], Mark]


def benchmark(
    split: str | None = None, turns: str = "conversation", metric: str | None = None, limit: int | None = None
) -> Benchmark:
    """Returns the benchmark of one's own data: a folder of shards, or a list of questions beside its images.

    Args:
      split: split of the shards, by default validation; a list has none.
      turns: "conversation" asks every question of a record with the earlier questions and their reference answers
        before it; "separate" asks each alone.
      metric: one of METRICS; by default exact, or choice for questions of a list with choices. A row of a list may name
        its own.
      limit: number of questions that are read; None reads all.
    """
    default = METRICS[metric or "exact"].rule
    own = Protocol(
        name="own",
        version="fastvlm_jax",
        prompt=own_prompt,
        score=score,
        max_tokens=128,
        rule=default if metric else f"{default}; of questions with choices: {METRICS['choice'].rule}",
        figures=functools.partial(figures, split=split or SPLIT, turns=turns),
    )
    return Benchmark(
        name="qa",
        title="your own data",
        read=functools.partial(read_rows, split=split, turns=turns, metric=metric, limit=limit),
        protocols=(own,),
        metric="mean of the scores, %",
        size=0,
        files=(
            "a folder of shards, as `fastvlm data write` writes it",
            "a list of questions, .jsonl or .json, beside its images; see docs/evaluation.md",
        ),
        source="you",
        strict=False,
    )


def read_rows(
    folder: epath.Path,
    split: str | None = None,
    turns: str = "conversation",
    metric: str | None = None,
    limit: int | None = None,
) -> list[Row]:
    """Returns the questions of a split of a data set, see records.rows_of, or of a list, see own_list.py.

    Raises:
      FileNotFoundError: there is no such data set, or an image of a list is missing.
      ValueError: it has no such split, none of the split's records can be asked about, or a row of a list is wrong.
    """
    if not (folder / MANIFEST).exists() and (path := own_list.find_list(folder)):
        if split is not None:
            raise ValueError(f"{path} is a list of questions and has no split {split!r}: --split is for shards")
        return own_list.read_list(path, metric, METRICS)[:limit]
    if folder.suffix in (".json", ".jsonl"):
        raise FileNotFoundError(f"there is no list of questions {folder}")
    split = split or SPLIT
    if metric in ("choice", "vqa"):
        raise ValueError(
            f"the metric {metric} is for a list of questions: the records of {folder} have one answer each"
        )
    rows = rows_of(read_shards(folder, split), turns, limit)
    broken = [row.fields["unusable"] for row in rows if "unusable" in row.fields]
    if len(broken) == len(rows):
        why = "; ".join(f"{count} x {reason}" for count, reason in most_frequent(broken)[1])
        why = why or "it holds no records; choose another --split"
        raise ValueError(f"no question of the split {split!r} of {folder} can be asked: {why}")
    return [dataclasses.replace(row, fields={**row.fields, "metric": metric or "exact"}) for row in rows]


def score(answer: str, row: Row) -> Mark:
    """Returns the mark of an answer by the metric of its row; without one, by exact match."""
    return METRICS[row.fields.get("metric", "exact")].score(answer, row)


def _anls(answer: str, row: Row) -> Mark:
    return Mark(anls.score(answer, row.references), anls.normalise(answer))


def _vqa(answer: str, row: Row) -> Mark:
    return Mark(vqa_accuracy.textvqa(answer, row.references), evalai.normalise(answer))


def _relaxed(answer: str, row: Row) -> Mark:
    return Mark(max(relaxed_accuracy.score(answer, reference) for reference in row.references), answer)


def _f1(answer: str, row: Row) -> Mark:
    return Mark(token_f1.score(answer, row.references), " ".join(token_f1.words(answer)))


def _choice(answer: str, row: Row) -> Mark:
    """Returns whether the answer is the text of the right choice, or else names its letter."""
    named = {normalise(choice): letter for letter, choice in options.lettered(row.fields["choices"])}
    return options.mark(named.get(normalise(answer)) or letters.extract(answer, "".join(named.values())), row)


METRICS = {
    "exact": Metric(f"exact: {RULE}", mark),
    "anls": Metric(anls.RULE, _anls),
    "vqa": Metric("VQA: equal after EvalAI's normaliser to 3 of the other 9 answers is right", _vqa),
    "relaxed": Metric(f"{relaxed_accuracy.RULE}; best reference", _relaxed),
    "f1": Metric(token_f1.RULE, _f1),
    "choice": Metric(f"choice: the text of the right one, or else {letters.RULE}", _choice),
}


def figures(results: Sequence[Result], split: str, turns: str) -> dict[str, Any]:
    """Returns further figures of the results.

    "accuracy_exact" counts answers that are the same as a reference but for white space at the ends; "metrics" holds
    the mean score, %, of the questions of each metric, with its rule.
    """
    exact = [any(identical(result.answer, truth) for truth in result.row.references) for result in results]
    marks = collections.defaultdict(list)
    for result in results:
        marks[result.row.fields.get("metric", "exact")].append(result.mark.score)
    metrics = {
        name: {"score": 100 * sum(found) / len(found), "n": len(found), "rule": METRICS[name].rule}
        for name, found in sorted(marks.items())
    }
    asked = {"split": split, "turns": turns} if any("record" in result.row.fields for result in results) else {}
    return {**asked, "accuracy_exact": sum(exact) / max(len(exact), 1), "metrics": metrics}


BENCHMARKS = (benchmark(),)
