"""Causal grouped-query attention over packed rows and over a KV cache: one function, an implementation per platform.

| platform | implementation | reason |
|---|---|---|
| TPU | `kernels.splash` | see the table there |
| CUDA, 16-bit | cuDNN's flash attention | the [T, S] scores are never stored |
| CPU, all others | `plain` | nothing faster is available |
| any, below 256 keys or one query | `plain` | short rows leave a kernel idle; one query stores few scores |

Generation has `prompt_attention` and `cached_attention`, which need no backward pass. On TPU the scores of a prompt
stay in on-chip memory if they fit, all at once or those of one key-value head at a time. The TPU compiler's estimates
for one v5e chip, bfloat16, thousands of cycles, in brackets by its schedules (nothing was measured on a TPU):

| heads, key-value heads, head dim | B x T | all at once | a key-value head at a time | splash |
|---|---|---|---|---|
| 14, 2, 64 (Qwen2 0.5B) | 1 x 320 | 27 (11) | 43 (13) | 63 (30) |
| | 1 x 640 | 49 (27) | 71 (33) | 162 (98) |
| | 1 x 1088 | 112 (90) | 143 (89) | 387 (261) |
| | 8 x 512 | 1,757 (679) | 233 (152) | 313 (216) |
| | 1 x 1500 | 1,024 (709) | 233 (168) | 422 (267) |
| | 1 x 2048 | 1,829 (1,313) | 421 (273) | 391 (341) |
| | 1 x 4096 | 7,056 (5,229) | 7,115 (5,275) | 1,446 (1,350) |
| 28, 4, 128 (7B) | 1 x 640 | 103 (68) | 182 (101) | 340 (206) |
| | 1 x 1088 | 1,171 (763) | 337 (217) | 756 (537) |

v6e and v4 are alike. On v5p, whose device has two cores, splash is as fast from half as many scores on: 14 heads at
1 x 1500 take 428 (249), 467 (261) and 202 (148).

The platform is the target of the compilation, not the machine that compiles: a program for TPU can be compiled on a CPU
machine. cuDNN is the exception: JAX asks the GPU of the running process what it supports, and without a GPU the program
uses `plain`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fastvlm_jax.kernels.splash import splash_attention
from fastvlm_jax.sharding import batch_shards, device_cores, on_shards

Array = jax.Array
# Scores of a prompt that may exist at a time on a TPU with one core, half as many on one with two: see the table above.
MAX_SCORES = 2**24
MIN_KERNEL_KEYS = 256  # keys; with fewer, `plain` takes fewer estimated cycles on TPU


def attention(
    q_BTKGE: Array, k_BSKE: Array, v_BSKE: Array, q_segments_BT: Array, kv_segments_BS: Array, offset=0
) -> Array:
    """Computes attention from query slot offset + t to the key slots s <= offset + t of the same segment.

        segments 1 1 2 2 0      k: 1 1 2 2 0
                         q: 1      x . . . .
                            1      x x . . .
                            2      . . x . .
                            2      . . x x .
                            0      . . . . x   (padding: the result is finite and unused)

    Inside `jax.set_mesh` each device runs the kernels on its own rows and key-value heads.

    Args:
      q_BTKGE: queries; K key-value heads, G query heads per key-value head, E head dim.
      k_BSKE, v_BSKE: keys and values; S = T without a cache.
      q_segments_BT, kv_segments_BS: int32 segment ids; 0 is padding.
      offset: slot of the first query among the keys; may be traced. It must be 0 if S = T.

    Returns:
      [B, T, K, G, E] in the dtype of the queries; the softmax is computed in float32. Checkpoint policies can save
      activations under the name "attention", except with cuDNN, whose backward pass needs more than the result.
    """
    T, S = q_BTKGE.shape[1], k_BSKE.shape[1]
    args = (q_BTKGE, k_BSKE, v_BSKE, q_segments_BT, kv_segments_BS)
    if S != T:  # otherwise the causal mask is a constant of the kernels
        args += (offset,)
    if T == 1 or S < MIN_KERNEL_KEYS:
        return checkpoint_name(plain(*args), "attention")
    forms = {"tpu": splash_attention}
    if cudnn_supports(q_BTKGE, k_BSKE):
        forms["cuda"] = cudnn_attention
    kernels = {platform: partial(_on_shards, form) for platform, form in forms.items()}
    # Every branch stores the residuals of all branches (zeros where it has none), so `plain` may store only its inputs.
    return jax.lax.platform_dependent(*args, **kernels, default=jax.checkpoint(plain))


def plain(q_BTKGE: Array, k_BSKE: Array, v_BSKE: Array, q_segments_BT: Array, kv_segments_BS: Array, offset=0) -> Array:
    """Computes `attention` in plain JAX, which stores the scores [B, K, G, T, S] in float32."""
    scores = _scores(q_BTKGE, k_BSKE, q_segments_BT, kv_segments_BS, offset)
    weights = jax.nn.softmax(scores).astype(v_BSKE.dtype)
    return jnp.einsum("bkgts,bske->btkge", weights, v_BSKE)


def prompt_attention(q_BTKGE: Array, k_BTKE: Array, v_BTKE: Array, segments_BT: Array) -> Array:
    """Computes `attention` of prompts to themselves, without a backward pass."""
    args = (q_BTKGE, k_BTKE, v_BTKE, segments_BT, segments_BT)
    return jax.lax.platform_dependent(*args, tpu=partial(_on_shards, _on_chip), default=attention)


def cached_attention(q_BKGE: Array, k_BKES: Array, v_BKES: Array, allowed_BS: Array) -> Array:
    """Computes the attention of one query a row to the slots of a cache, [B, K, G, E] in the dtype of the queries."""
    q_BKGE = q_BKGE * q_BKGE.shape[-1] ** -0.5
    scores = jnp.einsum("bkge,bkes->bkgs", q_BKGE, k_BKES, preferred_element_type=jnp.float32)
    scores = jnp.where(allowed_BS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    return jnp.einsum("bkgs,bkes->bkge", jax.nn.softmax(scores).astype(v_BKES.dtype), v_BKES)


def _on_chip(q_BTKGE: Array, k_BSKE: Array, v_BSKE: Array, q_segments_BT: Array, kv_segments_BS: Array) -> Array:
    """Computes `plain` for all heads at once, or for one key-value head at a time, or by a kernel: as scores fit."""
    B, T, K, G, _ = q_BTKGE.shape
    scores, fitting = B * G * T * T, MAX_SCORES // device_cores()
    if K * scores <= fitting:
        return _sums_by_product(q_BTKGE, k_BSKE, v_BSKE, q_segments_BT, kv_segments_BS)
    if scores > fitting:
        return splash_attention(q_BTKGE, k_BSKE, v_BSKE, q_segments_BT, kv_segments_BS)
    heads = tuple(jnp.moveaxis(jnp.expand_dims(x, 3), 2, 0) for x in (q_BTKGE, k_BSKE, v_BSKE))
    mixed = jax.lax.map(lambda head: _sums_by_product(*head, q_segments_BT, kv_segments_BS), heads)
    return jnp.moveaxis(jnp.squeeze(mixed, 3), 0, 2)


def _sums_by_product(
    q_BTKGE: Array, k_BSKE: Array, v_BSKE: Array, q_segments_BT: Array, kv_segments_BS: Array
) -> Array:
    """Computes `plain` with the sums of the softmax as a product, each of whose eight columns is the sum.

    By the TPU compiler's estimate that takes an eighth of the time of a reduction. The result is divided by them, not
    the weights, which are more numbers.
    """
    scores = _scores(q_BTKGE, k_BSKE, q_segments_BT, kv_segments_BS, 0)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    ones = jnp.ones((k_BSKE.shape[1], 8), v_BSKE.dtype)
    sums = jnp.einsum("bkgts,sn->bkgtn", weights.astype(v_BSKE.dtype), ones, preferred_element_type=jnp.float32)
    mixed = jnp.einsum("bkgts,bske->bkgte", weights.astype(v_BSKE.dtype), v_BSKE, preferred_element_type=jnp.float32)
    return jnp.einsum("bkgte->btkge", (mixed / jnp.max(sums, axis=-1, keepdims=True)).astype(q_BTKGE.dtype))


def cudnn_attention(
    q_BTKGE: Array,
    k_BSKE: Array,
    v_BSKE: Array,
    q_segments_BT: Array,
    kv_segments_BS: Array,
    offset=0,
    *,
    implementation: str = "cudnn",
) -> Array:
    """Computes the same as `plain` with jax.nn.dot_product_attention; cuDNN gets the segments as a mask [B, 1, T, S].

    cuDNN's packed layout (offsets of each segment) needs the maximum number of segments in a row and a Hopper GPU.
    """
    B, T, K, G, E = q_BTKGE.shape
    S = k_BSKE.shape[1]
    mask_BTS = q_segments_BT[:, :, None] == kv_segments_BS[:, None, :]
    # With is_causal=True cuDNN skips half of the scores, but it counts queries from slot 0.
    from_start = isinstance(offset, int) and offset == 0
    if not from_start:
        mask_BTS &= _causal(T, S, offset)
    mixed_BTHE = jax.nn.dot_product_attention(
        q_BTKGE.reshape(B, T, K * G, E),
        k_BSKE,
        v_BSKE,
        mask=mask_BTS[:, None],
        is_causal=from_start,
        implementation=implementation,
    )
    return mixed_BTHE.reshape(B, T, K, G, E)


def cudnn_supports(q_BTKGE: Array, k_BSKE: Array) -> bool:
    """Returns whether this process has a GPU whose cuDNN supports these shapes and dtypes, forward and backward."""
    T, E, S = q_BTKGE.shape[1], q_BTKGE.shape[-1], k_BSKE.shape[1]
    if q_BTKGE.dtype != k_BSKE.dtype or q_BTKGE.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    if E % 8 or E > 128 or T % 2 or S % 2:
        return False
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        return False
    return float(device.compute_capability) >= 8


def _scores(q_BTKGE: Array, k_BSKE: Array, q_segments_BT: Array, kv_segments_BS: Array, offset) -> Array:
    """Returns the masked scores [B, K, G, T, S] in float32."""
    T, S, E = q_BTKGE.shape[1], k_BSKE.shape[1], q_BTKGE.shape[-1]
    scores = jnp.einsum("btkge,bske->bkgts", q_BTKGE * E**-0.5, k_BSKE, preferred_element_type=jnp.float32)
    mask_BTS = _causal(T, S, offset) & (q_segments_BT[:, :, None] == kv_segments_BS[:, None, :])
    return jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)


def _causal(T: int, S: int, offset) -> Array:
    return jnp.arange(S)[None, :] <= offset + jnp.arange(T)[:, None]


def _on_shards(form, *args):
    """Runs `form` on each device's own rows and heads: XLA cannot partition a kernel and would gather its arguments.

    If the number of rows does not divide over the devices, every device computes all rows.
    """
    rows = "batch" if len(args[0]) % batch_shards() == 0 else None
    heads = (rows, None, "kv_heads")
    axes = (heads, heads, heads, (rows,), (rows,), ())
    return on_shards(lambda *args: (form(*args),), axes[: len(args)], (heads,))(*args)[0]
