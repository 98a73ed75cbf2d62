"""Draws pages that a tiny model learns to read: four real numbers of four digits, each digit in a cell of a grid.

2  6  5  4      0.2654, 17.99, 1065 and 3.784, as on a form. Sizes and fonts are mixed on a page, so that a model tells
1  7  9  9      the more digits the more pixels it sees. A digit's cell and its place in the transcription are the same
1  0  6  5      on all pages: where to look, a tiny model learns within minutes. With two digits in a cell it read the
3  7  8  4      first and guessed the second; with grids of several sizes it stayed blind.
"""

import functools
import itertools
import random

from fastvlm_jax.data.sets.documents.canvas import Canvas, Placed
from fastvlm_jax.data.sets.documents.data_sets import read_data_sets
from fastvlm_jax.data.sets.documents.fonts import open_font
from fastvlm_jax.data.sets.documents.page import Page

SIDE, CELLS = 320, 4  # pixels of a page, cells in a row and in a column
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif")
MIXED, LARGE = (8, 60), (30, 75)  # smallest and largest em square of a digit, pixels
FIRST = (1, 2, 4)  # numbers on a page for a model's first steps, each count as likely
ORDER = ("test", "validation", "train")  # in which a number of several splits is given away
_SWAY = 6  # pixels that a digit stands off the middle of its cell, at most


def draw(seed: int, split: str, page: int, sizes: tuple[int, int] = MIXED, counts: tuple[int, ...] = (CELLS,)) -> Page:
    """Returns a page of numbers of a split's data sets.

    Each first digit from 1 to 9 is as likely, so that the page tells it and nothing else; in real data a number begins
    with a 1 more often than with a 9 (Benford's law).

    Args:
      seed, split, page: see pages.draw.
      sizes: smallest and largest digit; each doubling is as likely. LARGE is for a model's first steps.
      counts: how many numbers a page may hold, from the top; FIRST is for a model's first steps, which on full pages
        may take as long as a whole stage, by the seed.
    """
    rng = random.Random(f"numbers {sizes} {seed} {split} {page}")
    canvas = Canvas((SIDE, SIDE), (255, 255, 255), (0, 0, 0))
    lines, drawn = [], []
    # A choice among one would take a random number, and so change pages that were drawn without it.
    for row in range(rng.choice(counts) if counts[1:] else counts[0]):
        number, boxes = rng.choice(read_numbers(split)[rng.randrange(9)]), []
        for column, digit in enumerate(number):
            font, size = rng.choice(FONTS), round(sizes[0] * (sizes[1] / sizes[0]) ** rng.random())
            canvas.ink = (rng.randrange(96),) * 3
            boxes.append(canvas.write(digit, _place(rng, digit, font, size, row, column), font, size).box)
            drawn.append(size)
        left, top, right, bottom = zip(*boxes, strict=True)
        lines.append((Placed(number, (min(left), min(top), max(right), max(bottom))),))
    return Page("numbers", canvas.picture, tuple(lines), min(drawn), "numbers")


def _place(rng: random.Random, digit: str, font: str, size: int, row: int, column: int) -> tuple[int, int]:
    """Returns where a digit's baseline begins: its ink is near the middle of its cell, and inside."""
    cell = SIDE // CELLS
    left, top, right, bottom = map(int, open_font(font, size).getbbox(digit, anchor="ls"))
    sway = [min(_SWAY, (cell - extent) // 2) for extent in (right - left, bottom - top)]
    x = column * cell + (cell - left - right) // 2 + rng.randint(-sway[0], sway[0])
    y = row * cell + (cell - top - bottom) // 2 + rng.randint(-sway[1], sway[1])
    return x, y


@functools.cache
def read_numbers(split: str) -> tuple[tuple[str, ...], ...]:
    """Returns the first four digits of a split's numbers, without sign and point, by their first digit 1 to 9.

    0.2654 gives "2654", 10.38 "1038" and 135450 "1354"; 0.07 has too few digits. What is in the test split too is left
    out of the others, and what is in validation of training.
    """
    found: dict[str, set[str]] = {first: set() for first in "123456789"}
    for data_set in read_data_sets(split):
        for values in data_set.columns.values():
            for value in values:
                digits = value.replace(".", "").lstrip("-0")[:CELLS]
                if len(digits) == CELLS:
                    found[digits[0]].add(digits)
    for earlier in itertools.takewhile(lambda other: other != split, ORDER):
        for numbers, taken in zip(found.values(), read_numbers(earlier), strict=True):
            numbers.difference_update(taken)
    return tuple(tuple(sorted(numbers)) for numbers in found.values())
