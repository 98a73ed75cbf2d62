"""What the backward pass recomputes: policies by name, the same for encoder blocks and decoder layers."""

import flax.linen as nn
import jax

# The input of every block is always kept. "full" keeps nothing else and computes the block again in the backward pass.
POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the results of all products with weights
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),  # the result of the attention
}


def rematted(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """The block's class under the policy of that name, itself for "none".

    Raises:
      ValueError: an unknown policy.
    """
    if policy == "none":
        return block
    if policy not in POLICIES:
        raise ValueError(f"remat={policy!r} must be one of none, {', '.join(POLICIES)}")
    return nn.remat(block, prevent_cse=False, policy=POLICIES[policy])
