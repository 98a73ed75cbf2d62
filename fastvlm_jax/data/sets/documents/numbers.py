"""Draws pages that a tiny model learns to read: sixteen real numbers of one or two digits, a number in each cell of a
grid.

    27   31   90   15      Sizes and fonts are mixed on a page, so that more of a page can be read the more pixels
    48   62   11   73      the model sees. All pages have the same cells and each cell as many digits: where a digit
    55   20   84   39      stands on the page and where in the transcription are then the same for all pages, which a
    96   17   40   66      tiny model learns in minutes.
"""

import functools
import random

from fastvlm_jax.data.sets.documents.canvas import Canvas
from fastvlm_jax.data.sets.documents.data_sets import read_data_sets
from fastvlm_jax.data.sets.documents.fonts import open_font
from fastvlm_jax.data.sets.documents.page import Page

SIDE, CELLS = 320, 4  # pixels of a page, numbers in a row and in a column
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif")
SIZES = {1: (30, 75), 2: (12, 48)}  # digits of a number -> smallest and largest em square, pixels
_SWAY = 6  # pixels that a number stands off the middle of its cell, at most


def draw(seed: int, split: str, number: int, digits: int = 2) -> Page:
    """Returns a page of numbers of a split's data sets, rounded to their leading digits: 0.2654 -> "27".

    Each first digit from 1 to 9 is as likely, so that nothing but the page tells the digits; the numbers of real data
    begin with a 1 three times as often as with a 9.

    Args:
      seed, split, number: see pages.draw.
      digits: of a number, 1 or 2. Pages of one digit have larger ones, for a model's first steps.
    """
    rng = random.Random(f"numbers {digits} {seed} {split} {number}")
    canvas = Canvas((SIDE, SIDE), (255, 255, 255), (0, 0, 0))
    chosen, sizes, cell = leading(split, digits), [], SIDE // CELLS
    lines = []
    for row in range(CELLS):
        line = []
        for column in range(CELLS):
            text, font = rng.choice(chosen[rng.randrange(9)]), rng.choice(FONTS)
            smallest, largest = SIZES[digits]
            size = round(smallest * (largest / smallest) ** rng.random())
            left, top, right, bottom = open_font(font, size).getbbox(text, anchor="ls")
            x, y = (
                first * cell + (cell - low - high) // 2 + rng.randint(-sway, sway)
                for first, low, high in ((column, left, right), (row, top, bottom))
                for sway in [min(_SWAY, (cell - high + low) // 2)]
            )
            canvas.ink = (rng.randrange(96),) * 3
            line.append(canvas.write(text, (x, y), font, size))
            sizes.append(size)
        lines.append(tuple(line))
    return Page("numbers", canvas.picture, tuple(lines), min(sizes), "numbers", ())


@functools.cache
def leading(split: str, digits: int) -> tuple[tuple[str, ...], ...]:
    """Returns the numbers of a split, rounded to `digits` significant digits, those that begin with 1 first."""
    found: dict[str, list[str]] = {first: [] for first in "123456789"}
    for data_set in read_data_sets(split):
        for values in data_set.columns.values():
            for value in values:
                text = f"{abs(float(value)):.{digits - 1}e}".partition("e")[0].replace(".", "")
                if text[0] != "0":
                    found[text[0]].append(text)
    return tuple(tuple(numbers) for numbers in found.values())
