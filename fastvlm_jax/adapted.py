"""Reads a model whose adapters (LoRA) are stored apart from their base: a workdir that trained them, or a PEFT folder.

The kernels are merged when they are read, part by part: base + factor * a @ b, rounded to float32. What a run recorded
of its base is proved first, so that adapters meet only the weights that they were trained on.
"""

import pathlib
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fastvlm_jax import checkpoint
from fastvlm_jax.adapt import adapt
from fastvlm_jax.checkpoint import digest
from fastvlm_jax.convert.layouts import peft
from fastvlm_jax.convert.mapping import SAME, Leaf
from fastvlm_jax.convert.weight_files import DTYPES
from fastvlm_jax.files import json_digest
from fastvlm_jax.loaded import Adapters, Loaded
from fastvlm_jax.metrics import best
from fastvlm_jax.models import kinds
from fastvlm_jax.models.kinds import Model
from fastvlm_jax.models.lora import Lora, problem
from fastvlm_jax.optim import ADAPTERS

FORMATS = {"param_dtype": "float32", "frozen_dtype": "bfloat16"}  # keys of a run's config -> what they are if empty
PART = re.compile(r"(?:^|,)(?:(?:base|lora|vision|projector|llm|text)=)+")  # before each path of a model in parts


def is_adapted(run: Mapping[str, Any]) -> bool:
    """Returns whether a run, the content of its config.json, trains adapters."""
    lora = run["config"].get("lora")
    return isinstance(lora, dict) and bool(lora.get("rank"))


def base_of(source: str, name: str) -> str:
    """Returns where the base of adapters is.

    Args:
      source: where the adapters are.
      name: what they call their base.

    Raises:
      ValueError: no model is there.
    """
    if name and all(map(_exists, PART.split(name)[1:] or [name])):
        return name
    said = f"adapts {name[:200]}, which is not there" if name else "does not say what it adapts"
    raise ValueError(f"{source} {said}: give the model too, as base=MODEL,lora={source}")


def _exists(path: str) -> bool:
    """Returns whether there is a file or folder, or the workdir of WORKDIR@best."""
    try:
        return pathlib.Path(path.removesuffix(best.MARK)).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, the home of nobody, or with a byte of 0
        return False


def join_run(
    source: str, folder: pathlib.Path, run: Mapping[str, Any], model: Model, base: Loaded
) -> tuple[dict, Adapters]:
    """Joins the adapters of a checkpoint with their base: (variables as Leaves, adapters).

    Args:
      source: what was asked for.
      folder: folder of the checkpoint.
      run: content of the workdir's config.json.
      model: its model.
      base: the base that was read.

    Raises:
      ValueError: the config is not one of adapters, the base does not fit, or is not the one that the run began with;
        the last shows when a Leaf is read.
    """
    config, notes = run["config"], checkpoint.read_notes(folder)
    saved = notes["digests"]["model"] if notes["digests"] else {}
    targets = [path.removesuffix(".a").replace(".", "/") for path in _below("params.lora.", saved) if path[-2:] == ".a"]
    try:
        lora = Lora(**config["lora"])
        if why := problem(lora):
            raise ValueError(why)
        # The pattern of a stranger may take for ever to match; what was saved tells the same.
        lora = lora._replace(targets="|".join(map(re.escape, targets)))
        params = kinds.abstract_params(model, lora)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: the `lora` of its config.json is {config['lora']!r}: {error}") from error
    flat = flatten_dict(params, sep="/")
    own = {path: x for path, x in flat.items() if f"params.{path.replace('/', '.')}" in saved}
    stats = kinds.abstract_variables(model)["batch_stats"]
    variables = checkpoint.load_variables(folder, {"params": unflatten_dict(own, sep="/"), "batch_stats": stats})
    trained = flatten_dict(variables["params"], sep="/")
    kept = flatten_dict(adapt(base, model, base.source)["params"], sep="/")
    if missing := [path for path in flat if path not in own and path not in kept]:
        raise ValueError(f"{base.source} has no {missing[0]}, which {source} takes from its base")
    dtypes = [DTYPES.get(str(config.get(key) or default)) for key, default in FORMATS.items()]
    if None in dtypes:
        raise ValueError(f"{source}: its config.json has another {' or '.join(FORMATS)} than {', '.join(DTYPES)}")
    proved = _digests_of_base(notes)

    def of_base(path: str, leaf) -> tuple[np.dtype, str | None]:
        name = f"params.{path.replace('/', '.')}"
        if name not in proved:
            raise ValueError(f"{folder} has no digest of {path} of its base: it is not what was saved")
        return dtypes[path.endswith(("/kernel", "/embedding"))], proved[name]

    frozen = {path: kept[path] for path in flat if path not in own}
    adapters = Adapters(
        lora, unflatten_dict(trained, sep="/")["lora"], base.source,
        tuple(path for path in trained if not path.startswith(ADAPTERS)),
    )  # fmt: skip
    joined = {path: _joined(source, path, x, adapters, *of_base(path, x)) for path, x in frozen.items()}
    joined |= {path: trained[path] for path in adapters.others}
    return {"params": unflatten_dict(joined, sep="/"), "batch_stats": variables["batch_stats"]}, adapters


def base_digest(folder: pathlib.Path) -> str:
    """Returns one digest of the base that a checkpoint of adapters names, made of those of its arrays."""
    return json_digest(_digests_of_base(checkpoint.read_notes(folder)))


def _digests_of_base(notes: Mapping[str, Any]) -> dict[str, str]:
    """Returns name -> digest of the arrays of a base, from the notes of a checkpoint; {} if they have none."""
    base = notes.get("base")
    digests = base.get("digests") if isinstance(base, dict) else None
    return digests if isinstance(digests, dict) else {}


def _below(start: str, names: Iterable[str]) -> Iterator[str]:
    """Yields the rest of the names that begin with `start`."""
    return (name.removeprefix(start) for name in names if name.startswith(start))


def read_peft(folder: pathlib.Path, base: Loaded) -> Loaded:
    """Reads the adapters of a PEFT folder and joins them with their base; for errors see `peft.read`."""
    model = kinds.build(**base.config)
    if model.llm_args is None:
        raise ValueError(f"{folder} adapts {base.source}, which has no language model")
    lora, tree = peft.read(folder, model, peft.read_config(folder)[0])
    adapters = Adapters(lora, tree, base.source)
    flat = flatten_dict(base.variables["params"], sep="/")
    adapted = {path.rpartition("/")[0] for path in flatten_dict(tree, sep="/")}
    joined = {
        path: _joined(str(folder), path, x, adapters, np.dtype(x.dtype), None) if path in adapted else x
        for path, x in flat.items()
    }
    variables = {**base.variables, "params": unflatten_dict(joined, sep="/")}
    lineage = {"layout": "peft", "path": str(folder), "base": base.lineage}
    return Loaded(str(folder), base.config, variables, base.processor, lineage, adapters)


class _Joined:
    """Holds a kernel of a base with its adapter added, which is computed when it is indexed."""

    def __init__(self, source: str, path: str, leaf, adapters: Adapters, dtype: np.dtype, expected: str | None):
        """Describes a parameter.

        Args:
          source: where the adapters are, for messages.
          path: its path.
          leaf: the base's array or Leaf.
          adapters: all adapters.
          dtype: dtype that the base's values were rounded to.
          expected: digest of those; None if it is not known.
        """
        self._source, self._path, self._base, self._leaf, self._rounded = source, path, adapters.base, leaf, dtype
        self._expected, self._lock = expected, threading.Lock()
        self._adapter = flatten_dict(adapters.params, is_leaf=lambda _, x: "a" in x).get(tuple(path.split("/")))
        self._factor = adapters.lora.factor
        self.shape, self.dtype = leaf.shape, np.dtype(np.float32) if self._adapter else dtype

    def _read(self, index) -> np.ndarray:
        return np.asarray(self._leaf[index]).astype(self._rounded, copy=False)

    def __getitem__(self, index) -> np.ndarray:
        with self._lock:
            if self._expected is not None:
                if digest.of_parts(self._read, self.shape, self._rounded) != self._expected:
                    raise ValueError(
                        f"{self._source}: {self._path} of its base {self._base} is not what the adapters were trained "
                        "on: give the same model as base=MODEL,lora=" + self._source
                    )
                self._expected = None
            if self._adapter:
                self._adapter = {name: np.asarray(x, np.float32) for name, x in self._adapter.items()}
        found = self._read(index)
        if not self._adapter:
            return found
        index = index if isinstance(index, tuple) else (index,)
        index = (*index, *[slice(None)] * (len(self.shape) - len(index)))
        a = self._adapter["a"][index[:-1]]
        b = self._adapter["b"][(*index[:-2], slice(None), index[-1])]
        found = found.astype(np.float32)
        # In float64, kernel by kernel: in float32 the last bits depend on the machine and on the part that is read, and
        # this model may be the base of other adapters, which know its digest.
        b = self._factor * b.astype(np.float64)
        for i in np.ndindex(found.shape[:-2]):
            found[i] += a[i].astype(np.float64) @ b[i]
        return found


def _joined(source: str, path: str, leaf, adapters: Adapters, dtype: np.dtype, expected: str | None) -> Leaf:
    joined = _Joined(source, path, leaf, adapters, dtype, expected)
    return Leaf((joined,), SAME, joined.shape, joined.dtype, stacked=False)
