"""Defines a page: its picture, where every piece of text stands on it, and what may be asked about it.

Reading order: lines from top to bottom, the pieces of a line from left to right. The transcription has a line for each
line of the page, with one space between its pieces. A chart is read as a table: its title, then for each bar or point,
from left to right or from top to bottom, its label and its value.
"""

import dataclasses
import io
from typing import NamedTuple

from PIL import Image

from fastvlm_jax.data.sets.documents.canvas import Placed


class Question(NamedTuple):
    """Holds a question about a page.

    Attributes:
      kind: what it asks for, as "cell" or "yes/no".
      text: the question.
      answer: the one right answer.
    """

    kind: str
    text: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Page:
    """Holds a page.

    Attributes:
      kind: "table", "words", "receipt", "chart" or "numbers".
      picture: the page, RGB.
      lines: the pieces of text of each line, in reading order.
      font_size: size of the em square of its smallest text, pixels.
      source: data set or module that its text comes from.
      questions: what may be asked about it.
    """

    kind: str
    picture: Image.Image
    lines: tuple[tuple[Placed, ...], ...]
    font_size: int
    source: str
    questions: tuple[Question, ...] = ()

    @property
    def text(self) -> str:
        """Returns the transcription."""
        return "\n".join(" ".join(piece.text for piece in line) for line in self.lines)

    def png(self) -> bytes:
        """Returns the picture as a PNG file."""
        file = io.BytesIO()
        self.picture.save(file, "png", compress_level=6)
        return file.getvalue()
