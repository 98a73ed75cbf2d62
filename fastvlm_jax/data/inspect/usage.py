"""What the schedule makes of data sets: lengths, how full groups get, what cannot be used, other choices."""

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
IMAGES = (1, 2, 3, 4, 6, 8)  # data.images_per_group to compare
ROWS = (0.5, 1.0, 2.0)  # and data.row_length, times the present one
_BATCHES = 2000  # that are counted
_COMPARED = 512  # records that the other choices are tried with; packing takes up to 1 ms each


@dataclasses.dataclass(frozen=True)
class BucketUse:
    """The batches of one size of images in an epoch: how many (of all), and the share of their slots that is used."""

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
    """One data set's part in an epoch: records drawn, passes over it, its share of the tokens and images drawn."""

    name: str
    records: int
    unusable: int
    drawn: int
    passes: float
    token_share: float
    image_share: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """What other settings would give; `lost` is the share of records that would be unusable."""

    images_per_group: int
    row_length: int
    token_fill: float
    image_fill: float
    records_per_group: float
    lost: float


@dataclasses.dataclass(frozen=True)
class Usage:
    """What the schedule makes of data sets.

    Attributes:
      image_size, row_length, images_per_group: the config's.
      segments: texts that are packed: conversations, or single questions.
      lengths, quantiles: segments by tokens, with those of their images at image_size; {"50 %": tokens}.
      overlong: segments longer than a row. truncated: those of them that fit without their oldest questions.
      unusable, reasons: records that no batch can hold or nothing can be learnt from, and why.
      batches_per_epoch, groups, records_per_epoch: of epoch 0.
      token_fill, image_fill: share of the slots used.
      buckets, sets, choices: see there. counted: batches that `buckets` was counted from.
      compared: records that `choices` were tried with.
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
    """Returns what the schedule of a run makes of its data sets.

    Args:
      indexes: of the data sets, those that the schedule was made from.
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
    draws, few = schedule.draws(0), _few(indexes)
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
        compared=sum(map(len, few)),
        choices=_choices(schedule, image_size, shape, few),
    )


def write_unusable(schedule: Schedule, sources: Sequence[RecordSource], path: pathlib.Path) -> None:
    """Lists every record that cannot be used, a line of JSON each: where it lies, its key, and why."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for number, reason in sorted(schedule.unusable.items()):
            source, record = schedule.where(number)
            try:
                key = sources[source][record].key
            except ValueError:  # a damaged one
                key = ""
            where = sources[source].where(record)
            file.write(json.dumps({"record": where, "key": key, "reason": reason}) + "\n")


def _buckets(schedule: Schedule) -> tuple[tuple[BucketUse, ...], int]:
    """The use of each bucket, and how many batches it was counted from."""
    total = schedule.batches_per_epoch
    counted = some(total, _BATCHES).tolist()
    sums = np.zeros((len(schedule.settings.buckets), 5))  # batches, groups that are not empty, records, tokens, images
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
    """Returns the row lengths compared, and for each images_per_group its choices; None where no record fits."""
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
    """What other numbers of image slots and tokens in a group would give; `shape` is the run's, at image_size."""
    total, found = sum(map(len, indexes)), []
    sizes = [bucket.size for bucket in schedule.settings.buckets]
    shares = {bucket.size.side: bucket.share for bucket in schedule.settings.buckets}
    for images, length in itertools.product(_images_compared(shape.images), _lengths_compared(shape.length)):
        buckets = make_buckets(sizes, image_size, shape._replace(images=images, length=length), shares)
        settings = dataclasses.replace(schedule.settings, buckets=buckets, groups=1)
        try:
            other = Schedule(indexes, settings)
        except ValueError:  # of some data set no record fits
            continue
        records = len(other.draws(0)) / other.batches_per_epoch
        lost = len(other.unusable) / total
        found.append(Choice(images, length, other.token_fill, other.image_fill, records, lost))
    return tuple(found)


def _few(indexes: Sequence[RecordIndex]) -> list[RecordIndex]:
    """Some records of every index, few enough to try many settings."""
    share = min(_COMPARED / sum(map(len, indexes)), 1)
    return [_part(index, some(len(index), math.ceil(share * len(index)))) for index in indexes]


def _part(index: RecordIndex, records: np.ndarray) -> RecordIndex:
    """The index of a data set that holds these records alone."""
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
    """Where the entries of the chosen owners stand, if owner i has `counts[i]` entries, one owner after another."""
    counts = counts.astype(np.int64)
    first, own = np.cumsum(counts) - counts, counts[chosen]
    return np.repeat(first[chosen] - (np.cumsum(own) - own), own) + np.arange(own.sum())
