"""Draws the pages of a split by their number: each is a function of the seed, the split and its number alone."""

import random

from fastvlm_jax.data.sets.documents import charts, look, receipts, tables, words
from fastvlm_jax.data.sets.documents.page import Page

KINDS = {"table": tables.draw, "words": words.draw, "receipt": receipts.draw, "chart": charts.draw}


def draw(seed: int, split: str, number: int) -> Page:
    """Returns a page of any of the KINDS, each as likely.

    Args:
      split: "train", "validation" or "test"; the page shows numbers and texts of the sources of this split alone.
      number: of the page in its split.
    """
    rng = random.Random(f"documents {seed} {split} {number}")
    kind = rng.choice(list(KINDS))
    while True:
        try:
            return KINDS[kind](rng, split, look.choose(rng))
        except look.NoRoom:
            continue
