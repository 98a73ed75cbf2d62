"""Prepares the rows of a benchmark: the conversation that the model is asked, its length and the shape of its images.

What is prepared for a row depends on that row alone, so that its answer does not depend on the rows beside it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fastvlm_jax.data.rejected import most_frequent
from fastvlm_jax.evaluate.benchmark import Picture, Protocol, Row
from fastvlm_jax.images.header import read_header
from fastvlm_jax.images.sizes import Grid, Size, slots_of
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.conversation import TEMPLATES, Turn
from fastvlm_jax.text.prompt import MARK, place_images, read_prompts


@dataclasses.dataclass(frozen=True)
class Question:
    """Holds a row as the model is asked it.

    Attributes:
      row: the row.
      turns: conversation that ends with the question; numbers are indices into `pictures`.
      pictures: the images of the row that the turns name.
      length: number of tokens of the prompt, with the placeholders of its images.
      size: size of its images as the model sees them; None without images.
      grids: AnyRes tiles of each image, see images/sizes.py.
    """

    row: Row
    turns: tuple[Turn, ...]
    pictures: tuple[Picture, ...]
    length: int
    size: Size | None
    grids: tuple[Grid, ...]

    @property
    def slots(self) -> tuple[int, ...]:
        """Returns the number of image slots of each image."""
        return tuple(map(slots_of, self.grids))

    @property
    def prompt(self) -> str:
        """Returns the conversation as text, with "<image>" where an image stands.

        A single turn is its text alone; of several, each is a line that its role opens.
        """
        texts = ["".join(part if isinstance(part, str) else MARK for part in content) for _, content in self.turns]
        if len(texts) == 1:
            return texts[0]
        return "\n".join(f"{role}: {text}" for (role, _), text in zip(self.turns, texts, strict=True))


class Prepared(NamedTuple):
    """Holds the questions to ask, and why rows were left out.

    Attributes:
      questions: the questions, in the order of the rows.
      left_out: (id, reason) of each row that the model cannot be asked.
    """

    questions: list[Question]
    left_out: list[tuple[str, str]]

    def describe_left_out(self) -> str:
        """Returns the reasons in a line, the most frequent first: "2 x it has no image; 1 x ..."."""
        _, reasons = most_frequent(reason for _, reason in self.left_out)
        return "; ".join(f"{count} x {reason}" for count, reason in reasons)


def prepare(
    rows: Sequence[Row], protocol: Protocol, processor: Processor, *, most_tokens: int, strict: bool = True
) -> Prepared:
    """Prepares rows in their order.

    A row cannot be asked if its protocol says so, the model's template or encoder cannot take it, or its prompt is too
    long. Rows that are not strict have their images decoded once, so that a damaged one shows here; those of a
    published benchmark are read while they are asked, or here if the model's image shapes depend on them.

    Args:
      most_tokens: longest prompt, tokens; see generate.answer_limit.
      strict: whether a row that cannot be asked is an error, or left out.

    Raises:
      ValueError: a row of a strict benchmark cannot be asked; the message names it.
    """
    questions, left_out = [], []
    shape_of = _shapes(processor, strict)
    for row in rows:
        try:
            questions.append(_prepared(row, protocol, processor, most_tokens, shape_of))
        except ValueError as error:
            if strict:
                raise ValueError(f"row {row.id} cannot be asked: {error}") from error
            left_out.append((row.id, str(error)))
    return Prepared(questions, left_out)


def _shapes(processor: Processor, strict: bool) -> Callable[[Picture], tuple[int, int]]:
    """Returns a function that gives the (width, height) of a picture, and reads it once if it must."""
    known: dict[str, tuple[int, int] | ValueError] = {}

    def look(picture: Picture) -> tuple[int, int]:
        if strict and not processor.grids and len(processor.sizes) <= 1:
            return 1, 1  # all images have one shape
        data = picture.read()
        if not strict:
            height, width, _ = processor.decode(data, picture.name).shape
        else:
            height, width = read_header(data).upright
        return width, height

    def shape_of(picture: Picture) -> tuple[int, int]:
        if picture.name not in known:
            try:
                known[picture.name] = look(picture)
            except ValueError as error:
                known[picture.name] = error
        found = known[picture.name]
        if isinstance(found, ValueError):
            raise found
        return found

    return shape_of


def _prepared(row: Row, protocol: Protocol, processor: Processor, most_tokens: int, shape_of: Callable) -> Question:
    turns = protocol.prompt(row)
    named = sorted({part for _, content in turns for part in content if isinstance(part, int)})
    if named and not 0 <= named[0] <= named[-1] < len(row.pictures):
        raise ValueError(f"its prompt names image {named[-1]} of {len(row.pictures)}")
    if named and not processor.image_size:
        raise ValueError("it has images, which this model does not read")
    prompt = read_prompts(_renumbered(turns, named))[0]
    turns = place_images(prompt, range(len(named)), TEMPLATES[processor.template].user_text)
    pictures = tuple(row.pictures[number] for number in named)
    size, grids = processor.layout([shape_of(picture) for picture in pictures])
    segment = processor.segment(turns, True, tuple(map(slots_of, grids)), size.tokens)
    length = len(segment.tokens)
    if length > most_tokens:
        raise ValueError(f"its prompt is {length} tokens long, more than the {most_tokens} that leave room to answer")
    return Question(row, turns, pictures, length, size if pictures else None, tuple(grids))


def _renumbered(turns: Sequence[Turn], numbers: Sequence[int]) -> tuple[Turn, ...]:
    """Returns turns whose images are counted from 0 in the order of `numbers`."""
    return tuple(
        (role, tuple(part if isinstance(part, str) else numbers.index(part) for part in content))
        for role, content in turns
    )
