"""Rematerialization policies by name: the activations of encoder blocks and decoder layers to save or recompute."""

from collections.abc import Callable

import flax.linen as nn
import jax

# Every policy saves the input of each block. "full" saves nothing else: the backward pass recomputes the whole block.
POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # outputs of all matrix products with weights
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),  # output of the attention
    # Saves also, in encoder blocks, the output of the 7x7 convolution and the batch statistics of BatchNorm.
    "depthwise": jax.checkpoint_policies.save_only_these_names("attention", "depthwise", "statistics"),
}


# What a stage that is one function of kernels keeps besides the input of each block, see kernels/repmixer_stage.py; a
# policy that is not listed keeps nothing.
SAVED = {"none": ("mixed", "depthwise"), "depthwise": ("depthwise",)}


def saved(policy: str) -> tuple[str, ...]:
    """Returns what a stage that is one function keeps of each block under the named policy."""
    return SAVED.get(policy, ())


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
