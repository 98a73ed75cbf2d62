"""easy-VQA: questions about one coloured shape, scored by exact match on the published test split."""

import collections
from collections.abc import Sequence
from typing import Any

from fastvlm_jax.data.sources import RecordSource, read_shards
from fastvlm_jax.evaluate.answers import Result, accuracy, answer_records, question_text
from fastvlm_jax.text.conversation import questions


def evaluate(
    model, variables, processor, data: str, *, limit: int | None = None, progress=None
) -> tuple[dict[str, Any], list[Result]]:
    """Answers the test split of the folder `data`.

    Returns:
      The summary, with "baseline_accuracy" that of always giving a question's most frequent training answer, and the
      single results.
    """
    results = answer_records(model, variables, processor, read_shards(data, "test"), limit=limit, progress=progress)
    training = [read_shards(data, split) for split in ("train", "validation")]
    common = most_frequent_answers(training)
    baseline = [r.truth == common.get(r.question) for r in results]
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
    """Questions that `evaluate` will ask."""
    records = read_shards(data, "test")
    total = sum(len(questions(records[i].turns)) for i in range(len(records)))
    return min(total, limit or total)


def most_frequent_answers(sources: Sequence[RecordSource]) -> dict[str, str]:
    """Question text -> its most frequent answer."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for source in sources:
        for i in range(len(source)):
            for talk in questions(source[i].turns):
                counts[question_text(talk[:-1])]["".join(talk[-1][1])] += 1
    return {question: counter.most_common(1)[0][0] for question, counter in counts.items()}
