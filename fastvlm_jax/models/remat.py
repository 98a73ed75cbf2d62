"""What the backward pass recomputes: policies by name, the same for encoder blocks and decoder layers."""

from collections.abc import Callable

import flax.linen as nn
import jax

# The input of every block is always kept. "full" keeps nothing else and computes the block again in the backward pass.
POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the results of all products with weights
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),  # the result of the attention
    # Of an encoder block also those of the 7x7 convolution and the statistics of training BatchNorm.
    "depthwise": jax.checkpoint_policies.save_only_these_names("attention", "depthwise", "statistics"),
}


def rematted(block: Callable, policy: str, *, scanned: bool = True) -> Callable:
    """The block's class, or function of a module, under the policy of that name; itself for "none".

    Outside a scan (`scanned=False`) the compiler has to be kept from seeing that the second computation is the first.

    Raises:
      ValueError: an unknown policy.
    """
    if policy == "none":
        return block
    if policy not in POLICIES:
        raise ValueError(f"remat={policy!r} must be one of none, {', '.join(POLICIES)}")
    return nn.remat(block, prevent_cse=not scanned, policy=POLICIES[policy])
