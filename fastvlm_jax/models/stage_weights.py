"""Makes of the parameters of a stage of RepMixer blocks the weights that kernels/repmixer_stage.py takes."""

import jax

from fastvlm_jax.kernels.repmixer_stage import Weights
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
    conv, conv_bias = conv_bn(ffn["conv"], stats["ffn"]["conv"])
    scale = params["layer_scale_ffn"]
    fc1, fc2 = ffn["fc1"], ffn["fc2"]
    found = Weights(
        mixer_kernel, mixer_bias, conv, conv_bias,
        fc1["kernel"], fc1["bias"], fc2["kernel"] * scale[:, None], fc2["bias"] * scale,
    )  # fmt: skip
    exact = Weights(*[w.dtype for w in found[:4]], *[dtype] * 4)
    return jax.tree.map(lambda w, dtype: gathered(w, None, dtype), found, exact)
