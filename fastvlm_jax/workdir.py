"""Decides which run may work in a workdir, and records where its model comes from.

WORKDIR/config.json              the settings that the run has now, and its lineage
WORKDIR/lock                     who is at work; see lock.py
WORKDIR/processor/               tokenizer, template and image settings
WORKDIR/checkpoints/STEP/        see checkpoint/folder.py
"""

import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jaxlib

from fastvlm_jax import changes as changing
from fastvlm_jax import disk, distributed, files
from fastvlm_jax.changes import Change
from fastvlm_jax.files import put_in_place, read_object, write_json
from fastvlm_jax.lock import Lock, locked
from fastvlm_jax.processor import Processor

FORMAT = "fastvlm_jax workdir"
# What a first start may leave that ends before it has written config.json.
LEFTOVERS = ("lock", "config.json.*.partial", "config.tmp")  # the last by versions before
# Keys of `data` that may differ between the processes of a run: where each finds the data, and how it reads them.
OWN_KEYS = ("path", "root", "num_threads", "prefetch", "cache_images")


def check_processes(config: dict[str, Any]) -> None:
    """Raises ValueError, naming process and key, unless all processes of a run have the same settings and code."""
    shared = {**config, "data": {key: value for key, value in config["data"].items() if key not in OWN_KEYS}}
    code = {"version": importlib.metadata.version("fastvlm_jax"), "sources": source_digest()}
    compiler = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "flags": os.environ.get("LIBTPU_INIT_ARGS")}
    distributed.check_same({"config": shared, "code": code, **compiler})


class Claim:
    """Holds a workdir for a run, until the end of the block of `claim`.

    Attributes:
      changes: what changed since the run was last at work here; see changes.py.
      lineage: where the model comes from, with the changes of before.
    """

    def __init__(self, workdir: pathlib.Path, lock: Lock | None, found: dict[str, Any]):
        self._path, self._lock = workdir / "config.json", lock
        self.changes = [Change(*change) for change in found["changes"]]
        self.lineage = found["lineage"]

    def check(self) -> None:
        """Raises OSError, in process 0, if the workdir has vanished or another run has taken it; costs nothing."""
        if self._lock is not None:
            self._lock.check()

    def record(self, config: dict[str, Any], step: int) -> dict[str, Any]:
        """Writes down that the run goes on with `config` behind `step`; returns its lineage, which has the changes.

        A change that was recorded at a later step counts from here on: the run has lost the steps before it.
        """
        made = [{**change, "step": min(change["step"], step)} for change in self.lineage.get("changes", [])]
        made += [{"step": step, **change._asdict()} for change in self.changes if not changing.is_free(change.key)]
        lineage = {**self.lineage, **({"changes": made} if made else {})}
        if self._lock is not None and (self.changes or lineage != self.lineage):
            write_json(self._path, {"format": FORMAT, "config": config, "lineage": lineage})
        return lineage


@contextlib.contextmanager
def claim(
    workdir: pathlib.Path,
    config: dict[str, Any],
    lineage: dict[str, Any],
    processor: Processor,
    allowed: Collection[str] = (),
) -> Iterator[Claim]:
    """Keeps other runs out of a workdir within the block; a fresh one gets config.json and processor.

    Process 0 does it; the other processes wait.

    Args:
      allowed: keys of the config that may change in this run though its results depend on them; see changes.py.

    Raises:
      ValueError: another run is at work in the workdir; it belongs to other settings or holds something else; the
        processes differ in data or parent; or a process does not see the workdir.
      TimeoutError: a process does not arrive.
    """
    distributed.check_same(lineage)
    with contextlib.ExitStack() as held:
        found, problem, lock = {}, None, None
        if jax.process_index() == 0:
            try:
                check_folder(workdir)
                lock = held.enter_context(locked(workdir, "another process is training"))
                changes = _claim(workdir, config, lineage, allowed)
                found = {"changes": changes, "lineage": read_run(workdir)["lineage"]}
                _save(processor, workdir)
            except ValueError as error:
                problem = str(error)
        answers = distributed.exchange("workdir", [problem, found], distributed.START_SECONDS)
        if problems := [problem for problem, _ in answers if problem]:
            raise ValueError(problems[0])
        _wait_for(workdir / "config.json")
        yield Claim(workdir, lock, answers[0][1])


def check_folder(workdir: pathlib.Path) -> None:
    """Raises ValueError if a folder holds something else than a run, or than what the first start of one leaves."""
    if (workdir / "config.json").exists():
        read_run(workdir)
    elif workdir.exists() and any(not any(map(path.match, LEFTOVERS)) for path in workdir.iterdir()):
        raise ValueError(f"{workdir} is not empty and not a training workdir; choose another --workdir")


def _claim(
    workdir: pathlib.Path, config: dict[str, Any], lineage: dict[str, Any], allowed: Collection[str] = ()
) -> list[Change]:
    """Makes a workdir that of this run; returns what changed since it was last at work there.

    Raises:
      ValueError: changes that nobody has allowed, or that no run can make.
    """
    check_folder(workdir)
    path = workdir / "config.json"
    for leftover in workdir.glob(files.PARTIALS):
        leftover.unlink()
    if not path.exists():
        write_json(path, {"format": FORMAT, "config": config, "lineage": lineage})
        return []
    changes = changing.compare(read_run(workdir), config, lineage)
    if problem := changing.refusal(workdir, changes, allowed, config, _go_on(workdir)):
        raise ValueError(problem)
    return changes


def _save(processor: Processor, workdir: pathlib.Path) -> None:
    """Writes the processor beside the one that is there, then file by file in its place: a full disk harms none.

    Raises:
      OSError: the disk does not take it; the error names the folder.
    """
    partial, folder = workdir / "processor.partial", workdir / "processor"
    shutil.rmtree(partial, ignore_errors=True)  # of a start that was killed
    try:
        processor.save(partial)
    except Exception as error:  # the tokenizers library raises plain ones
        found = error if isinstance(error, OSError) else disk.error_in(str(error))
        shutil.rmtree(partial, ignore_errors=True)
        if found is None or found.errno not in disk.FULL:
            raise
        raise OSError(found.errno, found.strerror, str(partial)) from error
    folder.mkdir(exist_ok=True)
    for file in partial.iterdir():
        put_in_place(file, folder / file.name)
    partial.rmdir()


def _wait_for(path: pathlib.Path) -> None:
    """Waits until this process sees a file that process 0 wrote: a network file system may show it with a delay."""
    for _ in range(60):
        if path.exists():
            return
        time.sleep(1)
    raise ValueError(
        f"process {jax.process_index()} does not see {path}, which process 0 wrote: --workdir must be on a file system "
        "that all processes share"
    )


def _go_on(workdir: pathlib.Path) -> str:
    """Returns what to do where a run cannot continue in its workdir."""
    if any(step.name.isdigit() for step in (workdir / "checkpoints").glob("*")):
        return f"choose another --workdir; --config.parent={workdir} starts there from the weights of this run"
    return "choose another --workdir, or delete this one, which holds no checkpoint yet"


def read_run(workdir: pathlib.Path) -> dict[str, Any]:
    """Reads the config.json of a workdir: {"format", "config", "lineage"}.

    Raises:
      FileNotFoundError, ValueError: there is no such file, or it belongs to something else.
    """
    path = workdir / "config.json"
    run = read_object(path)
    if run.get("format") != FORMAT:
        raise ValueError(f"{path} is not of a training workdir")
    if wrong := [key for key in ("config", "lineage") if not isinstance(run.get(key), dict)]:
        raise ValueError(f"{path}: {wrong[0]} is missing or not an object: copy the workdir again")
    return run


def make_lineage(
    config: dict[str, Any], parent: dict[str, Any] | None, fingerprint: str, data_sets: list[dict[str, Any]]
) -> dict[str, Any]:
    """Returns the record of where a model comes from: stage, parent with its lineage, versions, data.

    Args:
      parent: lineage of the parent; None without one.
      fingerprint: one for all data sets; see data.sources.fingerprint.
      data_sets: what each holds; see data.sources.contents_of.
    """
    return {
        "stage": config["stage"],
        "code": importlib.metadata.version("fastvlm_jax"),
        "source_digest": source_digest()[:16],
        "jax": jax.__version__,
        "data_fingerprint": fingerprint,
        "data_sets": data_sets,
        "parent": parent,
        "parent_step": None if parent is None else parent.get("step"),
    }


def lineage_at(run: dict[str, Any], step: int) -> dict[str, Any]:
    """Returns the lineage of the state behind a step of a run, which knows only the changes before it.

    Args:
      run: the content of config.json.
    """
    made = [change for change in run["lineage"].get("changes", []) if change["step"] < step]
    own = {key: value for key, value in run["lineage"].items() if key != "changes"}
    return {**own, **({"changes": made} if made else {}), "step": step}


def origin(lineage: Mapping[str, Any] | None) -> str:
    """Returns in words where weights come from, the nearest first.

    "random weights", "stage1 (step 238) ← stage0 (step 90)", "models/mine (hf)", or each part with its own.
    """
    if not lineage:
        return "random weights"
    if "parts" in lineage:
        return "; ".join(f"{part}: {origin(own)}" for part, own in lineage["parts"].items())
    if "stage" not in lineage:
        return f"{lineage.get('path', '?')} ({lineage.get('layout', '?')})"
    step = f" (step {lineage['step']})" if "step" in lineage else ""
    return f"{lineage['stage']}{step}" + (f" ← {origin(lineage['parent'])}" if lineage.get("parent") else "")


def source_digest() -> str:
    """Returns the SHA-256 of all source files of the package, whose root is this file's folder."""
    digest, folder = hashlib.sha256(), pathlib.Path(__file__).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
