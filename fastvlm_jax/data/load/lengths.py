"""Computes the image slots and tokens of records at the image sizes of a run, and finds the records that do not fit."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fastvlm_jax.data.index import RecordIndex
from fastvlm_jax.data.load.packing import GroupShape, Lengths, fits_alone
from fastvlm_jax.images.sizes import Grid, Size, best_grid, slots_of

OVERLONG = ("truncate", "reject")


class Bucket(NamedTuple):
    """Describes the batches of one image size.

    Attributes:
      size: size of the images.
      shape: shape of a group.
      share: fraction of image records drawn at this resolution.
    """

    size: Size
    shape: GroupShape
    share: float


def make_buckets(
    sizes: Sequence[Size], image_size: int, shape: GroupShape, shares: Mapping[int, float]
) -> tuple[Bucket, ...]:
    """Returns the bucket of each size: `shape.images` slots for squares of `image_size`, more for smaller images.

    A group of any size has the same rows of text, and no more pixels than `shape.images` squares of `image_size`; but
    it keeps one slot, unless `shape.images` is 0.

    Args:
      sizes: image sizes of the run.
      image_size: the model's own resolution, pixels.
      shape: shape of a group whose images are squares of `image_size`.
      shares: side of a resolution, pixels -> fraction of image records drawn at it.
    """
    buckets = []
    for size in sizes:
        images = max(shape.images * image_size**2 // (size.height * size.width), 1) if shape.images else 0
        buckets.append(Bucket(size, shape._replace(images=images), shares[size.side]))
    return tuple(buckets)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Holds the settings of a schedule, which with the indexes determine every batch.

    Attributes:
      buckets: buckets of all resolutions; those of one resolution (size.side) are adjacent and have the same share.
      groups: G, groups in a global batch.
      seed: seed of the order; None (evaluation) takes each record once, in the order of the source.
      weights: fraction of the records drawn from each data set, on any positive scale; () = each record once an epoch.
      grids: AnyRes grids, (rows, columns) of tiles; () = one slot per image.
      overlong: "truncate" drops the oldest questions of a segment longer than a row, "reject" replaces the record.
    """

    buckets: tuple[Bucket, ...]
    groups: int
    seed: int | None
    weights: tuple[float, ...] = ()
    grids: tuple[Grid, ...] = ()
    overlong: str = "truncate"

    def __post_init__(self):
        if self.overlong not in OVERLONG:
            raise ValueError(f"unknown data.overlong {self.overlong!r}: choose one of {', '.join(OVERLONG)}")


@dataclasses.dataclass(frozen=True)
class RecordLengths:
    """Holds the text tokens and image slots of all M records of all data sets, with S segments.

    Attributes:
      buckets: see Settings.
      first: int64 [M + 1]; record i has the segments first[i] to first[i + 1] - 1.
      text: int32 [S], text tokens of each segment.
      shortest: int32 [S], text tokens of its newest question and answer alone.
      slots: side of a resolution -> int [M], image slots that each record takes.
      image_slots: side of a resolution -> int [S], image slots that each segment names, repeats included.
      aspect: float32 [M], width / height (geometric mean over the record's images); 0 for records without images, and
        for all if there is only one size.
    """

    buckets: tuple[Bucket, ...]
    first: np.ndarray
    text: np.ndarray
    shortest: np.ndarray
    slots: dict[int, np.ndarray]
    image_slots: dict[int, np.ndarray]
    aspect: np.ndarray

    def slots_in(self, bucket: int) -> np.ndarray:
        """Returns the image slots that every record takes at the size of a bucket, int [M]."""
        return self.slots[self.buckets[bucket].size.side]

    def segments(self, records: np.ndarray, bucket: int) -> tuple[Lengths, np.ndarray]:
        """Returns the segments of `records` in a bucket, longest first, and the number of each in its record."""
        first, owner, question, tokens = self._unsorted_segments(records, bucket)
        counts = np.diff(first)
        np.minimum(tokens, self.buckets[bucket].shape.length, out=tokens)  # longer ones are truncated
        if counts.max(initial=0) > 1:
            order = np.lexsort((-tokens, owner))
            tokens, question = tokens[order], question[order]
        return Lengths(first, tokens), question

    def overlong(self, records: np.ndarray, bucket: int) -> int:
        """Returns the number of segments of `records` that are longer than a row of a bucket."""
        return int((self._unsorted_segments(records, bucket)[-1] > self.buckets[bucket].shape.length).sum())

    def _unsorted_segments(self, records: np.ndarray, bucket: int) -> tuple[np.ndarray, ...]:
        """Returns the first segment of each record, and each segment's record, number there, and length in tokens."""
        size = self.buckets[bucket].size
        at = self.first[records]
        counts = self.first[records + 1] - at
        first, owner = np.concatenate([[0], np.cumsum(counts)]), np.arange(len(records))
        question = np.zeros(len(records), np.int32)
        if len(counts) and not counts.min() == counts.max() == 1:
            owner = np.repeat(owner, counts)
            question = np.arange(first[-1]) - first[owner]
            at = at[owner] + question
        return first, owner, question, (self.text[at] + self.image_slots[size.side][at] * size.tokens).astype(np.int32)


def make_record_lengths(indexes: Sequence[RecordIndex], settings: Settings) -> RecordLengths:
    """Returns the lengths of all records of the indexes at the image sizes of `settings`."""

    def join(name: str, dtype) -> np.ndarray:
        return np.concatenate([getattr(index, name) for index in indexes]).astype(dtype)

    first = np.concatenate([[0], np.cumsum(join("num_segments", np.int64))])
    num_images, num_refs = join("num_images", np.int32), join("num_refs", np.int32)
    width, height = np.maximum(join("width", np.int32), 1), np.maximum(join("height", np.int32), 1)
    slots, image_slots = {}, {}
    for side in dict.fromkeys(bucket.size.side for bucket in settings.buckets):
        if not settings.grids:
            slots[side], image_slots[side] = num_images, num_refs
            continue
        taken = np.array([slots_of(grid) for grid in settings.grids], np.int32)
        taken = taken[best_grid(width, height, settings.grids, side)]
        slots[side] = _sums(taken, num_images)
        # References count the images of one record: renumber them over all records.
        image_first = np.cumsum(num_images, dtype=np.int64) - num_images
        owner = np.repeat(np.repeat(np.arange(len(num_images)), np.diff(first)), num_refs)
        image_slots[side] = _sums(taken[image_first[owner] + join("refs", np.int64)], num_refs)
    aspect = np.zeros(len(num_images), np.float32)
    if len({bucket.size[1:3] for bucket in settings.buckets}) > 1:
        logs = _sums(np.log(width / height).astype(np.float32), num_images)
        aspect = np.where(num_images > 0, np.exp(logs / np.maximum(num_images, 1)), 0).astype(np.float32)
    text, shortest = join("text", np.int32), join("shortest", np.int32)
    return RecordLengths(settings.buckets, first, text, shortest, slots, image_slots, aspect)


def find_unusable(records: RecordLengths, overlong: str) -> dict[int, str]:
    """Returns the records that do not fit an empty group of every bucket: record number -> reason."""
    unusable: dict[int, str] = {}
    for side in records.slots:  # all of them, as an image may take more tiles at a smaller side
        numbers = [b for b, bucket in enumerate(records.buckets) if bucket.size.side == side]
        # The fewest images per group, and then the most tokens per image: what fits this bucket fits all of its side.
        hardest = min(numbers, key=lambda b: (records.buckets[b].shape.images, -records.buckets[b].size.tokens))
        unusable = _misfits(records, hardest, overlong) | unusable
    return unusable


def _misfits(records: RecordLengths, bucket: int, overlong: str) -> dict[int, str]:
    """Returns the records that do not fit an empty group of one bucket: record number -> reason."""
    unusable = {}
    size, shape, _ = records.buckets[bucket]
    slots = records.slots_in(bucket)
    for record in np.flatnonzero(slots > shape.images).tolist():
        unusable[record] = (
            f"it takes {slots[record]} image slots, groups have {shape.images}: raise data.images_per_group"
        )
    segments = records.shortest if overlong == "truncate" else records.text
    unit = "a question and answer" if overlong == "truncate" else "a text"
    lengths = segments + records.image_slots[size.side] * size.tokens
    for segment in np.flatnonzero(lengths > shape.length).tolist():
        record = int(np.searchsorted(records.first, segment, side="right")) - 1
        unusable.setdefault(
            record, f"{unit} of {lengths[segment]} tokens, rows have {shape.length}: raise data.row_length"
        )
    del lengths
    fits = fits_alone(slots, records.segments(np.arange(len(slots)), bucket)[0], shape)
    for record in np.flatnonzero(~fits).tolist():
        unusable.setdefault(
            record, f"its texts do not fit {shape.rows} rows of {shape.length} tokens: raise data.rows_per_group"
        )
    return unusable


def _sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns the sum of each run of `counts[i]` values."""
    sums = np.concatenate([[0], np.cumsum(values, dtype=np.float64 if values.dtype.kind == "f" else np.int64)])
    ends = np.cumsum(counts, dtype=np.int64)
    return (sums[ends] - sums[ends - counts]).astype(values.dtype)
