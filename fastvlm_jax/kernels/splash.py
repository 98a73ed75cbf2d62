"""The TPU form of `attention`: Pallas splash attention, which never stores the [T, S] scores.

Forward + backward, bfloat16, one v5e chip, as the TPU compiler estimates it (nothing here was measured on a TPU):

| heads, key-value heads, head dim | B x T | plain: M cycles, temporaries | splash: M cycles, temporaries |
|---|---|---|---|
| 14, 2, 64 (Qwen2 0.5B) | 64 x 128 | 1.2, 0.01 GB | 2.4, 0.10 GB |
| | 32 x 256 | 3.0, 0.1 GB | 2.4, 0.1 GB |
| | 16 x 512 | 6.7, 0.3 GB | 2.6, 0.1 GB |
| | 8 x 2048 | 50.3, 2.8 GB | 11.0, 0.3 GB |
| | 2 x 4096 | 47.2, 2.8 GB | 6.7, 0.1 GB |
| 12, 2, 128 (1.5B) | 8 x 2048 | 44.9, 2.5 GB | 11.0, 0.3 GB |
| 28, 4, 128 (7B) | 8 x 2048 | 111.8, 5.7 GB | 30.1, 0.7 GB |

A kernel's call carries no estimated cycles: its bundles (one a cycle) are counted in the compiler's schedule, times the
steps of its grid that run them; the rest, mostly transposed copies, is the sum of `estimated_cycles`. Blocks of 1024
take 2 to 12 % fewer than blocks of 512 where T is 2048 or more, and fit on v4, v5e, v5p, v6e and v7x; 2048 do not fit
on v5e. Heads of 64 need no padding to 128. One fused kernel for the backward pass gains 2 % at T = 2048 with heads of
64, loses 1 % with heads of 128, and 12 % at T = 4096: it writes a dq for each block of keys.
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
    """`kernels.attention.plain`, by the kernels of jax.experimental.pallas.ops.tpu.splash_attention.

    Key-value heads are not repeated for their queries. T and S are padded to whole blocks. Blocks of keys that lie
    wholly after their queries are skipped. `interpret` runs the kernels on any platform, slowly.

    A checkpoint policy that saves the name "attention" keeps what the backward kernels need of the forward one: its
    result and the logarithm of each softmax's denominator.
    """
    B, T, K, G, E = q_BTKGE.shape
    S = k_BSKE.shape[1]
    block_q, block_kv = block_size(T), block_size(S)
    q_BHTE = _whole_blocks((q_BTKGE * E**-0.5).reshape(B, T, K * G, E), block_q).swapaxes(1, 2)
    k_BKSE, v_BKSE = (_whole_blocks(x, block_kv).swapaxes(1, 2) for x in (k_BSKE, v_BSKE))
    segments = SegmentIds(_whole_blocks(q_segments_BT, block_q), _whole_blocks(kv_segments_BS, block_kv))
    # Steps of 512 keys within a block of 1024: 6 % fewer cycles forward than the block at once.
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
    # Made under jit, this constant would be a tracer, which the kernel's `if` refuses.
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=not isinstance(offset, int))
    mixed_BHTE = jax.vmap(kernel)(q_BHTE, k_BKSE, v_BKSE, segments)
    return mixed_BHTE[:, :, :T].swapaxes(1, 2).reshape(B, T, K, G, E)


def block_size(length: int) -> int:
    """Rows of a block: one block up to 512, then the larger of 512 and 1024 that pads no more than 512 does."""
    if length <= 512:
        return -(-length // 128) * 128
    return 1024 if -(-length // 512) % 2 == 0 else 512


def _whole_blocks(x: Array, block: int) -> Array:
    """x [B, T, ...] with zeros up to a multiple of `block`: keys after every query, queries that are cut off again."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)) + ((0, 0),) * (x.ndim - 2))


def _causal_mask(heads: int, T: int, S: int, offset):
    """Query t sees key s <= offset + t: computed in the kernel, or of a traced offset stored, one for all heads."""
    if isinstance(offset, int):
        return MultiHeadMask([CausalMask((T, S), offset)] * heads)
    return (jnp.arange(S)[None, :] <= offset + jnp.arange(T)[:, None])[None]
