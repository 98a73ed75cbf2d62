"""Compares two files of predictions: against lmms-eval's paired test, SciPy, and numbers worked by hand."""

import json
import math

import numpy as np
import pytest
from harness import ask

from fastvlm_jax.evaluate.compare import compare, describe, sign_test
from fastvlm_jax.evaluate.results import write_lines


def line(number: int, score: float | None, image: str = "", **more) -> dict:
    return {
        "id": str(number),
        "benchmark": "docvqa",
        "protocol": "paper",
        "question": f"question {number}?",
        "prompt": f"<image>\nquestion {number}?",
        "answer": f"answer {score}",
        "parsed": None,
        "references": ["a"],
        "score": score,
        "groups": {},
        "images": [{"name": "x.png", "digest": image or str(number)}],
        **more,
    }


def written(tmp_path, a, b):
    for name, lines in (("a", a), ("b", b)):
        write_lines(tmp_path / f"{name}.jsonl", lines)
    return tmp_path / "a.jsonl", tmp_path / "b.jsonl"


def test_a_comparison_worked_by_hand(tmp_path):
    """Differences 1, 1, -1/2, 0 about images p p q r: mean 3/8."""
    images = ("p", "p", "q", "r")
    a = [line(i, score, image) for i, (score, image) in enumerate(zip((0, 0, 1, 1), images, strict=True))]
    b = [line(i, score, image) for i, (score, image) in enumerate(zip((1, 1, 0.5, 1), images, strict=True))]
    paths = written(tmp_path, a, b[::-1])
    result = compare(*paths)
    # Deviations 5/8, 5/8, -7/8, -3/8: squares 108/64; the cluster of p adds 2 * 25/64, over 16.
    error = 100 * math.sqrt(108 / 64 / 12 + 50 / 64 / 16)
    assert (result["score_a"], result["score_b"], result["difference"], result["n"]) == (50.0, 87.5, 37.5, 4)
    assert result["standard_error"] == pytest.approx(error)
    assert result["interval_95"] == [pytest.approx(37.5 - 1.96 * error), 100.0]
    assert (result["better"], result["worse"], result["equal"]) == (2, 1, 1)
    assert result["sign_test_p"] == pytest.approx(1.0)
    assert [(found["id"], found["score_a"], found["score_b"]) for found in result["changed"]] == [
        ("2", 1, 0.5), ("0", 0, 1), ("1", 0, 1),
    ]  # fmt: skip
    assert json.loads(json.dumps(result)) == result
    assert describe(result).splitlines() == [
        "docvqa, protocol paper: mean score of 4 questions that both answered",
        f"A       50.00  {paths[0]}",
        f"B       87.50  {paths[1]}",
        "B - A  +37.50  95 %: -47.81 to +100.00 (standard error 43.53, central limit theorem, clustered by image: 3 "
        "clusters)",
        "B is better in 2 questions, worse in 1, equal in 1; sign test: p = 1, as if all questions were independent",
        "",
        "Scores that changed:",
        "  1.00 -> 0.50  '2'  'question 2?'",
        "      A: 'answer 1'  B: 'answer 0.5'",
        "  0.00 -> 1.00  '0'  'question 0?'",
        "      A: 'answer 0'  B: 'answer 1'",
        "  0.00 -> 1.00  '1'  'question 1?'",
        "      A: 'answer 0'  B: 'answer 1'",
    ]


def test_the_paired_difference_is_that_of_lmms_eval(tmp_path):
    rng = np.random.default_rng(0)
    a, b = (rng.random((2, 300)) < [[0.6], [0.65]]).astype(float)
    result = compare(*written(tmp_path, [line(i, x) for i, x in enumerate(a)], [line(i, x) for i, x in enumerate(b)]))
    code = """
import sys, types
quantile = types.SimpleNamespace(ppf=lambda share, freedom: 1.96, cdf=lambda x, freedom: 0.0)  # theirs is Student's
sys.modules["scipy"] = types.SimpleNamespace(stats=types.SimpleNamespace(t=quantile))
from lmms_eval.api.metrics import paired_ttest
def main(value): return paired_ttest(*value)
"""
    expected = ask("lmms-eval-0.7.3", code, [b.tolist(), a.tolist()])
    assert result["difference"] == pytest.approx(100 * expected["mean_diff"])
    assert result["standard_error"] == pytest.approx(100 * expected["se_diff"])
    assert result["interval_95"] == pytest.approx([100 * expected["ci_lower"], 100 * expected["ci_upper"]])


def test_the_sign_test_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for better, worse in ((0, 0), (1, 0), (5, 5), (2, 9), (211, 152), (5000, 5300)):
        expected = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
        assert sign_test(better, worse) == pytest.approx(expected, rel=1e-9)
    assert sign_test(0, 5) == 2 / 32
    assert sign_test(0, 5000) == 0.0


def test_what_is_not_compared_is_counted_and_said(tmp_path):
    a = [line(0, 1.0), line(1, None), line(2, 0.0), line(3, 1.0)]
    b = [
        line(2, 1.0, prompt="other", images=[]),
        line(1, 1.0),
        line(0, 1.0, answer="other"),
        line(4, 0.5),
        line(5, 0.5),
    ]
    result = compare(*written(tmp_path, a, b))
    keys = ("n", "only_in_a", "only_in_b", "without_score", "other_prompts", "other_images", "other_answers")
    assert [result[key] for key in keys] == [2, 1, 2, 1, 1, 1, 2]
    assert describe(result).splitlines()[5:10] == [
        "left out, as only A has them: 1",
        "left out, as only B has them: 2",
        "left out, as they have no score: 1",
        "asked with other prompts: 1",
        "about images of other files: 1",
    ]


def test_long_lists_are_cut_and_texts_stay_in_their_line(tmp_path):
    answer = "two\nlines\x1b[2J" + "x" * 1000
    a = [line(i, 1.0, answer=answer) for i in range(30)]
    result = compare(*written(tmp_path, a, [line(i, 0.0) for i in range(30)]))
    text = describe(result)
    assert "Scores that changed, 20 of 30, all with --output:" in text and len(text.splitlines()) == 7 + 2 * 20
    assert "\x1b" not in text and max(map(len, text.splitlines()[7:])) < 250
    assert len(result["changed"]) == 30 and result["changed"][0]["answer_a"] == answer
    assert result["standard_error"] == 0.0 and result["interval_95"] == [-100.0, -100.0]


def test_one_question_has_no_interval(tmp_path):
    result = compare(*written(tmp_path, [line(0, 1.0)], [line(0, 0.0)]))
    assert result["interval_95"] is None
    assert "B - A  -100.00  (standard error: none: one question)" in describe(result)


@pytest.mark.parametrize(
    ("b", "message"),
    [
        ([line(0, 1.0, benchmark="infovqa")], "is of the benchmark docvqa and {b} of infovqa: they do not compare"),
        ([line(0, 1.0, protocol="llava")], "is of the protocol paper and {b} of llava: they do not compare"),
        ([line(7, 1.0)], "have no question in common"),
        ([line(0, None)], "hold no scores: their benchmark needs a judge, or a server"),
        ([line(0, 1.0, question="other?")], "the question of the row '0' in {a} and in {b} differ: they are of other"),
        ([line(0, 1.0, references=["b"])], "the references of the row '0' in {a} and in {b} differ"),
        ([{}], "b.jsonl line 1 has no 'id'"),
    ],
)
def test_files_that_do_not_compare_are_refused_in_a_line(tmp_path, b, message):
    path_a, path_b = written(tmp_path, [line(0, 1.0)], b)
    with pytest.raises(ValueError) as caught:
        compare(path_a, path_b)
    assert message.format(a=path_a, b=path_b) in str(caught.value) and "\n" not in str(caught.value)
