"""Summaries of results, worked by hand, and files of predictions, good and bad."""

import dataclasses
import json
import math

import pytest

from fastvlm_jax import files
from fastvlm_jax.evaluate.benchmark import Benchmark, Mark, Picture, Protocol, Result, Row, ask, ask_llava
from fastvlm_jax.evaluate.results import predictions, read_predictions, summarise, write_lines

PROTOCOL = Protocol(
    "paper", "lmms-eval 0.2.2", lambda row: ask_llava(row, row.question), lambda a, row: Mark(1, a), 32, "ANLS"
)
BENCHMARK = Benchmark("docvqa", "DocVQA, validation", lambda folder: [], (PROTOCOL,), "ANLS, %", 5349, (), "")
# (score, what the rule read, image, type): the mean is 62.5 %.
MARKS = [(1.0, "a", "p", "form"), (0.5, "b", "p", "form"), (1.0, "c", "q", "table"), (0.0, None, "r", "table")]


def results(marks=MARKS) -> list[Result]:
    return [
        Result(
            Row(str(i), f"question {i}?", (Picture(f"{image}.png", bytes),), ("a", "b"), groups={"type": kind}),
            f"<image>\nquestion {i}?",
            f"answer {i}",
            None if score is None else Mark(score, parsed),
            (image,),
        )
        for i, (score, parsed, image, kind) in enumerate(marks)
    ]


def test_a_summary_worked_by_hand():
    summary = summarise(
        BENCHMARK, PROTOCOL, results(), seconds=2.0, answered=3, left_out=[("9", "it is too long")], lineage={"step": 7}
    )
    # Deviations 3/8, -1/8, 3/8, -5/8 of the mean 5/8: squares 44/64; image p has the sum 2/8, so that clustering adds
    # (4/64 + 9/64 + 25/64 - 44/64) / 16.
    error = 100 * math.sqrt(44 / 64 / 12 - 6 / 64 / 16)
    versions = summary.pop("versions")
    assert set(versions) == {"fastvlm_jax", "jax", "jaxlib"} and all(versions.values())
    assert summary == {
        "benchmark": "docvqa",
        "title": "DocVQA, validation",
        "protocol": {"name": "paper", "version": "lmms-eval 0.2.2", "rule": "ANLS", "max_tokens": 32},
        "metric": "ANLS, %",
        "score": 62.5,
        "n": 4,
        "standard_error": pytest.approx(error),
        "standard_error_method": "central limit theorem, clustered by image: 3 clusters",
        "interval_95": [pytest.approx(62.5 - 1.96 * error), 100.0],
        "groups": {
            "type": {
                "form": {"score": 75.0, "standard_error": None, "n": 2},  # both about image p
                "table": {"score": 50.0, "standard_error": 50.0, "n": 2},
            }
        },
        "figures": {},
        "unparsed": 0.25,
        "not_scored": None,
        "questions": 4,
        "questions_published": 5349,
        "left_out": {"questions": 1, "reasons": {"it is too long": 1}},
        "first_prompt": "<image>\nquestion 0?",
        "model": {"step": 7},
        "seconds": 2.0,
        "questions_per_second": 1.5,
    }
    assert json.loads(json.dumps(summary)) == summary


def test_a_published_score_that_is_no_mean_and_its_figures():
    sums = dataclasses.replace(
        PROTOCOL,
        aggregate=lambda drawn: sum(r.mark.score for r in drawn),
        figures=lambda drawn: {"count": len(drawn)},
    )
    summary = summarise(BENCHMARK, sums, results(), max_tokens=5)
    assert (summary["score"], summary["figures"]) == (2.5, {"count": 4})
    assert summary["standard_error_method"].startswith("half-sample bootstrap over images: 3 clusters")
    assert summary["interval_95"][1] > 2.5  # no percent: not cut at 100
    assert summary["protocol"]["max_tokens"] == 5
    assert summary["groups"]["type"]["form"]["score"] == 75.0


@pytest.mark.parametrize(
    ("benchmark", "protocol", "marks", "reason"),
    [
        (BENCHMARK, PROTOCOL, [], "not scored: no question was answered"),
        (BENCHMARK, PROTOCOL, [(None, None, "p", "form")], "not scored: the references are not public"),
        (
            dataclasses.replace(BENCHMARK, name="docvqa-test", submission=list),
            PROTOCOL,
            [(None, None, "p", "form")],
            "not scored: the references are not public: send docvqa-test-paper.submission.json to the benchmark's "
            "server",
        ),
        (
            BENCHMARK,
            dataclasses.replace(PROTOCOL, score=None, judge=list),
            [(None, None, "p", "form")],
            "not scored: only a judge can score it; docvqa-paper.judge.jsonl is what to ask it, --review reads its "
            "replies",
        ),
    ],
)
def test_without_marks_there_is_no_score_and_a_reason(benchmark, protocol, marks, reason):
    summary = summarise(benchmark, protocol, results(marks), seconds=1.0)
    empty = ("score", "standard_error", "interval_95", "unparsed")
    assert [summary[key] for key in empty] == [None] * 4
    assert (summary["not_scored"], summary["n"], summary["questions"]) == (reason, 0, len(marks))
    assert summary["groups"] == summary["figures"] == {}


def test_predictions_are_written_and_read(tmp_path):
    unscored = results([*MARKS, (None, None, "ü\u2028\ud800", "table")])
    lines = predictions(BENCHMARK, PROTOCOL, unscored)
    assert lines[1] == {
        "id": "1",
        "benchmark": "docvqa",
        "protocol": "paper",
        "question": "question 1?",
        "prompt": "<image>\nquestion 1?",
        "answer": "answer 1",
        "parsed": "b",
        "references": ["a", "b"],
        "score": 0.5,
        "groups": {"type": "form"},
        "images": [{"name": "p.png", "digest": "p"}],
    }
    assert (lines[4]["score"], lines[4]["parsed"]) == (None, None)
    write_lines(tmp_path / "out" / "a.jsonl", lines)
    assert read_predictions(tmp_path / "out" / "a.jsonl") == lines
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.jsonl"]


def test_predictions_name_the_images_that_the_prompt_shows_in_the_order_of_their_numbers():
    protocol = dataclasses.replace(PROTOCOL, prompt=lambda row: ask(2, " or ", 0, "?", 2))
    pictures = tuple(Picture(f"{number}.png", bytes) for number in range(3))
    result = Result(Row("0", "", pictures, None), "", "", None, ("digest of 0", "digest of 2"))
    (line,) = predictions(BENCHMARK, protocol, [result])
    assert [(image["name"], image["digest"]) for image in line["images"]] == [
        ("0.png", "digest of 0"), ("2.png", "digest of 2"),
    ]  # fmt: skip


GOOD = predictions(BENCHMARK, PROTOCOL, results())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "a.jsonl holds no predictions"),
        ([GOOD[0], {"id": "1"}], "a.jsonl line 2 has no 'benchmark': it is no file of predictions"),
        ([{**GOOD[0], "score": "1"}], "a.jsonl line 1 has a wrong 'score'"),
        ([{**GOOD[0], "score": True}], "a.jsonl line 1 has a wrong 'score'"),
        ([{**GOOD[0], "score": math.nan}], "a.jsonl line 1: its score nan is not between 0 and 1"),
        ([{**GOOD[0], "score": 1.5}], "a.jsonl line 1: its score 1.5 is not between 0 and 1"),
        ([{**GOOD[0], "images": ["p"]}], "a.jsonl line 1: an image of it has no digest"),
        ([GOOD[0], GOOD[0]], "a.jsonl line 2: its id '0' stands twice"),
        ([GOOD[0], {**GOOD[1], "benchmark": "gqa"}], "line 2 is of the benchmark 'gqa', and line 1 of 'docvqa'"),
        ([GOOD[0], ["x"]], "a.jsonl line 2 holds no object"),
    ],
)
def test_what_is_no_file_of_predictions_is_refused_in_a_line(tmp_path, lines, message):
    write_lines(tmp_path / "a.jsonl", lines)
    with pytest.raises(ValueError) as caught:
        read_predictions(tmp_path / "a.jsonl")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_summary_or_a_missing_file_is_no_file_of_predictions(tmp_path):
    files.write_json(tmp_path / "a.json", {"benchmark": "docvqa", "score": 1})
    with pytest.raises(ValueError, match=r"a\.json line 1: it is not JSON .*: it is no whole file of predictions"):
        read_predictions(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*b\.jsonl"):
        read_predictions(tmp_path / "b.jsonl")
