"""Records to the arrays of a batch: tokenize, decode, put each segment where the schedule planned it."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastvlm_jax.data.buffers import Buffers
from fastvlm_jax.data.conversation import Segment, drop_oldest
from fastvlm_jax.data.geometry import Size, slots_of
from fastvlm_jax.data.image import size_of, views_into
from fastvlm_jax.data.index import FOLDER, talks_of
from fastvlm_jax.data.packing import GroupShape
from fastvlm_jax.data.processor import Processor
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.schedule import BatchPlan, Place, Placement, Schedule
from fastvlm_jax.data.sources import RecordSource

MAX_TRIES = 100  # records that are tried in the place of one that cannot be used

Arrays = dict[str, np.ndarray]


class Substituted(NamedTuple):
    """A record that could not be used: its data set, number, file, key, and why. Another one took its place."""

    source: int
    record: int
    where: str
    key: str
    reason: str


@dataclasses.dataclass(frozen=True)
class BatchBuilder:
    """Makes the arrays of a process's groups of a global batch; safe to call from several threads.

    Attributes:
      sources, schedule, processor: where records come from and what becomes of them.
      turns: "separate" or "conversation".
      overlong: "truncate" or "reject".
      exact: Pillow's pixels, those of transformers' image processor, instead of the fast path.
      cache: (data set, record, size) -> its views, kept in memory; None to decode each time.
      buffers: where the images of batches lie.
    """

    sources: tuple[RecordSource, ...]
    schedule: Schedule
    processor: Processor
    turns: str
    overlong: str = "truncate"
    exact: bool = False
    cache: dict[tuple[int, int, Size], np.ndarray] | None = None
    buffers: Buffers = dataclasses.field(default_factory=Buffers)

    def __call__(self, k: int, groups: Sequence[int]) -> tuple[Arrays, list[Substituted]]:
        """Returns the fields of Batch for these groups of global batch k, and the records that had to be replaced.

        A token learns its successor: targets[t] = tokens[t + 1], and loss_mask[t] is that of t + 1, inside a segment.
        """
        plan = self.schedule.batch(k)
        size, shape, _ = self.schedule.settings.buckets[plan.bucket]
        out, substituted = empty_arrays(len(groups), shape, size, self.buffers), []
        for i, g in enumerate(groups):
            self._fill_group({name: array[i] for name, array in out.items()}, plan, g, size, substituted)
        return out, substituted

    def _fill_group(self, out: Arrays, plan: BatchPlan, g: int, size: Size, substituted: list[Substituted]) -> None:
        segments_in_row = [0] * len(out["tokens"])
        for place in self.schedule.group(plan, g):
            views, row_length = out["images"][place.slot : place.slot + place.slots], out["tokens"].shape[1]
            try:
                slots, segments = self.load(place.source, place.record, views, size, row_length)
                placements = place.placements
                self._check_lengths(segments, place, row_length)
            except _UnusableError as error:
                where = self.sources[place.source].where(place.record)
                substituted.append(Substituted(place.source, place.record, where, error.key, str(error)))
                slots, segments, placements = self._substitute(place, views, size, row_length)
            out["image_mask"][place.slot : place.slot + slots] = True
            for question, row, offset, _ in placements:
                segments_in_row[row] += 1
                first_feature = place.slot * size.tokens
                _put(out, segments[question], row, offset, segments_in_row[row], first_feature, place.source)
        out["images"][~out["image_mask"]] = 0

    def load(
        self, source: int, number: int, views: np.ndarray, size: Size, row_length: int
    ) -> tuple[int, list[Segment]]:
        """Writes a record's images to `views`, uint8 [slots, H, W, 3], and returns the slots used and its segments.

        Raises:
          _UnusableError: it is damaged, has nothing to learn, or does not fit.
        """
        key = ""
        try:
            record = self.sources[source][number]
            key = record.key
            grids = [self._grid(image, size) for image in record.images]
            slots = tuple(map(slots_of, grids))
            if sum(slots) > len(views):
                raise ValueError(f"it takes {sum(slots)} image slots, there are {len(views)}")
            segments = self.segments(record, slots, size, row_length)
            self._draw(source, number, record, grids, views[: sum(slots)], size)
            return sum(slots), segments
        except ValueError as error:
            raise _UnusableError(key, str(error)) from error

    def segments(self, record: Record, slots: tuple[int, ...], size: Size, row_length: int) -> list[Segment]:
        """Returns the segments of a record; one that is longer than a row loses its oldest questions."""
        found = []
        for talk in talks_of(record, self.turns):
            segment = self._segment(talk, slots, size)
            while len(segment.tokens) > row_length:
                talk = drop_oldest(talk) if self.overlong == "truncate" else None
                if talk is None:
                    raise ValueError(f"a text of {len(segment.tokens)} tokens, rows have {row_length}")
                segment = self._segment(talk, slots, size)
            if not segment.loss_mask[1:].any():
                raise ValueError("no token of it is supervised")
            found.append(segment)
        return found

    def _segment(self, talk, slots: tuple[int, ...], size: Size) -> Segment:
        return self.processor.segment(talk, False, slots if self.processor.grids else (), size.tokens)

    def _grid(self, image: bytes, size: Size) -> tuple[int, int]:
        return self.processor.grid(*size_of(image), size.side) if self.processor.grids else (1, 1)

    def _draw(self, source: int, number: int, record: Record, grids, views: np.ndarray, size: Size) -> None:
        kept = None if self.cache is None else self.cache.get((source, number, size))
        if kept is not None:
            views[:] = kept
            return
        at = 0
        for i, (image, grid) in enumerate(zip(record.images, grids, strict=True)):
            own = views[at : at + slots_of(grid)]
            try:
                views_into(image, own, grid, self.processor.overview(grid), self.processor.background, self.exact)
            except ValueError as error:
                raise ValueError(f"image {i}: {error}" if len(grids) > 1 else str(error)) from error
            at += len(own)
        if self.cache is not None:
            self.cache[source, number, size] = views.copy()

    def _check_lengths(self, segments: list[Segment], place: Place, row_length: int) -> None:
        for question, _, _, length in place.placements:
            found = len(segments[question].tokens) if question < len(segments) else 0
            if not (found == length or found < length == row_length):
                folder = self.sources[place.source].folder
                raise ValueError(f"the index of {folder} does not fit its records: delete {folder / FOLDER}")

    def _substitute(
        self, place: Place, views: np.ndarray, size: Size, row_length: int
    ) -> tuple[int, list[Segment], list[Placement]]:
        """Puts the next usable record of the data set in the places of a bad one, as many of its segments as fit."""
        total = len(self.sources[place.source])
        for step in range(1, min(total, MAX_TRIES) + 1):
            try:
                number = (place.record + step) % total
                slots, segments = self.load(place.source, number, views, size, row_length)
            except _UnusableError:
                continue
            free, chosen = sorted(place.placements, key=lambda at: at.length), []
            for question in sorted(range(len(segments)), key=lambda q: len(segments[q].tokens), reverse=True):
                fits = [at for at in free if at.length >= len(segments[question].tokens)]
                if fits:
                    free.remove(fits[0])
                    chosen.append(fits[0]._replace(question=question))
            if chosen:
                return slots, segments, chosen
        where = self.sources[place.source].where(place.record)
        raise ValueError(f"no usable record after {where} fits its place: write the data set again")


class _UnusableError(ValueError):
    """A record that cannot be used, with its key where that could be read."""

    def __init__(self, key: str, reason: str):
        super().__init__(reason)
        self.key = key


def empty_arrays(groups: int, shape: GroupShape, size: Size, buffers: Buffers) -> Arrays:
    """Returns the fields of Batch for `groups` empty groups; images are not written yet."""
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
    """Writes one segment, the `number`-th of its row, to the arrays of a group."""
    count = len(segment.tokens)
    span, before = np.s_[row, offset : offset + count], np.s_[row, offset : offset + count - 1]
    out["tokens"][span] = segment.tokens
    out["image_index"][span] = np.where(segment.image_index < 0, -1, segment.image_index + first_feature)
    out["targets"][before] = segment.tokens[1:]
    out["loss_mask"][before] = segment.loss_mask[1:]
    out["segment_ids"][span] = number
    out["positions"][span] = np.arange(count)
    out["source"][span] = source
