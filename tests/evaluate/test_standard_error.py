"""Standard errors, against lmms-eval's functions, the bootstrap with replacement, and numbers worked by hand."""

import itertools
import math

import numpy as np
import pytest
from harness import ask

from fastvlm_jax.evaluate.benchmark import Mark, Result, Row
from fastvlm_jax.evaluate.standard_error import clusters_of, interval, of_aggregate, of_mean


def result(score: float, image: str = "", category: str = "a", parsed: str = "yes") -> Result:
    row = Row("", "", (), ("yes",), groups={"category": category})
    return Result(row, "", parsed, Mark(score, parsed), (image,) if image else ())


def f1(results) -> float:
    """F1 of "yes": an answer is right if its score is 1, and so tells the truth."""
    hits = sum(r.mark.score == 1 and r.mark.parsed == "yes" for r in results)
    false = sum(r.mark.score == 0 for r in results)  # false alarms and misses
    return 200 * hits / (2 * hits + false) if hits + false else 0.0


def test_questions_that_share_an_image_are_one_cluster():
    assert clusters_of([("a",), ("b",), ("b",), ("c",), (), ()]).tolist() == [0, 1, 1, 2, 3, 4]


def test_sharing_carries_over():
    #               0         1         2      3             4      5
    images = [("a", "b"), ("c",), ("d", "b"), ("c", "e"), ("f",), ("e", "d")]
    assert clusters_of(images).tolist() == [0, 0, 0, 0, 1, 0]  # 5 joins {0, 2} and {1, 3}


def test_a_long_chain_of_shared_images_is_one_cluster():
    assert set(clusters_of([(str(i), str(i + 1)) for i in range(5000)]).tolist()) == {0}


def test_standard_error_of_a_mean_by_hand():
    # 1, 0, 1, 1: mean 3/4, squares 3/4, variance 1/4 with n - 1, error sqrt(1/16)
    assert of_mean([1, 0, 1, 1], np.arange(4)) == (0.25, "central limit theorem")


def test_standard_error_of_clusters_by_hand():
    # Deviations 1/2, 1/2, -1/2, -1/2 in two clusters of equal answers: sums 1 and -1.
    # 1/12 + (1 + 1 - 1) / 16 = 7/48
    error = of_mean([1, 1, 0, 0], np.array([0, 0, 1, 1]))
    assert error.value == pytest.approx(math.sqrt(7 / 48))
    assert error.method == "central limit theorem, clustered by image: 2 clusters"


def test_one_question_or_one_image_has_no_standard_error():
    assert of_mean([1.0], np.zeros(1, int)) == (None, "none: one question")
    assert of_mean([1.0, 0.0], np.zeros(2, int)) == (None, "none: all questions are about one image")
    assert of_aggregate([result(1), result(0)], np.zeros(2, int), f1).value is None
    assert interval(50.0, None) is None


def test_standard_errors_equal_lmms_evals():
    rng = np.random.default_rng(0)
    cases = []
    for n in (2, 3, 10, 400):
        for scores in (rng.integers(0, 2, n), rng.random(n), np.ones(n)):
            for clusters in (np.arange(n), rng.permutation(n) // 2, np.minimum(rng.integers(0, n, n), n // 2)):
                if len(set(clusters.tolist())) > 1:
                    cases.append((scores.tolist(), clusters.tolist()))
    code = """
from lmms_eval.api.metrics import clustered_stderr, mean_stderr
def main(cases): return [[mean_stderr(s), clustered_stderr(s, c)] for s, c in cases]
"""
    expected = ask("lmms-eval-0.7.3", code, cases)
    for (scores, clusters), (plain, clustered) in zip(cases, expected, strict=True):
        assert of_mean(scores, np.arange(len(scores))).value == pytest.approx(plain, abs=1e-12)
        assert of_mean(scores, np.array(clusters)).value == pytest.approx(clustered, abs=1e-12)


def test_halves_of_few_clusters_by_hand():
    # Four clusters of one question each, 1 0 0 0: half of the six pairs hold the 1 and have the mean 1/2, half 0.
    results = [result(score) for score in (1, 0, 0, 0)]
    error = of_aggregate(results, np.arange(4), lambda drawn: sum(r.mark.score for r in drawn) / len(drawn))
    assert error.value == pytest.approx(1 / 4, rel=0.01)  # as the central limit theorem has it
    assert error.method == "half-sample bootstrap over images: 4 clusters, 1,000 draws, seed 0"


@pytest.mark.parametrize("count", [41, 60])
def test_halves_equal_the_bootstrap_with_replacement(count):
    rng = np.random.default_rng(count)
    easy = rng.random(count)  # how easy each image is: its questions are alike
    images = np.repeat(np.arange(count), rng.integers(1, 7, count))
    results = [
        result(float(rng.random() < easy[i]), str(i), parsed=("yes", "no")[rng.integers(2)]) for i in images.tolist()
    ]
    by_image = [list(group) for _, group in itertools.groupby(results, key=lambda r: r.images)]
    brute = [f1([r for i in rng.integers(0, count, count) for r in by_image[i]]) for _ in range(4000)]
    error = of_aggregate(results, clusters_of([r.images for r in results]), f1)
    assert error.value == pytest.approx(np.std(brute, ddof=1), rel=0.08)
    assert error == of_aggregate(results, clusters_of([r.images for r in results]), f1)
    ignoring = of_aggregate(results, np.arange(len(results)), f1)
    assert ignoring.value < 0.8 * error.value  # questions of an image are not independent


def test_halves_of_a_score_that_joins_the_questions_of_an_image():
    """An image counts if both its questions are right: each is a coin, and the binomial gives the error."""
    rng = np.random.default_rng(3)
    results = [result(float(rng.random() < 0.8), str(i // 2)) for i in range(800)]

    def both(drawn) -> float:
        wrong = {r.images for r in drawn if r.mark.score == 0}
        shown = {r.images for r in drawn}
        return 100 * (len(shown) - len(wrong)) / len(shown)

    share = both(results) / 100
    error = of_aggregate(results, clusters_of([r.images for r in results]), both)
    assert error.value == pytest.approx(100 * math.sqrt(share * (1 - share) / 400), rel=0.08)


def test_a_score_that_some_halves_lack_has_no_standard_error():
    results = [result(1, "a"), result(0, "b")]
    error = of_aggregate(results, np.arange(2), lambda drawn: 1.0 if drawn[0].mark.score else math.nan)
    assert error == (None, "none: some halves of the questions have no score")


def test_the_interval_stays_inside_its_limits():
    assert interval(50.0, 1.0) == [48.04, 51.96]
    assert interval(99.0, 1.0, 0.0, 100.0) == [97.04, 100.0]
