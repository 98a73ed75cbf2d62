"""Which record goes where, decided before anything is decoded.

The stream of groups is a function of (index, shape, seed) alone. Global batch k is groups kG ... kG+G-1 of it, whoever
builds them, so one integer is the whole data position:

    epoch 0, shuffled by (seed, 0)    epoch 1, shuffled by (seed, 1)
    |group 0 |group 1 | ... |group 58 |group 59 |group 60 | ...          the last group of an epoch may be part filled
    `--- batch 0 ----´ ...  `---- batch 29 ----´                         G = 2

    one group, N = 2 image slots, R = 2 rows of T tokens: records a and b, three questions each
    slots   [a][b]
    row 0   [a2......][a0....][b1....]     longest first, each into the fullest row that has room
    row 1   [b0.........][b2....][a1..]
"""

import bisect
import dataclasses
import itertools
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LOOKAHEAD = 64  # records; small beside an epoch, so the order stays random


class GroupShape(NamedTuple):
    """Sizes of one group: N image slots, R rows of T tokens."""

    images: int
    rows: int
    length: int


@dataclasses.dataclass(frozen=True)
class RecordIndex:
    """What the schedule knows of each of M records, with S segments in all.

    Attributes:
      keys: the M records' names, for messages.
      num_images: int [M].
      lengths: int [S], tokens of each segment, record after record.
      first: int [M + 1]; the segments of record i are `lengths[first[i]:first[i + 1]]`.
    """

    keys: Sequence[str]
    num_images: np.ndarray
    lengths: np.ndarray
    first: np.ndarray


class Placement(NamedTuple):
    """Where one segment stands: it starts at `offset` of `row` and takes `length` tokens."""

    record: int  # in the source
    question: int  # which segment of the record
    row: int
    offset: int
    length: int


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """What fills one group.

    Attributes:
      records: the record numbers, in order of their image slots.
      slots: the first image slot of each record.
      placements: every segment of those records.
    """

    records: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    placements: tuple[Placement, ...] = ()


class Schedule:
    """The stream of groups of one split; safe to ask from several threads.

    With `seed=None` (evaluation) the records come once, in the order of the source; groups after the last are empty.

    Attributes:
      num_groups, batches_per_epoch: groups, and global batches (a fraction), in epoch 0; others differ by a little.
      token_fill, image_fill: share of the token and image slots of epoch 0 that are used.

    Raises:
      ValueError: no records, or one that does not fit even an empty group.
    """

    def __init__(self, index: RecordIndex, shape: GroupShape, groups: int, seed: int | None):
        self._index, self._shape, self._groups, self._seed = index, shape, groups, seed
        self._check()
        self._ends: list[int] = []  # groups up to the end of each epoch
        self._epochs: dict[int, list[GroupPlan]] = {}
        self._lock = threading.Lock()
        with self._lock:
            count = len(self._epoch(0))
        self.num_groups = count
        self.batches_per_epoch = count / groups
        self.token_fill = float(index.lengths.sum()) / (count * shape.rows * shape.length)
        self.image_fill = float(index.num_images.sum()) / (count * max(shape.images, 1))

    def plan(self, k: int, g: int) -> GroupPlan:
        """Returns what fills group g of global batch k."""
        wanted = k * self._groups + g
        if self._seed is None:
            plans = self._epochs[0]
            return plans[wanted] if wanted < len(plans) else GroupPlan()
        with self._lock:
            while not self._ends or self._ends[-1] <= wanted:
                self._epoch(len(self._ends))
            epoch = bisect.bisect_right(self._ends, wanted)
            return self._epoch(epoch)[wanted - (self._ends[epoch - 1] if epoch else 0)]

    def order(self, epoch: int) -> np.ndarray:
        """Returns the record numbers in the order of one epoch, int [M]."""
        count = len(self._index.keys)
        if self._seed is None:
            return np.arange(count)
        # The raw stream of a bit generator is fixed for good; numpy's own permutation() may change between versions.
        return np.argsort(np.random.PCG64([self._seed, epoch]).random_raw(count), kind="stable")

    def _epoch(self, epoch: int) -> list[GroupPlan]:
        if epoch not in self._epochs:
            lookahead = 1 if self._seed is None else LOOKAHEAD
            plans = fill_groups(self._index, self._shape, self.order(epoch), lookahead)
            if epoch == len(self._ends):
                self._ends.append(len(plans) + (self._ends[-1] if epoch else 0))
            # Prefetching crosses at most one border between epochs: the last few are enough.
            self._epochs = {e: p for e, p in self._epochs.items() if abs(e - epoch) < 2} | {epoch: plans}
        return self._epochs[epoch]

    def _check(self) -> None:
        index, (images, rows, length) = self._index, self._shape
        if not len(index.keys):
            raise ValueError("the split holds no records: write the dataset again")
        for i, key in enumerate(index.keys):
            lengths = index.lengths[index.first[i] : index.first[i + 1]]
            if index.num_images[i] > images:
                raise ValueError(
                    f"record {key} has {index.num_images[i]} images: raise data.images_per_group, now {images}"
                )
            if lengths.max(initial=0) > length:
                raise ValueError(
                    f"record {key} has a text of {lengths.max()} tokens: raise data.row_length, now {length}"
                )
            if not _OpenGroup(self._shape).add(i, 0, lengths.tolist()):
                raise ValueError(
                    f"record {key} has {lengths.sum()} tokens of text that do not fit one group: raise "
                    f"data.row_length, now {length}, or data.rows_per_group, now {rows}"
                )


def fill_groups(
    index: RecordIndex, shape: GroupShape, order: np.ndarray, lookahead: int = LOOKAHEAD
) -> list[GroupPlan]:
    """Fills groups one after another with the records in `order`; each record must fit an empty group.

    The open group takes the first of the next `lookahead` records that fits, for its last image slot the longest that
    fits; when none does, it is closed. (Without looking ahead, easy-VQA fills 88 % of its tokens, with it 96 %.)
    """
    num_images, first, lengths = index.num_images.tolist(), index.first.tolist(), index.lengths.tolist()
    totals = np.add.reduceat(np.append(index.lengths, 0), index.first[:-1]) * (np.diff(index.first) > 0)
    totals, order = totals.tolist(), order.tolist()
    window, upcoming = order[:lookahead], iter(order[lookahead:])
    plans, group = [], _OpenGroup(shape)
    while window:
        longest_first = group.slots_left == 1
        for record in sorted(window, key=totals.__getitem__, reverse=True) if longest_first else window:
            fits = num_images[record] <= group.slots_left and totals[record] <= group.tokens_left
            if fits and group.add(record, num_images[record], lengths[first[record] : first[record + 1]]):
                window.remove(record)
                window.extend(itertools.islice(upcoming, 1))
                break
        else:
            plans.append(group.plan())
            group = _OpenGroup(shape)
    return [*plans, group.plan()]


class _OpenGroup:
    """The group being filled."""

    def __init__(self, shape: GroupShape):
        self.length, self.slots, self.slots_left = shape.length, shape.images, shape.images
        self.tokens_left = shape.rows * shape.length
        self.free = [(shape.length, row) for row in range(shape.rows)]  # (room, row), ascending
        self.records, self.first_slots, self.placements = [], [], []

    def add(self, record: int, num_images: int, lengths: list[int]) -> bool:
        """Puts the segments of a record, longest first, each into the fullest row with room; False if one has none."""
        free, placements = self.free.copy(), []
        for question in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
            best = bisect.bisect_left(free, (lengths[question], -1))
            if best == len(free):
                return False
            room, row = free.pop(best)
            bisect.insort(free, (room - lengths[question], row))
            placements.append(Placement(record, question, row, self.length - room, lengths[question]))
        self.records.append(record)
        self.first_slots.append(self.slots - self.slots_left)
        self.placements += placements
        self.free = free
        self.slots_left -= num_images
        self.tokens_left -= sum(lengths)
        return True

    def plan(self) -> GroupPlan:
        return GroupPlan(tuple(self.records), tuple(self.first_slots), tuple(self.placements))
