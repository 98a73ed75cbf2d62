"""Scores answers on easy-VQA, questions about one coloured shape, by exact match on the published test split."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from etils import epath

from fastvlm_jax.data.sources import RecordSource, read_shards
from fastvlm_jax.evaluate import record_answers as answers
from fastvlm_jax.evaluate.benchmark import Benchmark, Mark, Protocol, Result, Row
from fastvlm_jax.evaluate.exact_match import RULE, matches, normalise
from fastvlm_jax.evaluate.record_answers import accuracy, answer_records
from fastvlm_jax.evaluate.record_questions import question_text
from fastvlm_jax.evaluate.records import own_prompt, rows_of
from fastvlm_jax.text.conversation import questions


def read(folder: epath.Path) -> list[Row]:
    """Returns the questions of the test split of the shards; "common" in their fields is the most frequent answer.

    Raises:
      FileNotFoundError: there are no such shards.
      ValueError: a split is missing, or a record cannot be asked about.
    """
    common = most_frequent_answers([read_shards(folder, split) for split in ("train", "validation")])
    rows = []
    for row in rows_of(read_shards(folder, "test"), "separate"):
        if "unusable" in row.fields:
            raise ValueError(f"record {row.fields['record']} cannot be scored: {row.fields['unusable']}")
        kind = "yes/no" if row.references[0] in ("yes", "no") else "open"
        fields = {**row.fields, "common": common.get(row.question, "")}
        rows.append(dataclasses.replace(row, fields=fields, groups={"kind": kind}))
    return rows


def score(answer: str, row: Row) -> Mark:
    """Returns the mark of an answer by exact match."""
    return Mark(float(matches(answer, row.references[0])), normalise(answer))


def figures(results: Sequence[Result]) -> dict[str, Any]:
    """Returns "baseline_accuracy", of giving each question its most frequent answer in the other two splits."""
    baseline = [matches(result.row.fields["common"], result.row.references[0]) for result in results]
    return {"baseline_accuracy": sum(baseline) / max(len(baseline), 1)}


OWN = Protocol(
    name="own",
    version="fastvlm_jax",
    prompt=own_prompt,
    score=score,
    max_tokens=16,
    rule=RULE,
    figures=figures,
)
BENCHMARKS = (
    Benchmark(
        name="easy-vqa",
        title="easy-VQA, test",
        read=read,
        protocols=(OWN,),
        metric="exact match, %",
        size=9673,
        files=("the shards that `fastvlm data easy-vqa` writes",),
        source="the PyPI package easy-vqa",
    ),
)


def evaluate(
    model, variables, processor, data: str, *, limit: int | None = None, progress=None
) -> tuple[dict[str, Any], list[answers.Result]]:
    """Answers and scores the test split of easy-VQA.

    Args:
      data: folder of the shards, with the splits train, validation and test.
      limit: number of test questions to ask; None asks all.
      progress: function that is called after each batch with the number of questions in it.

    Returns:
      (summary, results). "baseline_accuracy" in the summary is the accuracy of giving each question its most frequent
      answer in the train and validation splits.
    """
    results = answer_records(model, variables, processor, read_shards(data, "test"), limit=limit, progress=progress)
    training = [read_shards(data, split) for split in ("train", "validation")]
    common = most_frequent_answers(training)
    baseline = [matches(common.get(r.question, ""), r.truth) for r in results]
    by_kind = collections.defaultdict(list)
    for r in results:
        by_kind["yes/no" if r.truth in ("yes", "no") else "open"].append(r)
    return {
        "benchmark": "easy-vqa",
        "test_questions": len(results),
        "accuracy": accuracy(results),
        "baseline_accuracy": sum(baseline) / max(len(baseline), 1),
        "accuracy_by_kind": {kind: accuracy(found) for kind, found in sorted(by_kind.items())},
    }, results


def count_questions(data: str, limit: int | None) -> int:
    """Returns the number of questions that `evaluate` will ask."""
    records = read_shards(data, "test")
    total = sum(len(questions(records[i].turns)) for i in range(len(records)))
    return min(total, limit or total)


def most_frequent_answers(sources: Sequence[RecordSource]) -> dict[str, str]:
    """Returns the most frequent answer to each question, by the text of the question."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for source in sources:
        for i in range(len(source)):
            for turns in questions(source[i].turns):
                counts[question_text(turns[:-1])]["".join(turns[-1][1])] += 1
    return {question: counter.most_common(1)[0][0] for question, counter in counts.items()}
