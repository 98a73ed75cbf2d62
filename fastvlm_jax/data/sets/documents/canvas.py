"""Draws text on a page, and notes where each piece of it lies."""

from typing import NamedTuple

from PIL import Image, ImageDraw

from fastvlm_jax.data.sets.documents.fonts import open_font

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; the last two are outside
Color = tuple[int, int, int]


class Placed(NamedTuple):
    """Holds a text as it stands on a page.

    Attributes:
      text: the text, in one line.
      box: the pixels that it takes: as high as its ink, and from the start of its first glyph to the end of its last.
    """

    text: str
    box: Box


class Canvas:
    """Holds a page while it is drawn.

    Attributes:
      picture: the page so far, RGB.
      ink: color of the text.
      placed: the texts so far.
    """

    def __init__(self, size: tuple[int, int], paper: Color, ink: Color):
        self.picture, self.ink, self.placed = Image.new("RGB", size, paper), ink, []
        self._draw = ImageDraw.Draw(self.picture)

    def write(self, text: str, at: tuple[int, int], font: str, size: int, anchor: str = "ls") -> Placed:
        """Draws a text in one line.

        Args:
          at: where the text's anchor stands, (x, y) in pixels.
          font: name in FONTS.
          size: of the font's em square, pixels.
          anchor: "ls", "ms" or "rs": the left end, the middle or the right end of the baseline.

        Raises:
          ValueError: the text would leave the page or touch another text.
        """
        opened = open_font(font, size)
        placed = Placed(text, tuple(map(int, self._draw.textbbox(at, text, opened, anchor))))
        check(placed, self.placed, self.picture.size)
        self._draw.text(at, text, self.ink, opened, anchor)
        self.placed.append(placed)
        return placed

    def rule(self, start: tuple[int, int], end: tuple[int, int], color: Color, width: int = 1) -> None:
        """Draws a line."""
        self._draw.line((start, end), color, width)


def check(placed: Placed, others: list[Placed], size: tuple[int, int]) -> None:
    """Raises ValueError if a text leaves a page of the size (width, height), or touches one of the others."""
    left, top, right, bottom = placed.box
    if min(left, top) < 0 or right > size[0] or bottom > size[1]:
        raise ValueError(f"{placed.text!r} at {placed.box} leaves the page of {size[0]} x {size[1]} pixels")
    for other in others:
        if left < other.box[2] and other.box[0] < right and top < other.box[3] and other.box[1] < bottom:
            raise ValueError(f"{placed.text!r} at {placed.box} touches {other.text!r} at {other.box}")
