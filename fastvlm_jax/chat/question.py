"""Holds what is asked in a conversation, and lays it out as tokens that can be compared with those of a cache."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fastvlm_jax.images.sizes import Grid, Size, slots_of
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.conversation import TEMPLATES, Segment, render
from fastvlm_jax.text.prompt import Prompt, place_images


class Picture(NamedTuple):
    """Holds an image of a conversation.

    Attributes:
      name: its digest: other bytes have another name.
      data: the encoded file.
      size: (width, height) after EXIF rotation, pixels.
    """

    name: str
    data: bytes
    size: tuple[int, int]


class Question(NamedTuple):
    """Holds what is asked.

    Attributes:
      conversation: name of the conversation, whose cache is looked for.
      prompt: the whole conversation, which ends with the question.
      pictures: its images, as its turns number them.
      temperature, seed: see `generate.generate`.
    """

    conversation: str
    prompt: Prompt
    pictures: tuple[Picture, ...] = ()
    temperature: float = 0.0
    seed: int = 0


class View(NamedTuple):
    """Names an image as a model sees it: its digest, its size, and its grid of AnyRes tiles."""

    name: str
    size: Size
    grid: Grid


@dataclasses.dataclass(frozen=True)
class Laid:
    """Holds a conversation as tokens, up to where its next answer begins.

        text      <  I  I  what ?      one image of two tokens
        image    -1  0  0  -1  -1
        place    -1  0  1  -1  -1

    Attributes:
      segment: its L tokens.
      views: its images.
      image: number of the image that each token belongs to, -1 for text; int64 [L].
      place: number of the token in its image, -1 for text; int64 [L].
    """

    segment: Segment
    views: tuple[View, ...]
    image: np.ndarray
    place: np.ndarray

    def names(self, numbers: Mapping[View, int]) -> np.ndarray:
        """Returns what each token is, int64 [L, 3]: its id, the number that `numbers` gives its image, and its place.

        Tokens of the same names, behind tokens of the same names, have the same keys and values.
        """
        images = np.array([*(numbers[view] for view in self.views), -1], np.int64)  # the last is that of text
        return np.stack([self.segment.tokens.astype(np.int64), images[self.image], self.place], axis=1)

    def behind(self, start: int) -> tuple[list[int], np.ndarray]:
        """Returns the numbers of the images that have tokens from `start` on, and where those tokens find them.

        That is image_index, int32 [L - start], in the features of these images alone, joined in this order.
        """
        image, place = self.image[start:], self.place[start:]
        needed = sorted(set(image[image >= 0].tolist()))
        offsets = np.zeros(len(self.views) + 1, np.int64)
        lengths = [self.views[i].size.tokens * slots_of(self.views[i].grid) for i in needed]
        offsets[needed] = np.cumsum([0, *lengths])[: len(needed)]
        return needed, np.where(image < 0, -1, offsets[image] + place).astype(np.int32)


def lay_out(processor: Processor, question: Question) -> Laid:
    """Lays a conversation out as `processor(images, prompt)` does.

    Raises:
      ValueError: the template cannot write it, as one that reads no text; the message is one line.
    """
    size, grids = processor.layout([picture.size for picture in question.pictures])
    views = tuple(View(picture.name, size, grid) for picture, grid in zip(question.pictures, grids, strict=True))
    template, slots = TEMPLATES[processor.template], tuple(map(slots_of, grids))
    turns = place_images(question.prompt, range(len(views)), template.user_text)
    segment = render(turns, processor.tokenizer, template, size.tokens, True, slots)
    first = np.cumsum([0, *slots]) * size.tokens  # image_index of the first token of each image
    index = segment.image_index.astype(np.int64)
    image = np.where(index < 0, -1, np.searchsorted(first, index, "right") - 1)
    return Laid(segment, views, image, np.where(index < 0, -1, index - first[image]))


def common(one: np.ndarray, other: np.ndarray) -> int:
    """Returns how many rows two arrays [L, 3] both begin with."""
    length = min(len(one), len(other))
    differ = np.flatnonzero((one[:length] != other[:length]).any(axis=1))
    return int(differ[0]) if len(differ) else length


def names_of_text(ids: list[int]) -> np.ndarray:
    """Returns the names of tokens of text, int64 [N, 3]; see `Laid.names`."""
    return np.array([(i, -1, -1) for i in ids], np.int64).reshape(-1, 3)
