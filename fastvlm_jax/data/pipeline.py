"""Records to global batches on the devices.

    RecordSource ──Schedule──> plan(k, g) ──GroupBuilder──> arrays of one group ──Grain threads──> Loader ──> Batch

Every process builds only the groups that its own devices hold, so the global batch k is the same array on any mesh.
"""

import collections
import sys
from collections.abc import Iterator

import grain
import jax
import ml_collections
import numpy as np

from fastvlm_jax.batch import Batch
from fastvlm_jax.data.groups import Arrays, GroupBuilder, index_records
from fastvlm_jax.data.processor import Processor
from fastvlm_jax.data.schedule import GroupShape, Schedule
from fastvlm_jax.data.sources import read_shards

TURNS = ("separate", "conversation")
_AHEAD = 2  # batches on their way to the devices


class _LocalBatches:
    """Grain's view: item i is this process's part of global batch `start + i`, and its count of replaced records."""

    def __init__(self, build: GroupBuilder, schedule: Schedule, groups: list[int], start: int, stop: int):
        self._build, self._schedule, self._groups = build, schedule, groups
        self._start, self._stop = start, stop

    def __len__(self) -> int:
        return max(self._stop - self._start, 0)

    def __getitem__(self, item: int) -> tuple[Arrays, int]:
        built = [self._build(self._schedule.plan(self._start + item, g)) for g in self._groups]
        return {name: np.stack([arrays[name] for arrays, _ in built]) for name in built[0][0]}, sum(n for _, n in built)


class Loader:
    """Iterates over global Batches of `jax.Array`, read, decoded and transferred ahead of time.

    Attributes:
      position: batches given out so far, those before `start` included: the number to save, and to pass as `start`.
      substituted: unreadable records replaced in the batches given out by this process.
      batches_per_epoch: global batches in an epoch (a fraction).
      token_fill, image_fill: share of token and image slots used.
      fingerprint: that of the dataset, for the lineage.
    """

    def __init__(
        self,
        build: GroupBuilder,
        schedule: Schedule,
        groups: int,
        sharding: jax.sharding.Sharding,
        *,
        start: int = 0,
        stop: int | None = None,
        num_threads: int = 2,
        prefetch: int = 4,
    ):
        self.position, self.substituted = start, 0
        self.batches_per_epoch, self.fingerprint = schedule.batches_per_epoch, build.source.fingerprint
        self.token_fill, self.image_fill = schedule.token_fill, schedule.image_fill
        self._num_groups, self.sharding = groups, sharding
        try:
            sharding.shard_shape((groups,))
        except ValueError as error:
            raise ValueError(f"data.groups {groups} does not divide over {sharding}: make it a multiple") from error
        indices = sharding.addressable_devices_indices_map((groups,)).values()
        local = sorted({g for (index,) in indices for g in range(*index.indices(groups))})
        self._local_position = {g: i for i, g in enumerate(local)}
        batches = _LocalBatches(build, schedule, local, start, sys.maxsize // 2 if stop is None else stop)
        self._length = len(batches) if stop is not None else None
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        self._host = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
        self._ahead = collections.deque()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("an endless loader has no length")
        return self._length

    def __next__(self) -> Batch:
        while len(self._ahead) <= _AHEAD:
            try:
                arrays, substituted = next(self._host)
            except StopIteration:
                break
            self._ahead.append((Batch(**{name: self._put(array) for name, array in arrays.items()}), substituted))
        if not self._ahead:
            raise StopIteration
        batch, substituted = self._ahead.popleft()
        self.position += 1
        self.substituted += substituted
        return batch

    def close(self) -> None:
        """Stops the threads."""
        self._host.close()
        self._ahead.clear()

    def _put(self, local: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(self._num_groups)
            return local[self._local_position[start] : self._local_position[start] + stop - start]

        return jax.make_array_from_callback((self._num_groups, *local.shape[1:]), self.sharding, part)


def make_loader(
    config: ml_collections.ConfigDict,
    processor: Processor,
    split: str,
    *,
    seed: int,
    sharding: jax.sharding.Sharding,
    start: int = 0,
    num_batches: int | None = None,
) -> Loader:
    """Opens an endless, shuffled stream of batches of `split` (or the `num_batches` from `start` on).

    Args:
      config: the keys `data.*`.
      processor: its template, image size and tokens per image are what the batches are made with.
      seed: of the order.
      sharding: of axis 0, the groups; the data shards must divide `config.groups`.
      start: the position to go on from.

    Raises:
      FileNotFoundError, ValueError: see `read_shards` and `Schedule`.
    """
    stop = None if num_batches is None else start + num_batches
    return _open(config, processor, split, seed, sharding, start, stop)


def eval_batches(
    config: ml_collections.ConfigDict,
    processor: Processor,
    split: str,
    *,
    sharding: jax.sharding.Sharding,
    num_batches: int | None = None,
) -> Loader:
    """Opens one pass over `split` in the order of its records; the last batch is filled up with empty groups."""
    return _open(config, processor, split, None, sharding, 0, num_batches)


def _open(config, processor, split, seed, sharding, start, stop) -> Loader:
    if config.turns not in TURNS:
        raise ValueError(f"unknown data.turns {config.turns!r}: choose one of {', '.join(TURNS)}")
    source = read_shards(config.path, split)
    shape = GroupShape(config.images_per_group, config.rows_per_group, config.row_length)
    schedule = Schedule(index_records(source, processor, config.turns), shape, config.groups, seed)
    if seed is None:
        whole = -(-schedule.num_groups // config.groups)
        stop = whole if stop is None else min(stop, whole)
    build = GroupBuilder(source, processor, shape, config.turns, {} if config.cache_images else None)
    return Loader(
        build,
        schedule,
        config.groups,
        sharding,
        start=start,
        stop=stop,
        num_threads=config.num_threads,
        prefetch=config.prefetch,
    )
