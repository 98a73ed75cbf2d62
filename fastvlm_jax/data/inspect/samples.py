"""Takes samples as the model sees them: pixels and tokens from the arrays of the first batches.

Each token is spelled out, with its kind and whether it is supervised (`learnt`):

    tokens           S    user  \\n    I I I I I I I I I   what   shape  E ...  red       E
    pieces           S    user  ⏎    image x 9, slot 0    what   shape  E      red       E
    kind             special text    image                text          special          special
    learnt                                                                     x         x
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fastvlm_jax.data.load.batch_builder import Arrays, BatchBuilder, Substituted
from fastvlm_jax.data.load.schedule import BatchPlan, Place
from fastvlm_jax.images.header import read_header
from fastvlm_jax.images.sizes import Size, slots_of
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.bpe import END, IMAGE, PAD, START
from fastvlm_jax.text.tokenizer import Tokenizer

_BATCHES = 4  # batches that the samples are spread over, to show several buckets
_ONE_CHARACTER = 4  # most bytes, and so tokens, of a character


class Piece(NamedTuple):
    """Holds tokens that are shown together: one, those of one character, or all of an image in one slot.

    Attributes:
      text: text of the tokens, "" for an image.
      kind: "text", "special" or "image".
      learnt: True if the tokens are supervised: they count in the loss.
      tokens: ids of the tokens; for an image, one of them.
      count: number of tokens of an image.
      slot: image slot in the group, -1 for text.
    """

    text: str
    kind: str
    learnt: bool
    tokens: tuple[int, ...]
    count: int = 1
    slot: int = -1


class Text(NamedTuple):
    """Holds a segment as it is shown.

    Attributes:
      row: row of the group.
      start, stop: positions [start, stop) in the row.
      cut: True if its oldest questions were dropped.
      pieces: tokens of the segment.
    """

    row: int
    start: int
    stop: int
    cut: bool
    pieces: list[Piece]


class View(NamedTuple):
    """Holds an image as it is shown.

    Attributes:
      original: size and format of the image file, "" if unknown.
      slot: first image slot in the group.
      columns: columns of tiles.
      pixels: uint8 [slots, H, W, 3], the overview first, then the tiles.
    """

    original: str
    slot: int
    columns: int
    pixels: np.ndarray


class Sample(NamedTuple):
    """Holds one record in a batch, read from the arrays.

    Attributes:
      source: number of the data set.
      record: number of the record in the data set.
      key: key of the record.
      where: shard and record, for messages.
      batch: number of the global batch.
      group: number of the group in the batch.
      size: image size of the batch.
      views: images of the record.
      texts: segments of the record.
      replaced: why another record takes its place, "" if none does; views and texts are then the other record's.
    """

    source: int
    record: int
    key: str
    where: str
    batch: int
    group: int
    size: Size
    views: list[View]
    texts: list[Text]
    replaced: str


def take_samples(build: BatchBuilder, count: int) -> Iterator[Sample]:
    """Yields up to `count` samples: the first records of each of the first batches."""
    schedule, left = build.schedule, count
    for k in range(schedule.batches_per_epoch):
        share = min(-(-count // _BATCHES), left)
        plan = schedule.batch(k)
        for g in range(schedule.groups):
            places = schedule.group(plan, g)[:share]
            if places:
                arrays, replaced = build(k, [g])
                arrays = {name: array[0] for name, array in arrays.items()}
                for place in places:
                    yield sample_of(build, k, g, plan, place, arrays, replaced)
            share, left = share - len(places), left - len(places)
            if not share:
                break
        if not left:
            return


def sample_of(
    build: BatchBuilder, k: int, g: int, plan: BatchPlan, place: Place, arrays: Arrays, replaced: Sequence[Substituted]
) -> Sample:
    """Returns the record at a place of group g of batch k as a sample.

    Args:
      plan: plan of the batch.
      arrays: fields of the group, as the builder returns them, without the axis of groups.
      replaced: records of the group that had to be replaced.
    """
    size, shape, _ = build.schedule.settings.buckets[plan.bucket]
    reasons = [item for item in replaced if (item.source, item.record) == (place.source, place.record)]
    if reasons:  # the substitute is not named, but the arrays hold its pixels and tokens
        key, originals = reasons[0].key, []
    else:
        record = build.sources[place.source][place.record]
        key, originals = record.key, list(record.images)
    texts = []
    for _, row, offset, length in sorted(place.placements, key=lambda at: at.question):
        number = arrays["segment_ids"][row, offset]
        if number:  # 0 where the substitute has fewer texts
            stop = offset + int((arrays["segment_ids"][row] == number).sum())
            pieces = _pieces(arrays, row, offset, stop, size, build.processor.tokenizer)
            cut = not reasons and stop - offset < length == shape.length
            texts.append(Text(row, offset, stop, cut, pieces))
    slots = slice(place.slot, place.slot + place.slots)
    pixels = arrays["images"][slots][arrays["image_mask"][slots]]
    return Sample(
        place.source, place.record, key, build.sources[place.source].where(place.record), k, g, size,
        _views(build.processor, originals, pixels, place.slot, size), texts, reasons[0].reason if reasons else "",
    )  # fmt: skip


def _views(processor: Processor, originals: Sequence[bytes], pixels: np.ndarray, slot: int, size: Size) -> list[View]:
    """Returns the views of each image; without the originals, each slot as an image of its own."""
    if not originals:
        return [View("", slot + i, 1, pixels[i : i + 1]) for i in range(len(pixels))]
    views, at = [], 0
    for image in originals:
        header = read_header(image)
        height, width = header.upright
        grid = processor.grid(width, height, size.side)
        original = f"{width} x {height} {header.kind}, {max(len(image) // 1000, 1):,} kB"
        own = pixels[at : at + slots_of(grid)]
        views.append(View(original, slot + at, max(grid[1], 1), own))
        at += len(own)
    return views


def _pieces(arrays: Arrays, row: int, start: int, stop: int, size: Size, tokenizer: Tokenizer) -> list[Piece]:
    """Splits a segment into pieces. The loss mask at a position is about the token after it."""
    tokens, index = (arrays[name][row, start:stop] for name in ("tokens", "image_index"))
    supervised = np.concatenate([[False], arrays["loss_mask"][row, start : stop - 1]])
    special = special_tokens(tokenizer)
    slots = np.where(index < 0, -1, index // size.tokens)
    kinds = np.where(index >= 0, 2, np.isin(tokens, list(special)))
    edges = np.flatnonzero((np.diff(kinds) != 0) | (np.diff(slots) != 0) | (np.diff(supervised) != 0)) + 1
    pieces = []
    for run in np.split(np.arange(len(tokens)), edges):
        ids, learnt = tokens[run].tolist(), bool(supervised[run[0]])
        if kinds[run[0]] == 2:
            pieces.append(Piece("", "image", learnt, (ids[0],), len(ids), int(slots[run[0]])))
        elif kinds[run[0]] == 1:
            pieces += [Piece(special[token], "special", learnt, (token,)) for token in ids]
        else:
            pieces += [Piece(text, "text", learnt, own) for text, own in spell(ids, tokenizer)]
    return pieces


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Returns the special tokens that templates place: id -> name."""
    found = {} if tokenizer.bos is None else {tokenizer.bos: "<s>"}
    for name in (PAD, START, END, IMAGE, "<s>", "</s>", tokenizer.pad, tokenizer.image, tokenizer.end):
        try:
            found[tokenizer.special_id(name)] = name
        except ValueError:  # the tokenizer has no token of this name
            continue
    return found


def spell(tokens: Sequence[int], tokenizer: Tokenizer) -> list[tuple[str, tuple[int, ...]]]:
    """Returns the text of each token with its id; tokens that hold parts of one character stay together.

    Each token is decoded behind the one before it, since a token alone may give another text: SentencePiece drops a
    leading space.
    """
    pieces, before, start = [], (), 0
    for stop in range(1, len(tokens) + 1):
        own = tuple(tokens[start:stop])
        text = tokenizer.decode(before + own)[len(tokenizer.decode(before)) :]
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(own) < _ONE_CHARACTER and stop < len(tokens):
            continue
        pieces.append((text, own))
        before, start = own, stop
    return pieces
