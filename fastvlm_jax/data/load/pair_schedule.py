"""Plans which pairs go into which batch of stage 0, without an index and in the same memory for any number of records.

An epoch draws every record once or, with weights, each data set in endless shuffled passes. The data sets are spread
evenly over the draws of an epoch; which record a draw takes is looked up in a permutation that is computed place by
place. Batch k of G groups of N pairs:

    data sets       in the order of a pass        draws of an epoch             batches of G x N = 4 pairs
    a a a a         a2 a0 a3 a1
                                             ->   a2 b1 a0 a3 b0 a1        ->   k    a2 b1 a0 a3
    b b             b1 b0

The draws at the end of an epoch that do not fill a batch are left out; they are other records in each epoch.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

_PURPOSE = 4  # of the seeds of permutations; `Schedule` has those below


class PairPlace(NamedTuple):
    """Describes the record of a pair: its data set, its number there, and the number of the pass over the data set."""

    source: int
    record: int
    visit: int


class PairPlan(NamedTuple):
    """Describes one global batch: its epoch, and the number of its first draw there."""

    epoch: int
    first: int


class PairSchedule:
    """Plans the stream of global batches of pairs; safe to use from several threads.

    Without weights, no batch holds a record twice.

    Attributes:
      groups, pairs: groups in a batch, and pairs in a group.
      seed: seed of the order; None = one epoch, each data set in the order of its records.
      batches_per_epoch: global batches in an epoch.
      token_fill, image_fill: fractions of the token and image slots in use: 1, for no place of a batch is empty.
      unusable: records known to be unusable before they are read: none.
    """

    token_fill = image_fill = 1.0

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        groups: int,
        pairs: int,
        tokens: int,
        seed: int | None,
        weights: Sequence[float] = (),
    ):
        """Plans the batches of data sets.

        Args:
          sizes: number of records of each data set.
          tokens: number of tokens of a pair, padding included.
          weights: weight of each data set; () = each record once an epoch.

        Raises:
          ValueError: an epoch has no record, or fewer than a batch has pairs.
        """
        self.groups, self.pairs, self.seed, self.unusable = groups, pairs, seed, {}
        self._tokens, self._sizes, self._counts = tokens, list(sizes), list(sizes)
        self._offsets = np.cumsum([0, *sizes])
        total = sum(sizes)
        if not total:
            raise ValueError("the split holds no records: write the dataset again")
        if weights:
            whole = math.fsum(weights)
            self._counts = [round(total * w / whole) if size else 0 for w, size in zip(weights, sizes, strict=True)]
        drawn, batch = sum(self._counts), groups * pairs
        if drawn < batch:
            key, most = ("groups", drawn // pairs) if drawn >= pairs else ("images_per_group", drawn)
            raise ValueError(
                f"a batch of data.groups={groups} x data.images_per_group={pairs} = {batch:,} pairs is larger than the "
                f"{drawn:,} records of an epoch: lower data.{key} to {most} or less"
            )
        self.batches_per_epoch = drawn // batch

    def batch(self, k: int) -> PairPlan:
        """Returns the plan of global batch k.

        Raises:
          IndexError: in evaluation, k is not a batch of the one epoch.
        """
        if self.seed is None and k >= self.batches_per_epoch:
            raise IndexError(k)
        epoch, number = divmod(k, self.batches_per_epoch)
        return PairPlan(epoch, number * self.groups * self.pairs)

    def group(self, plan: PairPlan, g: int) -> list[PairPlace]:
        """Returns the records of group g of a batch, in the order of its pairs."""
        first, places = plan.first + g * self.pairs, []
        before = self._drawn(first)
        for draw in range(first + 1, first + self.pairs + 1):
            after = self._drawn(draw)
            source = next(i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a < b)
            visit, at = divmod(plan.epoch * self._counts[source] + before[source], self._sizes[source])
            if self.seed is not None:
                at = int(_shuffled(self._sizes[source], self.seed, source, visit)[at])
            places.append(PairPlace(source, at, visit))
            before = after
        return places

    def counts(self, plan: PairPlan) -> dict[str, np.ndarray | int]:
        """Returns the contents of a batch in numbers; see `Schedule.counts`. Padding counts as tokens here."""
        pairs = self.groups * self.pairs
        records = np.subtract(self._drawn(plan.first + pairs), self._drawn(plan.first))
        return {"images": pairs, "tokens": pairs * self._tokens, "truncated": 0, "records": records}

    def where(self, record: int) -> tuple[int, int]:
        """Returns the data set of `record`, a number over all data sets, and its number there."""
        source = int(np.searchsorted(self._offsets, record, side="right")) - 1
        return source, record - int(self._offsets[source])

    def number(self, source: int, record: int) -> int:
        """Returns the number over all data sets of a record of a data set."""
        return int(self._offsets[source]) + record

    def _drawn(self, draws: int) -> list[int]:
        """Returns how many of the first `draws` draws of an epoch are of each data set."""
        drawn, total = [], sum(self._counts)
        for count in self._counts:
            own = (draws * count + total // 2) // total if count else 0
            drawn.append(own)
            draws, total = draws - own, total - count
        return drawn


@functools.lru_cache(maxsize=256)
def _shuffled(size: int, seed: int, source: int, visit: int) -> grain.MapDataset:
    """Returns the numbers below `size` in the order of one pass; each is computed when it is asked for."""
    (state,) = np.random.SeedSequence([seed, _PURPOSE, source, visit]).generate_state(1)
    return grain.MapDataset.range(size).shuffle(seed=int(state))
