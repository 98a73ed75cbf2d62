"""Image slots and tokens of records at the sizes of a run, and which records cannot be used."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fastvlm_jax.data.index import RecordIndex
from fastvlm_jax.data.load.packing import GroupShape, Lengths, fits_alone
from fastvlm_jax.images.sizes import Grid, Size, best_grid, slots_of

OVERLONG = ("truncate", "reject")


class Bucket(NamedTuple):
    """The batches of one size of images: `share` of the draws of image records go to its resolution."""

    size: Size
    shape: GroupShape
    share: float


def make_buckets(
    sizes: Sequence[Size], image_size: int, shape: GroupShape, shares: Mapping[int, float]
) -> tuple[Bucket, ...]:
    """Returns the bucket of each size: `shape.images` slots of the square of image_size, more of smaller images.

    Pixels and text tokens of a group stay within those of the square of `image_size`.

    Args:
      shape: of a group whose images are squares of `image_size`.
      shares: side of a resolution -> fraction of image records drawn at it.
    """
    buckets = []
    for size in sizes:
        images = max(shape.images * image_size**2 // (size.height * size.width), 1) if shape.images else 0
        buckets.append(Bucket(size, shape._replace(images=images), shares[size.side]))
    return tuple(buckets)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the schedule follows, beside the indexes.

    Attributes:
      buckets: of all resolutions; those of one resolution (size.side) stand together and have the same share.
      groups: G, groups of a global batch.
      seed: of the order; None (evaluation) takes each record once, in the order of the source.
      weights: share of each data set in the draws, any positive scale; () = each record once an epoch.
      grids: AnyRes grids of tiles; () = one slot an image.
      overlong: "truncate" drops the oldest questions of a segment that is longer than a row, "reject" the record.
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
    """Of all M records of all data sets, with S segments: what lengths and slots are computed from.

    Attributes:
      buckets: see Settings.
      first: int64 [M + 1]; the segments of record i are those from first[i] to first[i + 1].
      text, shortest: int32 [S], tokens of text of a segment, and of its newest question and answer alone.
      slots: side -> int [M], image slots of a record. image_slots: side -> int [S], slots that a segment names.
      aspect: float32 [M], width / height (geometric mean of the images), 0 without images.
    """

    buckets: tuple[Bucket, ...]
    first: np.ndarray
    text: np.ndarray
    shortest: np.ndarray
    slots: dict[int, np.ndarray]
    image_slots: dict[int, np.ndarray]
    aspect: np.ndarray

    def slots_in(self, bucket: int) -> np.ndarray:
        """Returns the image slots of every record at the size of a bucket, int [M]."""
        return self.slots[self.buckets[bucket].size.side]

    def segments(self, records: np.ndarray, bucket: int) -> tuple[Lengths, np.ndarray]:
        """Returns the segments of some records at the size of a bucket, longest first, and which question each is."""
        first, owner, question, tokens = self._unsorted_segments(records, bucket)
        counts = np.diff(first)
        np.minimum(tokens, self.buckets[bucket].shape.length, out=tokens)  # what is longer loses its oldest questions
        if counts.max(initial=0) > 1:
            order = np.lexsort((-tokens, owner))
            tokens, question = tokens[order], question[order]
        return Lengths(first, tokens), question

    def overlong(self, records: np.ndarray, bucket: int) -> int:
        """Returns how many segments of some records are longer than a row of a bucket."""
        return int((self._unsorted_segments(records, bucket)[-1] > self.buckets[bucket].shape.length).sum())

    def _unsorted_segments(self, records: np.ndarray, bucket: int) -> tuple[np.ndarray, ...]:
        """The segments of records: where those of each begin, whose each is, which question, and its tokens."""
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
    """Joins the indexes of the data sets at the sizes of the settings."""

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
        # The image that the j-th name of a segment means, over all records.
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
    """Returns the records that do not fit an empty group of every bucket, and why."""
    unusable: dict[int, str] = {}
    for side in records.slots:  # a smaller one may give an image more tiles
        numbers = [b for b, bucket in enumerate(records.buckets) if bucket.size.side == side]
        # What fits the group of the fewest images, and of the most tokens for each, fits all of this resolution.
        hardest = min(numbers, key=lambda b: (records.buckets[b].shape.images, -records.buckets[b].size.tokens))
        unusable = _misfits(records, hardest, overlong) | unusable
    return unusable


def _misfits(records: RecordLengths, bucket: int, overlong: str) -> dict[int, str]:
    """The records that do not fit an empty group of one bucket, and why."""
    unusable = {}
    size, shape, _ = records.buckets[bucket]
    slots = records.slots_in(bucket)
    for record in np.flatnonzero(slots > shape.images).tolist():
        unusable[record] = (
            f"it takes {slots[record]} image slots, groups have {shape.images}: raise data.images_per_group"
        )
    segments = records.shortest if overlong == "truncate" else records.text
    what = "a question and answer" if overlong == "truncate" else "a text"
    lengths = segments + records.image_slots[size.side] * size.tokens
    for segment in np.flatnonzero(lengths > shape.length).tolist():
        record = int(np.searchsorted(records.first, segment, side="right")) - 1
        unusable.setdefault(
            record, f"{what} of {lengths[segment]} tokens, rows have {shape.length}: raise data.row_length"
        )
    del lengths
    fits = fits_alone(slots, records.segments(np.arange(len(slots)), bucket)[0], shape)
    for record in np.flatnonzero(~fits).tolist():
        unusable.setdefault(
            record, f"its texts do not fit {shape.rows} rows of {shape.length} tokens: raise data.rows_per_group"
        )
    return unusable


def _sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The sum of each run of `counts[i]` values."""
    sums = np.concatenate([[0], np.cumsum(values, dtype=np.float64 if values.dtype.kind == "f" else np.int64)])
    ends = np.cumsum(counts, dtype=np.int64)
    return (sums[ends] - sums[ends - counts]).astype(values.dtype)
