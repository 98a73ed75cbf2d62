"""Loads a model from any layout that a command or a stage may be given."""

import dataclasses
import os
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastvlm_jax import checkpoint, convert
from fastvlm_jax.data.processor import Processor, load_processor
from fastvlm_jax.models import fastvlm
from fastvlm_jax.models.fastvlm import FastVLM


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a model folder holds: constructor arguments of `fastvlm.build`, variables on the host, and the rest."""

    config: dict[str, Any]
    variables: dict[str, Any]
    processor: Processor
    lineage: dict[str, Any]


def read(path: str | os.PathLike) -> Loaded:
    """Reads a training workdir, one checkpoint in it, our model directory or a transformers one.

    Raises:
      FileNotFoundError, ValueError: nothing there, or nothing known; the message names the file and the mend.
    """
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no model at {path}; give a training workdir or a model directory")
    found = checkpoint.find(path)
    if found is not None:
        workdir, folder = found
        run = checkpoint.read_run(workdir)
        config = run["config"]["model"]
        variables = checkpoint.load_variables(folder, abstract_variables(fastvlm.build(**config)))
        lineage = {**run["lineage"], "step": int(folder.name)}
        return Loaded(config, variables, load_processor(workdir / "processor"), lineage)
    config, variables = convert.load_weights(path)
    lineage = convert.read_lineage(path) if convert.recognise(path) == "native" else {"source": "hf"}
    return Loaded(config, variables, load_processor(path), lineage)


def load(path: str | os.PathLike) -> tuple[FastVLM, dict[str, Any], Processor]:
    """(model, variables, processor) of any layout that `read` knows, the variables on the default device."""
    loaded = read(path)
    return fastvlm.build(**loaded.config), jax.tree.map(jnp.asarray, loaded.variables), loaded.processor


def init_variables(model: FastVLM, rng: jax.Array) -> dict[str, Any]:
    """Random variables, boxed with their logical axes; the shapes do not depend on the batch."""
    side = model.stride
    text = jnp.zeros((1, 1, 1), jnp.int32)
    return model.init(rng, jnp.zeros((1, 1, side, side, 3), jnp.uint8), text, text, text, text)


def abstract_variables(model: FastVLM) -> dict[str, Any]:
    """Shapes and dtypes of the model's variables, unboxed."""
    return nn.unbox(jax.eval_shape(lambda: init_variables(model, jax.random.key(0))))
