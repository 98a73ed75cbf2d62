"""The TPU implementation of `attention`: Pallas splash attention, which never stores the [T, S] scores.

Estimates of the TPU compiler, forward + backward, bfloat16, one v5e chip (nothing here was measured on a TPU):

| heads, key-value heads, head dim | B x T | plain: M cycles, temporaries | splash: M cycles, temporaries |
|---|---|---|---|
| 14, 2, 64 (Qwen2 0.5B) | 64 x 128 | 1.2, 0.01 GB | 2.4, 0.10 GB |
| | 32 x 256 | 3.0, 0.1 GB | 2.4, 0.1 GB |
| | 16 x 512 | 6.7, 0.3 GB | 2.6, 0.1 GB |
| | 8 x 2048 | 50.3, 2.8 GB | 11.0, 0.3 GB |
| | 2 x 4096 | 47.2, 2.8 GB | 6.7, 0.1 GB |
| 12, 2, 128 (1.5B) | 8 x 2048 | 44.9, 2.5 GB | 11.0, 0.3 GB |
| 28, 4, 128 (7B) | 8 x 2048 | 111.8, 5.7 GB | 30.1, 0.7 GB |

The compiler reports no `estimated_cycles` for a kernel call: its cycles are the bundles (one per cycle) in the
compiler's schedule, times the grid steps that run them. The rest, mostly transposing copies, is the sum of
`estimated_cycles`. Blocks of 1024 take 2 to 12 % fewer cycles than blocks of 512 if T is 2048 or more, and fit on v4,
v5e, v5p, v6e and v7x; blocks of 2048 do not fit on v5e. Head dim 64 needs no padding to 128. One fused kernel for the
backward pass is 2 % faster at T = 2048 with head dim 64, 1 % slower with head dim 128, and 12 % slower at T = 4096,
because it writes a dq for each block of keys.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha_single_device,
)

Array = jax.Array


def splash_attention(
    q_BTKGE: Array,
    k_BSKE: Array,
    v_BSKE: Array,
    q_segments_BT: Array,
    kv_segments_BS: Array,
    offset=0,
    *,
    interpret: bool = False,
) -> Array:
    """Computes the same as `kernels.attention.plain` with jax.experimental.pallas.ops.tpu.splash_attention.

    Key-value heads are not repeated for their query heads. T and S are padded to whole blocks. Blocks of keys that are
    entirely after their queries are skipped. `interpret` runs the kernels on any platform, slowly.

    A checkpoint policy that saves the name "attention" saves what the backward kernels need from the forward kernel:
    its result and the logarithm of each softmax denominator.
    """
    B, T, K, G, E = q_BTKGE.shape
    S = k_BSKE.shape[1]
    block_q, block_kv = block_size(T), block_size(S)
    q_BHTE = _whole_blocks((q_BTKGE * E**-0.5).reshape(B, T, K * G, E), block_q).swapaxes(1, 2)
    k_BKSE, v_BKSE = (_whole_blocks(x, block_kv).swapaxes(1, 2) for x in (k_BSKE, v_BSKE))
    segments = SegmentIds(_whole_blocks(q_segments_BT, block_q), _whole_blocks(kv_segments_BS, block_kv))
    # Computing a block of 1024 keys in steps of 512 takes 6 % fewer cycles forward than in one step.
    compute = min(block_kv, 512)
    kernel = make_splash_mha_single_device(
        _causal_mask(K * G, q_BHTE.shape[2], k_BKSE.shape[2], offset),
        block_sizes=BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_kv_compute=compute,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_kv_dkv_compute=compute,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    # Under jit this constant would become a tracer, which the kernel's `if` rejects.
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=not isinstance(offset, int))
    mixed_BHTE = jax.vmap(kernel)(q_BHTE, k_BKSE, v_BKSE, segments)
    return mixed_BHTE[:, :, :T].swapaxes(1, 2).reshape(B, T, K, G, E)


def block_size(length: int) -> int:
    """Returns the slots in a block: up to 512 one block of all, else 1024 if it needs no more padding than 512, or 512.

    A single block is rounded up to a multiple of 128.
    """
    if length <= 512:
        return -(-length // 128) * 128
    return 1024 if -(-length // 512) % 2 == 0 else 512


def _whole_blocks(x: Array, block: int) -> Array:
    """Pads x [B, T, ...] with zeros to a multiple of `block`: keys after every query, or queries that are cut off."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)) + ((0, 0),) * (x.ndim - 2))


def _causal_mask(heads: int, T: int, S: int, offset):
    """Returns the mask s <= offset + t: computed in the kernel, or for a traced offset a stored array for all heads."""
    if isinstance(offset, int):
        return MultiHeadMask([CausalMask((T, S), offset)] * heads)
    return (jnp.arange(S)[None, :] <= offset + jnp.arange(T)[:, None])[None]
