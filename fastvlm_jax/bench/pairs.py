"""Times the input of stage 0 and compares it with torchvision in a PyTorch DataLoader: `fastvlm bench input`.

    pipeline           the Loader that training uses: reads records and features, decodes, crops, changes and tokenizes,
                       up to batches on the devices
    dataloader_crops   a PyTorch DataLoader that reads the same pictures as files, and crops and changes them alone

Both use as many threads, or worker processes, as the Loader has threads, and take turns, as in input.py.
"""

import contextlib
import dataclasses
import importlib.util
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from absl import logging

from fastvlm_jax.bench.dataloader import start_process
from fastvlm_jax.bench.input import batches_to_time, compete, open_loader, summary, timed
from fastvlm_jax.data.load import pair_builder
from fastvlm_jax.data.load.from_config import make_builder
from fastvlm_jax.data.load.pair_builder import PairBuilder
from fastvlm_jax.data.load.pair_record import augmentations_of
from fastvlm_jax.data.sources import RecordSource
from fastvlm_jax.images.header import read_header
from fastvlm_jax.pair_processor import PairProcessor

PARTS = ("read", "decode", "crop", "tokenize", "pack", "copy")
_BATCH = 32  # pictures in a batch of the DataLoader
_BYTES = 512 << 20  # most bytes of pictures that are written as files
_NAME = "dataloader_crops"


def bench_pairs(
    config: ml_collections.ConfigDict, processor: PairProcessor, sharding: jax.sharding.Sharding, seconds: float = 20.0
) -> dict[str, Any]:
    """Times the training input of a config of stage 0; see the module's docstring.

    Returns:
      What `bench_input` returns, for these contestants and parts.

    Raises:
      FileNotFoundError, ValueError: see `bench_input`.
    """
    build = dataclasses.replace(make_builder(config.data, processor, "train", config.seed), cache=None)
    first, count = batches_to_time(build, config, sharding, seconds)
    left_out: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        stack.callback(logging.set_verbosity, logging.get_verbosity())
        logging.set_verbosity(logging.ERROR)  # unusable records were named once, by the first Loader
        others = _start(stack, build, config, range(first, first + count), left_out)
        flows, rates = compete(build, config, sharding, first, count, seconds, others, left_out)
    return summary(config, processor, seconds, flows, rates, time_parts(build, config, sharding, first), left_out)


def time_parts(build: PairBuilder, config, sharding: jax.sharding.Sharding, batch: int) -> dict[str, float]:
    """Times the builder's code in one thread; returns the ms per image for each of PARTS, and their "total"."""
    spent = dict.fromkeys(PARTS, 0.0)
    loader = open_loader(build, config, sharding, stop=0)
    with contextlib.ExitStack() as stack:
        for owner, attribute, part in (
            (RecordSource, "__getitem__", "read"),
            (pair_builder, "features_of", "read"),
            (pair_builder, "decode", "decode"),
            (pair_builder, "views_into", "decode"),
            (pair_builder, "augment_into", "crop"),
            (type(build.processor.tokenizer), "__call__", "tokenize"),
        ):
            stack.enter_context(timed(owner, attribute, spent, part))
        start = time.perf_counter()
        arrays, _ = build(batch, list(range(config.data.groups)))
        spent["pack"] = time.perf_counter() - start - sum(spent.values())
        start = time.perf_counter()
        jax.block_until_ready(loader.to_devices(arrays))
        spent["copy"] = time.perf_counter() - start
    loader.close()
    images = config.data.groups * config.data.images_per_group
    parts = {name: value / images * 1000 for name, value in spent.items()}
    return parts | {"total": sum(parts.values())}


def _start(
    stack: contextlib.ExitStack, build: PairBuilder, config, batches: Sequence[int], left_out: dict[str, str]
) -> dict[str, Callable[[float], float]]:
    """Starts the contestant with the pictures of some batches, or tells in `left_out` why not."""
    processor = build.processor
    missing = [package for package in ("torch", "torchvision") if importlib.util.find_spec(package) is None]
    if missing:
        left_out[_NAME] = f"{missing[0]} is not installed"
        return {}
    if build.augment == "none" and processor.fit != "crop":
        left_out[_NAME] = "it shows whole images with data.fit='crop' alone"
        return {}
    folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastvlm-bench-")))
    _write_pictures(build, batches, folder)
    flags = {
        "folder": folder, "augment": build.augment, "size": processor.image_size, "batch": _BATCH,
        "workers": max(config.data.num_threads, 1),
    }  # fmt: skip
    lists = {
        "crop_area": build.crop_area, "operations": build.operations, "mean": processor.image_mean,
        "std": processor.image_std,
    }  # fmt: skip
    return {_NAME: start_process(stack, "fastvlm_jax.bench.dataloader_crops", flags, lists)}


def _write_pictures(build: PairBuilder, batches: Sequence[int], folder: pathlib.Path) -> None:
    """Writes the pictures of batches, and their augmentations, as the contestant reads them."""
    schedule, entries, held = build.schedule, [], 0
    for k in batches:
        plan = schedule.batch(k)
        for place in (place for g in range(schedule.groups) for place in schedule.group(plan, g)):
            with contextlib.suppress(ValueError):  # a record that cannot be used
                record = build.sources[place.source][place.record]
                image = record.images[0]
                name = f"{len(entries)}.{read_header(image).kind.lower()}"
                stored = augmentations_of(record) if build.augment == "replay" else []
                (folder / name).write_bytes(image)
                entries.append({"name": name, "param_aug": stored})
                held += len(image)
        if held > _BYTES:
            break
    (folder / "pictures.json").write_text(json.dumps(entries))
