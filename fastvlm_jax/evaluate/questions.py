"""Prepares the rows of a benchmark: the conversation that the model is asked, its length and the shape of its images.

What is prepared for a row depends on that row alone, so that its answer does not depend on the rows beside it.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fastvlm_jax.data.rejected import most_frequent
from fastvlm_jax.evaluate.benchmark import Picture, Protocol, Row
from fastvlm_jax.images.header import read_header
from fastvlm_jax.images.sizes import Grid, Size, slots_of
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.conversation import TEMPLATES, Turn, renumbered
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
      same: for each image of a table the name of the first one with its contents, else its own name; () means the
        latter for all.
    """

    row: Row
    turns: tuple[Turn, ...]
    pictures: tuple[Picture, ...]
    length: int
    size: Size | None
    grids: tuple[Grid, ...]
    same: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[str, ...]:
        """Returns the name of each image, the same for images of the same contents."""
        return self.same or tuple(picture.name for picture in self.pictures)

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
    published benchmark are read while they are asked, or here too if they lie in a table, which may hold an image once
    for each of its questions, or if the model's image shapes depend on them.

    Args:
      most_tokens: longest prompt, tokens; see generate.answer_limit.
      strict: whether a row that cannot be asked is an error, or left out.

    Raises:
      ValueError: a row of a strict benchmark cannot be asked; the message names it.
    """
    questions, left_out = [], []
    seen = _looking(processor, strict)
    for row in rows:
        try:
            questions.append(_prepared(row, protocol, processor, most_tokens, seen))
        except ValueError as error:
            if strict:
                raise ValueError(f"row {row.id} cannot be asked: {error}") from error
            left_out.append((row.id, str(error)))
    return Prepared(questions, left_out)


class _Seen(NamedTuple):
    """Holds what is known of an image before it is asked about; see Question.same."""

    width: int
    height: int
    same: str


def _looking(processor: Processor, strict: bool) -> Callable[[Picture], _Seen]:
    """Returns a function that looks at a picture, and reads it at most once."""
    known: dict[str, _Seen | ValueError] = {}
    first: dict[str, str] = {}  # digest of an image -> name of the first picture of it
    one_shape = not processor.grids and len(processor.sizes) <= 1

    def look(picture: Picture) -> _Seen:
        width = height = 1  # all images have one shape
        if strict and one_shape and not picture.in_table:
            return _Seen(width, height, picture.name)
        data = picture.read()
        if not strict:
            height, width, _ = processor.decode(data, picture.name).shape
        elif not one_shape:
            height, width = read_header(data).upright
        same = picture.name
        if picture.in_table:
            same = first.setdefault(hashlib.sha256(data).hexdigest(), picture.name)
        return _Seen(width, height, same)

    def seen(picture: Picture) -> _Seen:
        if picture.name not in known:
            try:
                known[picture.name] = look(picture)
            except ValueError as error:
                known[picture.name] = error
        found = known[picture.name]
        if isinstance(found, ValueError):
            raise found
        return found

    return seen


def _prepared(row: Row, protocol: Protocol, processor: Processor, most_tokens: int, seen: Callable) -> Question:
    turns = protocol.prompt(row)
    named = sorted({part for _, content in turns for part in content if isinstance(part, int)})
    if named and not 0 <= named[0] <= named[-1] < len(row.pictures):
        raise ValueError(f"its prompt names image {named[-1]} of {len(row.pictures)}")
    if named and not processor.image_size:
        raise ValueError("it has images, which this model does not read")
    prompt = read_prompts(renumbered(turns, named))[0]
    turns = place_images(prompt, range(len(named)), TEMPLATES[processor.template].user_text)
    pictures = tuple(row.pictures[number] for number in named)
    looks = [seen(picture) for picture in pictures]
    size, grids = processor.layout([(look.width, look.height) for look in looks])
    segment = processor.segment(turns, True, tuple(map(slots_of, grids)), size.tokens)
    length = len(segment.tokens)
    if length > most_tokens:
        raise ValueError(f"its prompt is {length} tokens long, more than the {most_tokens} that leave room to answer")
    same = tuple(look.same for look in looks)
    return Question(row, turns, pictures, length, size if pictures else None, tuple(grids), same)
