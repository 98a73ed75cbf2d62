"""Compares the predictions of two models on the same questions: the paired difference, its error, and what changed.

The scores of two models on one benchmark rise and fall together, because some questions are hard for both. The
difference of each question's two scores leaves that out, so that its error is smaller than those of the two suggest.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.evaluate import standard_error
from fastvlm_jax.evaluate.results import read_predictions

LISTED = 20  # changed questions that the text lists

Line = Mapping[str, Any]


def compare(path_a: os.PathLike | str, path_b: os.PathLike | str) -> dict[str, Any]:
    """Returns the comparison of two files of predictions, JSON values; scores are means in percent, differences B - A.

    Only questions that stand in both files and have scores in both are compared. Of benchmarks whose published score is
    no mean, as the F1 of POPE, it is the mean of the questions' scores all the same.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file is damaged, or they are of different benchmarks, protocols or questions.
    """
    a, b = read_predictions(path_a), read_predictions(path_b)
    for key in ("benchmark", "protocol"):
        if a[0][key] != b[0][key]:
            raise ValueError(f"{path_a} is of the {key} {a[0][key]} and {path_b} of {b[0][key]}: they do not compare")
    in_b = {line["id"]: line for line in b}
    shared = [(line, in_b[line["id"]]) for line in a if line["id"] in in_b]
    if not shared:
        raise ValueError(f"{path_a} and {path_b} have no question in common")
    for first, second in shared:
        _check_same_question(first, second, path_a, path_b)
    scored = [pair for pair in shared if None not in (pair[0]["score"], pair[1]["score"])]
    if not scored:
        raise ValueError(f"{path_a} and {path_b} hold no scores: their benchmark needs a judge, or a server")
    return {
        "benchmark": a[0]["benchmark"],
        "protocol": a[0]["protocol"],
        "a": os.fspath(path_a),
        "b": os.fspath(path_b),
        **_difference(scored),
        "only_in_a": len(a) - len(shared),
        "only_in_b": len(b) - len(shared),
        "without_score": len(shared) - len(scored),
        "other_prompts": sum(first["prompt"] != second["prompt"] for first, second in scored),
        "other_images": sum(_digests(first) != _digests(second) for first, second in scored),
        "other_answers": sum(first["answer"] != second["answer"] for first, second in scored),
        "changed": _changed(scored),
    }


def describe(comparison: Mapping[str, Any]) -> str:
    """Returns a comparison as text of a few lines, with the first of the questions whose scores changed."""
    c = comparison
    lines = [
        f"{c['benchmark']}, protocol {c['protocol']}: mean score of {c['n']:,} questions that both answered",
        f"A      {c['score_a']:6.2f}  {c['a']}",
        f"B      {c['score_b']:6.2f}  {c['b']}",
        f"B - A  {c['difference']:+6.2f}  {_interval(c)}",
        f"B is better in {c['better']:,} questions, worse in {c['worse']:,}, equal in {c['equal']:,}; sign test: p = "
        f"{c['sign_test_p']:.2g}, as if all questions were independent",
        *_notes(c),
    ]
    if c["changed"]:
        cut = f", {LISTED} of {len(c['changed']):,}, all with --output" if len(c["changed"]) > LISTED else ""
        lines += ["", f"Scores that changed{cut}:"]
    for line in c["changed"][:LISTED]:
        lines += [
            f"  {line['score_a']:.2f} -> {line['score_b']:.2f}  {shown(line['id'])}  {shown(line['question'])}",
            f"      A: {shown(line['answer_a'])}  B: {shown(line['answer_b'])}",
        ]
    return "\n".join(lines)


def sign_test(better: int, worse: int) -> float:
    """Returns the probability of at least so uneven a split of the questions that changed, if each side were as likely.

    It is exact and two-sided; McNemar's exact test where scores are 0 or 1.
    """
    n, least = better + worse, min(better, worse)
    log_choose = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(least + 1)]
    tail = math.fsum(math.exp(value - n * math.log(2)) for value in log_choose)
    return min(1.0, 2 * tail)


def _difference(scored: Sequence[tuple[Line, Line]]) -> dict[str, Any]:
    a, b = 100 * np.array([[first["score"], second["score"]] for first, second in scored], np.float64).T
    clusters = standard_error.clusters_of([_digests(first) for first, _ in scored])
    difference, error = float((b - a).mean()), standard_error.of_mean(b - a, clusters)
    better, worse = int((b > a).sum()), int((b < a).sum())
    return {
        "n": len(scored),
        "score_a": float(a.mean()),
        "score_b": float(b.mean()),
        "difference": difference,
        "standard_error": error.value,
        "standard_error_method": error.method,
        "interval_95": standard_error.interval(difference, error.value, -100.0, 100.0),
        "better": better,
        "worse": worse,
        "equal": len(scored) - better - worse,
        "sign_test_p": sign_test(better, worse),
    }


def _changed(scored: Sequence[tuple[Line, Line]]) -> list[dict[str, Any]]:
    """Returns the questions whose scores changed, those that B lost most first."""
    changed = [
        {
            "id": first["id"],
            "question": first["question"],
            "references": first["references"],
            "answer_a": first["answer"],
            "answer_b": second["answer"],
            "score_a": first["score"],
            "score_b": second["score"],
        }
        for first, second in scored
        if first["score"] != second["score"]
    ]
    return sorted(changed, key=lambda line: line["score_b"] - line["score_a"])


def _check_same_question(first: Line, second: Line, path_a: os.PathLike | str, path_b: os.PathLike | str) -> None:
    for key in ("question", "references"):
        if first[key] != second[key]:
            raise ValueError(
                f"the {key} of the row {shown(first['id'])} in {path_a} and in {path_b} differ: they are of other "
                f"versions of {first['benchmark']}, and do not compare"
            )


def _digests(line: Line) -> list[str]:
    return [image["digest"] for image in line["images"]]


def _interval(c: Mapping[str, Any]) -> str:
    if c["interval_95"] is None:
        return f"(standard error: {c['standard_error_method']})"
    low, high = c["interval_95"]
    return f"95 %: {low:+.2f} to {high:+.2f} (standard error {c['standard_error']:.2f}, {c['standard_error_method']})"


def _notes(c: Mapping[str, Any]) -> list[str]:
    found = {
        "only_in_a": "left out, as only A has them",
        "only_in_b": "left out, as only B has them",
        "without_score": "left out, as they have no score",
        "other_prompts": "asked with other prompts",
        "other_images": "about images of other files",
    }
    return [f"{text}: {c[key]:,}" for key, text in found.items() if c[key]]
