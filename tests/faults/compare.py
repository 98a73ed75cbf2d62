"""Reads what a run leaves in its workdir, with TensorStore and json alone, and compares it with another run."""

import contextlib
import json
import pathlib

import numpy as np
import tensorstore


class Broken(AssertionError):
    """Raised where a run does not keep a promise; the message says which."""


def expect(fact: object, otherwise: str) -> None:
    """Raises Broken, with `otherwise` for its message, unless `fact` is true."""
    if not fact:
        raise Broken(otherwise)


def saved(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of the finished checkpoints; unfinished ones and those set aside have other names."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())


def newest(workdir: pathlib.Path) -> pathlib.Path:
    """Returns the folder of the newest finished checkpoint."""
    expect(saved(workdir), f"{workdir} has no checkpoint")
    return workdir / "checkpoints" / str(saved(workdir)[-1])


def rows(workdir: pathlib.Path) -> list[dict]:
    """Returns the rows of metrics.jsonl that tell of training steps; a line that is cut is left out."""
    path, found = workdir / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [row for row in found if "loss" in row]


def has_step(workdir: pathlib.Path, step: int) -> bool:
    """Returns whether a run has told of this step or a later one."""
    return any(row["step"] >= step for row in rows(workdir))


def read(checkpoint: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads all arrays of a checkpoint with TensorStore alone: parameters, statistics, optimizer slots, step."""
    found = {}
    for part in ("model", "training"):
        store = {"driver": "ocdbt", "base": f"file://{checkpoint / part}"}
        for key in tensorstore.KvStore.open(store).result().list().result():
            name, _, file = key.decode().rpartition("/")
            if file == "zarr.json":
                array = {"driver": "zarr3", "kvstore": {**store, "path": f"{name}/"}}
                found[f"{part}/{name}"] = tensorstore.open(array).result().read().result()
    expect(len(found) > 20, f"{checkpoint} holds {len(found)} arrays")
    return found


def differing(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    """Returns the names of the arrays that are not the same in both, bit for bit."""
    both = a.keys() & b.keys()
    return sorted((a.keys() ^ b.keys()) | {k for k in both if a[k].dtype != b[k].dtype or _bytes(a, k) != _bytes(b, k)})


def _bytes(arrays: dict[str, np.ndarray], name: str) -> tuple:
    return arrays[name].shape, arrays[name].tobytes()


def check_same(workdir: pathlib.Path, other: pathlib.Path) -> None:
    """Checks that a run ended as the undisturbed one: the same last checkpoint bit for bit, every step told once."""
    expect(saved(workdir)[-1:] == saved(other)[-1:], f"its checkpoints are {saved(workdir)}, not {saved(other)}")
    differ = differing(read(newest(workdir)), read(newest(other)))
    expect(not differ, f"{len(differ)} arrays of step {newest(workdir).name} differ, the first is {differ[:1]}")
    mine, theirs = ([(row["step"], row["loss"]) for row in rows(folder)] for folder in (workdir, other))
    expect(mine == theirs, f"the steps and losses told are {mine}, not {theirs}")


def all_finite(workdir: pathlib.Path) -> bool:
    """Returns whether every array of every checkpoint of a run holds finite numbers alone."""
    folders = [workdir / "checkpoints" / str(step) for step in saved(workdir)]
    return all(np.isfinite(np.float64(x)).all() for folder in folders for x in read(folder).values())
