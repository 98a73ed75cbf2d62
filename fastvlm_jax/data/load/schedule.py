"""Plans which record goes into which batch, before any image is decoded.

The batches of an epoch depend on (indexes, settings, seed, epoch) alone, so one integer is the whole data position, on
any number of hosts:

    data sets, weights     draws of epoch e, shuffled    by bucket         packed            batches of G groups, spread
    a a a a    2/3
                      ->   a2 b1 a0 a3 b0 a1        ->   1024: a2 b1 a1 -> [a2 b1][a1]   ->  k     1024: [a2 b1][a1]
    b b b      1/3                                        512: a0 a3 b0 -> [a0 a3 b0]        k+1    512: [a0 a3 b0][]

All groups of a batch have one shape. The last batch of a bucket in an epoch may hold empty groups.
"""

import bisect
import hashlib
import math
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastvlm_jax.data.index import RecordIndex
from fastvlm_jax.data.load.epoch import Epoch, read_epoch, write_epoch
from fastvlm_jax.data.load.lengths import Settings, find_unusable, make_record_lengths
from fastvlm_jax.data.load.packing import LOOKAHEAD, fill_groups, place
from fastvlm_jax.files import cache_folder
from fastvlm_jax.images.sizes import nearest

_VERSION = 1  # version of the algorithm; a change of the order raises it
_KEEP = 2  # epochs closer than this stay in memory: prefetching crosses the end of an epoch
_SLOW = 1.0  # seconds; an epoch that takes longer to compute is cached on disk


class Placement(NamedTuple):
    """Describes where a segment is placed: from `offset` of `row` on, at most `length` tokens."""

    question: int  # number of the segment in its record
    row: int
    offset: int
    length: int


class Place(NamedTuple):
    """Describes where a record of a data set is placed in a group: its first image slot, and its segments."""

    source: int
    record: int  # number in its data set
    slot: int
    slots: int  # number of image slots
    placements: tuple[Placement, ...]


class BatchPlan(NamedTuple):
    """Describes one global batch: its epoch, its bucket, and the number in the bucket of each group; -1 = empty."""

    epoch: int
    bucket: int
    groups: tuple[int, ...]


class Schedule:
    """Plans the stream of global batches of one split; safe to use from several threads.

    Attributes:
      settings: settings that determine the batches.
      batches_per_epoch: global batches in epoch 0; other epochs differ by a few.
      token_fill: fraction of the token slots used in epoch 0.
      image_fill: fraction of the image slots used in epoch 0.
      unusable: record number over all data sets -> why the record cannot be used; another one takes its place.

    Raises:
      ValueError: there are no records, or none of a data set can be used.
    """

    def __init__(self, indexes: Sequence[RecordIndex], settings: Settings, key: str = ""):
        """Plans epoch 0. `key` identifies the contents of the indexes; with it, slow epochs are cached on disk."""
        self.settings = settings
        self._key = key and hashlib.sha256(f"{_VERSION} {LOOKAHEAD} {settings} {key}".encode()).hexdigest()[:32]
        self._offsets = np.cumsum([0] + [len(index) for index in indexes])
        if not self._offsets[-1]:
            raise ValueError("the split holds no records: write the dataset again")
        self._lengths = make_record_lengths(indexes, settings)
        self._lock = threading.Lock()
        from_indexes = [
            {int(o) + i: why for i, why in x.unusable.items()} for o, x in zip(self._offsets, indexes, strict=False)
        ]
        self.unusable = find_unusable(self._lengths, settings.overlong)
        for reasons in from_indexes:
            self.unusable |= reasons
        self._replacement = _replacements(self.unusable, self._offsets)
        self._epochs: dict[int, Epoch] = {}
        self._ends: list[int] = []  # batches up to the end of each epoch
        with self._lock:
            epoch = self._epoch(0)
        self.batches_per_epoch = len(epoch.bucket)
        self.token_fill, self.image_fill = self._fill(epoch)

    @property
    def groups(self) -> int:
        """Returns the number of groups in a batch."""
        return self.settings.groups

    def batch(self, k: int) -> BatchPlan:
        """Returns the plan of global batch k.

        Raises:
          IndexError: in evaluation, k is not a batch of the one epoch.
        """
        with self._lock:
            if self.settings.seed is None and k >= self.batches_per_epoch:
                raise IndexError(k)
            while not self._ends or self._ends[-1] <= k:
                self._epoch(len(self._ends))
            number = bisect.bisect_right(self._ends, k)
            epoch = self._epoch(number)
        at = k - (self._ends[number - 1] if number else 0)
        bucket, batch, G = int(epoch.bucket[at]), int(epoch.number[at]), self.settings.groups
        count = min(len(epoch.first[bucket]) - 1 - batch * G, G)
        groups = [-1] * G
        for j in range(count):  # groups are spread over the data shards
            groups[j * G // count] = batch * G + j
        return BatchPlan(number, bucket, tuple(groups))

    def group(self, plan: BatchPlan, g: int) -> list[Place]:
        """Returns the records placed in group g of a batch, in the order of their image slots."""
        shape = self.settings.buckets[plan.bucket].shape
        records = self._records(plan, [g])
        lengths, questions = self._lengths.segments(records, plan.bucket)
        first, tokens, questions = lengths.first.tolist(), lengths.tokens.tolist(), questions.tolist()
        slots = self._lengths.slots_in(plan.bucket)[records].tolist()
        room, used = np.full((1, shape.rows), shape.length, np.int32), [0] * shape.rows
        places, slot = [], 0
        for i, record in enumerate(records.tolist()):
            own, placements = range(first[i], first[i + 1]), []
            rows = [0] * len(own)
            if shape.rows > 1:
                rows = place(room, lengths.tokens[None, own.start : own.stop])[0][0].tolist()
            for segment, row in zip(own, rows, strict=True):
                placements.append(Placement(questions[segment], row, used[row], tokens[segment]))
                used[row] += tokens[segment]
            places.append(Place(*self.where(record), slot, slots[i], tuple(placements)))
            slot += slots[i]
        return places

    def counts(self, plan: BatchPlan) -> dict[str, np.ndarray | int]:
        """Returns the contents of a batch in numbers.

        They are its `images` (tiles included), `tokens` (image placeholders included), `truncated` texts, and the
        `records` of each data set.
        """
        records = self._records(plan, range(self.settings.groups))
        sources = np.searchsorted(self._offsets, records, side="right") - 1
        return {
            "images": int(self._lengths.slots_in(plan.bucket)[records].sum()),
            "tokens": int(self._lengths.segments(records, plan.bucket)[0].tokens.sum()),
            "truncated": int(self._lengths.overlong(records, plan.bucket)),
            "records": np.bincount(sources, minlength=len(self._offsets) - 1),
        }

    def where(self, record: int) -> tuple[int, int]:
        """Returns the data set of `record`, a number over all data sets, and its number there."""
        source = int(np.searchsorted(self._offsets, record, side="right")) - 1
        return source, record - int(self._offsets[source])

    def _records(self, plan: BatchPlan, groups: Sequence[int]) -> np.ndarray:
        with self._lock:
            epoch = self._epoch(plan.epoch)
        records, first = epoch.records[plan.bucket], epoch.first[plan.bucket]
        held = [plan.groups[g] for g in groups if plan.groups[g] >= 0]
        return np.concatenate([np.zeros(0, np.int32)] + [records[first[h] : first[h + 1]] for h in held])

    def _epoch(self, number: int) -> Epoch:
        """Returns an epoch; the caller holds the lock and asks for new epochs in order."""
        if number not in self._epochs:
            path = cache_folder() / "schedules" / f"{self._key}-{number}.npz" if self._key else None
            epoch = read_epoch(path, len(self.settings.buckets)) if path else None
            if epoch is None:
                start = time.monotonic()
                epoch = self._build(number)
                if path and time.monotonic() - start > _SLOW:
                    write_epoch(path, epoch)
            if number == len(self._ends):
                self._ends.append(len(epoch.bucket) + (self._ends[-1] if number else 0))
            near = {e: p for e, p in self._epochs.items() if abs(e - number) < _KEEP}
            self._epochs = near | {number: epoch}
        return self._epochs[number]

    def _build(self, number: int) -> Epoch:
        settings, G = self.settings, self.settings.groups
        draws = self.draws(number)
        buckets = self._buckets_of(draws, number)
        records, first = [], []
        for b, bucket in enumerate(settings.buckets):
            own = draws[buckets == b] if len(settings.buckets) > 1 else draws
            # Far fewer than the bucket holds, or a small data set would be packed alike in every epoch.
            lookahead = 1 if settings.seed is None else min(max(len(own) // 16, 4), LOOKAHEAD)
            order, starts = fill_groups(
                self._lengths.slots_in(b)[own], self._lengths.segments(own, b)[0], bucket.shape, lookahead
            )
            if settings.seed is not None:
                # The first groups of a lane hold its longest records, the last the shortest: shuffle them.
                order, starts = _reordered(order, starts, _shuffled([settings.seed, 3, number, b], len(starts) - 1))
            records.append(own[order])
            first.append(starts)
        counts = [-(-(len(starts) - 1) // G) for starts in first]
        bucket = np.repeat(np.arange(len(counts)), counts)
        batch = np.concatenate([np.arange(count) for count in counts])
        # Each bucket is spread evenly over the epoch.
        spread = np.argsort((batch + 0.5) / np.repeat(np.maximum(counts, 1), counts), kind="stable")
        return Epoch(records, first, bucket[spread].astype(np.int32), batch[spread].astype(np.int32))

    def draws(self, epoch: int) -> np.ndarray:
        """Returns the records of an epoch in order, int32 numbers over all data sets, with unusable ones replaced.

        With weights, each data set is drawn in endless shuffled passes, and an epoch goes on where the one before it
        ended: no record is drawn twice before all others of its data set were drawn once.
        """
        settings, sizes = self.settings, np.diff(self._offsets)
        total = int(self._offsets[-1])
        if settings.seed is None:  # each data set is spread evenly over the epoch
            at = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes.tolist()])
            drawn = np.argsort(at, kind="stable").astype(np.int32)
        elif not settings.weights:
            drawn = np.arange(total, dtype=np.int32)
        else:
            shares = np.array(settings.weights) / math.fsum(settings.weights)
            parts = []
            for i, (size, share) in enumerate(zip(sizes.tolist(), shares.tolist(), strict=True)):
                count = round(total * share)
                for part, start, stop in _passes(epoch * count, (epoch + 1) * count, size):
                    own = np.arange(size, dtype=np.int32)
                    if stop - start < size:
                        own = _shuffled([settings.seed, 1, i, part], size)[start:stop]
                    parts.append(own + np.int32(self._offsets[i]))
            drawn = np.concatenate(parts)
        if settings.seed is not None:
            drawn = drawn[_shuffled([settings.seed, 0, epoch], len(drawn))]
        if self._replacement is not None:
            drawn = self._replacement[drawn]
        return drawn

    def _buckets_of(self, draws: np.ndarray, epoch: int) -> np.ndarray:
        settings, records = self.settings, self._lengths
        sides = list(dict.fromkeys(bucket.size.side for bucket in settings.buckets))
        if len(settings.buckets) == 1:
            return np.zeros(len(draws), np.uint8)
        shares = np.array([next(b.share for b in settings.buckets if b.size.side == side) for side in sides])
        if settings.seed is None:
            resolution = np.full(len(draws), int(np.argmax(sides)))
        else:
            uniform = np.random.PCG64([settings.seed, 2, epoch]).random_raw(len(draws)) / 2.0**64
            resolution = np.searchsorted(np.cumsum(shares / shares.sum())[:-1], uniform, side="right")
        # A record without images fits any shape: it takes the aspect of the image record before it.
        at = np.where(records.aspect[draws] > 0, np.arange(len(draws)), -1)
        at = np.maximum.accumulate(at)
        at[at < 0] = np.argmax(at >= 0)
        aspect = np.maximum(records.aspect[draws][at], 1e-3) if len(draws) else records.aspect[:0]
        buckets = np.zeros(len(draws), np.uint8)
        for r, side in enumerate(sides):
            numbers = [b for b, bucket in enumerate(settings.buckets) if bucket.size.side == side]
            mine = resolution == r
            shape = nearest(aspect[mine], [settings.buckets[b].size for b in numbers])
            buckets[mine] = np.array(numbers, np.uint8)[shape]
        return buckets

    def _fill(self, epoch: Epoch) -> tuple[float, float]:
        """Returns the fractions of an epoch's token slots and image slots that are used."""
        tokens = images = token_slots = image_slots = 0
        for b, (_, shape, _) in enumerate(self.settings.buckets):
            batches = int((epoch.bucket == b).sum())
            tokens += int(self._lengths.segments(epoch.records[b], b)[0].tokens.sum(dtype=np.int64))
            images += int(self._lengths.slots_in(b)[epoch.records[b]].sum(dtype=np.int64))
            groups = len(epoch.first[b]) - 1 if batches else 0
            token_slots += groups * shape.rows * shape.length
            image_slots += groups * shape.images
        return tokens / max(token_slots, 1), images / max(image_slots, 1)


def _replacements(unusable: dict[int, str], offsets: np.ndarray) -> np.ndarray | None:
    """Returns each record itself or, if unusable, the next usable one of its data set; None if all are usable."""
    if not unusable:
        return None
    replacement = np.arange(offsets[-1], dtype=np.int32)
    bad = np.zeros(len(replacement), bool)
    bad[list(unusable)] = True
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        usable = np.flatnonzero(~bad[start:stop]) + start
        if not len(usable) and stop > start:
            record, reason = next((r, why) for r, why in unusable.items() if start <= r < stop)
            raise ValueError(f"none of the {stop - start} records can be used; record {record - start}: {reason}")
        lost = np.flatnonzero(bad[start:stop]) + start
        replacement[lost] = usable[np.searchsorted(usable, lost) % max(len(usable), 1)] if len(lost) else lost
    return replacement


def _shuffled(seed: list[int], count: int) -> np.ndarray:
    # The raw stream of a bit generator never changes; numpy's permutation() may change between versions.
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable").astype(np.int32)


def _reordered(order: np.ndarray, first: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns `order` and `first` with the groups [first[g], first[g + 1]) in the order that `groups` gives."""
    counts = np.diff(first)[groups]
    starts = np.concatenate([[0], np.cumsum(counts)])
    at = np.repeat(first[:-1][groups] - starts[:-1], counts) + np.arange(len(order))
    return order[at], starts


def _passes(start: int, stop: int, size: int):
    """Yields the parts of draws [start, stop) of endless passes over `size` records: (pass, from, to)."""
    while start < stop and size:
        number, at = divmod(start, size)
        end = min(size, at + stop - start)
        yield number, at, end
        start += end - at
