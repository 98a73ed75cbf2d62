"""Rematerialization policies by name: the activations of encoder blocks and decoder layers to save or recompute."""

from collections.abc import Callable

import flax.linen as nn
import jax

# Every policy saves the input of each block, and in encoders of the stem and the patch embeds, which count as blocks.
# "full" saves nothing else: the backward pass recomputes the whole block.
POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # outputs of all matrix products with weights
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),  # output of the attention
    # Saves also the output of the 7x7 convolution, and the batch statistics of BatchNorm.
    "depthwise": jax.checkpoint_policies.save_only_these_names("attention", "depthwise", "statistics"),
}


def saved(policy: str, channels: int) -> tuple[str, ...]:
    """Returns what a stage that is one function of kernels keeps of each block besides its input.

    See kernels/repmixer_stage.py. "depthwise" keeps nothing of maps with fewer channels than a TPU's 128 lanes, which
    take as much memory as 128: with 8 images of 1024 px the two blocks of FastViTHD's first stage would keep 268 MB,
    and computing them again is 1 % of the encoder's time.

    Args:
      policy: a name in POLICIES, or "none".
      channels: channels of the maps.
    """
    if policy == "none":
        return "mixed", "depthwise"
    return ("depthwise",) if policy == "depthwise" and channels >= 128 else ()


def rematted(block: Callable, policy: str, *, scanned: bool = True) -> Callable:
    """Returns `block` wrapped so that it recomputes activations under the named policy; for "none", `block` itself.

    Args:
      block: a module class, or a function whose first argument is a module.
      policy: "none" or a name in POLICIES.
      scanned: whether the block runs inside a scan. Outside one, common subexpression elimination must be prevented, or
        the compiler would merge the recomputation with the forward pass.

    Raises:
      ValueError: the policy is unknown.
    """
    if policy == "none":
        return block
    if policy not in POLICIES:
        raise ValueError(f"remat={policy!r} must be one of none, {', '.join(POLICIES)}")
    return nn.remat(block, prevent_cse=not scanned, policy=POLICIES[policy])
