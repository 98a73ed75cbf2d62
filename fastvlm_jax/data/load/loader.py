"""Iterates over global batches on the devices, which threads build ahead, and counts what it gives out."""

import collections
import errno
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np

from fastvlm_jax.batch import Batch, PairBatch
from fastvlm_jax.data.load.bad_records import BadRecords
from fastvlm_jax.data.load.batch_builder import Arrays, BatchBuilder, Substituted
from fastvlm_jax.data.load.pair_builder import PairBuilder

Builder = BatchBuilder | PairBuilder

_AHEAD = 2  # batches in transfer to the devices


class _LocalBatches:
    """The source that Grain reads: item i is (number, arrays of this process, replaced records, counts) of a batch.

    Their numbers are start, start + 1 and so on, without those passed over:

        start 4, passed over 2 5 6      item    0 1 2 3
                                        batch   4 7 8 9
    """

    def __init__(self, build: Builder, groups: list[int], start: int, stop: int, passed_over: Collection[int]):
        self._build, self._groups, self._start, self._stop = build, groups, start, stop
        self._passed_over = sorted(k for k in set(passed_over) if start <= k < stop)

    def __len__(self) -> int:
        return max(self._stop - self._start - len(self._passed_over), 0)

    def __getitem__(self, item: int) -> tuple[int, Arrays, list[Substituted], dict]:
        k = self._start + item
        for passed in self._passed_over:
            k += passed <= k
        return k, *self._build(k, self._groups), self._build.schedule.counts(self._build.schedule.batch(k))


class Flow(NamedTuple):
    """Counts what a loader gave out since the last call of `Loader.flow`, in all processes unless noted.

    Attributes:
      images: number of images, tiles included.
      tokens: number of tokens, image placeholders included.
      truncated: number of texts that lost their oldest questions.
      records: number of records of each data set.
      waited: seconds that this process waited for batches.
      sizes: number of images by (height, width).
    """

    images: int
    tokens: int
    truncated: int
    records: tuple[int, ...]
    waited: float
    sizes: Mapping[tuple[int, int], int]


class Loader:
    """Iterates over global Batches, or PairBatches, of `jax.Array`, read, decoded and transferred ahead of time.

    Attributes:
      position: number behind that of the last batch given out, at first `start`; the value to save and to pass as
        `start`.
      build: builder of the batches.
      names: short names of the data sets, for metrics.
      batches_per_epoch: global batches in the first epoch.
      token_fill: fraction of the token slots used in the first epoch.
      image_fill: fraction of the image slots used in the first epoch.

    Raises:
      ValueError: the data shards do not divide `groups`; or, from `next` too, more than the fraction `max_substituted`
        of the records cannot be used.
      MemoryError: from `next`: the machine has too little memory for the batches.
    """

    def __init__(
        self,
        build: Builder,
        groups: int,
        sharding: jax.sharding.Sharding,
        *,
        start: int = 0,
        stop: int | None = None,
        passed_over: Collection[int] = (),
        num_threads: int = 2,
        prefetch: int = 4,
        max_substituted: float = 0.01,
    ):
        schedule = build.schedule
        self.position, self.build = start, build
        self.names = set_names([os.fspath(source.folder) for source in build.sources])
        self.batches_per_epoch = schedule.batches_per_epoch
        self.token_fill, self.image_fill = schedule.token_fill, schedule.image_fill
        self._num_groups, self.sharding = groups, sharding
        try:
            sharding.shard_shape((groups,))
        except ValueError as error:
            raise ValueError(
                f"data.groups {groups} does not divide over {sharding}: make it a multiple of the number of data shards"
            ) from error
        indices = sharding.addressable_devices_indices_map((groups,)).values()
        local = sorted({g for (index,) in indices for g in range(*index.indices(groups))})
        self._local_position = {g: i for i, g in enumerate(local)}
        batches = _LocalBatches(build, local, start, sys.maxsize // 2 if stop is None else stop, passed_over)
        self._length = len(batches) if stop is not None else None
        self._bad_records = BadRecords(build, max_substituted)
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        self._host = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
        self._ahead = collections.deque()
        self._flow = self._no_flow()

    def __iter__(self) -> Iterator[Batch | PairBatch]:
        return self

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("an endless loader has no length")
        return self._length

    def __next__(self) -> Batch | PairBatch:
        begin = time.monotonic()
        while len(self._ahead) <= _AHEAD:
            try:
                number, arrays, substituted, counts = next(self._host)
            except StopIteration:
                break
            except ValueError as error:  # Grain appends lines about itself
                raise ValueError((str(error).splitlines() or ["the input failed"])[0]) from error
            except (MemoryError, OSError) as error:
                if isinstance(error, OSError) and error.errno != errno.ENOMEM:
                    raise
                raise MemoryError(
                    "the loader needs more: lower data.prefetch or data.num_threads (each holds a batch), turn off "
                    "data.cache_images, or spread data.groups over more processes"
                ) from error
            self._ahead.append((number, self.to_devices(arrays), substituted, counts))
        if not self._ahead:
            raise StopIteration
        number, batch, substituted, counts = self._ahead.popleft()
        self._bad_records.add(substituted, int(counts["records"].sum()))
        self.position = number + 1
        images, tokens, truncated = (getattr(self._flow, name) + counts[name] for name in Flow._fields[:3])
        records = tuple(np.add(self._flow.records, counts["records"]).tolist())
        sizes = self._flow.sizes + collections.Counter({batch.images.shape[2:4]: int(counts["images"])})
        self._flow = Flow(images, tokens, truncated, records, self._flow.waited + time.monotonic() - begin, sizes)
        return batch

    @property
    def substituted(self) -> int:
        """Returns the number of unusable records found so far; each is replaced wherever it is drawn."""
        return self._bad_records.count

    def flow(self) -> Flow:
        """Returns the counts since the last call, and resets them."""
        flow, self._flow = self._flow, self._no_flow()
        return flow

    def _no_flow(self) -> Flow:
        return Flow(0, 0, 0, (0,) * len(self.names), 0.0, collections.Counter())

    def close(self) -> None:
        """Stops the threads and drops the batches read ahead."""
        self._host.close()
        self._ahead.clear()

    def to_devices(self, arrays: Arrays) -> Batch | PairBatch:
        """Starts the transfer of this process's groups and returns the global batch."""
        return self.build.batch_type(**{name: self._put(array) for name, array in arrays.items()})

    def _put(self, local: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(self._num_groups)
            return local[self._local_position[start] : self._local_position[start] + stop - start]

        return jax.make_array_from_callback((self._num_groups, *local.shape[1:]), self.sharding, part)


def set_names(paths: Sequence[str]) -> tuple[str, ...]:
    """Returns short names of data sets: as many last parts of their paths as it takes to tell them apart."""
    parts = [[part for part in path.split("/") if part] for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = tuple("/".join(part[-count:]) for part in parts)
        if len(set(names)) == len(names):
            return names
    return tuple(f"{'/'.join(part)}#{i}" for i, part in enumerate(parts))
