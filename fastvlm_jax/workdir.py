"""Decides which run may continue in a workdir, and records where its model comes from.

WORKDIR/config.json              the settings and the lineage of the run
WORKDIR/processor/               tokenizer, template and image settings
WORKDIR/checkpoints/STEP/        see checkpoint.py
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
from fastvlm_jax.config import differences
from fastvlm_jax.files import read_object, write_json
from fastvlm_jax.processor import Processor

FORMAT = "fastvlm_jax workdir"
# Keys that may change when a run resumes, because they do not change its results. The exception is accumulate: it does
# if BatchNorm is in training mode or drop_path is above 0.
FREE_KEYS = (
    "mesh", "log_every", "checkpoint_every", "keep_checkpoints", "eval_every", "eval_batches", "eval_questions",
    "wandb", "accumulate", "shard_frozen", "model.vision.remat", "model.llm.remat", "data.num_threads", "data.prefetch",
    "data.cache_images", "data.path", "data.root",
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
        for key in ("data_fingerprint", "parent_step"):
            if found["lineage"].get(key) != lineage.get(key):
                differ.append((key, found["lineage"].get(key), lineage.get(key)))
        if differ:
            key, there, here = differ[0]
            raise ValueError(
                f"{workdir} is in use by a run with other settings: {key} is {there!r} there and {here!r} here "
                f"({len(differ)} differ); choose another --workdir"
            )
        return
    if workdir.exists() and any(workdir.iterdir()):
        raise ValueError(f"{workdir} is not empty and not a training workdir; choose another --workdir")
    write_json(path, {"format": FORMAT, "config": config, "lineage": lineage})


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


def make_lineage(config: dict[str, Any], parent: dict[str, Any] | None, fingerprint: str) -> dict[str, Any]:
    """Returns the record of where a model comes from: stage, parent with its lineage, versions, data fingerprint."""
    return {
        "stage": config["stage"],
        "code": importlib.metadata.version("fastvlm_jax"),
        "jax": jax.__version__,
        "data_fingerprint": fingerprint,
        "parent": parent,
        "parent_step": None if parent is None else parent.get("step"),
    }


def source_digest() -> str:
    """Returns the SHA-256 of all source files of the package, whose root is this file's folder."""
    digest, folder = hashlib.sha256(), pathlib.Path(__file__).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
