"""Says what may change in a run that goes on in its workdir.

log_every, mesh, ...              free: no result depends on it
steps, groups, data.groups, ...   alters what the run becomes: --allow_changes=KEY, kept in the lineage with the step
model, parent, param_dtype, ...   fixed: the saved state would not fit, or would come from elsewhere
"""

import os
import pathlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from fastvlm_jax.config import REPLACED, differences
from fastvlm_jax.models.lora import Lora

# Keys that may change freely, because they do not change the results. There are two exceptions: accumulate does if
# BatchNorm is in training mode or drop_path is above 0, and bad_steps does if there are bad steps.
FREE_KEYS = (
    "eval_every", "eval_batches", "evaluate", "keep_best", "stop_after", "predictions_every", "num_predictions",
    *REPLACED, "mesh", "log_every",
    "checkpoint_every", "keep_checkpoints", "keep_every", "wandb", "accumulate", "shard_frozen", "bad_steps",
    "model.vision.remat", "model.vision.kernels", "model.llm.remat", "model.text.remat", "loss.block", "loss.ring",
    "data.num_threads", "data.prefetch", "data.cache_images", "data.path",
    "data.root",
)  # fmt: skip
FIXED_KEYS = (
    "model", "lora", "param_dtype", "frozen_dtype", "moment_dtype", "optimizer", "ema", "parent", "parent_step",
)  # fmt: skip
# Keys of `model` that change what it computes and not what it is.
COMPUTED_KEYS = ("model.dtype", "model.vision.drop_path", "model.vision.batch_norm", "model.vision.batch_norm_images")
# Keys that runs of earlier versions do not have -> what they did.
ADDED = {
    "warmup": "transformers", "final_rate": 0.0, "optimizer": "adamw", "decayed": ["kernel", "embedding"], "ema": 0.0,
    "frozen_dtype": "", "lora": dict(rank=0, alpha=16.0, stabilised=False, dropout=0.0, targets=Lora(1).targets),
    "layer_decay": {"vision": 1.0, "llm": 1.0, "text": 1.0}, "predictions_every": 0, "num_predictions": 8,
}  # fmt: skip
# Keys of the lineage that are compared too, and free: a run goes on under new code, and its lineage says so.
CODE_KEYS = ("code", "source_digest", "jax")
CONTENTS = "data.contents"  # names a change of what the data sets hold, which no key of the config shows


class Change(NamedTuple):
    """Holds a difference between a run and what is to go on with it: the dotted key, its value before and now."""

    key: str
    before: Any
    now: Any

    @property
    def free(self) -> bool:
        """Returns whether no result depends on it."""
        return is_free(self.key) or self.key in CODE_KEYS

    @property
    def fixed(self) -> bool:
        """Returns whether no run can make it."""
        if self.key == "groups":  # other patterns, or other frozen parameters, need other optimizer slots
            learning = [[(pattern, rate > 0) for pattern, rate, _ in groups] for groups in (self.before, self.now)]
            return learning[0] != learning[1]
        return not self.free and self.key not in COMPUTED_KEYS and _is_below(self.key, FIXED_KEYS)


def is_free(key: str) -> bool:
    """Returns whether a key of the config may change without changing the results of a run."""
    return _is_below(key, FREE_KEYS)


def compare(run: dict[str, Any], config: dict[str, Any], lineage: dict[str, Any]) -> list[Change]:
    """Returns all that changed since a run, the content of its config.json, was last at work."""
    there, added = run["lineage"], {key: value for key, value in ADDED.items() if key in config}
    before = added | run["config"]
    changes = [Change(*found) for found in differences(before, config) if not _moved(*found)]
    found = [Change(key, latest(there, key), lineage.get(key)) for key in ("parent_step", *CODE_KEYS)]
    # Versions before recorded less about their code.
    changes += [c for c in found if c.before != c.now and not (c.free and None in (c.before, c.now))]
    contents = Change(CONTENTS, latest(there, CONTENTS), contents_of(lineage))
    if contents.before["data_fingerprint"] != contents.now["data_fingerprint"]:
        changes.append(contents)
    return changes


def latest(lineage: dict[str, Any], key: str) -> Any:
    """Returns the value that a run has had for a key of its lineage since the last change of it."""
    made = [change["now"] for change in lineage.get("changes", []) if change["key"] == key]
    if made:
        return made[-1]
    return contents_of(lineage) if key == CONTENTS else lineage.get(key)


def contents_of(lineage: dict[str, Any]) -> dict[str, Any]:
    """Returns what a lineage says of the data."""
    return {"data_fingerprint": lineage.get("data_fingerprint"), "data_sets": lineage.get("data_sets", [])}


def check_allowed(allowed: Collection[str], config: dict[str, Any]) -> None:
    """Raises ValueError unless `allowed` are keys of the config, of whole parts of it (`data`), or CONTENTS."""
    known = {CONTENTS, *_keys(config)}
    if unknown := [key for key in allowed if key not in known]:
        raise ValueError(f"--allow_changes: there is no key {unknown[0]!r}; docs/config.md lists the keys")


def _keys(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


def refusal(
    workdir: pathlib.Path, changes: Sequence[Change], allowed: Collection[str], config: dict[str, Any], go_on: str
) -> str:
    """Returns why a run may not go on with these changes, and lists all of them; "" if it may.

    Args:
      allowed: keys, or names of whole parts, whose changes the user allows.
      go_on: what to do instead.
    """
    altering = [change for change in changes if not change.free]
    fixed = [change.key for change in altering if change.fixed]
    if not fixed and all(_is_below(change.key, allowed) for change in altering):
        return ""
    settings = [change for change in altering if change.key != CONTENTS]
    parts = []
    if settings:
        parts.append(f"{workdir} is in use by a run with other settings: {listed(settings, config)}")
    if len(settings) < len(altering):
        changed = listed([change for change in altering if change.key == CONTENTS], config)
        parts.append(f"{changed} since the run of {workdir} began: write the data as it was")
    if fixed:
        parts.append(f"no run can change {', '.join(fixed)}")
    if free := [change for change in changes if change.free]:
        parts.append(f"free to change: {listed(free, config)}")
    if not fixed:
        keys = ",".join(change.key for change in altering)
        go_on = f"--allow_changes={keys} goes on with that and records it in the lineage, or {go_on}"
    return "; ".join([*parts, go_on])


def listed(changes: Sequence[Change], config: dict[str, Any]) -> str:
    """Returns changes in words."""
    return ", ".join(
        _changed_data(change, config)
        if change.key == CONTENTS
        else f"{change.key} is {change.before!r} there and {change.now!r} here"
        for change in changes
    )


def _changed_data(change: Change, config: dict[str, Any]) -> str:
    """Returns which data sets are not what they were, and how they changed."""
    data = config["data"]
    folders = [data["path"]] if data["path"] else [os.path.join(data["root"], name) for name, _ in data["mixture"]]
    before, now = change.before["data_sets"], change.now["data_sets"]
    if not len(before) == len(now) == len(folders):  # another mixture, or a run of a version that did not record them
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


def _is_below(key: str, keys: Collection[str]) -> bool:
    """Returns whether a key is one of `keys`, or a part of one."""
    return any(f"{key}.".startswith(f"{part}.") for part in keys)
