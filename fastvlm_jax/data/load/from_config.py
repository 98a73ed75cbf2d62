"""Opens the input pipeline that a config describes: from records to global batches on the devices.

    RecordSources ──Schedule──> batch(k) ──BatchBuilder──> arrays of this process's groups ──Grain──> Loader ──> Batch
    of stage 0:   PairSchedule             PairBuilder                                                       PairBatch

Every process builds only the groups that its own devices hold, and global batch k is the same array on any mesh.
"""

from collections.abc import Collection, Sequence

import jax
import ml_collections
from etils import epath

from fastvlm_jax.data.index import Counter, load_index
from fastvlm_jax.data.load.batch_builder import BatchBuilder
from fastvlm_jax.data.load.lengths import Settings, make_buckets
from fastvlm_jax.data.load.loader import Builder, Loader
from fastvlm_jax.data.load.packing import GroupShape
from fastvlm_jax.data.load.pair_builder import PairBuilder
from fastvlm_jax.data.load.pair_schedule import PairSchedule
from fastvlm_jax.data.load.schedule import Schedule
from fastvlm_jax.data.mixture import data_sets
from fastvlm_jax.data.sources import RecordSource, read_manifest, read_shards
from fastvlm_jax.pair_processor import PairProcessor
from fastvlm_jax.processor import Processor

DECODERS = ("fast", "exact")


def open_sources(config: ml_collections.ConfigDict, split: str) -> tuple[RecordSource, ...]:
    """Opens a split of every data set of a config; for "validation", of those that have records in it, perhaps none.

    Raises:
      FileNotFoundError, ValueError: see `data_sets` and `read_shards`.
    """
    folders, _ = data_sets(config)
    if split == "validation":
        held_out = {f: read_manifest(epath.Path(f).expanduser())["splits"].get(split, {}) for f in folders}
        folders = [f for f in folders if held_out[f].get("records")]
    return tuple(read_shards(folder, split) for folder in folders)


def make_schedule(
    config: ml_collections.ConfigDict, processor: Processor, sources: Sequence[RecordSource], seed: int | None
) -> Schedule:
    """Returns the schedule of opened data sets; records without an index are tokenized and counted first.

    Evaluation (`seed=None`) uses the model's own resolution only, `image_size`.
    """
    counter = Counter(processor.tokenizer, processor.template, config.turns)
    indexes = [load_index(source, counter) for source in sources]
    weights = data_sets(config)[1] if seed is not None else ()
    sizes = processor.sizes or (processor.size,)
    if seed is None:
        sizes = tuple(size for size in sizes if size.side == processor.image_size)
    shares = dict(config.resolutions) if config.resolutions else {processor.image_size: 1.0}
    shape = GroupShape(config.images_per_group, config.rows_per_group, config.row_length)
    buckets = make_buckets(sizes, processor.image_size, shape, shares)
    settings = Settings(buckets, config.groups, seed, weights, processor.grids, config.overlong)
    split = " ".join(f"{source.fingerprint} {source.split}" for source in sources)
    return Schedule(indexes, settings, f"{split} {counter.id}")


def make_pair_schedule(
    config: ml_collections.ConfigDict, processor: PairProcessor, sources: Sequence[RecordSource], seed: int | None
) -> PairSchedule:
    """Returns the schedule of opened data sets whose records are pairs; no index of them is needed."""
    return PairSchedule(
        list(map(len, sources)),
        groups=config.groups,
        pairs=config.images_per_group,
        tokens=config.texts * processor.context_length,
        seed=seed,
        weights=data_sets(config)[1] if seed is not None else (),
    )


def make_loader(
    config: ml_collections.ConfigDict,
    processor: Processor | PairProcessor,
    split: str,
    *,
    seed: int,
    sharding: jax.sharding.Sharding,
    start: int = 0,
    num_batches: int | None = None,
    passed_over: Collection[int] = (),
) -> Loader:
    """Opens a shuffled stream of the batches of `split`: endless, or those of the `num_batches` from batch `start` on.

    Args:
      config: the keys `data.*`.
      processor: tokenizer, template, image sizes and tokens per image of the batches; a PairProcessor gives pairs.
      split: name of the split.
      seed: seed of the order.
      sharding: sharding of axis 0, the groups; its data shards must divide `config.groups`.
      start: number of the first batch, the data position of a resumed run.
      num_batches: number of batches; None = no end.
      passed_over: numbers of batches that are left out of the stream.

    Raises:
      FileNotFoundError, ValueError: see `read_shards` and `Schedule`.
      ValueError: more records cannot be used than `data.max_substituted` allows.
    """
    stop = None if num_batches is None else start + num_batches
    return _open(config, processor, split, seed, sharding, start, stop, passed_over)


def eval_batches(
    config: ml_collections.ConfigDict,
    processor: Processor | PairProcessor,
    split: str,
    *,
    sharding: jax.sharding.Sharding,
    num_batches: int | None = None,
) -> Loader:
    """Opens one pass over `split` in the order of its records; empty groups fill up the last batch.

    Of pairs, those that do not fill a batch are left out: their loss depends on the size of the batch. They are shown
    without augmentation, and without the features of teachers.

    Raises:
      ValueError: the split has fewer pairs than a batch; or see `make_builder`.
    """
    return _open(config, processor, split, None, sharding, 0, num_batches)


def make_builder(
    config: ml_collections.ConfigDict, processor: Processor | PairProcessor, split: str, seed: int | None
) -> Builder:
    """Returns the builder of a split's batches, shuffled by `seed`; None = in the order of evaluation.

    Raises:
      FileNotFoundError, ValueError: see `read_shards` and `Schedule`.
      ValueError: `data.decode` is unknown, no data set has the split, or one of them holds no pairs of stage 0.
    """
    if config.decode not in DECODERS:
        raise ValueError(f"unknown data.decode {config.decode!r}: choose one of {', '.join(DECODERS)}")
    sources = open_sources(config, split)
    if not sources:
        raise ValueError(f"no data set of the config has a split {split!r}: choose another --split")
    cache, exact = {} if config.cache_images else None, config.decode == "exact"
    if isinstance(processor, PairProcessor):
        builder = PairBuilder(
            sources,
            make_pair_schedule(config, processor, sources, seed),
            processor,
            config.texts,
            "none" if seed is None else config.augment,
            tuple(config.crop_area),
            tuple(map(int, config.operations)),
            exact,
            cache,
        )
        builder.check()
        return builder
    schedule = make_schedule(config, processor, sources, seed)
    return BatchBuilder(sources, schedule, processor, config.turns, config.overlong, exact, cache)


def _open(config, processor, split, seed, sharding, start, stop, passed_over=()) -> Loader:
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
        passed_over=passed_over,
        num_threads=config.num_threads,
        prefetch=config.prefetch,
        max_substituted=config.max_substituted,
    )
