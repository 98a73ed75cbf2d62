"""Decides which run may continue in a workdir, and records where its model comes from.

WORKDIR/config.json              the settings and the lineage of the run
WORKDIR/processor/               tokenizer, template and image settings
WORKDIR/checkpoints/STEP/        see checkpoint/folder.py
"""

import hashlib
import importlib.metadata
import os
import pathlib
import time
from typing import Any

import jax
import jaxlib

from fastvlm_jax import distributed
from fastvlm_jax.config import REPLACED, differences
from fastvlm_jax.files import read_object, write_json
from fastvlm_jax.processor import Processor

FORMAT = "fastvlm_jax workdir"
# Keys that say what is evaluated and which checkpoint is the best; a run that goes on under others records them anew.
EVALUATION_KEYS = ("eval_every", "eval_batches", "evaluate", "keep_best", "stop_after")
# Keys that may change when a run resumes, because they do not change its results. The exception is accumulate: it does
# if BatchNorm is in training mode or drop_path is above 0. Good steps do not depend on bad_steps; earlier versions lack
# it.
FREE_KEYS = (
    *EVALUATION_KEYS, *REPLACED, "mesh", "log_every", "checkpoint_every", "keep_checkpoints", "keep_every", "wandb",
    "accumulate", "shard_frozen", "model.vision.remat", "model.llm.remat",
    "bad_steps", "bad_steps.mode", "bad_steps.factor", "bad_steps.in_a_row", "bad_steps.roll_backs",
    "data.num_threads", "data.prefetch", "data.cache_images", "data.path", "data.root",
)  # fmt: skip
# Keys of `data` that may differ between the processes of a run: where each finds the data, and how it reads them.
OWN_KEYS = ("path", "root", "num_threads", "prefetch", "cache_images")


def check_processes(config: dict[str, Any]) -> None:
    """Raises ValueError, naming process and key, unless all processes of a run have the same settings and code."""
    shared = {**config, "data": {key: value for key, value in config["data"].items() if key not in OWN_KEYS}}
    code = {"version": importlib.metadata.version("fastvlm_jax"), "sources": source_digest()}
    compiler = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "flags": os.environ.get("LIBTPU_INIT_ARGS")}
    distributed.check_same({"config": shared, "code": code, **compiler})


def claim(workdir: pathlib.Path, config: dict[str, Any], lineage: dict[str, Any], processor: Processor) -> None:
    """Writes config.json and the processor of a fresh workdir, or checks that it belongs to the same settings and data.

    Process 0 does it; the other processes wait.

    Raises:
      ValueError: the workdir belongs to other settings or holds something else; the processes differ in data or
        parent; or a process does not see the workdir.
      TimeoutError: a process does not arrive.
    """
    distributed.check_same(lineage)
    problem = None
    if jax.process_index() == 0:
        try:
            _claim(workdir, config, lineage)
            processor.save(workdir / "processor")
        except ValueError as error:
            problem = str(error)
    if problems := list(filter(None, distributed.exchange("workdir", problem, distributed.START_SECONDS))):
        raise ValueError(problems[0])
    # A network file system may show a new file with a delay.
    for _ in range(60):
        if (workdir / "config.json").exists():
            return
        time.sleep(1)
    raise ValueError(
        f"process {jax.process_index()} does not see {workdir / 'config.json'}, which process 0 wrote: --workdir must "
        "be on a file system that all processes share"
    )


def _claim(workdir: pathlib.Path, config: dict[str, Any], lineage: dict[str, Any]) -> None:
    path = workdir / "config.json"
    if path.exists():
        found = read_run(workdir)
        differ = [d for d in differences(found["config"], config) if d[0] not in FREE_KEYS and not _moved(*d)]
        key = "parent_step"
        if found["lineage"].get(key) != lineage.get(key):
            differ.append((key, found["lineage"].get(key), lineage.get(key)))
        go_on = _go_on(workdir)
        if differ:
            settings = ", ".join(f"{key} is {there!r} there and {here!r} here" for key, there, here in differ)
            raise ValueError(f"{workdir} is in use by a run with other settings: {settings}; {go_on}")
        if changed := _changed_data(found["lineage"], lineage, config):
            raise ValueError(f"{changed} since the run of {workdir} began: write the data as it was, or {go_on}")
        changed = {key: config[key] for key in EVALUATION_KEYS if key in config}
        if not changed.items() <= found["config"].items():
            write_json(path, {**found, "config": found["config"] | changed})
        return
    if workdir.exists() and any(workdir.iterdir()):
        raise ValueError(f"{workdir} is not empty and not a training workdir; choose another --workdir")
    write_json(path, {"format": FORMAT, "config": config, "lineage": lineage})


def _go_on(workdir: pathlib.Path) -> str:
    """Returns what to do where a run cannot continue in its workdir."""
    if any(step.name.isdigit() for step in (workdir / "checkpoints").glob("*")):
        return f"choose another --workdir; --config.parent={workdir} starts there from the weights of this run"
    return "choose another --workdir, or delete this one, which holds no checkpoint yet"


def _changed_data(there: dict[str, Any], here: dict[str, Any], config: dict[str, Any]) -> str:
    """Returns which data sets are not what they were in the lineage `there`, and how they changed; "" if all are."""
    if there.get("data_fingerprint") == here.get("data_fingerprint"):
        return ""
    data = config["data"]
    folders = [data["path"]] if data["path"] else [os.path.join(data["root"], name) for name, _ in data["mixture"]]
    before, now = there.get("data_sets", []), here.get("data_sets", [])
    if len(before) != len(folders):  # a run of a version that did not record them
        return f"one of the data sets {', '.join(folders)} has changed" if folders[1:] else f"{folders[0]} has changed"
    changed = []
    for folder, old, new in zip(folders, before, now, strict=True):
        if old["fingerprint"] != new["fingerprint"]:
            counts = differences(old["records"], new["records"]) or [("", 0, 0)]
            how = ", ".join(f"{split} had {x or 0} records and has {y or 0}" for split, x, y in counts if split)
            changed.append(f"{folder} has changed ({how or 'the same number of records, other contents'})")
    return " and ".join(changed)


def _moved(key: str, there: Any, here: Any) -> bool:
    """Returns whether a difference is only that the parent's folder moved: machines may mount a bucket elsewhere."""
    names = [[path.rpartition("/")[2] for path in str(paths).split(",")] for paths in (there, here)]
    return key == "parent" and names[0] == names[1]


def read_run(workdir: pathlib.Path) -> dict[str, Any]:
    """Reads the config.json of a workdir: {"format", "config", "lineage"}.

    Raises:
      FileNotFoundError, ValueError: there is no such file, or it belongs to something else.
    """
    path = workdir / "config.json"
    run = read_object(path)
    if run.get("format") != FORMAT:
        raise ValueError(f"{path} is not of a training workdir")
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
        "jax": jax.__version__,
        "data_fingerprint": fingerprint,
        "data_sets": data_sets,
        "parent": parent,
        "parent_step": None if parent is None else parent.get("step"),
    }


def source_digest() -> str:
    """Returns the SHA-256 of all source files of the package, whose root is this file's folder."""
    digest, folder = hashlib.sha256(), pathlib.Path(__file__).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
