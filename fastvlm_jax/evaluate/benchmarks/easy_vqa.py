"""Scores answers on easy-VQA, questions about one coloured shape, by exact match on the published test split."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from etils import epath

from fastvlm_jax.data.sources import RecordSource, read_shards
from fastvlm_jax.evaluate.benchmark import Benchmark, Protocol, Result, Row
from fastvlm_jax.evaluate.exact_match import RULE, mark, matches
from fastvlm_jax.evaluate.records import own_prompt, rows_of, text_of
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


def figures(results: Sequence[Result]) -> dict[str, Any]:
    """Returns "baseline_accuracy", of giving each question its most frequent answer in the other two splits."""
    baseline = [matches(result.row.fields["common"], result.row.references[0]) for result in results]
    return {"baseline_accuracy": sum(baseline) / max(len(baseline), 1)}


OWN = Protocol(
    name="own",
    version="fastvlm_jax",
    prompt=own_prompt,
    score=mark,
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


def most_frequent_answers(sources: Sequence[RecordSource]) -> dict[str, str]:
    """Returns the most frequent answer to each question, by the text of the question."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for source in sources:
        for i in range(len(source)):
            for turns in questions(source[i].turns):
                counts[text_of(turns[-2])]["".join(turns[-1][1])] += 1
    return {question: counter.most_common(1)[0][0] for question, counter in counts.items()}
