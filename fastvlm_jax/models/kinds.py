"""Builds the model that a config describes, a FastVLM or a CLIP, and its variables, where code serves both."""

import functools
from typing import Any

import flax
import flax.linen as nn
import jax

from fastvlm_jax.models import clip, fastvlm
from fastvlm_jax.models.clip import CLIP
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.models.lora import Lora, with_adapters

Model = FastVLM | CLIP


def build(**config) -> Model:
    """Builds the model of a config, `build(**config.model)`: a CLIP if it has a text tower, else a FastVLM."""
    return clip.build(**config) if config.get("text") else fastvlm.build(**config)


def init_variables(model: Model, rng: jax.Array) -> dict[str, Any]:
    """Returns randomly initialized variables, boxed with their logical axes; no shape depends on the batch."""
    return (clip if isinstance(model, CLIP) else fastvlm).init_variables(model, rng)


@functools.lru_cache(maxsize=16)
def boxed_variables(model: Model) -> dict[str, Any]:
    """Returns shapes and dtypes of the variables, boxed with their logical axes, without computing anything.

    The result is cached: do not modify it.
    """
    plain = _without_kernels(model)
    return {"batch_stats": {}, **jax.eval_shape(lambda: init_variables(plain, jax.random.key(0)))}


def _without_kernels(model: Model) -> Model:
    """Returns the model without TPU kernels, on which no shape depends.

    Whether there are any depends on the devices, and these must not be asked for before all processes have met, when
    the config of a run describes its parent already.
    """
    args = model.vision_args
    if args is None or not hasattr(fastvlm.make_encoder(**args, parent=None), "kernels"):
        return model
    return model.clone(vision_args=flax.core.freeze({**args, "kernels": "none"}))


def abstract_params(model: Model, adapters: Lora | None) -> dict[str, Any]:
    """Returns the model's parameters, with adapters if there are any, as ShapeDtypeStructs.

    Raises:
      ValueError: the adapters have no target; see lora.paths_of.
    """
    params = abstract_variables(model)["params"]
    return jax.eval_shape(lambda params: with_adapters(params, adapters, jax.random.key(0)), params)


def abstract_variables(model: Model) -> dict[str, Any]:
    """Returns the model's variables as ShapeDtypeStructs, without their logical axes."""
    return nn.unbox(boxed_variables(model))
