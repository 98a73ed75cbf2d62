"""Divides questions into groups of few shapes, and builds what the model reads of a group.

Questions of similar length and the same image size form a bucket; the longest prompts come first, and inside a bucket
the order stays as published, so that rows about one image meet in one group. A bucket has one shape:

    bucket (length 320, images 1024 x 1024)   group 0: rows a b c d, images 1 2      each image is encoded once a group
                                              group 1: rows e f g ., images 2 3      "." repeats a row and is not read
    bucket (length 96, no images)             group 2: rows h i . .

How long a row is padded, and the size of its images, depend on the row alone; so does its answer, up to the rounding of
matrix products of other shapes.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fastvlm_jax.batch import Batch
from fastvlm_jax.evaluate.benchmark import Picture
from fastvlm_jax.evaluate.questions import Question
from fastvlm_jax.generate import padded
from fastvlm_jax.images.sizes import Grid, Size, slots_of
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.processor import Processor

# Numbers of rows and image slots that a group may have; it is padded to one of them.
ROWS = (8, 24, 48, 96, 192)
SLOTS = (1, 2, 4, 8, 16)
MAX_BYTES = 2**32  # memory of a group's prompts while they are read, beside the model: 4 GiB


class Shape(NamedTuple):
    """Describes a group: tokens a row, rows, image slots, and the size of the images (None without images)."""

    length: int
    rows: int
    slots: int
    size: Size | None

    def __str__(self) -> str:
        images = f", {self.slots} images of {self.size.width} x {self.size.height}" if self.size else ""
        return f"{self.rows} prompts of up to {self.length} tokens{images}"


class Group(NamedTuple):
    """Holds the numbers of the questions of a group, in the order of its rows."""

    shape: Shape
    members: tuple[int, ...]


class Built(NamedTuple):
    """Holds a group as the model reads it, arrays without the group axis, and the digest of each image by its name."""

    batch: Batch
    digests: dict[str, str]


def rows_that_fit(length: int, llm: Decoder) -> int:
    """Returns the most rows of a group whose prompts are padded to a length: MAX_BYTES or the last of ROWS.

    Counted in float32 are the keys and values of all layers, the activations of one layer, whose scores are stored
    where no kernel keeps them on the chip, and the logits of the last token.
    """
    cached = 2 * llm.num_layers * llm.num_kv_heads * llm.size_of_head
    layer = 4 * llm.width + 3 * llm.mlp_dim + 2 * llm.num_heads * length
    return max(1, min(ROWS[-1], MAX_BYTES // (4 * (length * (cached + layer) + llm.vocab_size))))


def plan(questions: Sequence[Question], llm: Decoder, *, shards: int = 1, batch_size: int | None = None) -> list[Group]:
    """Divides the questions into groups, the longest prompts first.

    Args:
      llm: the model's decoder, whose memory limits the rows of a group.
      shards: number of groups that are answered at once.
      batch_size: most rows of a group; by default `rows_that_fit`.
    """
    buckets: dict[tuple[int, Size | None], list[int]] = {}
    for number, question in enumerate(questions):
        buckets.setdefault((padded(question.length), question.size), []).append(number)
    groups = []
    for (length, size), numbers in sorted(buckets.items(), key=lambda item: (-item[0][0], item[0][1] or ())):
        most = batch_size or rows_that_fit(length, llm)
        rows = min(fit(-(-len(numbers) // shards), ROWS), most)
        members = list(divided(questions, numbers, rows))
        used = max(map(len, members))
        slots = max(sum(_slots(questions[number] for number in group).values()) for group in members)
        shape = Shape(length, min(fit(used, ROWS), rows), fit(slots, SLOTS), size)
        groups += [Group(shape, tuple(group)) for group in members]
    return groups


def divided(questions: Sequence[Question], numbers: Iterable[int], most_rows: int) -> Iterator[list[int]]:
    """Yields consecutive numbers in groups of so many rows, and as many image slots as SLOTS has; one may have more."""
    group: list[int] = []
    slots: dict[str, int] = {}
    for number in numbers:
        more = slots | _slots([questions[number]])
        if group and (len(group) == most_rows or sum(more.values()) > max(SLOTS[-1], sum(slots.values()))):
            yield group
            group, more = [], _slots([questions[number]])
        group.append(number)
        slots = more
    if group:
        yield group


def _slots(questions: Iterable[Question]) -> dict[str, int]:
    """Returns the number of slots of each different image of the questions, by its name, in their order."""
    return {name: count for q in questions for name, count in zip(q.images, q.slots, strict=True)}


def fit(count: int, sizes: Sequence[int]) -> int:
    """Returns the smallest of `sizes` that holds `count`, or `count` itself if it is 0 or above all."""
    return next((size for size in sizes if size >= count), count) if count else 0


def build(
    group: Group, questions: Sequence[Question], asked: Sequence[int], processor: Processor, map_: Callable = map
) -> Built:
    """Builds a group in which the questions `asked` stand at their places; the first of them fills the other rows.

    Args:
      questions: all questions of the plan.
      asked: numbers of the members to ask, at least one.
      map_: `map`, or that of a pool of threads that decode images.

    Raises:
      ValueError: an image cannot be read; the message names its row.
    """
    length, rows, slots, size = group.shape
    first, used = {}, 0
    for name, count in _slots(questions[number] for number in group.members).items():
        first[name], used = used, used + count
    images = np.zeros((slots, size.height, size.width, 3) if size else (0, 0, 0, 3), np.uint8)
    needed: dict[str, tuple[int, Picture, Grid]] = {}
    for number in asked:
        question = questions[number]
        for name, picture, grid in zip(question.images, question.pictures, question.grids, strict=True):
            needed.setdefault(name, (number, picture, grid))
    contents = {name: _read(questions[number], picture) for name, (number, picture, _) in needed.items()}

    def draw(name: str) -> None:
        number, picture, grid = needed[name]
        try:
            views = processor.views(processor.decode(contents[name], picture.name), size, grid)
        except ValueError as error:
            raise _damaged(questions[number], error) from error
        images[first[name] : first[name] + len(views)] = views

    list(map_(draw, needed))
    tokens, segment_ids = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    positions, image_index = np.zeros((rows, length), np.int32), np.full((rows, length), -1, np.int32)
    for row in range(rows):
        number = group.members[row] if row < len(group.members) and group.members[row] in asked else asked[0]
        question = questions[number]
        ids, index = _tokens(question, processor, [first[name] for name in question.images])
        span = np.s_[row, : len(ids)]
        tokens[span], image_index[span], segment_ids[span], positions[span] = ids, index, 1, np.arange(len(ids))
    mask = np.arange(slots) < used
    zeros = np.zeros((rows, length), np.int32)
    batch = Batch(images, mask, tokens, image_index, zeros, zeros.astype(bool), segment_ids, positions)
    return Built(batch, _digests([questions[number] for number in asked], contents))


def _digests(asked: Sequence[Question], contents: dict[str, bytes]) -> dict[str, str]:
    """Returns the digest of each image of the rows by its name, also of images that the prompt does not name.

    Args:
      contents: encoded images, by the names in Question.images.
    """
    digests = {name: _digest(data) for name, data in contents.items()}
    for question in asked:
        digests |= {p.name: digests[name] for p, name in zip(question.pictures, question.images, strict=True)}
        for picture in question.row.pictures:
            if picture.name not in digests:
                digests[picture.name] = _digest(_read(question, picture))
    return digests


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _read(question: Question, picture: Picture) -> bytes:
    try:
        return picture.read()
    except ValueError as error:
        raise _damaged(question, error) from error


def _damaged(question: Question, error: ValueError) -> ValueError:
    return ValueError(f"row {question.row.id} cannot be asked: {error}")


def _tokens(question: Question, processor: Processor, first: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of a prompt, and which feature of its group stands at each; `first` are its images' slots."""
    tokens_per_image = question.size.tokens if question.size else None
    segment = processor.segment(question.turns, True, question.slots, tokens_per_image)
    if not first:
        return segment.tokens, segment.image_index
    slots = np.concatenate(
        [start + np.arange(slots_of(grid)) for start, grid in zip(first, question.grids, strict=True)]
    )
    own, feature = np.divmod(segment.image_index, question.size.tokens)
    return segment.tokens, np.where(segment.image_index < 0, -1, slots[own] * question.size.tokens + feature)
