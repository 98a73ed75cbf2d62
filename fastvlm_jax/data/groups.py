"""Records to the arrays of one group: tokenize, decode, put each segment where the schedule planned it."""

import collections
import dataclasses

import numpy as np
from absl import logging

from fastvlm_jax.data.conversation import Segment, questions
from fastvlm_jax.data.processor import Processor
from fastvlm_jax.data.schedule import GroupPlan, GroupShape, Placement, RecordIndex
from fastvlm_jax.data.sources import Record, RecordSource

MAX_BAD = 100  # unreadable records one after another

Arrays = dict[str, np.ndarray]


def segments(record: Record, processor: Processor, turns: str) -> list[Segment]:
    """Returns the segments of a record: each question alone ("separate"), or all in one ("conversation")."""
    try:
        talks = questions(record.turns) if turns == "separate" else [record.turns]
        found = [processor.segment(talk) for talk in talks]
    except ValueError as error:
        raise ValueError(f"record {record.key}: {error}") from error
    if not all(segment.loss_mask[1:].any() for segment in found):
        raise ValueError(f"record {record.key} has no assistant turn: there is nothing to learn from it")
    return found


def index_records(source: RecordSource, processor: Processor, turns: str) -> RecordIndex:
    """Reads every record once and returns what the schedule needs; texts that recur are tokenized once."""
    keys, num_images, lengths, first = [], [], [], [0]
    for i in range(len(source)):
        record = source[i]
        keys.append(record.key)
        num_images.append(len(record.images))
        lengths += [len(segment.tokens) for segment in segments(record, processor, turns)]
        first.append(len(lengths))
    return RecordIndex(keys, np.array(num_images, int), np.array(lengths, int), np.array(first, int))


@dataclasses.dataclass(frozen=True)
class GroupBuilder:
    """Makes the arrays of a group from its plan; safe to call from several threads.

    Attributes:
      source, processor, shape, turns: where records come from and what becomes of them.
      cache: record number -> its decoded images, kept in memory; None to decode each time.
    """

    source: RecordSource
    processor: Processor
    shape: GroupShape
    turns: str
    cache: dict[int, list[np.ndarray]] | None = None

    def __call__(self, plan: GroupPlan) -> tuple[Arrays, int]:
        """Returns the fields of Batch without the group axis, and how many records had to be replaced.

        A token learns its successor: targets[t] = tokens[t + 1], and loss_mask[t] is that of t + 1, inside a segment.
        """
        (num_images, rows, length), size = self.shape, self.processor.image_size
        out = {
            "images": np.zeros((num_images, size, size, 3), np.uint8),
            "image_mask": np.zeros(num_images, bool),
            "tokens": np.zeros((rows, length), np.int32),
            "image_index": np.full((rows, length), -1, np.int32),
            "targets": np.zeros((rows, length), np.int32),
            "loss_mask": np.zeros((rows, length), bool),
            "segment_ids": np.zeros((rows, length), np.int32),
            "positions": np.zeros((rows, length), np.int32),
        }
        substituted = 0
        placements = collections.defaultdict(list)
        for placement in plan.placements:
            placements[placement.record].append(placement)
        segments_in_row = [0] * rows
        for number, slot in zip(plan.records, plan.slots, strict=True):
            places = placements[number]
            images, texts = self._read(number)
            if images is None:
                substituted += 1
                images, texts, places = self._substitute(number, places)
            for i, image in enumerate(images):
                out["images"][slot + i] = image
                out["image_mask"][slot + i] = True
            for place in places:
                segment = texts[place.question]
                count = len(segment.tokens)
                segments_in_row[place.row] += 1
                span = np.s_[place.row, place.offset : place.offset + count]
                before = np.s_[place.row, place.offset : place.offset + count - 1]
                out["tokens"][span] = segment.tokens
                out["image_index"][span] = np.where(
                    segment.image_index < 0, -1, segment.image_index + slot * self.processor.tokens_per_image
                )
                out["targets"][before] = segment.tokens[1:]
                out["loss_mask"][before] = segment.loss_mask[1:]
                out["segment_ids"][span] = segments_in_row[place.row]
                out["positions"][span] = np.arange(count)
        return out, substituted

    def _read(self, number: int) -> tuple[list[np.ndarray] | None, list[Segment]]:
        record = self.source[number]
        images = None if self.cache is None else self.cache.get(number)
        if images is None:
            try:
                images = [self.processor.pixels(image) for image in record.images]
            except ValueError as error:
                logging.warning("record %s is replaced by another: %s", record.key, error)
                return None, []
            if self.cache is not None:
                self.cache[number] = images
        return images, segments(record, self.processor, self.turns)

    def _substitute(self, number: int, places: list[Placement]):
        """Puts the next readable record of the source in the places of a bad one, as many of its segments as fit."""
        slots = len(self.source[number].images)
        for step in range(1, min(len(self.source), MAX_BAD) + 1):
            images, texts = self._read((number + step) % len(self.source))
            if images is None or len(images) > slots:
                continue
            free, chosen = sorted(places, key=lambda place: place.length), []
            for question in sorted(range(len(texts)), key=lambda q: len(texts[q].tokens), reverse=True):
                fits = [place for place in free if place.length >= len(texts[question].tokens)]
                if fits:
                    free.remove(fits[0])
                    chosen.append(fits[0]._replace(question=question))
            if chosen:
                return images, texts, chosen
        raise ValueError(f"no readable record after {self.source[number].key} fits its place: write the dataset again")
