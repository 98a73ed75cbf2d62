"""The PyTorch contestants of input.py: dataloader_torch.py in processes of their own."""

import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

from fastvlm_jax.data.load.batch_builder import BatchBuilder
from fastvlm_jax.data.record import Record
from fastvlm_jax.images.header import read_header
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.conversation import TEMPLATES

_BATCH = 8
_NEEDS = {
    "dataloader_pillow": ("torch", "transformers"),
    "dataloader_torchvision": ("torch", "transformers", "torchvision"),
}


def start_dataloaders(
    stack: contextlib.ExitStack, build: BatchBuilder, records: Sequence[Record], workers: int
) -> tuple[dict[str, Callable[[float], float]], dict[str, str]]:
    """Starts what can be compared on the files of `records`; `stack` ends it.

    Returns:
      name -> a function that runs a DataLoader for some seconds and returns its images/s (ValueError if it fails), and
      name -> why there is none.
    """
    found, left_out = {}, {}
    for name, needed in _NEEDS.items():
        missing = [package for package in needed if importlib.util.find_spec(package) is None]
        if build.processor.grids or len(build.schedule.settings.buckets) > 1:
            left_out[name] = "it makes images of one size, a view each"
        elif missing:
            left_out[name] = f"{missing[0]} is not installed"
    if len(left_out) < len(_NEEDS):
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastvlm-bench-")))
        _write_llava(folder, records, build.processor)
        for name in (name for name in _NEEDS if name not in left_out):
            found[name] = _start(stack, folder, name.removeprefix("dataloader_"), build.processor, workers)
    return found, left_out


def _write_llava(folder: pathlib.Path, records: Sequence[Record], processor: Processor) -> None:
    """Records as files: images, train.json, the tokenizer and the template."""
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
    log = stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
    flags = {
        "folder": folder, "backend": backend, "size": processor.image_size, "fit": processor.fit,
        "batch": _BATCH, "workers": workers,
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "fastvlm_jax.bench.dataloader_torch",
        *(f"--{key}={value}" for key, value in flags.items()),
    ]
    command += ["--mean", *map(str, processor.image_mean), "--std", *map(str, processor.image_std)]
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
