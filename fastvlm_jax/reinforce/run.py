"""Reinforces a data set of pairs: draws augmentations, lets teachers embed all views and captions, and writes tars.

    records ──threads: decode, draw, augment──> views, captions ──devices: teachers──> embeddings ──> tars, in order

A tar depends on its records, the teachers and the settings alone: batches do not reach from one tar into the next, so
that an interrupted run ends with the same bytes as a straight one.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import os
import pathlib
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from fastvlm_jax import sharding
from fastvlm_jax.data.record import Rejected
from fastvlm_jax.data.sources import MANIFEST, RecordSource, read_shards
from fastvlm_jax.data.write.folder import local_folder, locked
from fastvlm_jax.data.write.reinforced import Sample, add, members
from fastvlm_jax.files import whole_file
from fastvlm_jax.reinforce import plan as plans
from fastvlm_jax.reinforce.draw import make_sample, views_of
from fastvlm_jax.reinforce.plan import Settings
from fastvlm_jax.reinforce.summary import Summary, summarise
from fastvlm_jax.reinforce.teachers import Teacher, embed_texts, embed_views, open_teachers, wait_for

Drawn = tuple[Sample, dict[int, np.ndarray]]  # a pair and its views by their size, uint8 [augmentations, size, size, 3]


@dataclasses.dataclass(frozen=True)
class Progress:
    """Describes how far a run is.

    Attributes:
      done: number of records that are done, those of earlier runs included.
      records: number of records of the source.
      written: number of pairs that this run wrote.
      rejected: number of records that this run rejected.
      seconds: time since the first record, s.
    """

    done: int
    records: int
    written: int = 0
    rejected: int = 0
    seconds: float = 0.0


def reinforce(
    source: str | os.PathLike,
    teachers: Sequence[str],
    output: str | os.PathLike,
    settings: Settings | None = None,
    *,
    overwrite: bool = False,
    devices: Sequence[jax.Device] | None = None,
    progress: Callable[[Progress], None] = lambda state: None,
) -> Summary:
    """Writes the pairs of a split with augmentations and with the embeddings of teachers, as tars in `output`.

    Args:
      source: folder of shards that `fastvlm data write` wrote, local or gs://.
      teachers: models that model_io.read knows, with an image and a text tower; their embeddings are concatenated.
      output: local folder.
      settings: how the data set is reinforced.
      overwrite: whether to replace tars of another source, other teachers or other settings.
      devices: devices of the teachers; by default all of this process.
      progress: function that is called with the progress after each pair.

    Raises:
      FileNotFoundError: the source or a teacher does not exist.
      ValueError: a teacher is no CLIP with a tokenizer, the output is occupied, or the first tar would have no pair.
      OSError: the output cannot be written, for example because the disk is full.
    """
    settings, output = settings or Settings(), local_folder(output)
    records = read_shards(source, settings.split)
    if not len(records):
        raise ValueError(f"{source}: its split {settings.split!r} is empty")
    if (output / MANIFEST).exists():
        raise ValueError(f"{output} holds shards: choose another --output for the tars")
    devices = jax.local_devices() if devices is None else devices
    mesh = sharding.make_mesh(devices=devices)
    settings = dataclasses.replace(settings, batch_size=-(-settings.batch_size // len(devices)) * len(devices))
    opened = open_teachers(teachers, mesh)
    plan = plans.make_plan(records, opened, settings)
    with locked(output):
        plans.begin(output, plan, overwrite)
        tars = [plans.tar_of(output, i) for i in range(-(-len(records) // settings.tar_records))]
        to_do = [(number, tar) for number, tar in enumerate(tars) if plans.read_done(tar) is None]
        start = time.monotonic()
        try:
            _write(to_do, records, opened, settings, mesh, progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command goes on from here") from None
        done = [plans.read_done(tar) for tar in tars]
        plans.list_rejected(output, settings.split, done)
        return summarise(output, plan, done, [number for number, _ in to_do], time.monotonic() - start)


def _write(
    to_do: Sequence[tuple[int, pathlib.Path]], records: RecordSource, teachers: Sequence[Teacher], settings: Settings,
    mesh: Mesh, progress: Callable[[Progress], None],
) -> None:  # fmt: skip
    """Writes the tars with these numbers."""
    count, size = len(records), settings.tar_records
    ranges = [range(number * size, min((number + 1) * size, count)) for number, _ in to_do]
    state = Progress(count - sum(map(len, ranges)), count)
    start = time.monotonic()

    def show(written: int, rejected: int) -> None:
        nonlocal state
        state = Progress(
            state.done + written + rejected, count, state.written + written, state.rejected + rejected,
            time.monotonic() - start,
        )  # fmt: skip
        progress(state)

    sizes = [teacher.processor.image_size for teacher in teachers]
    pool = concurrent.futures.ThreadPoolExecutor(settings.workers or len(os.sched_getaffinity(0)))
    try:
        drawn = _in_order(
            pool, lambda number: _draw(records, number, settings, sizes), itertools.chain(*ranges), settings.batch_size
        )
        for (number, tar), numbers in zip(to_do, ranges, strict=True):
            own = itertools.islice(drawn, len(numbers))
            _write_tar(tar, own, teachers, settings, mesh, show, may_be_empty=number > 0)
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: concurrent.futures.Executor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """Yields function(item) of each item in order, while the pool computes those of the next `ahead` items."""
    coming: collections.deque[concurrent.futures.Future] = collections.deque()
    for item in items:
        coming.append(pool.submit(function, item))
        if len(coming) > ahead:
            yield coming.popleft().result()
    while coming:
        yield coming.popleft().result()


def _draw(records: RecordSource, number: int, settings: Settings, sizes: Sequence[int]) -> Drawn | Rejected:
    key = ""
    try:
        record = records[number]
        key = record.key
        sample, image = make_sample(record, number, settings)
        return sample, views_of(image, sample.entries, settings.image_size, sizes)
    except ValueError as error:
        return Rejected(records.where(number), key, str(error))


def _write_tar(
    path: pathlib.Path, drawn: Iterator[Drawn | Rejected], teachers: Sequence[Teacher], settings: Settings,
    mesh: Mesh, show: Callable[[int, int], None], may_be_empty: bool,
) -> None:  # fmt: skip
    """Writes a tar of the pairs among `drawn`, and records that it is complete.

    Raises:
      ValueError: no record is a pair, and the tar may not be empty.
    """
    rejected: list[Rejected] = []
    pairs = synthetic = 0

    def usable() -> Iterator[Drawn]:
        for entry in drawn:
            if isinstance(entry, Rejected):
                rejected.append(entry)
                show(0, 1)
            else:
                yield entry

    with whole_file(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for sample, images, texts in _embedded(usable(), teachers, settings.batch_size, mesh):
            add(archive, sample.number, members(sample, images, texts, settings.dtype))
            pairs, synthetic = pairs + 1, synthetic + bool(sample.synthetic)
            show(1, 0)
        if not pairs and not may_be_empty:
            raise ValueError(
                f"none of the first {len(rejected)} records is a pair of a picture and its caption, as in "
                f"{rejected[0].file}: {rejected[0].reason}"
            )
    plans.save_done(path, {"pairs": pairs, "synthetic": synthetic, "rejected": rejected})


def _embedded(
    drawn: Iterator[Drawn], teachers: Sequence[Teacher], batch_size: int, mesh: Mesh
) -> Iterator[tuple[Sample, np.ndarray, np.ndarray]]:
    """Yields pairs with the embeddings of their views and of their texts, while the devices embed the next ones."""
    before: Any = None
    while chunk := list(itertools.islice(drawn, batch_size)):
        samples = [sample for sample, _ in chunk]
        views = {size: np.concatenate([own[size] for _, own in chunk]) for size in chunk[0][1]}
        coming = (
            samples,
            embed_views(teachers, views, batch_size, mesh),
            embed_texts(teachers, [text for sample in samples for text in sample.texts], batch_size, mesh),
        )
        if before:
            yield from _divided(*before)
        before = coming
    if before:
        yield from _divided(*before)


def _divided(samples: Sequence[Sample], views, texts) -> Iterator[tuple[Sample, np.ndarray, np.ndarray]]:
    """Waits for the embeddings of some pairs, and yields each pair with its own."""
    image_counts, text_counts = [len(s.entries) for s in samples], [len(s.texts) for s in samples]
    images, texts = wait_for(views, sum(image_counts)), wait_for(texts, sum(text_counts))
    if not (np.isfinite(images).all() and np.isfinite(texts).all()):
        raise ValueError(f"a teacher gives embeddings that are not finite, from record {samples[0].number} on")
    split = (np.split(x, np.cumsum(counts[:-1])) for x, counts in ((images, image_counts), (texts, text_counts)))
    yield from zip(samples, *split, strict=True)
