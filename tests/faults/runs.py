"""Starts runs of `fastvlm train` as child processes, and continues them.

`base` is the folder of what all trials share: the data set, the library of preload.py, and undisturbed runs, each of
which is done once, when the first trial asks for it.
"""

import atexit
import contextlib
import functools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import PIL.Image

from tests.faults import preload
from tests.faults.compare import check_same, expect, newest
from tests.helpers.ports import free_port

TESTS = pathlib.Path(__file__).parents[1]
FASTVLM = TESTS / "helpers/train_process.py"  # `fastvlm ...` with the fake devices of the tests
STEPS, EVERY, KEPT = 24, 4, 3  # steps of a run, steps between its checkpoints, checkpoints that it keeps
NAME = "small"  # the stage of tests/helpers/small.py; a run begins its lines with it
SETTINGS = {
    "data.image_size": 8, "data.groups": 4, "data.rows_per_group": 2, "model.vision.layers": (1,),
    "model.vision.embed_dims": (8,), "model.vision.mixers": ("repmixer",), "steps": STEPS, "checkpoint_every": EVERY,
    "keep_checkpoints": KEPT, "eval_every": 12, "eval_batches": 1,
}  # fmt: skip
PATIENCE = 300  # seconds after which a run that should have ended counts as hung; they last 5 s on an idle machine


def rng_of(fault: Callable, seed: int) -> random.Random:
    """Returns the source of all that a trial of a fault decides."""
    return random.Random(f"{fault.__name__} {seed}")


class Ended(NamedTuple):
    """Tells how a process ended.

    Attributes:
      status: exit status, below 0 the signal that killed it; None if it hung and had to be killed.
      text: what it printed on stderr.
    """

    status: int | None
    text: str

    def refusal(self, because: str = "") -> str:
        """Returns the one line in which the process said why it could not go on.

        Raises:
          Broken: it hung, ended otherwise than with status 1, or said something else; `because` is a pattern for the
            reason that the line must give.
        """
        last = "\n".join(self.text.splitlines()[-12:])
        expect(self.status is not None, f"it hung for {PATIENCE} s: {last}")
        expect(self.status == 1, f"exit status {self.status}: {last}")
        expect("Traceback" not in self.text, f"a traceback: {last}")
        lines = [line for line in self.text.splitlines() if line.startswith("fastvlm")]
        expect(len(lines) == 1, f"{len(lines)} lines of error in place of one: {last}")
        expect(re.search(because, lines[0]), f"the line does not say {because!r}: {lines[0]}")
        return lines[0]


class Run:
    """One command, running in one process or several.

    Attributes:
      processes: the processes, each of a group of its own.
    """

    def __init__(self, folder: pathlib.Path, commands: list[list], environment: dict[str, str] | None = None):
        """Starts a process for each command; what they print goes to files in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._logs = [folder / f"stderr.{len(list(folder.glob('stderr.*'))) + i}" for i in range(len(commands))]
        # All runs but the first start in seconds, for even what compiles fast is kept.
        own = {
            "PYTHONPATH": str(TESTS.parent),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **(environment or {}),
        }
        options = dict(cwd=TESTS.parent, env=os.environ | own, stdout=subprocess.DEVNULL, start_new_session=True)
        self.processes = []
        for command, log in zip(commands, self._logs, strict=True):
            with log.open("w") as file:
                words = [sys.executable, *map(str, command)]
                self.processes.append(subprocess.Popen(words, stderr=file, **options))
        atexit.register(self.kill)  # where the harness itself is stopped

    def end(self, seconds: float = PATIENCE, leave_out: int | None = None) -> list[Ended]:
        """Waits for all processes but `leave_out`; kills those that still run after `seconds`, and the one left out."""
        deadline, statuses = time.monotonic() + seconds, []
        for i, process in enumerate(self.processes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                if i != leave_out:
                    process.wait(max(deadline - time.monotonic(), 0.1))
            statuses.append(process.poll())
        self.kill()
        return [Ended(status, log.read_text()) for status, log in zip(statuses, self._logs, strict=True)]

    def kill(self) -> None:
        """Kills the processes that still run, and what they started."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def until(self, fact: Callable[[], bool]) -> bool:
        """Waits until `fact()` holds or a process has ended; returns whether it holds."""
        deadline = time.monotonic() + PATIENCE
        while not fact() and time.monotonic() < deadline:
            if any(process.poll() is not None for process in self.processes):
                return fact()
            time.sleep(0.005)
        return fact()


def train(
    base: pathlib.Path,
    workdir: pathlib.Path,
    *flags: str,
    processes: int = 1,
    devices: int = 1,
    ports: Sequence[int] = (),
    program: Sequence = (FASTVLM,),
    environment: dict[str, str] | None = None,
) -> Run:
    """Starts a run of the tiny stage in `workdir`.

    Args:
      flags: flags behind those of the stage; the last one of a name counts.
      devices: devices of each process.
      ports: port at which each process looks for process 0, which listens at the first; default: the same free port.
      program: file and first arguments of the program that takes the place of `fastvlm`.
    """
    stage = ["--config", f"{TESTS / 'helpers/small.py'}:{data_set(base)}", "--workdir", workdir]
    config = [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    command = [*program, devices, "train", *stage, *config, *flags]
    if processes == 1:
        return Run(workdir.parent, [command], environment)
    own = [f"--coordinator_address=127.0.0.1:{port}" for port in ports or [free_port()] * processes]
    numbered = [[address, f"--num_processes={processes}", f"--process_id={i}"] for i, address in enumerate(own)]
    return Run(workdir.parent, [[*command, *flags] for flags in numbered], environment)


def go_on(base: pathlib.Path, workdir: pathlib.Path, *flags: str, **settings: Any) -> Ended:
    """Continues a disturbed run with the same command, undisturbed, to its end; returns how process 0 ended."""
    ended = train(base, workdir, *flags, **settings).end()
    for number, (status, text) in enumerate(ended):
        expect(status == 0, f"continued, process {number} ended with status {status}: {text[-1500:]}")
        expect("Traceback" not in text, f"continued, process {number} printed a traceback: {text[-1500:]}")
    return ended[0]


def resumed_at(ended: Ended) -> int:
    """Returns the step behind which a run went on; 0 if it began anew."""
    found = re.search(rf"^{NAME}: goes on behind step (\d+)", ended.text, re.MULTILINE)
    return int(found[1]) if found else 0


@functools.cache
def data_set(base: pathlib.Path) -> pathlib.Path:
    """Writes a data set of 32 pictures with a question each, and its tokenizer."""
    data = base / "data"
    for *words, flags in (
        ("write", ["--source", source(base), "--validation_share=0.25", "--workers=1"]),
        ("tokenizer", ["--vocab_size=300"]),
    ):
        where = ["--output" if words == ["write"] else "--data", data]
        (ended,) = Run(base, [[FASTVLM, 1, "data", *words, *flags, *where]]).end()
        expect(ended.status == 0, f"the data set cannot be made: {ended.text}")
    return data


@functools.cache
def source(base: pathlib.Path) -> pathlib.Path:
    """Draws the pictures of the data set and writes their questions in LLaVA's format."""
    folder, entries = base / "source", []
    folder.mkdir()
    colours = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "white": (240, 240, 240)}
    for i in range(32):
        name, colour = list(colours.items())[i % 4]
        PIL.Image.new("RGB", (12 + i, 16), colour).save(folder / f"{i}.png")
        talk = [{"from": "human", "value": f"<image>\nwhat colour is it? {i}"}, {"from": "gpt", "value": name}]
        entries.append({"id": str(i), "image": f"{i}.png", "conversations": talk})
    path = folder / "entries.json"
    path.write_text(json.dumps(entries))
    return path


@functools.cache
def straight(base: pathlib.Path, name: str = "straight", *flags: str, processes: int = 1, devices: int = 1):
    """Runs the tiny stage undisturbed, once, and returns its workdir; its file operations are in NAME.log beside it."""
    workdir = base / name
    watched = preload.watching(base, workdir, base / f"{name}.log")
    go_on(base, workdir, *flags, processes=processes, devices=devices, environment=watched)
    return workdir


def half_done(base: pathlib.Path, workdir: pathlib.Path) -> None:
    """Makes `workdir` a run that was stopped before its last save: it holds all checkpoints but the last."""
    shutil.copytree(straight(base), workdir)
    shutil.rmtree(newest(workdir))


def check_continued(base: pathlib.Path, workdir: pathlib.Path, before: list[int]) -> None:
    """Continues a run that left the checkpoints `before`: it loses no step behind the last of them, and ends alike."""
    ended = go_on(base, workdir)
    expect(resumed_at(ended) == (before or [0])[-1], f"with {before} it went on behind step {resumed_at(ended)}")
    check_same(workdir, straight(base))
