"""Runs a fine-tuning from the data to the page, each part as the command that does it alone."""

import contextlib
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from fastvlm_jax import model_io
from fastvlm_jax.adapted import PART
from fastvlm_jax.data.sources import MANIFEST, read_manifest, read_shards
from fastvlm_jax.distributed import Interrupted, StopRequest
from fastvlm_jax.files import read_object, write_json, write_whole
from fastvlm_jax.finetune import config_file, facts, plan
from fastvlm_jax.preflight import gpu
from fastvlm_jax.sweep.launcher import ending_with_this

CONFIG, CHOICE = "config.py", "choice.json"
SHARE = "0.1"  # of the pictures that are held out
SCORES = "qa-own.json"  # what `fastvlm evaluate` writes of one's own data


class Failed(ValueError):
    """Raised where a command of the chain ended with an error, which it has told itself."""


class Chosen(NamedTuple):
    """Holds what was chosen for, and what further commands need to know of it.

    Attributes:
      model, data, lora: as in `init`, with absolute paths.
      metric: metric of `fastvlm evaluate` that fits the answers.
      held_out: whether records are held out.
    """

    model: str
    data: str
    lora: bool
    metric: str
    held_out: bool


def init(model: str, data: str, output: pathlib.Path, *, lora: bool, devices: gpu.Gpus | None = None) -> list[str]:
    """Chooses the settings of a run and writes them to OUTPUT/config.py, which is kept if it is there already.

    Args:
      model: the model to tune.
      data: folder of shards.
      devices: devices to choose for; default: those of this machine.

    Returns:
      Lines that tell what was chosen.

    Raises:
      FileNotFoundError, ValueError: the model or the data cannot be read, or do not fit; see `plan.choose`.
    """
    file, place = output / CONFIG, absolute(data)
    asked = {"model": absolute(model), "data": place, "lora": lora}
    if file.exists():
        if not (output / CHOICE).exists():
            raise ValueError(f"{file} is not of `fastvlm init`, whose {CHOICE} lies beside it: name another --output")
        before = read_object(output / CHOICE)
        if other := [name for name, value in asked.items() if before.get(name) != value]:
            raise ValueError(
                f"{file} was written for --{other[0]}={before.get(other[0])}: name another --output, or delete the file"
            )
        return [f"{file} is there and stays as it is"]
    loaded = model_io.read(model)
    if loaded.processor is None:
        raise ValueError(f"{model} has no tokenizer: put its tokenizer.json beside its config.json")
    found = facts.measure(read_shards(data, "train"), loaded.processor, loaded.processor.template)
    split = read_manifest(epath.Path(data).expanduser())["splits"].get("validation", {})
    held_out = split.get("records", 0)
    chosen_for = devices or plan.devices_here()
    made = plan.choose(asked["model"], place, found, held_out, lora=lora, devices=chosen_for)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / CHOICE, Chosen(**asked, metric=made.metric, held_out=held_out > 0)._asdict())
    train = shown(["train", f"--config={file}", f"--workdir={output / 'run'}"])
    write_whole(file, config_file.text(made, asked["model"], train).encode())
    return [*(f"{key} = {value!r}{f'  ({why})' if why else ''}" for key, value, why in made.choices), *made.remarks]


def absolute(model: str) -> str:
    """Returns a source of `model_io.read` with absolute paths, so that it means the same from everywhere."""
    pieces = re.split(f"({PART.pattern})", model)
    pieces[::2] = [path and _absolute(path) for path in pieces[::2]]
    return "".join(pieces)


def _absolute(path: str) -> str:
    return path if "://" in path else os.fspath(pathlib.Path(path).expanduser().absolute())


def finetune(model: str, data: str, output: pathlib.Path, *, lora: bool, images: Sequence[str] = ()) -> None:
    """Runs all parts in turn; those that are done already are passed over or go on.

    Args:
      model: the model to tune.
      data: a folder of shards, or a file or folder of any format that `fastvlm data write` reads.
      images: folders that the names of pictures are relative to.

    Raises:
      Failed: a command ended with an error.
    """
    shards = data
    if not (epath.Path(data).expanduser() / MANIFEST).exists():
        shards = os.fspath(output / "data")
        named = [f"--images={folder}" for folder in images]
        run(["data", "write", f"--source={data}", *named, f"--output={shards}", f"--validation_share={SHARE}"])
    file, workdir = output / CONFIG, output / "run"
    run(["init", f"--model={model}", f"--data={shards}", f"--output={output}", *(["--lora"] if lora else [])])
    chosen = Chosen(**read_object(output / CHOICE))
    run(["data", "inspect", f"--config={file}", f"--output={output / 'data.html'}"])
    asked = ["--benchmark=qa", f"--data={shards}", f"--metric={chosen.metric}"]
    if chosen.held_out and not (output / "before" / SCORES).exists():
        run(["evaluate", f"--model={model}", *asked, f"--output={output / 'before'}"])
    run(["train", f"--config={file}", f"--workdir={workdir}"])
    tuned, page = f"{workdir}@best" if chosen.held_out else os.fspath(workdir), output / "report.html"
    if chosen.held_out:
        run(["evaluate", f"--model={tuned}", *asked, f"--output={output / 'after'}"])
        run(["report", os.fspath(workdir), f"--output={page}", f"--model={tuned}", f"--data={shards}"])
        before, after = (read_object(output / name / SCORES) for name in ("before", "after"))
        scores = f"{before['score']:.1f} % before, {after['score']:.1f} % after"
        print(f"\n{chosen.metric}: {scores}, of {after['n']} questions about held-out pictures")
    else:
        run(["report", tuned, f"--output={page}"])
    print(f"page: {page}\n\nnow, for example:")
    further = [["generate", f"--model={tuned}", "--image=FILE", "--prompt=TEXT"]]
    for layout in ("hf", *(["peft"] if lora else [])):
        further.append(["convert", f"--source={tuned}", f"--target={output / layout}", f"--layout={layout}"])
    print(*(f"  {shown(words)}" for words in further), sep="\n")


def shown(words: Sequence[str]) -> str:
    """Returns a command as a person would type it."""
    return shlex.join(["fastvlm", *words])


def run(words: Sequence[str]) -> None:
    """Prints a command and runs it.

    Raises:
      Failed: it ended with an error.
      Interrupted: this process was asked to stop, and the command has ended.
    """
    print(f"\n$ {shown(words)}", flush=True)
    command = ending_with_this([sys.executable, "-m", "fastvlm_jax", *words], os.getpid())
    with StopRequest() as stop:
        child = subprocess.Popen(command, start_new_session=True)  # Ctrl-C is passed on once, as SIGTERM
        try:
            while child.poll() is None and not stop.reached():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(0.2)
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
        finally:
            status = child.wait()
        if stop.reached():
            raise Interrupted(f"stopped in `fastvlm {words[0]}`; the same command goes on from there")
    if status:
        raise Failed(f"`fastvlm {words[0]}` ended with status {status}; mend that, and the same command goes on")
