"""Measures how the schedule of a run uses its data sets: lengths, fill, unusable records, and other settings."""

import dataclasses
import itertools
import json
import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from fastvlm_jax.data.index import RecordIndex
from fastvlm_jax.data.inspect.contents import Counts, histogram, some
from fastvlm_jax.data.load.batch_builder import BatchBuilder
from fastvlm_jax.data.load.lengths import RecordLengths, make_buckets, make_record_lengths
from fastvlm_jax.data.load.loader import set_names
from fastvlm_jax.data.load.packing import GroupShape
from fastvlm_jax.data.load.schedule import Schedule
from fastvlm_jax.data.rejected import Reasons, most_frequent
from fastvlm_jax.data.sources import RecordSource

LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384)  # tokens
QUANTILES = (0, 10, 50, 90, 99, 100)  # %
IMAGES = (1, 2, 3, 4, 6, 8)  # values of data.images_per_group to compare
ROWS = (0.5, 1.0, 2.0)  # values of data.row_length to compare, as multiples of the present one
_BATCHES = 2000  # most batches that are counted
_COMPARED = 512  # records that other settings are tried with; packing takes up to 1 ms each


@dataclasses.dataclass(frozen=True)
class BucketUse:
    """Describes the batches of one image size in an epoch.

    Attributes:
      height, width: image size, pixels.
      tokens_per_image: image tokens of one slot.
      images_per_group: image slots of a group.
      batches: number of batches in the epoch, estimated from those counted.
      records_per_batch: mean number of records in a batch.
      token_fill: fraction of the token slots used.
      image_fill: fraction of the image slots used.
    """

    height: int
    width: int
    tokens_per_image: int
    images_per_group: int
    batches: float
    records_per_batch: float
    token_fill: float
    image_fill: float


@dataclasses.dataclass(frozen=True)
class SetUse:
    """Describes one data set's part in an epoch.

    Attributes:
      name: short name of the data set.
      records: number of its records.
      unusable: number of its records that cannot be used.
      drawn: number of records drawn from it in the epoch.
      passes: passes over the data set in the epoch.
      token_share: its fraction of the tokens drawn.
      image_share: its fraction of the image slots drawn.
    """

    name: str
    records: int
    unusable: int
    drawn: int
    passes: float
    token_share: float
    image_share: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """Describes the result of other settings.

    Attributes:
      images_per_group, row_length: the settings.
      token_fill: fraction of the token slots used.
      image_fill: fraction of the image slots used.
      records_per_group: mean number of records in a group.
      lost: fraction of records that would be unusable.
    """

    images_per_group: int
    row_length: int
    token_fill: float
    image_fill: float
    records_per_group: float
    lost: float


@dataclasses.dataclass(frozen=True)
class Usage:
    """Describes how the schedule of a run uses its data sets.

    Attributes:
      image_size, row_length, images_per_group: values of the config.
      segments: number of texts that are packed: conversations, or single questions.
      lengths: number of segments by tokens, including the tokens of their images at image_size.
      quantiles: quantiles of these lengths, such as {"50 %": tokens}.
      overlong: number of segments longer than a row.
      truncated: number of overlong segments that fit without their oldest questions.
      unusable: number of records that do not fit a group or cannot be used for training.
      reasons: most frequent reasons for that.
      batches_per_epoch: global batches in epoch 0.
      groups: groups in a global batch.
      records_per_epoch: records drawn in epoch 0.
      token_fill: fraction of the token slots used.
      image_fill: fraction of the image slots used.
      counted: number of batches that `buckets` was counted from.
      buckets: use of each image size.
      sets: use of each data set.
      compared: number of records that `choices` were tried with.
      choices: results of other settings.
    """

    image_size: int
    row_length: int
    images_per_group: int
    segments: int
    lengths: Counts
    quantiles: dict[str, int]
    overlong: int
    truncated: int
    unusable: int
    reasons: Reasons
    batches_per_epoch: int
    groups: int
    records_per_epoch: int
    token_fill: float
    image_fill: float
    counted: int
    buckets: tuple[BucketUse, ...]
    sets: tuple[SetUse, ...]
    compared: int
    choices: tuple[Choice, ...]


def measure(build: BatchBuilder, indexes: Sequence[RecordIndex], images_per_group: int) -> Usage:
    """Returns how the schedule of a run uses its data sets.

    Args:
      build: builder of the run's batches.
      indexes: index of each data set, the same that the schedule was made from.
      images_per_group: image slots of a group whose images are squares of the processor's image_size.
    """
    schedule, sources, image_size = build.schedule, build.sources, build.processor.image_size
    settings = schedule.settings
    records = make_record_lengths(indexes, settings)
    sizes = [bucket.size for bucket in settings.buckets]
    size = max(sizes, key=lambda size: (size.side == image_size, size.tokens))
    image_tokens = records.image_slots[size.side].astype(np.int64) * size.tokens
    shape = settings.buckets[0].shape._replace(images=images_per_group)
    lengths, row_length = records.text + image_tokens, shape.length
    overlong = lengths > row_length
    truncated = overlong & (records.shortest + image_tokens <= row_length) & (settings.overlong == "truncate")
    buckets, counted = _buckets(schedule)
    draws, sampled = schedule.draws(0), _sampled(indexes)
    return Usage(
        image_size=image_size,
        row_length=row_length,
        images_per_group=images_per_group,
        segments=len(lengths),
        lengths=histogram(lengths, sorted({*LENGTHS, row_length + 1} - {row_length})),
        quantiles={f"{q} %": int(np.percentile(lengths, q, method="inverted_cdf")) for q in QUANTILES},
        overlong=int(overlong.sum()),
        truncated=int(truncated.sum()),
        unusable=len(schedule.unusable),
        reasons=most_frequent(schedule.unusable.values())[1],
        batches_per_epoch=schedule.batches_per_epoch,
        groups=settings.groups,
        records_per_epoch=len(draws),
        token_fill=schedule.token_fill,
        image_fill=schedule.image_fill,
        counted=counted,
        buckets=buckets,
        sets=_sets(sources, schedule, draws, records, size.side, np.minimum(lengths, row_length)),
        compared=sum(map(len, sampled)),
        choices=_choices(schedule, image_size, shape, sampled),
    )


def write_unusable(schedule: Schedule, sources: Sequence[RecordSource], path: pathlib.Path) -> None:
    """Writes one line of JSON for every record that cannot be used: its shard and number, its key, and the reason."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for number, reason in sorted(schedule.unusable.items()):
            source, record = schedule.where(number)
            try:
                key = sources[source][record].key
            except ValueError:  # a damaged record has no key
                key = ""
            where = sources[source].where(record)
            file.write(json.dumps({"record": where, "key": key, "reason": reason}) + "\n")


def _buckets(schedule: Schedule) -> tuple[tuple[BucketUse, ...], int]:
    """Returns the use of each bucket, and the number of batches it was counted from."""
    total = schedule.batches_per_epoch
    counted = some(total, _BATCHES).tolist()
    sums = np.zeros((len(schedule.settings.buckets), 5))  # batches, non-empty groups, records, tokens, images
    for k in counted:
        plan = schedule.batch(k)
        counts = schedule.counts(plan)
        groups = sum(group >= 0 for group in plan.groups)
        sums[plan.bucket] += (1, groups, counts["records"].sum(), counts["tokens"], counts["images"])
    found = []
    for (size, shape, _), (batches, groups, records, tokens, images) in zip(
        schedule.settings.buckets, sums.tolist(), strict=True
    ):
        found.append(
            BucketUse(
                height=size.height,
                width=size.width,
                tokens_per_image=size.tokens,
                images_per_group=shape.images,
                batches=round(batches * total / len(counted), 1),
                records_per_batch=round(records / max(batches, 1), 1),
                token_fill=tokens / max(groups * shape.rows * shape.length, 1),
                image_fill=images / max(groups * shape.images, 1),
            )
        )
    return tuple(found), len(counted)


def _sets(
    sources: Sequence[RecordSource],
    schedule: Schedule,
    draws: np.ndarray,
    records: RecordLengths,
    side: int,
    lengths: np.ndarray,
) -> tuple[SetUse, ...]:
    count, ends = len(sources), np.cumsum([len(source) for source in sources])
    sums = np.concatenate([[0], np.cumsum(lengths)])
    tokens = (sums[records.first[1:]] - sums[records.first[:-1]])[draws]
    images = records.slots[side][draws]
    owner = np.searchsorted(ends, draws, side="right")
    drawn = np.bincount(owner, minlength=count)
    token_share = np.bincount(owner, tokens, count) / max(tokens.sum(), 1)
    image_share = np.bincount(owner, images, count) / max(images.sum(), 1)
    unusable = np.bincount(np.searchsorted(ends, list(schedule.unusable), side="right"), minlength=count)
    passes = drawn / np.maximum([len(source) for source in sources], 1)
    columns = zip(
        set_names([os.fspath(source.folder) for source in sources]),
        [len(source) for source in sources],
        *(column.tolist() for column in (unusable, drawn, passes, token_share, image_share)),
        strict=True,
    )
    return tuple(SetUse(*row) for row in columns)


def choice_table(usage: Usage) -> tuple[list[int], dict[int, list[Choice | None]]]:
    """Returns the row lengths compared, and the choices of each images_per_group; None if a data set does not fit."""
    cells = {(choice.images_per_group, choice.row_length): choice for choice in usage.choices}
    lengths = _lengths_compared(usage.row_length)
    return lengths, {
        n: [cells.get((n, length)) for length in lengths] for n in _images_compared(usage.images_per_group)
    }


def _images_compared(images_per_group: int) -> list[int]:
    return sorted({*IMAGES, images_per_group}) if images_per_group else [0]


def _lengths_compared(row_length: int) -> list[int]:
    return [round(row_length * factor) for factor in ROWS]


def _choices(
    schedule: Schedule, image_size: int, shape: GroupShape, indexes: Sequence[RecordIndex]
) -> tuple[Choice, ...]:
    """Returns the results of other image slots and tokens in a group; `shape` is the run's, at image_size."""
    total, found = sum(map(len, indexes)), []
    sizes = [bucket.size for bucket in schedule.settings.buckets]
    shares = {bucket.size.side: bucket.share for bucket in schedule.settings.buckets}
    for images, length in itertools.product(_images_compared(shape.images), _lengths_compared(shape.length)):
        buckets = make_buckets(sizes, image_size, shape._replace(images=images, length=length), shares)
        settings = dataclasses.replace(schedule.settings, buckets=buckets, groups=1)
        try:
            other = Schedule(indexes, settings)
        except ValueError:  # no record of some data set fits
            continue
        records = len(other.draws(0)) / other.batches_per_epoch
        lost = len(other.unusable) / total
        found.append(Choice(images, length, other.token_fill, other.image_fill, records, lost))
    return tuple(found)


def _sampled(indexes: Sequence[RecordIndex]) -> list[RecordIndex]:
    """Returns indexes of some records of every data set, few enough to try many settings."""
    share = min(_COMPARED / sum(map(len, indexes)), 1)
    return [_subset(index, some(len(index), math.ceil(share * len(index)))) for index in indexes]


def _subset(index: RecordIndex, records: np.ndarray) -> RecordIndex:
    """Returns the index of a data set that holds only `records`."""
    images, segments = _runs(index.num_images, records), _runs(index.num_segments, records)
    return RecordIndex(
        num_images=index.num_images[records],
        width=index.width[images],
        height=index.height[images],
        num_segments=index.num_segments[records],
        text=index.text[segments],
        shortest=index.shortest[segments],
        num_refs=index.num_refs[segments],
        refs=index.refs[_runs(index.num_refs, segments)],
        unusable={i: index.unusable[r] for i, r in enumerate(records.tolist()) if r in index.unusable},
    )


def _runs(counts: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Returns the positions of the chosen owners' entries, where owner after owner has `counts[i]` entries."""
    counts = counts.astype(np.int64)
    first, own = np.cumsum(counts) - counts, counts[chosen]
    return np.repeat(first[chosen] - (np.cumsum(own) - own), own) + np.arange(own.sum())
