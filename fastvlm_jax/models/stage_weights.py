"""Makes of the variables of a stage of RepMixer blocks what kernels for whole stages take, and back."""

import jax
import jax.numpy as jnp

from fastvlm_jax.kernels.repmixer_stage import Weights
from fastvlm_jax.kernels.training_stage import Norms, Statistics
from fastvlm_jax.models.fold import conv_bn, rep_mixer
from fastvlm_jax.sharding import gathered


def stage_weights(params: dict, stats: dict, dtype) -> Weights:
    """Returns the weights of all blocks: branches and frozen statistics folded, gathered as `gathered` says.

    Args:
      params, stats: parameters and batch statistics of the stage's Block, each with a first axis for the blocks.
      dtype: dtype of the maps.
    """
    mixer, ffn = params["mixer"], params["ffn"]
    if "folded" in mixer:
        mixer_kernel, mixer_bias = mixer["folded"]["kernel"], mixer["folded"]["bias"]
    else:
        mixer_kernel, mixer_bias = rep_mixer(mixer, stats["mixer"])
    return _weights(params, (mixer_kernel, mixer_bias), conv_bn(ffn["conv"], stats["ffn"]["conv"]), dtype)


def training_weights(params: dict, dtype) -> tuple[Weights, Norms]:
    """Returns the weights of all blocks for statistics of images, and those of their BatchNorms, gathered.

    Args:
      params, dtype: as in `stage_weights`; the form is "branched".
    """
    mixer, conv = params["mixer"]["mixer"], params["ffn"]["conv"]
    zeros = jnp.zeros_like(conv["bn"]["bias"])
    norms = Norms(
        mixer["scale"]["kernel"].reshape(zeros.shape),
        params["mixer"]["layer_scale"],
        *[
            (norm["scale"], norm["bias"])
            for norm in (mixer["conv"]["bn"], mixer["scale"]["bn"], mixer["skip"], params["mixer"]["norm"], conv["bn"])
        ],
    )
    kernels = ((branch["kernel"], zeros) for branch in (mixer["conv"], conv))
    return _weights(params, *kernels, dtype), jax.tree.map(lambda w: gathered(w, None, w.dtype), norms)


def new_statistics(old: dict, found: Statistics, filled: jax.Array, momentum: float) -> dict:
    """Returns the batch statistics of a stage's Block, moved towards those of the images.

    Args:
      old: the ones before.
      found, filled: as kernels/training_stage.py returns them.
      momentum: of BatchNorm.
    """

    def moved(old: dict, new: tuple[jax.Array, jax.Array]) -> dict:
        return {
            name: old[name] + momentum * filled * (value - old[name])
            for name, value in zip(("mean", "var"), new, strict=True)
        }

    mixer, ffn = old["mixer"]["mixer"], old["ffn"]
    branches = {
        "conv": {"bn": moved(mixer["conv"]["bn"], found.of_mixer)},
        "scale": {"bn": moved(mixer["scale"]["bn"], found.of_scale)},
        "skip": moved(mixer["skip"], found.of_skip),
    }
    return {
        "mixer": {"mixer": branches, "norm": moved(old["mixer"]["norm"], found.of_norm)},
        "ffn": {"conv": {"bn": moved(ffn["conv"]["bn"], found.of_conv)}},
    }


def _weights(params: dict, mixer: tuple, conv: tuple, dtype) -> Weights:
    fc1, fc2, scale = params["ffn"]["fc1"], params["ffn"]["fc2"], params["layer_scale_ffn"]
    products = fc1["kernel"], fc1["bias"], fc2["kernel"] * scale[:, None], fc2["bias"] * scale
    found = Weights(*mixer, *conv, *products)
    exact = Weights(*[w.dtype for w in found[:4]], *[dtype] * 4)
    return jax.tree.map(lambda w, dtype: gathered(w, None, dtype), found, exact)
