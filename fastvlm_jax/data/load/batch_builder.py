"""Builds the arrays of a batch: reads, tokenizes and decodes records, and puts them where the schedule planned."""

import bisect
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastvlm_jax.batch import Batch
from fastvlm_jax.data.index import FOLDER, talks_of
from fastvlm_jax.data.load.buffer_pool import BufferPool
from fastvlm_jax.data.load.packing import GroupShape
from fastvlm_jax.data.load.schedule import Place, Placement, Schedule
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sources import RecordSource
from fastvlm_jax.images.decode import size_of, views_into
from fastvlm_jax.images.sizes import Size, slots_of
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.conversation import Segment, shortened

MAX_TRIES = 100  # records that are tried in place of an unusable one
_TOGETHER = 16  # records that are read and tokenized before any of their images is decoded

Arrays = dict[str, np.ndarray]


class Substituted(NamedTuple):
    """Describes a record that could not be used, so that another one took its place.

    Attributes:
      source: number of its data set.
      record: number of the record in that data set.
      where: shard and record, for messages.
      key: key of the record, "" if it could not be read.
      reason: why it could not be used.
    """

    source: int
    record: int
    where: str
    key: str
    reason: str


@dataclasses.dataclass(frozen=True)
class BatchBuilder:
    """Builds the arrays of a process's groups of a global batch; safe to call from several threads.

    Attributes:
      sources: data sets, in the order in which the schedule numbers them.
      schedule: plan of all batches.
      processor: tokenizer, template and image settings.
      turns: "separate" (a segment for each question) or "conversation" (one for each record).
      overlong: "truncate" drops the oldest questions of a segment longer than a row, "reject" replaces the record.
      exact: True resizes with Pillow, which gives the pixels of transformers' image processor; False is the fast path.
      cache: (data set, record, size) -> decoded views, kept in memory; None decodes each time.
      buffers: memory for the images of batches.
    """

    sources: tuple[RecordSource, ...]
    schedule: Schedule
    processor: Processor
    turns: str
    overlong: str = "truncate"
    exact: bool = False
    cache: dict[tuple[int, int, Size], np.ndarray] | None = None
    buffers: BufferPool = dataclasses.field(default_factory=BufferPool)

    batch_type = Batch  # what the arrays are the fields of

    def __call__(self, k: int, groups: Sequence[int]) -> tuple[Arrays, list[Substituted]]:
        """Returns the fields of Batch for `groups` of global batch k, and the records that had to be replaced.

        Every position predicts the next token of its segment: targets[t] = tokens[t + 1], and loss_mask[t] is True if
        token t + 1 is supervised.
        """
        plan = self.schedule.batch(k)
        size, shape, _ = self.schedule.settings.buckets[plan.bucket]
        out, substituted = empty_arrays(len(groups), shape, size, self.buffers), []
        parts = [{name: array[i] for name, array in out.items()} for i in range(len(groups))]
        places = [
            (part, place) for part, g in zip(parts, groups, strict=True) for place in self.schedule.group(plan, g)
        ]
        # Texts first, then images: decoding evicts the tokenizer's tables from the CPU caches.
        for start in range(0, len(places), _TOGETHER):
            some = places[start : start + _TOGETHER]
            items = [self._prepare(at.source, at.record, at.slots, size, shape.length) for _, at in some]
            for (part, place), item in zip(some, items, strict=True):
                self._fill(part, place, item, size, substituted)
        out["images"][~out["image_mask"]] = 0
        return out, substituted

    def _fill(
        self, out: Arrays, place: Place, item: "_Prepared | _Unusable", size: Size, substituted: list[Substituted]
    ) -> None:
        """Writes a record, or its substitute, to the arrays of its group."""
        views, row_length = out["images"][place.slot : place.slot + place.slots], out["tokens"].shape[1]
        placements, decoded = place.placements, self._decode(place.source, place.record, item, views, size)
        if isinstance(decoded, _Unusable):
            where = self.sources[place.source].where(place.record)
            substituted.append(Substituted(place.source, place.record, where, *decoded))
            decoded, placements = self._substitute(place, views, size, row_length)
        else:
            self._check_lengths(decoded.segments, place, row_length)
        if decoded is None:
            return
        out["image_mask"][place.slot : place.slot + sum(decoded.slots)] = True
        for question, row, offset, _ in placements:
            number = int(out["segment_ids"][row].max()) + 1
            _put(out, decoded.segments[question], row, offset, number, place.slot * size.tokens, place.source)

    def _prepare(self, source: int, number: int, room: int, size: Size, row_length: int) -> "_Prepared | _Unusable":
        """Reads and tokenizes a record, which may take at most `room` image slots."""
        key = ""
        try:
            record = self.sources[source][number]
            key = record.key
            grids = [self._grid(image, size) for image in record.images]
            slots = tuple(map(slots_of, grids))
            if sum(slots) > room:
                raise ValueError(f"it takes {sum(slots)} image slots, there are {room}")
            return _Prepared(record, grids, slots, self.segments(record, slots, size, row_length))
        except ValueError as error:
            return _Unusable(key, str(error))

    def _decode(
        self, source: int, number: int, item: "_Prepared | _Unusable", views: np.ndarray, size: Size
    ) -> "_Prepared | _Unusable":
        """Decodes a record's images to `views`, uint8 [slots, H, W, 3]; returns `item`, or why it cannot be used."""
        if isinstance(item, _Unusable):
            return item
        kept = None if self.cache is None else self.cache.get((source, number, size))
        if kept is not None:
            views[: len(kept)] = kept
            return item
        at = 0
        for i, (image, grid) in enumerate(zip(item.record.images, item.grids, strict=True)):
            own = views[at : at + slots_of(grid)]
            mode, background = self.processor.overview(grid), self.processor.background
            try:
                views_into(image, own, grid, mode, background, self.exact, self.processor.transparency)
            except ValueError as error:
                return _Unusable(item.record.key, f"image {i}: {error}" if len(item.grids) > 1 else str(error))
            at += len(own)
        if self.cache is not None:
            self.cache[source, number, size] = views[:at].copy()
        return item

    def segments(self, record: Record, slots: tuple[int, ...], size: Size, row_length: int) -> list[Segment]:
        """Returns the segments of a record; with "truncate", one longer than a row loses its oldest questions.

        Raises:
          ValueError: the record cannot be used; the message says why.
        """
        found = []
        for talk in talks_of(record, self.turns):
            segment = self._segment(talk, slots, size)
            if len(segment.tokens) > row_length and self.overlong == "truncate":
                shorter = list(shortened(talk))
                # Bisection, as a conversation may have hundreds of questions.
                fits = bisect.bisect_left(
                    shorter, True, key=lambda talk: len(self._segment(talk, slots, size).tokens) <= row_length
                )
                segment = self._segment(shorter[min(fits, len(shorter) - 1)], slots, size)
            if len(segment.tokens) > row_length:
                raise ValueError(f"a text of {len(segment.tokens)} tokens, rows have {row_length}")
            if not segment.loss_mask[1:].any():
                raise ValueError("none of its tokens is supervised")
            found.append(segment)
        return found

    def _segment(self, talk, slots: tuple[int, ...], size: Size) -> Segment:
        return self.processor.segment(talk, False, slots if self.processor.grids else (), size.tokens)

    def _grid(self, image: bytes, size: Size) -> tuple[int, int]:
        return self.processor.grid(*size_of(image), size.side) if self.processor.grids else (0, 0)

    def _check_lengths(self, segments: list[Segment], place: Place, row_length: int) -> None:
        for question, _, _, length in place.placements:
            found = len(segments[question].tokens) if question < len(segments) else 0
            if not (found == length or found < length == row_length):
                folder = self.sources[place.source].folder
                raise ValueError(f"the index of {folder} does not match its records: delete {folder / FOLDER}")

    def _substitute(
        self, place: Place, views: np.ndarray, size: Size, row_length: int
    ) -> tuple["_Prepared | None", list[Placement]]:
        """Returns the next usable record of the data set, and placements for as many of its segments as fit.

        The place stays empty (None) if none of the next MAX_TRIES records fits.
        """
        total = len(self.sources[place.source])
        for step in range(1, min(total, MAX_TRIES) + 1):
            number = (place.record + step) % total
            item = self._prepare(place.source, number, place.slots, size, row_length)
            if isinstance(item, _Unusable):
                continue
            segments = item.segments
            free, chosen = sorted(place.placements, key=lambda at: at.length), []
            for question in sorted(range(len(segments)), key=lambda q: len(segments[q].tokens), reverse=True):
                fits = [at for at in free if at.length >= len(segments[question].tokens)]
                if fits:
                    free.remove(fits[0])
                    chosen.append(fits[0]._replace(question=question))
            if chosen and isinstance(self._decode(place.source, number, item, views, size), _Prepared):
                return item, chosen
        return None, []


class _Prepared(NamedTuple):
    """Holds a record that was read and tokenized; its images are still encoded."""

    record: Record
    grids: list[tuple[int, int]]
    slots: tuple[int, ...]
    segments: list[Segment]


class _Unusable(NamedTuple):
    """Describes why a record cannot be used; `key` is "" if it could not be read."""

    key: str
    reason: str


def empty_arrays(groups: int, shape: GroupShape, size: Size, buffers: BufferPool) -> Arrays:
    """Returns the fields of Batch for `groups` empty groups; the pixels are uninitialized."""
    text = (groups, shape.rows, shape.length)
    return {
        "images": buffers.empty((groups, shape.images, size.height, size.width, 3)),
        "image_mask": np.zeros((groups, shape.images), bool),
        "tokens": np.zeros(text, np.int32),
        "image_index": np.full(text, -1, np.int32),
        "targets": np.zeros(text, np.int32),
        "loss_mask": np.zeros(text, bool),
        "segment_ids": np.zeros(text, np.int32),
        "positions": np.zeros(text, np.int32),
        "source": np.full(text, -1, np.int32),
    }


def _put(out: Arrays, segment: Segment, row: int, offset: int, number: int, first_feature: int, source: int) -> None:
    """Writes one segment, the `number`-th of its row counted from 1, to the arrays of a group."""
    count = len(segment.tokens)
    span, before = np.s_[row, offset : offset + count], np.s_[row, offset : offset + count - 1]
    out["tokens"][span] = segment.tokens
    out["image_index"][span] = np.where(segment.image_index < 0, -1, segment.image_index + first_feature)
    out["targets"][before] = segment.tokens[1:]
    out["loss_mask"][before] = segment.loss_mask[1:]
    out["segment_ids"][span] = number
    out["positions"][span] = np.arange(count)
    out["source"][span] = source
