"""Compares embeddings of two towers: which item fits a query best, and where the first right one stands.

scores of a query  0.1  0.7  0.7  0.3      right items: 2 and 3
rank of an item      3    0    1    2      best: item 1; rank of the first right item: 1
"""

from typing import NamedTuple

import numpy as np

BLOCK = 1 << 24  # scores that are computed at once


class Found(NamedTuple):
    """Holds what queries found among items, int64 [queries] each.

    Attributes:
      best: the item with the highest score; of equal ones the first.
      rank: number of items before the first right one: those with a higher score, and those before it with the same.
    """

    best: np.ndarray
    rank: np.ndarray


def find(queries: np.ndarray, items: np.ndarray, wanted: np.ndarray, held: np.ndarray) -> Found:
    """Returns what queries find among items by the products of their embeddings.

    An item is right for a query if what it holds is what the query wants. A query counts as answered within k if any
    right item is among the first k, as in CLIP_benchmark.

    Args:
      queries: float32 [queries, F].
      items: float32 [items, F].
      wanted: int [queries], such as the class of a picture.
      held: int [items], such as the number of a class; each wanted number is held by an item or more.

    Raises:
      ValueError: an embedding is not finite.
    """
    if not (np.isfinite(queries).all() and np.isfinite(items).all()):
        raise ValueError("the model's embeddings are not finite: its weights are damaged, or its training failed")
    best, rank = np.empty(len(queries), np.int64), np.empty(len(queries), np.int64)
    size, places = max(1, BLOCK // max(len(items), 1)), np.arange(len(items))
    for start in range(0, len(queries), size):
        block = np.s_[start : start + size]
        scores = queries[block] @ items.T
        right = np.where(wanted[block, None] == held, scores, -np.inf).argmax(axis=1)[:, None]
        score = np.take_along_axis(scores, right, axis=1)
        best[block] = scores.argmax(axis=1)
        rank[block] = ((scores > score) | ((scores == score) & (places < right))).sum(axis=1)
    return Found(best, rank)


def mean_direction(units: np.ndarray) -> np.ndarray:
    """Returns the mean of vectors of length 1, again of length 1: the ensemble of a class's sentences.

    Args:
      units: float32 [classes, sentences, F].
    """
    mean = units.mean(axis=1)
    return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
