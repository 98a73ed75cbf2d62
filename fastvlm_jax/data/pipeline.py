"""Records to global batches on the devices.

    RecordSources ──Schedule──> batch(k) ──BatchBuilder──> arrays of this process's groups ──Grain──> Loader ──> Batch

Every process builds only the groups that its own devices hold, so the global batch k is the same array on any mesh.
"""

import collections
import hashlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import grain
import jax
import ml_collections
import numpy as np
from etils import epath

from fastvlm_jax.batch import Batch
from fastvlm_jax.data.facts import Bucket, Settings
from fastvlm_jax.data.groups import Arrays, BatchBuilder, Substituted
from fastvlm_jax.data.index import Counter, load_index
from fastvlm_jax.data.packing import GroupShape
from fastvlm_jax.data.replaced import Replaced
from fastvlm_jax.data.schedule import Schedule
from fastvlm_jax.data.sources import RecordSource, read_manifest, read_shards
from fastvlm_jax.processor import Processor

DECODERS = ("fast", "exact")
_AHEAD = 2  # batches on their way to the devices


class _LocalBatches:
    """Grain's view: item i is this process's part of global batch `start + i`, and the records replaced in it."""

    def __init__(self, build: BatchBuilder, groups: list[int], start: int, stop: int):
        self._build, self._groups, self._start, self._stop = build, groups, start, stop

    def __len__(self) -> int:
        return max(self._stop - self._start, 0)

    def __getitem__(self, item: int) -> tuple[Arrays, list[Substituted], dict]:
        k = self._start + item
        return *self._build(k, self._groups), self._build.schedule.counts(self._build.schedule.batch(k))


class Flow(NamedTuple):
    """What went through a loader since it was last asked.

    Attributes:
      images, tokens: of all processes; tiles and placeholders are counted too.
      truncated: texts that lost their oldest questions, of all processes.
      records: of each data set, of all processes.
      waited: seconds that this process waited for a batch.
      sizes: images by (height, width).
    """

    images: int
    tokens: int
    truncated: int
    records: tuple[int, ...]
    waited: float
    sizes: Mapping[tuple[int, int], int]


class Loader:
    """Iterates over global Batches of `jax.Array`, read, decoded and transferred ahead of time.

    Attributes:
      position: batches given out so far, those before `start` included: the number to save, and to pass as `start`.
      names: of the data sets, for metrics.
      batches_per_epoch: global batches in the first epoch.
      token_fill, image_fill: share of token and image slots used.

    Raises:
      ValueError: from `next`, when more records than the share `max_substituted` cannot be used.
    """

    def __init__(
        self,
        build: BatchBuilder,
        groups: int,
        sharding: jax.sharding.Sharding,
        *,
        start: int = 0,
        stop: int | None = None,
        num_threads: int = 2,
        prefetch: int = 4,
        max_substituted: float = 0.01,
    ):
        schedule = build.schedule
        self.position = start
        self.names = set_names([os.fspath(source.folder) for source in build.sources])
        self.batches_per_epoch = schedule.batches_per_epoch
        self.token_fill, self.image_fill = schedule.token_fill, schedule.image_fill
        self._num_groups, self.sharding = groups, sharding
        try:
            sharding.shard_shape((groups,))
        except ValueError as error:
            raise ValueError(f"data.groups {groups} does not divide over {sharding}: make it a multiple") from error
        indices = sharding.addressable_devices_indices_map((groups,)).values()
        local = sorted({g for (index,) in indices for g in range(*index.indices(groups))})
        self._local_position = {g: i for i, g in enumerate(local)}
        batches = _LocalBatches(build, local, start, sys.maxsize // 2 if stop is None else stop)
        self._length = len(batches) if stop is not None else None
        self._sources, self._replaced = build.sources, Replaced(build, max_substituted)
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        self._host = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
        self._ahead = collections.deque()
        self._flow = self._no_flow()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("an endless loader has no length")
        return self._length

    def __next__(self) -> Batch:
        begin = time.monotonic()
        while len(self._ahead) <= _AHEAD:
            try:
                arrays, substituted, counts = next(self._host)
            except StopIteration:
                break
            except ValueError as error:  # Grain adds lines about itself
                raise ValueError((str(error).splitlines() or ["the input failed"])[0]) from error
            self._ahead.append((self.to_devices(arrays), substituted, counts))
        if not self._ahead:
            raise StopIteration
        batch, substituted, counts = self._ahead.popleft()
        self._replaced.add(substituted, int(counts["records"].sum()))
        self.position += 1
        images, tokens, truncated = (getattr(self._flow, name) + counts[name] for name in Flow._fields[:3])
        records = tuple(np.add(self._flow.records, counts["records"]).tolist())
        sizes = self._flow.sizes + collections.Counter({batch.images.shape[2:4]: int(counts["images"])})
        self._flow = Flow(images, tokens, truncated, records, self._flow.waited + time.monotonic() - begin, sizes)
        return batch

    @property
    def substituted(self) -> int:
        """How many records are known by now that cannot be used, and are replaced wherever they are drawn."""
        return self._replaced.count

    def flow(self) -> Flow:
        """Returns what went through since the last call."""
        flow, self._flow = self._flow, self._no_flow()
        return flow

    def _no_flow(self) -> Flow:
        return Flow(0, 0, 0, (0,) * len(self.names), 0.0, collections.Counter())

    def close(self) -> None:
        """Stops the threads."""
        self._host.close()
        self._ahead.clear()

    def to_devices(self, arrays: Arrays) -> Batch:
        """Starts the transfer of this process's groups."""
        return Batch(**{name: self._put(array) for name, array in arrays.items()})

    def _put(self, local: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(self._num_groups)
            return local[self._local_position[start] : self._local_position[start] + stop - start]

        return jax.make_array_from_callback((self._num_groups, *local.shape[1:]), self.sharding, part)


def set_names(paths: Sequence[str]) -> tuple[str, ...]:
    """Returns short names of data sets: the last parts of their paths that tell them apart."""
    parts = [[part for part in path.split("/") if part] for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = tuple("/".join(part[-count:]) for part in parts)
        if len(set(names)) == len(names):
            return names
    return tuple(f"{'/'.join(part)}#{i}" for i, part in enumerate(parts))


def data_sets(config: ml_collections.ConfigDict) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Returns the folders of `data.path` or `data.mixture`, and their weights; () where each record counts once.

    Raises:
      ValueError: no data set is named, or a mixture is not of (folder, weight) pairs.
    """
    if config.path:
        return (config.path,), ()
    try:
        folders = tuple(os.fspath(epath.Path(config.root) / folder) for folder, _ in config.mixture)
        weights = tuple(float(weight) for _, weight in config.mixture)
    except (TypeError, ValueError) as error:
        raise ValueError(f"data.mixture must be pairs as (('captions', 0.3), ('questions', 0.7)): {error}") from error
    if not folders:
        raise ValueError("data.path is empty: name the folder of shards with --config.data.path=DIR")
    if min(weights) < 0 or (any(weights) and not all(weights)) or not np.isfinite(weights).all():
        raise ValueError(f"data.mixture: weights {weights} must all be positive, or all 0: each record once an epoch")
    return folders, weights if any(weights) else ()


def open_sources(config: ml_collections.ConfigDict, split: str) -> tuple[RecordSource, ...]:
    """Opens a split of every data set of a config; of "validation" those that have it, perhaps none.

    Raises:
      FileNotFoundError, ValueError: see `data_sets` and `read_shards`.
    """
    folders, _ = data_sets(config)
    if split == "validation":
        folders = [f for f in folders if split in read_manifest(epath.Path(f).expanduser())["splits"]]
    return tuple(read_shards(folder, split) for folder in folders)


def fingerprint(sources: Sequence[RecordSource]) -> str:
    """Returns that of the data set, or one for several together."""
    if len(sources) == 1:
        return sources[0].fingerprint
    return hashlib.sha256(" ".join(source.fingerprint for source in sources).encode()).hexdigest()


def make_buckets(config: ml_collections.ConfigDict, processor: Processor) -> tuple[Bucket, ...]:
    """Returns the bucket of each of the processor's sizes: images_per_group of image_size, more of smaller ones.

    Pixels and text tokens of a group stay within those of the square of `image_size`.
    """
    sizes = processor.sizes or (processor.size,)
    shares = dict(config.resolutions) if config.resolutions else {processor.image_size: 1.0}
    buckets = []
    for size in sizes:
        images = config.images_per_group * processor.image_size**2 // (size.height * size.width)
        images = max(images, 1) if config.images_per_group else 0
        buckets.append(Bucket(size, GroupShape(images, config.rows_per_group, config.row_length), shares[size.side]))
    return tuple(buckets)


def make_schedule(
    config: ml_collections.ConfigDict, processor: Processor, sources: Sequence[RecordSource], seed: int | None
) -> Schedule:
    """Returns the schedule of opened data sets; records are counted first where that was not done yet.

    Evaluation (`seed=None`) is at the model's own resolution, `image_size`.
    """
    counter = Counter(processor.tokenizer, processor.template, config.turns)
    indexes = [load_index(source, counter) for source in sources]
    weights = data_sets(config)[1] if seed is not None else ()
    buckets = make_buckets(config, processor)
    if seed is None:
        buckets = tuple(bucket for bucket in buckets if bucket.size.side == processor.image_size)
    settings = Settings(buckets, config.groups, seed, weights, processor.grids, config.overlong)
    split = " ".join(f"{source.fingerprint} {source.split}" for source in sources)
    return Schedule(indexes, settings, f"{split} {counter.id}")


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
      processor: its template, sizes and tokens per image are what the batches are made with.
      seed: of the order.
      sharding: of axis 0, the groups; the data shards must divide `config.groups`.
      start: the position to go on from.

    Raises:
      FileNotFoundError, ValueError: see `read_shards` and `Schedule`; more unusable records than allowed.
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


def make_builder(config: ml_collections.ConfigDict, processor: Processor, split: str, seed: int | None) -> BatchBuilder:
    """Opens what builds the batches of a split, in the order of `seed`; None for evaluation's.

    Raises:
      FileNotFoundError, ValueError: see `read_shards` and `Schedule`; an unknown `data.decode`.
    """
    if config.decode not in DECODERS:
        raise ValueError(f"unknown data.decode {config.decode!r}: choose one of {', '.join(DECODERS)}")
    sources = open_sources(config, split)
    schedule = make_schedule(config, processor, sources, seed)
    cache = {} if config.cache_images else None
    return BatchBuilder(sources, schedule, processor, config.turns, config.overlong, config.decode == "exact", cache)


def _open(config, processor, split, seed, sharding, start, stop) -> Loader:
    build = make_builder(config, processor, split, seed)
    if seed is None:
        batches = build.schedule.batches_per_epoch
        stop = batches if stop is None else min(stop, batches)
    return Loader(
        build,
        config.groups,
        sharding,
        start=start,
        stop=stop,
        num_threads=config.num_threads,
        prefetch=config.prefetch,
        max_substituted=config.max_substituted,
    )
