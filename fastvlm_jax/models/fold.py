"""Folds the training form of the encoder into its released form: every multi-branch block becomes one convolution.

    conv + BN                y = s * (kernel * x) + (b - s * mean)              s = scale / sqrt(var + epsilon)
    scale + BN               the same, with the 1x1 kernel zero-padded to k x k
    skip BN                  the same, with the identity as kernel
    RepMixer                 x + ls * (mixer - BN(x))  ->  identity + ls * (mixer kernel - BN kernel)
    ConditionalPositions     x + conv(x)               ->  identity + conv kernel

Both forms have the same attention and attention norm, layer scales, squeeze-excite, ConvFFN with its BatchNorm, learned
pooling and head.
Source: MobileOne (arXiv 2206.04040) section 3.2, FastViT (arXiv 2303.14189) section 3.2.
"""

import numpy as np

from fastvlm_jax.models.layers import BATCH_NORM_EPSILON

# float64 kernel [..., k, k, I, O] and bias [..., O]; ... is the depth axis of scanned blocks
Kernel = tuple[np.ndarray, np.ndarray]


def fold(vision: dict) -> dict:
    """Converts variables of FastViT(form="branched") to FastViT(form="folded"), the same function in inference.

    Args:
      vision: {"params": {...}, "batch_stats": {...}} of the encoder alone, as concrete arrays. Scanned blocks keep
        their leading depth axis. An already folded tree is returned with the same contents.

    Returns:
      A new tree with the structure that `init` gives for form="folded". Folded kernels and biases are float32 numpy
      arrays, computed in float64; all other leaves are taken from `vision` unchanged.
    """
    params, stats = _fold(vision["params"], vision.get("batch_stats", {}))
    return {"params": params, "batch_stats": stats}


def fold_variables(variables: dict) -> dict:
    """Folds the `vision` subtree in every collection of FastVLM's variables and keeps the rest."""
    vision = fold({name: collection["vision"] for name, collection in variables.items() if "vision" in collection})
    return variables | {name: {**variables.get(name, {}), "vision": tree} for name, tree in vision.items()}


def _fold(params: dict, stats: dict) -> tuple[dict, dict]:
    """Folds the block that `params` belong to, recognised by their names, and all blocks inside it."""
    parts = set(params)
    if {"conv", "fc1", "fc2"} <= parts:  # ConvFFN
        return params, stats
    if {"large", "small"} <= parts:  # PatchEmbed
        folded, branches = _patch_embed(params, stats), {"large", "small"}
    elif {"mixer", "norm", "layer_scale"} <= parts:  # RepMixer
        folded, branches = _rep_mixer(params, stats), {"mixer", "norm", "layer_scale"}
    elif "conv" in parts and "bn" in params["conv"]:  # MobileOne
        folded, branches = _mobile_one(params, stats), {"conv", "scale", "skip"}
    elif parts == {"conv"}:  # ConditionalPositions
        folded, branches = _positions(params["conv"]), {"conv"}
    else:
        folded, branches = None, set()
    new_params, new_stats = {}, {name: x for name, x in stats.items() if not isinstance(x, dict)}
    for name in parts - branches:
        new_params[name] = params[name]
        if isinstance(params[name], dict):
            new_params[name], inner = _fold(params[name], stats.get(name, {}))
            new_stats |= {name: inner} if inner else {}
    if folded is not None:
        kernel, bias = folded
        new_params["folded"] = {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
    return new_params, new_stats


def _mobile_one(params: dict, stats: dict) -> Kernel:
    kernel, bias = _conv_bn(params["conv"], stats["conv"])
    if "scale" in params:
        scale_kernel, scale_bias = _conv_bn(params["scale"], stats["scale"])
        kernel, bias = kernel + _centred(scale_kernel, kernel.shape[-4]), bias + scale_bias
    if "skip" in params:
        factor, shift = _batch_norm(params["skip"], stats["skip"])
        kernel, bias = kernel + _identity(kernel) * _channels(factor), bias + shift
    return kernel, bias


def _patch_embed(params: dict, stats: dict) -> Kernel:
    kernel, bias = _conv_bn(params["large"], stats["large"])
    small_kernel, small_bias = _conv_bn(params["small"], stats["small"])
    return kernel + _centred(small_kernel, kernel.shape[-4]), bias + small_bias


def _rep_mixer(params: dict, stats: dict) -> Kernel:
    kernel, bias = _mobile_one(params["mixer"], stats["mixer"])
    factor, shift = _batch_norm(params["norm"], stats["norm"])
    layer_scale, identity = np.asarray(params["layer_scale"], np.float64), _identity(kernel)
    kernel = identity + _channels(layer_scale) * (kernel - identity * _channels(factor))
    return kernel, layer_scale * (bias - shift)


def _positions(params: dict) -> Kernel:
    kernel = np.asarray(params["kernel"], np.float64)
    return kernel + _identity(kernel), np.asarray(params["bias"])


def _conv_bn(params: dict, stats: dict) -> Kernel:
    factor, shift = _batch_norm(params["bn"], stats["bn"])
    return np.asarray(params["kernel"], np.float64) * _channels(factor), shift


def _batch_norm(params: dict, stats: dict) -> Kernel:
    """Returns BatchNorm with stored statistics as (factor, shift), each [..., C]."""
    mean, var = np.asarray(stats["mean"], np.float64), np.asarray(stats["var"], np.float64)
    factor = np.asarray(params["scale"], np.float64) / np.sqrt(var + BATCH_NORM_EPSILON)
    return factor, np.asarray(params["bias"], np.float64) - mean * factor


def _channels(x: np.ndarray) -> np.ndarray:
    """Reshapes [..., O] to [..., 1, 1, 1, O], which multiplies the output channels of a kernel."""
    return x[..., None, None, None, :]


def _centred(kernel: np.ndarray, size: int) -> np.ndarray:
    """Pads a kernel with zeros to size x size, the kernel in the centre."""
    pad = (size - kernel.shape[-4]) // 2
    return np.pad(kernel, [(0, 0)] * (kernel.ndim - 4) + [(pad, pad)] * 2 + [(0, 0)] * 2)


def _identity(kernel: np.ndarray) -> np.ndarray:
    """Returns the kernel of the identity function in the shape of `kernel`, [..., k, k, I, O]; I = 1 is depthwise."""
    size, _, inputs, outputs = kernel.shape[-4:]
    identity = np.zeros(kernel.shape[-4:])
    identity[size // 2, size // 2] = np.ones((1, outputs)) if inputs == 1 else np.eye(outputs)
    return identity
