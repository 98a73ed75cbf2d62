"""Causal grouped-query attention over packed rows and over a key-value cache."""

import jax
import jax.numpy as jnp

Array = jax.Array


def attention(
    q_BTKGE: Array, k_BSKE: Array, v_BSKE: Array, q_segments_BT: Array, kv_segments_BS: Array, offset=0
) -> Array:
    """Attends from query slot offset + t to the key slots s <= offset + t of the same segment.

        segments 1 1 2 2 0      k: 1 1 2 2 0
                         q: 1      x . . . .
                            1      x x . . .
                            2      . . x . .
                            2      . . x x .
                            0      (padding: the result is unused)

    Args:
      q_BTKGE: queries; K key-value heads, G queries a head, E head dim.
      k_BSKE, v_BSKE: keys and values; S = T without a cache.
      q_segments_BT, kv_segments_BS: int32; 0 is padding.
      offset: slot of the first query among the keys.

    Returns:
      [B, T, K, G, E] in the queries' dtype; the softmax is computed in float32.
    """
    T, S, E = q_BTKGE.shape[1], k_BSKE.shape[1], q_BTKGE.shape[-1]
    scores = jnp.einsum("btkge,bske->bkgts", q_BTKGE * E**-0.5, k_BSKE, preferred_element_type=jnp.float32)
    causal_TS = jnp.arange(S)[None, :] <= offset + jnp.arange(T)[:, None]
    mask_BTS = causal_TS & (q_segments_BT[:, :, None] == kv_segments_BS[:, None, :])
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores).astype(v_BSKE.dtype)
    return jnp.einsum("bkgts,bske->btkge", weights, v_BSKE)
