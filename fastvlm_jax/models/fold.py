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

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fastvlm_jax.kernels.batch_norm import EPSILON

# kernel [..., k, k, I, O] and bias [..., O]; ... is the depth axis of scanned blocks
Kernel = tuple[np.ndarray | jax.Array, np.ndarray | jax.Array]


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
    exact = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
    if {"conv", "fc1", "fc2"} <= parts:  # ConvFFN
        return params, stats
    if {"large", "small"} <= parts:  # PatchEmbed
        folded, branches = _patch_embed(exact(params), exact(stats)), {"large", "small"}
    elif {"mixer", "norm", "layer_scale"} <= parts:  # RepMixer
        folded, branches = rep_mixer(exact(params), exact(stats)), {"mixer", "norm", "layer_scale"}
    elif "conv" in parts and "bn" in params["conv"]:  # MobileOne
        folded, branches = _mobile_one(exact(params), exact(stats)), {"conv", "scale", "skip"}
    elif parts == {"conv"}:  # ConditionalPositions
        folded, branches = _positions(exact(params["conv"])), {"conv"}
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
    kernel, bias = conv_bn(params["conv"], stats["conv"])
    if "scale" in params:
        scale_kernel, scale_bias = conv_bn(params["scale"], stats["scale"])
        kernel, bias = kernel + _centred(scale_kernel, kernel.shape[-4]), bias + scale_bias
    if "skip" in params:
        factor, shift = _batch_norm(params["skip"], stats["skip"])
        kernel, bias = kernel + _identity(kernel) * _channels(factor), bias + shift
    return kernel, bias


def _patch_embed(params: dict, stats: dict) -> Kernel:
    kernel, bias = conv_bn(params["large"], stats["large"])
    small_kernel, small_bias = conv_bn(params["small"], stats["small"])
    return kernel + _centred(small_kernel, kernel.shape[-4]), bias + small_bias


def rep_mixer(params: dict, stats: dict) -> Kernel:
    """Folds a RepMixer: arrays of NumPy, or of JAX to be differentiated, in their dtype."""
    kernel, bias = _mobile_one(params["mixer"], stats["mixer"])
    factor, shift = _batch_norm(params["norm"], stats["norm"])
    layer_scale, identity = params["layer_scale"], _identity(kernel)
    kernel = identity + _channels(layer_scale) * (kernel - identity * _channels(factor))
    return kernel, layer_scale * (bias - shift)


def _positions(params: dict) -> Kernel:
    return params["kernel"] + _identity(params["kernel"]), params["bias"]


def conv_bn(params: dict, stats: dict) -> Kernel:
    """Folds a convolution and its BatchNorm: arrays of NumPy, or of JAX to be differentiated, in their dtype."""
    factor, shift = _batch_norm(params["bn"], stats["bn"])
    return params["kernel"] * _channels(factor), shift


def _batch_norm(params: dict, stats: dict) -> Kernel:
    """Returns BatchNorm with stored statistics as (factor, shift), each [..., C]."""
    factor = params["scale"] * (stats["var"] + EPSILON) ** -0.5
    return factor, params["bias"] - stats["mean"] * factor


def _channels(x: np.ndarray) -> np.ndarray:
    """Reshapes [..., O] to [..., 1, 1, 1, O], which multiplies the output channels of a kernel."""
    return x[..., None, None, None, :]


def _centred(kernel: np.ndarray, size: int) -> np.ndarray:
    """Pads a kernel with zeros to size x size, the kernel in the centre."""
    pad = (size - kernel.shape[-4]) // 2
    return (jnp if isinstance(kernel, jax.Array) else np).pad(
        kernel, [(0, 0)] * (kernel.ndim - 4) + [(pad, pad)] * 2 + [(0, 0)] * 2
    )


def _identity(kernel: np.ndarray) -> np.ndarray:
    """Returns the kernel of the identity function in the shape of `kernel`, [..., k, k, I, O]; I = 1 is depthwise."""
    size, _, inputs, outputs = kernel.shape[-4:]
    identity = np.zeros(kernel.shape[-4:], kernel.dtype)
    identity[size // 2, size // 2] = np.ones((1, outputs)) if inputs == 1 else np.eye(outputs)
    return identity
