"""Starts the PyTorch contestants of input.py and pairs.py in separate processes."""

import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastvlm_jax.data.load.batch_builder import BatchBuilder
from fastvlm_jax.data.record import Record
from fastvlm_jax.images.header import read_header
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.conversation import TEMPLATES

_BATCH = 8  # records per batch
_REQUIRED = {  # packages that each contestant imports
    "dataloader_pillow": ("torch", "transformers"),
    "dataloader_torchvision": ("torch", "transformers", "torchvision"),
}


def start_dataloaders(
    stack: contextlib.ExitStack, build: BatchBuilder, records: Sequence[Record], workers: int
) -> tuple[dict[str, Callable[[float], float]], dict[str, str]]:
    """Starts the contestants that can be compared on the images of `records`.

    Args:
      stack: exit stack that ends the processes.
      build: builder of the pipeline's batches, whose processor and sizes the contestants share.
      records: records to write as files for the contestants.
      workers: worker processes of each DataLoader.

    Returns:
      Two dictionaries by name of the contestant. The first holds functions that run a DataLoader for some seconds and
      return its images/s; they raise ValueError if it fails. The second holds the reason why a contestant is left out.
    """
    found, left_out = {}, {}
    for name, needed in _REQUIRED.items():
        missing = [package for package in needed if importlib.util.find_spec(package) is None]
        if build.processor.grids or len(build.schedule.settings.buckets) > 1:
            left_out[name] = "it supports only one image size and no tiles"
        elif missing:
            left_out[name] = f"{missing[0]} is not installed"
    if len(left_out) < len(_REQUIRED):
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastvlm-bench-")))
        _write_llava(folder, records, build.processor)
        for name in (name for name in _REQUIRED if name not in left_out):
            found[name] = _start(stack, folder, name.removeprefix("dataloader_"), build.processor, workers)
    return found, left_out


def _write_llava(folder: pathlib.Path, records: Sequence[Record], processor: Processor) -> None:
    """Writes records as files in LLaVA's format: images, train.json, the tokenizer and the template."""
    (folder / "images").mkdir()
    entries, template = [], TEMPLATES[processor.template]
    roles = {"user": "human", "assistant": "gpt", "system": "system"}
    for i, record in enumerate(record for record in records if record.images):
        names = [f"{i}-{j}.{read_header(image).kind.lower()}" for j, image in enumerate(record.images)]
        for name, image in zip(names, record.images, strict=True):
            (folder / "images" / name).write_bytes(image)
        turns = [
            {"from": roles[role], "value": "".join(part if isinstance(part, str) else "<image>\n" for part in content)}
            for role, content in record.turns
        ]
        entries.append({"images": names, "conversations": turns})
    (folder / "train.json").write_text(json.dumps(entries))
    processor.save(folder / "tokenizer")
    end = {role: text.replace("{end}", processor.tokenizer.end) for role, text in template.after.items()}
    texts = {"before": dict(template.before), "after": end, "system": template.system}
    (folder / "template.json").write_text(json.dumps(texts))


def _start(stack, folder: pathlib.Path, backend: str, processor: Processor, workers: int) -> Callable[[float], float]:
    flags = {
        "folder": folder, "backend": backend, "size": processor.image_size, "fit": processor.fit,
        "batch": _BATCH, "workers": workers,
    }  # fmt: skip
    lists = {"mean": processor.image_mean, "std": processor.image_std}
    return start_process(stack, "fastvlm_jax.bench.dataloader_torch", flags, lists)


def start_process(
    stack: contextlib.ExitStack, module: str, flags: Mapping[str, Any], lists: Mapping[str, Sequence[float]]
) -> Callable[[float], float]:
    """Starts the process of one contestant; returns the function that runs it for some seconds.

    Args:
      stack: exit stack that ends the process.
      module: module that is run; it answers each number of seconds on stdin with a line of JSON, see
        dataloader_torch.py.
      flags: its flags.
      lists: its flags of several numbers.
    """
    log = stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
    command = [sys.executable, "-m", module, *(f"--{key}={value}" for key, value in flags.items())]
    for key, values in lists.items():
        command += [f"--{key}", *map(str, values)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    stack.callback(process.wait)
    stack.callback(process.terminate)

    def answer() -> dict[str, float]:
        line = process.stdout.readline()
        if not line:
            log.seek(0)
            raise ValueError(f"it failed: {(log.read().strip().splitlines() or ['no reason given'])[-1]}")
        return json.loads(line)

    def ask(seconds: float) -> float:
        if not ready:
            ready.append(answer())
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{seconds}\n")
            process.stdin.flush()
        result = answer()
        return result["images"] / result["seconds"]

    ready: list[dict[str, float]] = []
    return ask
