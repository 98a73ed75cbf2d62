"""Reads or makes the model that `fastvlm bench ttft` times, in the form in which it is used: with a folded encoder."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastvlm_jax import model_io
from fastvlm_jax.bench.mosaic import PHOTO
from fastvlm_jax.convert.layouts.native import without_choices
from fastvlm_jax.images.sizes import Grid, best_grid
from fastvlm_jax.models import fastvlm, kinds
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.models.fold import fold_variables
from fastvlm_jax.processor import Processor


class Subject(NamedTuple):
    """Holds what is timed.

    Attributes:
      model: the model.
      variables: its variables on the device; None if only its shapes are of use.
      processor: says how it fits images; None if its files do not.
      sizes: (side, grid of tiles or None) at which it sees a photo.
    """

    model: FastVLM
    variables: dict[str, Any] | None
    processor: Processor | None
    sizes: list[tuple[int, Grid | None]]


def default_dtype(topology: str | None) -> str:
    """Returns bfloat16, in which accelerators are fast, or on a CPU float32."""
    return "float32" if jax.default_backend() == "cpu" and not topology else "bfloat16"


def of_source(source: str, dtype: str, shapes_only: bool = False) -> Subject:
    """Loads a model with parameters and computation in `dtype`; see `model_io.load` for sources and errors.

    An encoder in training form is folded first, which changes nothing of what it computes.
    """
    loaded = model_io.read(source)
    config, processor = inference(loaded.config), loaded.processor
    answers = isinstance(processor, Processor) and processor.image_size
    sizes = sizes_of(processor.image_size, processor.grids) if answers else []
    if shapes_only:
        return Subject(kinds.build(**{**config, "dtype": dtype}), None, processor, sizes)
    variables = loaded.variables if config == loaded.config else fold_variables(loaded.variables)
    put = model_io.put(dataclasses.replace(loaded, config=config, variables=variables), dtype)
    return Subject(*put, processor, sizes)


def of_config(config, dtype: str, shapes_only: bool = False) -> Subject:
    """Makes the model of a config, with random weights; only `model`, and sizes of images in `data`, count."""
    if "llm" not in config.model:
        raise ValueError("--config is of stage 0, whose model begins no answer: give the config of another stage")
    described = without_choices(inference(config.model.to_dict()))
    model = kinds.build(**{**described, "dtype": dtype})
    sizes = sizes_of(config.data.image_size, config.data.grids)
    return Subject(model, None if shapes_only else random_variables(model), None, sizes)


def sizes_of(side: int, grids: Sequence[Grid]) -> list[tuple[int, Grid | None]]:
    """Returns the (side, grid of tiles) at which a model with these settings sees the photo; the grid may be None."""
    return [(side, tuple(grids[int(best_grid(*PHOTO, grids, side))]) if grids else None)]


def inference(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `kinds.build` for the same model with its encoder folded."""
    vision = config.get("vision")
    if not vision or vision.get("family", "fastvit") != "fastvit" or vision.get("form") == "folded":
        return dict(config)
    return {**config, "vision": {**vision, "form": "folded"}}


def random_variables(model: FastVLM) -> dict[str, Any]:
    """Returns variables made on the device, as `model_io.load` gives them: parameters in the dtype of the computation.

    Their values are a sine along each array: as good as random ones for a clock, and made many times faster.
    """

    def make():
        def leaf(path, x):
            dtype = model.dtype if path[0].key == "params" else x.dtype
            if path[-1].key in ("scale", "var"):
                return jnp.ones(x.shape, dtype)
            wave = jnp.sin(jax.lax.iota(jnp.float32, math.prod(x.shape)))
            return (0.02 * wave).reshape(x.shape).astype(dtype)

        made = jax.tree_util.tree_map_with_path(leaf, nn.unbox(kinds.boxed_variables(model)))
        return {**made, "params": fastvlm.unstacked(model, made["params"])}

    return jax.jit(make)()
