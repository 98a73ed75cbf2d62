"""Estimates how far a score would move if a benchmark had drawn other questions of the same kind: its standard error.

question   0    1    2    3    4         cluster of 1 and 2: both show b; of 0, 1 and 2, if question 0 showed a and b
images    (a,) (b,) (b,) (c,) ()
cluster    0    1    1    2    3         questions without an image are alone
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

DRAWS = 1000  # halves that a bootstrap scores
MAX_VISITS = 20_000_000  # results that all its draws may visit together; more results get fewer draws
WIDTH = 1.96  # standard errors on each side of a 95 % interval


class StandardError(NamedTuple):
    """Holds a standard error.

    Attributes:
      value: in the unit of the scores; None if it cannot be estimated.
      method: how it was computed, or why it could not be.
    """

    value: float | None
    method: str


def clusters_of(images: Sequence[Sequence[str]]) -> np.ndarray:
    """Returns the cluster of each question, [questions] int, counted from 0: questions that share an image have one.

    Sharing carries over: if a question shows images a and b, all questions about a or b are one cluster.

    Args:
      images: digests of the images of each question.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    for names in images:
        for name in names:
            parent.setdefault(name, name)
            parent[root(name)] = root(names[0])
    numbers: dict[str | int, int] = {}
    keys = [root(names[0]) if names else i for i, names in enumerate(images)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def of_mean(scores: Sequence[float], clusters: np.ndarray) -> StandardError:
    """Returns the standard error of the mean of scores, by the central limit theorem.

    Where no questions share an image it is the sample's standard deviation, with n - 1, over the root of n. Questions
    of a cluster are not independent: each product of the deviations of two of them counts too (Miller, "Adding Error
    Bars to Evals", arXiv 2411.00640, equation 4; lmms-eval 0.7.3, api/metrics.py clustered_stderr).

    Args:
      clusters: [questions] int, from `clusters_of`.
    """
    n, count = len(scores), len(np.unique(clusters))
    if count < 2:
        return _impossible(n)
    deviations = np.asarray(scores, np.float64) - np.mean(scores)
    squares = float(deviations @ deviations)
    sums = np.bincount(clusters, weights=deviations)
    variance = squares / (n - 1) / n + (float(sums @ sums) - squares) / n**2
    shared = f", clustered by image: {count:,} clusters" if count < n else ""
    return StandardError(math.sqrt(max(variance, 0.0)), f"central limit theorem{shared}")


def of_aggregate(
    results: Sequence[Any], clusters: np.ndarray, aggregate: Callable[[Sequence[Any]], float], seed: int = 0
) -> StandardError:
    """Returns the standard error of a score that is no mean, as F1, by the half-sample bootstrap over clusters.

    Each draw scores a random half of the clusters, without replacement. Half of a sample varies around the whole as
    much as the whole varies around the truth, so the standard deviation of the draws is the standard error (Shao and
    Wu, "A General Theory for Jackknife Variance Estimation", 1989). The common bootstrap, with replacement, would draw
    some images twice, which scores that join the questions of an image (MME, MMBench) take for more questions of one.

    Args:
      results: what `aggregate` takes: results, or what a judge said of them.
      clusters: [results] int, from `clusters_of`.
      aggregate: returns the score of some results.
      seed: seed of the draws.
    """
    names, clusters = np.unique(clusters, return_inverse=True)
    count = len(names)
    if count < 2:
        return _impossible(len(results))
    half = count // 2
    draws = max(100, min(DRAWS, 2 * MAX_VISITS // len(results)))
    rng = np.random.default_rng(seed)
    scores = []
    for _ in range(draws):
        taken = rng.permutation(count) < half
        scores.append(aggregate([results[i] for i in np.flatnonzero(taken[clusters])]))
    value = float(np.std(scores, ddof=1)) * math.sqrt(half / (count - half))
    method = f"half-sample bootstrap over images: {count:,} clusters, {draws:,} draws, seed {seed}"
    if not math.isfinite(value):
        return StandardError(None, "none: some halves of the questions have no score")
    return StandardError(value, method)


def interval(score: float, error: float | None, low: float = -math.inf, high: float = math.inf) -> list[float] | None:
    """Returns the 95 % interval [lower, upper] of a score, inside [low, high]; None without a standard error."""
    if error is None:
        return None
    return [max(low, score - WIDTH * error), min(high, score + WIDTH * error)]


def _impossible(count: int) -> StandardError:
    return StandardError(None, "none: all questions are about one image" if count > 1 else "none: one question")
