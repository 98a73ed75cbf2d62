"""Builds the arrays of a batch of stage 0: reads records, draws captions and augmentations, decodes and tokenizes.

What is drawn of a record depends on (seed, number of the pass over its data set, its number over all data sets) alone:

    numbers of images.augment.uniform    0 caption   1 synthetic caption   2 augmentation   3-42 crop   43- changes

If a record has synthetic captions of several lists (DFNDR), number 1 chooses a list first and then a caption of it, as
DataCompDR's code does; with one list it chooses among all captions alike:

    lists of 2 and 3 captions            a0 a0 a0 a1 a1 a1 b0 b0 b1 b1 b2 b2          number 1 = 0 to 1
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastvlm_jax.batch import PairBatch
from fastvlm_jax.data.captions import captions_of, synthetic_captions_of, synthetic_lists_of
from fastvlm_jax.data.load.batch_builder import MAX_TRIES, Arrays, Substituted
from fastvlm_jax.data.load.buffer_pool import BufferPool
from fastvlm_jax.data.load.pair_record import augmentations_of, features_of
from fastvlm_jax.data.load.pair_schedule import PairPlace, PairSchedule
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sources import RecordSource
from fastvlm_jax.images.augment import Crop, Op, at_side, augment_into, read_params, sample_crop, sample_ops, uniform
from fastvlm_jax.images.decode import decode, views_into
from fastvlm_jax.pair_processor import PairProcessor

_CHOICES, _CROP = 3, 40  # random numbers for choices from lists, and for a crop


class _Pair(NamedTuple):
    """Holds what a pair has besides its pixels."""

    texts: list[str]
    teacher_image: np.ndarray | None
    teacher_texts: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class PairBuilder:
    """Builds the arrays of a process's groups of a global PairBatch; safe to call from several threads.

    Attributes:
      sources: data sets, in the order in which the schedule numbers them.
      schedule: plan of all batches; without a seed, the first caption of each record is taken.
      processor: tokenizer, image settings, and the teachers, whose features are read with augment="replay" alone.
      texts: texts of a pair: 1 = a caption, 2 = a synthetic one too.
      augment: "none", "random" or "replay"; see the config's data.augment.
      crop_area: smallest and largest fraction of an image's area in a random crop.
      operations: number of RandAugment's operations on a random crop, and their magnitude.
      exact: True resizes with Pillow, as torchvision and transformers do; False is the fast path.
      cache: (data set, record) -> decoded image, or its view without augmentation; None decodes each time.
      buffers: memory for the images of batches.
    """

    sources: tuple[RecordSource, ...]
    schedule: PairSchedule
    processor: PairProcessor
    texts: int = 1
    augment: str = "none"
    crop_area: tuple[float, float] = (0.08, 1.0)
    operations: tuple[int, int] = (2, 9)
    exact: bool = False
    cache: dict[tuple[int, int], np.ndarray] | None = None
    buffers: BufferPool = dataclasses.field(default_factory=BufferPool)

    batch_type = PairBatch  # what the arrays are the fields of

    @property
    def teachers(self) -> tuple[int, ...]:
        """Returns the widths of the features that batches hold: teachers saw no views but those that are replayed."""
        return self.processor.teachers if self.augment == "replay" else ()

    def check(self) -> None:
        """Raises ValueError if a data set begins with more records that cannot be used than a batch may replace.

        So a data set of another kind is told before a run begins; of others one record is read.
        """
        view = np.empty((self.processor.image_size, self.processor.image_size, 3), np.uint8)
        for number, source in enumerate(self.sources):
            if len(source):
                self._pair(PairPlace(number, 0, 0), view, [])

    def __call__(self, k: int, groups: Sequence[int]) -> tuple[Arrays, list[Substituted]]:
        """Returns the fields of PairBatch for `groups` of global batch k, and the records that had to be replaced.

        Raises:
          ValueError: neither a record nor any of the MAX_TRIES behind it can be used.
        """
        plan, length = self.schedule.batch(k), self.processor.context_length
        out, substituted = self._empty(len(groups)), []
        for i, g in enumerate(groups):
            texts = []
            for j, place in enumerate(self.schedule.group(plan, g)):
                pair = self._pair(place, out["images"][i, j], substituted)
                texts += pair.texts
                if self.teachers:
                    out["teacher_images"][i, j], out["teacher_texts"][i, j] = pair.teacher_image, pair.teacher_texts
            # All at once: decoding evicts the tokenizer's tables from the CPU caches.
            out["texts"][i] = self.processor.tokenizer(texts, length).reshape(-1, self.texts, length)
        return out, substituted

    def _empty(self, groups: int) -> Arrays:
        shape, side = (groups, self.schedule.pairs), self.processor.image_size
        out = {
            "images": self.buffers.empty((*shape, side, side, 3)),
            "texts": np.empty((*shape, self.texts, self.processor.context_length), np.int32),
        }
        if self.teachers:
            width = sum(self.teachers)
            out["teacher_images"] = np.empty((*shape, width), np.float32)
            out["teacher_texts"] = np.empty((*shape, self.texts, width), np.float32)
        return out

    def _pair(self, place: PairPlace, view: np.ndarray, substituted: list[Substituted]) -> _Pair:
        """Returns the pair of a record or, if that cannot be used, of the next usable one of its data set.

        Its pixels are written to `view`, uint8 [H, W, 3].
        """
        source, reason = self.sources[place.source], ""
        tries = min(len(source), MAX_TRIES + 1)
        for step in range(tries):
            number, key = (place.record + step) % len(source), ""
            try:
                record = source[number]
                key = record.key
                return self._make(record, place._replace(record=number), view)
            except ValueError as error:
                if not step:
                    reason, where = str(error), source.where(number)
                    substituted.append(Substituted(place.source, number, where, key, reason))
        raise ValueError(
            f"{where} cannot be used as a pair of an image and its caption: {reason}. Nor can the {tries - 1} records "
            "behind it: name another data set in data.path or data.mixture, or write this one again"
        )

    def _make(self, record: Record, place: PairPlace, view: np.ndarray) -> _Pair:
        """Returns a record's pair and writes its pixels to `view`; raises ValueError if it cannot be used."""
        captions, synthetic = captions_of(record), synthetic_captions_of(record)
        numbers = self._numbers(place)
        rows = [_choice(numbers[0], captions)]
        if self.texts == 2:
            if not synthetic:
                raise ValueError("no synthetic captions, which data.texts=2 asks for")
            rows.append(len(captions) + _choice_of_lists(numbers[1], synthetic_lists_of(record)))
        texts = [(captions + synthetic)[row] for row in rows]
        entries = augmentations_of(record) if self.augment == "replay" else []
        entry = _choice(numbers[2], entries)
        teacher_image = teacher_texts = None
        if self.teachers:
            counts = {"image": len(entries), "text": len(captions) + len(synthetic)}
            path = self.sources[place.source].features_file(place.record)
            found = features_of(record, {"image": [entry], "text": rows}, counts, self.teachers, path)
            (teacher_image,), teacher_texts = found["image"], found["text"]
        if self.augment == "none":
            self._show_whole(record.images[0], place, view)
        else:
            image = self._decoded(record.images[0], place)
            replay = self.augment == "replay"
            crop, changes = read_params(entries[entry]) if replay else self._sampled(numbers, image, view)
            changes = at_side(changes, len(view)) if replay else changes
            augment_into(image, view, crop, changes, self.exact)
        return _Pair(texts, teacher_image, teacher_texts)

    def _numbers(self, place: PairPlace) -> np.ndarray:
        """Returns the random numbers of a record on one visit; zeros, which choose the first of all, in evaluation."""
        count = _CHOICES + _CROP + 2 * self.operations[0]
        if self.schedule.seed is None:
            return np.zeros(count)
        number = self.schedule.number(place.source, place.record)
        return uniform(self.schedule.seed, place.visit, number, count)

    def _sampled(self, numbers: np.ndarray, image: np.ndarray, view: np.ndarray) -> tuple[Crop, tuple[Op, ...]]:
        crop = sample_crop(numbers[_CHOICES:][:_CROP], image.shape[:2], self.crop_area)
        return crop, sample_ops(numbers[_CHOICES + _CROP :], view.shape[:2], *self.operations)

    def _show_whole(self, data: bytes, place: PairPlace, view: np.ndarray) -> None:
        """Writes the view of an image without augmentation."""
        at = place.source, place.record
        if self.cache is not None and at in self.cache:
            view[:] = self.cache[at]
            return
        fit, background = self.processor.fit, self.processor.background
        views_into(data, view[None], (0, 0), fit, background, self.exact, self.processor.transparency)
        if self.cache is not None:
            self.cache[at] = view.copy()

    def _decoded(self, data: bytes, place: PairPlace) -> np.ndarray:
        """Returns an image at its full size, of which crops are told."""
        at = place.source, place.record
        if self.cache is not None and at in self.cache:
            return self.cache[at]
        image = decode(data, None, self.processor.transparency)
        if self.cache is not None:
            self.cache[at] = image
        return image


def _choice_of_lists(number: float, lengths: Sequence[int]) -> int:
    """Returns which item of lists, one behind the other, a random number chooses: first a list, then an item of it."""
    lengths = [length for length in lengths if length]
    place = number * len(lengths)
    chosen = int(place)
    return sum(lengths[:chosen]) + int((place - chosen) * lengths[chosen])


def _choice(number: float, items: Sequence) -> int:
    """Returns which of the items a random number in [0, 1) chooses."""
    return int(number * len(items))
