"""Chooses how a page looks: its size, its colors, its margin and the size of its text."""

import random
from typing import NamedTuple

from fastvlm_jax.data.sets.documents.canvas import Color

SIZES = ((256, 256), (320, 256), (256, 384), (384, 384), (512, 320), (384, 512), (512, 512))  # width, height, pixels
SMALLEST, LARGEST = 12, 48  # em square of a text, pixels
LIGHT = ((255, 255, 255), (250, 246, 233), (236, 242, 250), (232, 232, 232))
DARK = ((0, 0, 0), (24, 24, 72), (72, 16, 16), (10, 56, 32))


class NoRoom(Exception):
    """Says that a text does not fit on its page at the smallest size: another page is drawn."""


class Look(NamedTuple):
    """Describes how a page looks.

    Attributes:
      size: width and height, pixels.
      paper: color of the page.
      ink: color of the text.
      faint: color of rules, between the two.
      margin: smallest distance from the text to the edges, pixels.
      font_size: em square of the text, pixels; a page on which too little fits has a smaller one.
    """

    size: tuple[int, int]
    paper: Color
    ink: Color
    faint: Color
    margin: int
    font_size: int

    @property
    def room(self) -> tuple[int, int]:
        """Returns the width and the height inside the margins."""
        return self.size[0] - 2 * self.margin, self.size[1] - 2 * self.margin


def choose(rng: random.Random) -> Look:
    """Returns a look: dark on light twice as often as light on dark; each doubling of the text's size is as likely."""
    size, light, dark = rng.choice(SIZES), rng.choice(LIGHT), rng.choice(DARK)
    paper, ink = (light, dark) if rng.random() < 2 / 3 else (dark, light)
    faint = tuple((2 * a + b) // 3 for a, b in zip(paper, ink, strict=True))
    font_size = round(SMALLEST * (LARGEST / SMALLEST) ** rng.random())
    return Look(size, paper, ink, faint, rng.randint(6, size[0] // 12), font_size)


def smaller(font_size: int) -> int:
    """Returns the next smaller size of a text, pixels.

    Raises:
      NoRoom: it is the smallest.
    """
    if font_size == SMALLEST:
        raise NoRoom
    return max(SMALLEST, font_size * 5 // 6)
