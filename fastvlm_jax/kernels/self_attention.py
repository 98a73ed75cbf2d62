"""Self-attention over all positions of an image: one function, the implementation that is fastest on each platform.

| platform | implementation | reason |
|---|---|---|
| TPU, GPU, all gradients | `by_heads` | a group's scores stay in the on-chip memory of a TPU, forward and backward |
| CPU, forward | `by_rows` | scores of some rows of a head stay in the cache: 2 to 3 times faster at 16x16 and 32x32 |

Legend: B images, N positions, C channels, h heads, E head dim.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from fastvlm_jax.kernels.mlp import divisor
from fastvlm_jax.sharding import device_cores, images_here

Array = jax.Array
# Attention scores of a device that may exist at a time: `by_heads` processes groups of as many heads as fit, at least
# one. On TPU these scores stay in on-chip memory, forward and backward (at 32x32 a third of the estimated cycles of all
# heads at once).
SCORES_AT_ONCE = 2**23
# Scores of one head of a device's images that still fit into that memory. Of more, a group has a head of fewer images,
# but not on devices of two cores: for v5p the compiler estimates no gain.
ON_CHIP = 2**24
# Keys up to which a softmax is the usual one. With more, for one image of 48x48 and 24 heads, the TPU compiler
# estimates 2.3 of 3.0 M cycles for the sums alone, and none for sums that are columns of the product with the values.
SUMMED_AT_ONCE = 2048
CPU_SCORES = 2**18  # scores that `by_rows` computes at a time: 1 MB, the cache of a core


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def self_attention(qkv_BNX: Array, head_dim: int) -> Array:
    """Computes softmax(q k / sqrt(E)) v of each head over all positions, with scores and softmax in float32.

    Args:
      qkv_BNX: [B, N, 3 * C], the queries of all heads, then their keys, then their values.
      head_dim: channels E of a head.

    Returns:
      [B, N, C] in the dtype of qkv.
    """
    default, cpu = (functools.partial(form, head_dim=head_dim) for form in (by_heads, by_rows))
    return lax.platform_dependent(qkv_BNX, cpu=cpu, default=default)


self_attention.defvjp(
    lambda qkv_BNX, head_dim: jax.vjp(functools.partial(by_heads, head_dim=head_dim), qkv_BNX),
    lambda head_dim, vjp, dy: vjp(dy),
)


def by_heads(qkv_BNX: Array, head_dim: int) -> Array:
    """Computes `self_attention` for a group of heads at a time; the backward pass computes a group's scores again.

    A group has a head of some images where one of all has too many scores. It has as many images of every device, so
    that none moves.
    """
    B, N, X = qkv_BNX.shape
    heads, images = X // 3 // head_dim, images_here(B)
    n = images if device_cores() > 1 else divisor(images, max(ON_CHIP // (N * N), 1), 1)
    h = divisor(heads, max(SCORES_AT_ONCE // (n * N * N), 1), 1) if n == images else 1
    # [devices, groups of images, images in a group, N, qkv, groups of heads, heads in a group, E]
    qkv = qkv_BNX.reshape(B // images, images // n, n, N, 3, heads // h, h, head_dim)
    if n == images and h == heads:
        q, k, v = jnp.moveaxis(qkv.reshape(B, N, 3, heads, head_dim), 2, 0)
        return attend(q, k, v).reshape(B, N, -1)
    groups = jnp.moveaxis(qkv, (4, 1, 5), (0, 1, 2)).reshape(3, -1, B // images * n, N, h, head_dim)
    step = jax.checkpoint(attend, prevent_cse=False)
    mixed = lax.map(lambda qkv: step(*qkv), tuple(groups))
    mixed = mixed.reshape(images // n, heads // h, B // images, n, N, h, head_dim)
    return jnp.moveaxis(mixed, (0, 1), (1, 4)).reshape(B, N, -1)


def attend(q_BNhE: Array, k_BNhE: Array, v_BNhE: Array) -> Array:
    """Computes softmax(q k / sqrt(E)) v over all positions, [B, N, h, E], with scores and softmax in float32."""
    B, N = q_BNhE.shape[:2]
    if N > SUMMED_AT_ONCE and images_here(B) * N * N <= ON_CHIP:
        return _attend_to_many(q_BNhE, k_BNhE, v_BNhE)
    weights_BhNN = jax.nn.softmax(_scores(q_BNhE, k_BNhE)).astype(q_BNhE.dtype)
    return jnp.einsum("bhnm,bmhe->bnhe", weights_BhNN, v_BNhE)


def _scores(q_BNhE: Array, k_BNhE: Array) -> Array:
    scores_BhNN = jnp.einsum("bnhe,bmhe->bhnm", q_BNhE, k_BNhE, preferred_element_type=jnp.float32)
    return scores_BhNN * q_BNhE.shape[-1] ** -0.5


@jax.custom_vjp
def _attend_to_many(q_BNhE: Array, k_BNhE: Array, v_BNhE: Array) -> Array:
    """Computes `attend` with the sums of the softmax as further columns of the product with the values.

    Its gradient is that of the usual softmax. The derivative of the sums would be such a column too, and rounded as
    one, which makes errors of sharp softmaxes in bfloat16 up to four times as large.
    """
    return _many_forward(q_BNhE, k_BNhE, v_BNhE)[0]


def _many_forward(q_BNhE: Array, k_BNhE: Array, v_BNhE: Array) -> tuple[Array, tuple[Array, ...]]:
    """Returns the result and what the backward pass needs."""
    scores_BhNN = _scores(q_BNhE, k_BNhE)
    weights_BhNN = jnp.exp(scores_BhNN - scores_BhNN.max(-1, keepdims=True))
    ones = jnp.ones((*v_BNhE.shape[:3], 8), v_BNhE.dtype)  # eight columns, the multiple that a GPU's products ask for
    columns = jnp.concatenate([v_BNhE, ones], -1)
    mixed = jnp.einsum(
        "bhnm,bmhe->bnhe", weights_BhNN.astype(v_BNhE.dtype), columns, preferred_element_type=jnp.float32
    )
    sums_BNh1 = mixed[..., -1:]
    mixed_BNhE = mixed[..., : v_BNhE.shape[-1]] / sums_BNh1
    return mixed_BNhE.astype(q_BNhE.dtype), (q_BNhE, k_BNhE, v_BNhE, weights_BhNN, sums_BNh1, mixed_BNhE)


def _many_backward(kept: tuple[Array, ...], dy_BNhE: Array) -> tuple[Array, Array, Array]:
    """Returns the gradients of the queries, the keys and the values."""
    q_BNhE, k_BNhE, v_BNhE, weights_BhNN, sums_BNh1, mixed_BNhE = kept
    weights_BhNN = weights_BhNN / jnp.einsum("bnhi->bhni", sums_BNh1)
    dweights_BhNN = jnp.einsum("bnhe,bmhe->bhnm", dy_BNhE, v_BNhE, preferred_element_type=jnp.float32)
    # The sum of weights * dweights over the positions, from fewer numbers.
    mean_BhN1 = jnp.einsum("bnhi->bhni", (dy_BNhE.astype(jnp.float32) * mixed_BNhE).sum(-1, keepdims=True))
    scale = q_BNhE.shape[-1] ** -0.5
    dscores_BhNN = (weights_BhNN * (dweights_BhNN - mean_BhN1) * scale).astype(q_BNhE.dtype)
    dq = jnp.einsum("bhnm,bmhe->bnhe", dscores_BhNN, k_BNhE)
    dk = jnp.einsum("bhnm,bnhe->bmhe", dscores_BhNN, q_BNhE)
    dv = jnp.einsum("bhnm,bnhe->bmhe", weights_BhNN.astype(v_BNhE.dtype), dy_BNhE)
    return dq, dk, dv


_attend_to_many.defvjp(_many_forward, _many_backward)


def by_rows(qkv_BNX: Array, head_dim: int) -> Array:
    """Computes `self_attention` for one head and some of the queries at a time, divided by the sums at the end."""
    B, N, X = qkv_BNX.shape
    rows = divisor(N, CPU_SCORES // (B * N), 32)
    qkv = jnp.moveaxis(qkv_BNX.reshape(B, N, 3, -1, head_dim), (2, 3), (0, 1))  # [3, heads, B, N, E]

    def head(qkv):
        q, k, v = qkv

        def attend_rows(q):
            scores = jnp.einsum("bre,bne->brn", q, k, preferred_element_type=jnp.float32)
            weights = jnp.exp((scores - scores.max(-1, keepdims=True)) * head_dim**-0.5)
            mixed = jnp.einsum("brn,bne->bre", weights.astype(q.dtype), v, preferred_element_type=jnp.float32)
            return (mixed / weights.sum(-1, keepdims=True)).astype(q.dtype)

        mixed = lax.map(attend_rows, jnp.moveaxis(q.reshape(B, N // rows, rows, head_dim), 1, 0))
        return jnp.moveaxis(mixed, 0, 1).reshape(B, N, head_dim)

    return jnp.moveaxis(lax.map(head, tuple(qkv)), 0, 2).reshape(B, N, X // 3)
