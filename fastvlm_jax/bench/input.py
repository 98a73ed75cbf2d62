"""Times the training input and compares it with other ways to read the same images: `fastvlm bench input`.

The contestants take turns, round after round, so that other work on the machine slows all of them:

    pipeline                 the Loader that training uses, up to batches on the devices
    raw_files                bare threads that read the same images as files, decode and resize them
    raw                      bare threads that decode and resize the same images from memory
    dataloader_pillow        a PyTorch DataLoader that processes the same files as LLaVA does, with Pillow
    dataloader_torchvision   the same, with torchvision

The pairs of stage 0 have another contestant, see pairs.py.
All of them use as many threads, or worker processes, as the Loader has threads.
"""

import contextlib
import dataclasses
import os
import pathlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import logging

from fastvlm_jax import processor as processor_lib
from fastvlm_jax.bench.dataloader import start_dataloaders
from fastvlm_jax.data.load.batch_builder import BatchBuilder
from fastvlm_jax.data.load.from_config import make_builder
from fastvlm_jax.data.load.loader import Builder, Loader
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sources import RecordSource
from fastvlm_jax.images import decode as image_lib
from fastvlm_jax.images.resize import tiles_into
from fastvlm_jax.images.sizes import Grid, Size, slots_of
from fastvlm_jax.processor import Processor

ROUNDS = 5
PARTS = ("read", "decode", "resize", "tokenize", "pack", "copy")
NAMES = {
    "pipeline": "this pipeline",
    "raw_files": "files: read, decode, resize, bare threads",
    "raw": "decode and resize alone, bare threads",
    "dataloader_pillow": "PyTorch DataLoader, Pillow processor",
    "dataloader_torchvision": "PyTorch DataLoader, torchvision processor",
    "dataloader_crops": "PyTorch DataLoader, crops by torchvision",
}
_RAW_BYTES = 512 << 20  # bytes of encoded images held in memory for the other contestants
_JOIN_SECONDS = 60  # timeout for a thread to end
_AHEAD = 3  # batches that a Loader builds before it gives out the first


class _Image(NamedTuple):
    """Holds an encoded image, or the file that contains it, and the size and tiles in which the model sees it."""

    data: bytes | pathlib.Path
    grid: Grid
    size: Size


def bench_input(
    config: ml_collections.ConfigDict, processor: Processor, sharding: jax.sharding.Sharding, seconds: float = 20.0
) -> dict[str, Any]:
    """Times the training input of a config; see the module's docstring.

    Args:
      config: training config, of which `data.*` and `seed` count.
      processor: processor of images and text.
      sharding: sharding of the groups of a batch.
      seconds: how long each contestant is timed over all rounds, without its warm-up.

    Returns:
      A dictionary, JSON-ready: `rates` (images/s) and `ratios` of the pipeline's rate to the others', by contestant,
      each with "median", "min" and "max" over the rounds; `tokens_per_second` of the pipeline, likewise; `parts`, the
      milliseconds of one thread per image for each part, with their "total"; `left_out`, the reason by contestant; and
      the setup: `data`, `image_size`, `groups`, `threads`, `cores`, `rounds`, `seconds`.

    Raises:
      FileNotFoundError: there is no data; see `make_builder`.
      ValueError: the config does not fit the data (see `make_builder`), or the first batches hold no image.
    """
    build, threads = make_builder(config.data, processor, "train", config.seed), max(config.data.num_threads, 1)
    build = dataclasses.replace(build, cache=None)  # a cache would skip the decoding, which is timed here
    if not any(build.schedule.counts(build.schedule.batch(k))["images"] for k in range(threads)):
        raise ValueError("the first batches hold no image: there is no input to time")
    first, count = batches_to_time(build, config, sharding, seconds)
    images, records = _gather(build, range(first, first + count))
    with contextlib.ExitStack() as stack:
        stack.callback(logging.set_verbosity, logging.get_verbosity())
        logging.set_verbosity(logging.ERROR)  # unusable records were named once, by the first Loader
        files = _as_files(images, pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())))
        theirs, left_out = start_dataloaders(stack, build, records, threads)
        raw = {
            "raw_files": lambda _: _run_raw(build, files, threads),
            "raw": lambda _: _run_raw(build, images, threads),
        }
        flows, rates = compete(build, config, sharding, first, count, seconds, raw | theirs, left_out)
        parts = time_parts(build, config, sharding, range(first, first + max(threads, count // 2)))
    return summary(config, processor, seconds, flows, rates, parts, left_out)


def batches_to_time(build: Builder, config, sharding: jax.sharding.Sharding, seconds: float) -> tuple[int, int]:
    """Returns the number of the first batch to time, and how many take a round's share of the seconds."""
    threads = max(config.data.num_threads, 1)
    first = _AHEAD + threads
    *_, took = run_pipeline(build, config, sharding, first, threads)
    # Threads finish at about the same time: batches of all of them are counted.
    return first, threads * max(1, round(seconds / ROUNDS / (took or 1e-9)))


def compete(
    build: Builder, config, sharding, first: int, count: int, seconds: float,
    others: dict[str, Callable[[float], float]], left_out: dict[str, str],
) -> tuple[list[tuple[int, int, float]], dict[str, list[float]]]:  # fmt: skip
    """Runs the pipeline and the other contestants in turns.

    Args:
      first, count: batches of the pipeline.
      seconds: time of a contestant over all rounds.
      others: functions that run a contestant for some seconds and return its images/s, or raise ValueError.
      left_out: gets the reason why a contestant failed.

    Returns:
      What `run_pipeline` returned in each round; and the images/s of each contestant in each round, by name.
    """
    flows, rates, running = [], {"pipeline": []}, dict(others)
    for _ in range(ROUNDS):
        flows.append(run_pipeline(build, config, sharding, first, count))
        rates["pipeline"].append(flows[-1][0] / flows[-1][2])
        for name, run in list(running.items()):
            try:
                rates.setdefault(name, []).append(run(seconds / ROUNDS))
            except ValueError as error:
                left_out[name] = str(error)
                running.pop(name), rates.pop(name)
    return flows, rates


def summary(config, processor, seconds: float, flows, rates, parts, left_out) -> dict[str, Any]:
    """Returns the result of `bench_input`."""
    ours = rates["pipeline"]
    return {
        "data": config.data.path or [list(pair) for pair in config.data.mixture],
        "image_size": processor.image_size,
        "groups": config.data.groups,
        "threads": max(config.data.num_threads, 1),
        "cores": len(os.sched_getaffinity(0)),
        "rounds": ROUNDS,
        "seconds": seconds,
        "ratios": {
            name: spread([a / b for a, b in zip(ours, other, strict=True)])
            for name, other in rates.items()
            if name != "pipeline"
        },
        "rates": {name: spread(values) for name, values in rates.items()},
        "tokens_per_second": spread([tokens / took for _, tokens, took in flows]),
        "parts": parts,
        "left_out": left_out,
    }


def describe(found: dict[str, Any]) -> str:
    """Formats the result as a table, ratios first."""

    def numbers(values: dict[str, float], digits: int) -> str:
        median, low, high = (f"{values[key]:.{digits}f}" for key in ("median", "min", "max"))
        return f"{median} ({low} to {high})"

    lines = [
        f"{found['data']}, {found['image_size']} px, batches of {found['groups']} groups, {found['threads']} threads "
        f"on {found['cores']} cores; medians of {found['rounds']} rounds (minimum to maximum)",
        "",
        f"{'':42}{'ratio':24}images/s",
    ]
    for name, rate in found["rates"].items():
        ratio = numbers(found["ratios"][name], 2) if name in found["ratios"] else "1"
        lines.append(f"{NAMES[name]:42}{ratio:24}{numbers(rate, 1)}")
    lines += [f"{NAMES[name]:42}left out: {reason}" for name, reason in found["left_out"].items()]
    parts = ", ".join(f"{name} {took:.2f}" for name, took in found["parts"].items() if name != "total")
    return "\n".join(
        [
            *lines,
            "",
            f"tokens/s: {numbers(found['tokens_per_second'], 0)}",
            f"milliseconds of one thread per image: {parts}; total {found['parts']['total']:.2f}",
        ]
    )


def time_parts(
    build: BatchBuilder, config, sharding: jax.sharding.Sharding, batches: Sequence[int]
) -> dict[str, float]:
    """Times the builder's own code in one thread; returns the ms per image for each of PARTS, and their "total"."""
    spent = dict.fromkeys(PARTS, 0.0)
    groups, images = list(range(config.data.groups)), 0
    loader = open_loader(build, config, sharding, stop=0)
    processor_lib._segment.cache_clear()
    with contextlib.ExitStack() as stack:
        for owner, attribute, part in (
            (RecordSource, "__getitem__", "read"),
            (BatchBuilder, "segments", "tokenize"),
            (image_lib, "decode", "decode"),
            (image_lib, "_decode_into", "decode"),
            (image_lib, "fit_into", "resize"),
            (image_lib, "tiles_into", "resize"),
        ):
            stack.enter_context(timed(owner, attribute, spent, part))
        for k in batches:
            start, other = time.perf_counter(), sum(spent.values())
            arrays, _ = build(k, groups)
            spent["pack"] += time.perf_counter() - start - (sum(spent.values()) - other)
            images += int(arrays["image_mask"].sum())
            start = time.perf_counter()
            jax.block_until_ready(loader.to_devices(arrays))
            spent["copy"] += time.perf_counter() - start
    loader.close()
    parts = {name: value / max(images, 1) * 1000 for name, value in spent.items()}
    return parts | {"total": sum(parts.values())}


@contextlib.contextmanager
def timed(owner: Any, attribute: str, spent: dict[str, float], part: str) -> Iterator[None]:
    """Adds the time of a function's calls to `spent[part]`, by replacing it with a timed version within the block."""
    function = getattr(owner, attribute)

    def with_clock(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[part] += time.perf_counter() - start

    setattr(owner, attribute, with_clock)
    try:
        yield
    finally:
        setattr(owner, attribute, function)


def run_pipeline(build: Builder, config, sharding, first: int, count: int) -> tuple[int, int, float]:
    """Skips `first` batches; returns the images and tokens of the next `count`, and the seconds they took to arrive."""
    processor_lib._segment.cache_clear()  # in training a text is tokenized once an epoch
    before = set(threading.enumerate())
    loader = open_loader(build, config, sharding)
    try:
        for _ in range(first):
            jax.block_until_ready(next(loader))
        loader.flow()
        start = time.perf_counter()
        for _ in range(count):
            jax.block_until_ready(next(loader))
        seconds = time.perf_counter() - start
        flow = loader.flow()
    finally:
        loader.close()
        for thread in set(threading.enumerate()) - before:  # they first finish the batches that they have begun
            thread.join(_JOIN_SECONDS)
    return flow.images, flow.tokens, seconds


def open_loader(build: Builder, config, sharding, stop: int | None = None) -> Loader:
    data = config.data
    return Loader(
        build, data.groups, sharding, stop=stop, num_threads=data.num_threads, prefetch=data.prefetch,
        max_substituted=data.max_substituted,
    )  # fmt: skip


def _gather(build: BatchBuilder, batches: Sequence[int]) -> tuple[list[_Image], list[Record]]:
    """Collects the encoded images of batches, and their records, up to _RAW_BYTES."""
    schedule, processor, images, records, held = build.schedule, build.processor, [], [], 0
    for k in batches:
        plan = schedule.batch(k)
        size = schedule.settings.buckets[plan.bucket].size
        for place in (place for g in range(schedule.groups) for place in schedule.group(plan, g)):
            with contextlib.suppress(ValueError):
                record = build.sources[place.source][place.record]
                grids = [processor.grid(*image_lib.size_of(image), size.side) for image in record.images]
                images += [_Image(image, grid, size) for image, grid in zip(record.images, grids, strict=True)]
                records.append(record)
                held += sum(map(len, record.images))
        if held > _RAW_BYTES:
            break
    return images, records


def _as_files(images: Sequence[_Image], folder: pathlib.Path) -> list[_Image]:
    files = [folder / str(i) for i in range(len(images))]
    for image, file in zip(images, files, strict=True):
        file.write_bytes(image.data)
    return [image._replace(data=file) for image, file in zip(images, files, strict=True)]


def _run_raw(build: BatchBuilder, images: Sequence[_Image], count: int) -> float:
    """Returns the images/s of `count` threads that only read, decode and resize images, each into its own memory."""
    processor = build.processor
    shapes = [(slots_of(image.grid), image.size.height, image.size.width, 3) for image in images]
    memory = [np.zeros(max(map(np.prod, shapes)), np.uint8) for _ in range(count)]
    seen = [0] * count

    def work(thread: int) -> None:
        for image, shape in zip(images[thread::count], shapes[thread::count], strict=True):
            out = memory[thread][: np.prod(shape)].reshape(shape)
            with contextlib.suppress(ValueError):
                mode, background, exact = processor.overview(image.grid), processor.background, build.exact
                data = image.data if isinstance(image.data, bytes) else image.data.read_bytes()
                at_least = None if exact else image_lib.enough(data, out.shape[1:3], image.grid, mode)
                pixels = image_lib.decode(data, at_least, processor.transparency)
                image_lib.fit_into(pixels, out[0], mode, background, exact)
                if len(out) > 1:
                    tiles_into(pixels, out[1:], image.grid, exact)
                seen[thread] += len(out)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(count)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(seen) / (time.perf_counter() - start)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
