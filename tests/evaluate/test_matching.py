"""Ranks of queries among items, against the drawn example and against the formulas of CLIP_benchmark in PyTorch."""

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from fastvlm_jax.evaluate import matching
from fastvlm_jax.evaluate.benchmark import Picture
from fastvlm_jax.evaluate.benchmarks.clip_benchmark import (
    caption_results,
    caption_rows,
    caption_texts,
    class_figures,
    class_results,
    class_rows,
    class_texts,
    evenly,
    mean_recall,
    recall_figures,
)
from fastvlm_jax.evaluate.benchmarks.named_pictures import Classes, Named
from fastvlm_jax.evaluate.matching import find, mean_direction


def test_the_drawn_example():
    scores = np.array([[0.1, 0.7, 0.7, 0.3]], np.float32)
    found = find(scores, np.eye(4, dtype=np.float32), np.array([5]), np.array([4, 4, 5, 5]))
    assert (found.best.tolist(), found.rank.tolist()) == ([1], [1])


def test_embeddings_that_are_not_finite_are_told():
    broken = np.array([[np.nan, 1]], np.float32)
    with pytest.raises(ValueError, match="not finite"):
        find(broken, np.eye(2, dtype=np.float32), np.array([0]), np.arange(2))


def tied(rng, rows, width):
    """Embeddings of few values, so that many products are equal and exact."""
    return rng.integers(-1, 2, (rows, width)).astype(np.float32)


def in_order(scores):
    """Scores in float64 without ties: of equal ones the first is the highest, as torch.topk may else choose any."""
    return torch.from_numpy(scores.astype(np.float64) - 1e-6 * np.arange(scores.shape[1]))


def recall(scores, positive, k):
    """Returns whether any positive is among the k highest of each row, as CLIP_benchmark's retrieval counts."""
    top = torch.topk(scores, k, dim=1)[1]
    one_hot = torch.nn.functional.one_hot(top, scores.shape[1])
    return ((one_hot * positive[:, None]).sum(dim=(1, 2)) > 0).double()


@pytest.mark.parametrize("block", [1, 50, 1 << 24])
def test_retrieval_has_the_scores_of_clip_benchmark(monkeypatch, block):
    monkeypatch.setattr(matching, "BLOCK", block)
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 6, 40)
    pictures = [
        Named(f"p{i}", Picture(f"p{i}", bytes), tuple(f"c{i} {k}" for k in range(n))) for i, n in enumerate(counts)
    ]
    images, texts = tied(rng, 40, 6), tied(rng, counts.sum(), 6)
    rows = caption_rows(pictures, None)
    assert caption_texts(rows)[:2] == ["c0 0", "c0 1"] and len(caption_texts(rows)) == counts.sum()
    results = caption_results(rows, images, texts, [str(i) for i in range(40)])
    figures = recall_figures(results)
    positive = torch.zeros(len(texts), 40, dtype=torch.bool)
    positive[torch.arange(len(texts)), torch.from_numpy(np.repeat(np.arange(40), counts))] = True
    scores = texts @ images.T
    for k in (1, 5, 10):
        to_images, to_texts = recall(in_order(scores), positive, k), recall(in_order(scores.T), positive.T, k)
        assert figures[f"image_retrieval_recall@{k}"] == pytest.approx(100 * to_images.mean().item(), abs=1e-9)
        assert figures[f"text_retrieval_recall@{k}"] == pytest.approx(100 * to_texts.mean().item(), abs=1e-9)
    one = (figures["image_retrieval_recall@1"] + figures["text_retrieval_recall@1"]) / 2
    assert mean_recall(results) == pytest.approx(one) and 0 < one < 100
    # Each picture's captions are one cluster, of which the standard error is worked out by Miller's equation 4.
    hits = recall(in_order(scores), positive, 1).numpy() * 100
    deviations, owner = hits - hits.mean(), np.repeat(np.arange(40), counts)
    n, sums = len(hits), np.bincount(owner, deviations)
    variance = (deviations**2).sum() / (n - 1) / n + ((sums**2).sum() - (deviations**2).sum()) / n**2
    assert figures["image_retrieval_recall@1_stderr"] == pytest.approx(variance**0.5)


def test_zero_shot_has_the_scores_of_open_clip():
    rng = np.random.default_rng(1)
    names, templates = tuple(f"n{i}" for i in range(7)), ("a {c}.", "{c} {c}", "the {c}")
    labels = rng.integers(0, 6, 60).tolist()  # no picture of the last class
    pictures = [Named(f"p{i}", Picture(f"p{i}", bytes), label) for i, label in enumerate(labels)]
    rows = class_rows(Classes(pictures, names, templates), None)
    assert class_texts(rows)[:4] == ["a n0.", "n0 n0", "the n0", "a n1."] and len(class_texts(rows)) == 21
    images, texts = tied(rng, 60, 5), rng.normal(size=(21, 5)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    results = class_results(rows, images, texts, [str(i) for i in range(60)])
    weights = torch.from_numpy(texts).reshape(7, 3, 5).mean(dim=1)
    weights = weights / weights.norm(dim=1, keepdim=True)
    logits, target = 100.0 * torch.from_numpy(images) @ weights.T, torch.tensor(labels)
    order = in_order(logits.numpy())
    hit = order.topk(5, dim=1)[1] == target[:, None]
    first = hit[:, :1].any(dim=1).double()
    assert [result.mark.score for result in results] == first.tolist() and 0 < first.mean() < 1
    figures = class_figures(results)
    assert figures["top_5"] == pytest.approx(100 * hit.any(dim=1).double().mean().item())
    balanced = balanced_accuracy_score(target, order.argmax(dim=1))
    assert figures["mean_per_class_recall"] == pytest.approx(100 * balanced)
    parts = [first[target == label].numpy() for label in range(6)]
    error = sum(part.var(ddof=1) / len(part) for part in parts) ** 0.5 / 6
    assert figures["mean_per_class_recall_stderr"] == pytest.approx(100 * error)
    assert [result.answer for result in results] == [names[best] for best in order.argmax(dim=1)]


def test_few_classes_have_no_top_5():
    rows = class_rows(Classes([Named("a", Picture("a", bytes), 1)], ("x", "y"), ("{c}",)), None)
    texts = np.eye(2, dtype=np.float32)
    figures = class_figures(class_results(rows, texts[1:], texts, ["0"]))
    assert figures == {"classes": 2, "mean_per_class_recall": 100.0}


def test_captions_that_several_pictures_share_are_told_and_have_ids_of_their_own():
    pictures = [Named("a", Picture("a", bytes), ("red", "red")), Named("b", Picture("b", bytes), ("red", "blue"))]
    rows = caption_rows(pictures, None)
    results = caption_results(rows, np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32)[[0, 0, 0, 1]], ["0", "1"])
    assert [result.row.id for result in results] == ["a", "b", "a: red", "a: red (2)", "b: red", "b: blue"]
    assert [result.answer for result in results] == ["red", "blue", "a", "a", "a", "b"]
    assert [result.mark.score for result in results] == [1, 1, 1, 1, 0, 1]
    assert [result.images for result in results] == [("0",), ("1",), ("0",), ("0",), ("1",), ("1",)]
    assert recall_figures(results)["shared_captions"] == 75
    rows = caption_rows([*pictures, Named("c", Picture("c", bytes), ("blue", "green", "green", "grey"))], None)
    results = caption_results(rows, np.eye(3, dtype=np.float32), np.ones((8, 3), np.float32), ["0", "1", "2"])
    assert recall_figures(results)["shared_captions"] == 100 * 5 / 8  # green stands with one picture, though twice


def test_an_ensemble_is_the_mean_direction():
    units = np.array([[[1, 0], [0, 1]], [[0.6, 0.8], [0.6, 0.8]], [[1, 0], [-1, 0]]], np.float32)
    expected = [[0.5**0.5, 0.5**0.5], [0.6, 0.8], [0, 0]]  # opposite directions have no mean
    np.testing.assert_allclose(mean_direction(units), expected, atol=1e-7)


@pytest.mark.parametrize(("count", "expected"), [(None, "abcdefg"), (9, "abcdefg"), (3, "ace"), (1, "a")])
def test_some_of_many_are_taken_evenly(count, expected):
    assert "".join(evenly("abcdefg", count)) == expected
