"""Qwen2 and Llama decoders: RMSNorm, rotary grouped-query attention, SwiGLU, scanned over layers, KV cache.

Legend: B rows, T query slots, S key slots, D width, K key-value heads, G queries a key-value head, E head dim,
F MLP width, V vocabulary, L layers.
"""

from functools import partial

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from fastvlm_jax.kernels.attention import attention
from fastvlm_jax.kernels.cross_entropy import cross_entropy
from fastvlm_jax.kernels.embedding import embed
from fastvlm_jax.models.remat import rematted
from fastvlm_jax.sharding import batch_shards, constrain, gathered, sharded

Array = jax.Array


@flax.struct.dataclass
class Cache:
    """Keys and values of the slots filled so far. `length` is the next free slot, the same for all rows."""

    keys: Array  # [L, B, S, K, E]
    values: Array  # [L, B, S, K, E]
    segment_ids: Array  # int32 [B, S]; 0 where nothing may be attended to
    length: Array  # int32 []


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", sharded(nn.initializers.ones, (None,)), (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return y.astype(x.dtype) * scale.astype(x.dtype)


def matmul(x: Array, kernel: Array) -> Array:
    """x [..., D] @ kernel [D, F] over flattened leading axes: XLA's CPU backend runs the 3-D gradient half as fast."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


class Linear(nn.Module):
    """x @ kernel with logical axes on both dimensions, optional bias."""

    features: int
    axes: tuple[str | None, str | None]
    use_bias: bool = False
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.normal(self.init_std)
        kernel = self.param("kernel", sharded(init, self.axes), (x.shape[-1], self.features), jnp.float32)
        y = matmul(x, gathered(kernel, self.axes, x.dtype))
        if self.use_bias:
            bias = self.param("bias", sharded(nn.initializers.zeros, self.axes[1:]), (self.features,), jnp.float32)
            y += bias.astype(x.dtype)
        return y


def rotary(x_BTHE: Array, positions_BT: Array, theta: float) -> Array:
    """Rotates the two halves of each head by position (RoFormer, in the half-split layout of Llama and Qwen2)."""
    E = x_BTHE.shape[-1]
    frequencies = theta ** -(jnp.arange(0, E, 2, dtype=jnp.float32) / E)
    angles_BT1e = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles_BT1e), jnp.sin(angles_BT1e)
    a, b = jnp.split(x_BTHE.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHE.dtype)


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU MLP. With a cache, keys and values are written at `offset` and attended to."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float
    qkv_bias: bool
    epsilon: float
    init_std: float

    @nn.compact
    def __call__(self, x_BTD, kv, positions_BT, q_segments_BT, kv_segments_BS, offset):
        B, T, D = x_BTD.shape
        K, G, E = self.num_kv_heads, self.num_heads // self.num_kv_heads, self.head_dim
        linear = partial(Linear, init_std=self.init_std)
        y = RMSNorm(self.epsilon, name="attention_norm")(x_BTD)
        q = linear(K * G * E, ("embed", "heads"), self.qkv_bias, name="q")(y).reshape(B, T, K * G, E)
        k = linear(K * E, ("embed", "kv_heads"), self.qkv_bias, name="k")(y).reshape(B, T, K, E)
        v = linear(K * E, ("embed", "kv_heads"), self.qkv_bias, name="v")(y).reshape(B, T, K, E)
        q, k = rotary(q, positions_BT, self.rope_theta), rotary(k, positions_BT, self.rope_theta)
        if kv is not None:
            k = jax.lax.dynamic_update_slice_in_dim(kv[0], k.astype(kv[0].dtype), offset, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(kv[1], v.astype(kv[1].dtype), offset, axis=1)
            kv = (k, v)
        mixed = attention(q.reshape(B, T, K, G, E), k, v, q_segments_BT, kv_segments_BS, offset)
        x = x_BTD + linear(D, ("heads", "embed"), name="o")(mixed.reshape(B, T, K * G * E))
        y = RMSNorm(self.epsilon, name="mlp_norm")(x)
        gate = jax.nn.silu(linear(self.mlp_dim, ("embed", "mlp"), name="gate")(y))
        up = linear(self.mlp_dim, ("embed", "mlp"), name="up")(y)
        x = x + linear(D, ("mlp", "embed"), name="down")(gate * up)
        return constrain(x, ("batch", None, None)), kv


class Decoder(nn.Module):
    """A causal language model over embeddings.

    Attributes:
      vocab_size, width, num_layers, num_heads, num_kv_heads, mlp_dim: sizes; head_dim defaults to width / num_heads.
      rope_theta, epsilon, qkv_bias, tie_embeddings: Qwen2 has qkv biases, Llama none.
      init_std: of the initial weights; narrow models learn much sooner with 1 / sqrt(width) than with 0.02.
      context_length: positions the weights were made for; kept for exports, nothing is computed from it.
      remat: what the backward pass recomputes, a policy of models/remat.py.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_dim: int
    head_dim: int | None = None
    rope_theta: float = 1e6
    epsilon: float = 1e-6
    qkv_bias: bool = True
    tie_embeddings: bool = True
    init_std: float = 0.02
    context_length: int = 32768
    remat: str = "none"

    @property
    def size_of_head(self) -> int:
        return self.head_dim or self.width // self.num_heads

    def setup(self):
        init = nn.initializers.normal(self.init_std)
        self.embedding = self.param(
            "embedding", sharded(init, ("vocab", None)), (self.vocab_size, self.width), jnp.float32
        )
        layer = rematted(DecoderLayer, self.remat)
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            out_axes=0,
            length=self.num_layers,
            metadata_params={nn.PARTITION_NAME: None},
        )(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.size_of_head,
            mlp_dim=self.mlp_dim,
            rope_theta=self.rope_theta,
            qkv_bias=self.qkv_bias,
            epsilon=self.epsilon,
            init_std=self.init_std,
        )
        self.final_norm = RMSNorm(self.epsilon)
        if not self.tie_embeddings:
            self.lm_head = Linear(self.vocab_size, (None, "vocab"), init_std=self.init_std)

    def embed(self, tokens_BT: Array, dtype=jnp.float32) -> Array:
        """Token embeddings [B, T, D]."""
        if len(tokens_BT) % batch_shards():  # few rows, as in generation, which every device computes
            return self.embedding.astype(dtype)[tokens_BT]
        return embed(self.embedding, tokens_BT, dtype)

    def __call__(
        self, x_BTD: Array, positions_BT: Array, segments_BT: Array, cache: Cache | None = None, targets_BT=None
    ):
        """Hidden states to logits, or to losses.

        Args:
          x_BTD: embeddings. positions_BT, segments_BT: int32, positions inside a segment, 0 = padding segment.
          cache: filled slots to attend to; the T new slots are appended to it.
          targets_BT: int32; with them the loss of every token takes the place of its logits, which are never stored.

        Returns:
          (logits [B, T, V] in the dtype of x, or losses [B, T] in float32; the new cache or None).
        """
        offset, kv, kv_segments_BS = 0, None, segments_BT
        if cache is not None:
            offset, kv = cache.length, (cache.keys, cache.values)
            kv_segments_BS = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segments_BT, offset, axis=1)
        x_BTD, kv = self.layers(x_BTD, kv, positions_BT, segments_BT, kv_segments_BS, offset)
        x_BTD = self.final_norm(x_BTD)
        if targets_BT is not None:
            table_VD = self.embedding if self.tie_embeddings else self.lm_head.variables["params"]["kernel"].T
            return cross_entropy(x_BTD, table_VD, targets_BT), None
        logits_BTV = matmul(x_BTD, self.embedding.T.astype(x_BTD.dtype)) if self.tie_embeddings else self.lm_head(x_BTD)
        if cache is not None:
            cache = Cache(kv[0], kv[1], kv_segments_BS, offset + x_BTD.shape[1])
        return logits_BTV, cache

    def empty_cache(self, rows: int, slots: int, dtype=jnp.float32) -> Cache:
        """A cache of `slots` free slots for `rows` rows."""
        shape = (self.num_layers, rows, slots, self.num_kv_heads, self.size_of_head)
        zeros = jnp.zeros(shape, dtype)
        return Cache(zeros, zeros, jnp.zeros((rows, slots), jnp.int32), jnp.zeros((), jnp.int32))
