"""Qwen2 and Llama decoders: RMSNorm, rotary grouped-query attention, SwiGLU, a scan over the layers, a KV cache.

Legend: B rows, T query slots, S key slots, D width, K key-value heads, G query heads per key-value head, E head dim,
F MLP width, V vocabulary, L layers.
"""

import operator
from collections.abc import Callable
from functools import partial

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from fastvlm_jax.kernels.attention import attention, cached_attention, prompt_attention
from fastvlm_jax.kernels.cross_entropy import cross_entropy
from fastvlm_jax.kernels.embedding import embed
from fastvlm_jax.models import lora
from fastvlm_jax.models.remat import rematted
from fastvlm_jax.sharding import constrain, gathered, sharded

Array = jax.Array


@flax.struct.dataclass
class Cache:
    """Holds the keys and values of the slots filled so far. `length` is the first free slot, the same in all rows."""

    keys: tuple[Array, ...]  # [B, K, E, S] of each layer
    values: tuple[Array, ...]  # [B, K, E, S] of each layer
    segment_ids: Array  # int32 [B, S]; 0 in slots that no query may attend to
    length: Array  # int32 []


class RMSNorm(nn.Module):
    """Divides x by its root mean square, in float32, then multiplies by a learned scale in the dtype of x."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", sharded(nn.initializers.ones, (None,)), (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return y.astype(x.dtype) * scale.astype(x.dtype)


def matmul(x: Array, kernel: Array) -> Array:
    """Computes x [..., D] @ kernel [D, F] with the leading axes flattened.

    Without the flattening, XLA's CPU backend computes the gradient of a 3-D x at half the speed.
    """
    flat = x.reshape(-1, x.shape[-1])
    if len(flat) == 1:
        y = jax.lax.platform_dependent(flat, kernel, tpu=_one_row, default=jnp.matmul)
    else:
        y = flat @ kernel
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _one_row(x: Array, kernel: Array) -> Array:
    """Computes x [1, D] @ kernel on the matrix units of a TPU.

    XLA turns the product of a single row into vector operations, which take four times as long as HBM needs.
    """
    return (jnp.pad(x, ((0, 7), (0, 0))) @ kernel)[:1]


class Linear(nn.Module):
    """Computes x @ kernel, plus a bias if `use_bias`; `axes` are the logical axes of the kernel's two dimensions."""

    features: int
    axes: tuple[str | None, str | None]
    use_bias: bool = False
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.normal(self.init_std)
        kernel = self.param("kernel", sharded(init, self.axes), (x.shape[-1], self.features), jnp.float32)
        y = matmul(x, gathered(kernel, self.axes, x.dtype))
        if (low_rank := lora.update(self, x, self.axes)) is not None:
            y += low_rank
        if self.use_bias:
            bias = self.param("bias", sharded(nn.initializers.zeros, self.axes[1:]), (self.features,), jnp.float32)
            y += bias.astype(x.dtype)
        return y


def unstacked(layers: dict, count: int, index: Callable = operator.getitem) -> dict:
    """Returns the parameters of `count` scanned layers, [L, ...], as those of each layer: {"0": ..., "1": ...}.

    A decoder computes the same with either. Generation is faster with arrays of their own: a program need not cut a
    layer's weights out of the stack, and fetches them while the layer before computes.

    Args:
      layers: parameters under `llm/layers` of any form; those of single layers are returned as they are.
      index: function of a leaf and a number that returns the leaf of one layer.
    """
    if "0" in layers:
        return layers
    return {str(i): jax.tree.map(lambda leaf: index(leaf, i), layers) for i in range(count)}


def rotary(x_BTHE: Array, positions_BT: Array, theta: float, whole: bool = False) -> Array:
    """Applies rotary position embeddings (RoFormer) to the two halves of each head, the layout of Llama and Qwen2.

    `whole` computes the same with the halves in one array. By the TPU compiler's estimate that is faster for the few
    heads of keys that go into a cache, and slower for the many of queries.
    """
    E = x_BTHE.shape[-1]
    frequencies = theta ** -(jnp.arange(0, E, 2, dtype=jnp.float32) / E)
    angles_BT1e = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles_BT1e), jnp.sin(angles_BT1e)
    x = x_BTHE.astype(jnp.float32)
    if whole:
        halves = x.reshape(*x.shape[:-1], 2, E // 2)
        sines = sin[..., None, :] * jnp.array([[-1.0], [1.0]])
        return (halves * cos[..., None, :] + halves[..., ::-1, :] * sines).reshape(x.shape).astype(x_BTHE.dtype)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHE.dtype)


def written(cache_BKES: Array, new_BTKE: Array, offset: Array, further: bool = False) -> Array:
    """Returns a cache with the keys or values of one or more further tokens at slot `offset`, or of a prompt at 0."""
    new_BKET = new_BTKE.transpose(0, 2, 3, 1).astype(cache_BKES.dtype)
    S, T = cache_BKES.shape[3], new_BKET.shape[3]
    if T == 1 or further:
        return jax.lax.dynamic_update_slice_in_dim(cache_BKES, new_BKET, offset, axis=3)
    # The TPU compiler fills the caches of all layers in one operation so; an update of zeros is an operation for each.
    return jnp.where(jnp.arange(S) < T, jnp.pad(new_BKET, ((0, 0), (0, 0), (0, 0), (0, S - T))), 0)


class DecoderLayer(nn.Module):
    """Applies pre-norm attention and a pre-norm SwiGLU MLP, each around a skip connection.

    With a cache `kv`, writes the new keys and values at slot `offset`. One token attends to all of the cache; several
    are a prompt, for which the cache must be empty, and attend to each other, or with `further` to the cache as well.
    With `last_B`, only the token at that place of each row attends, and the result has one token a row.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float
    qkv_bias: bool
    epsilon: float
    init_std: float

    @nn.compact
    def __call__(self, x_BTD, kv, positions_BT, q_segments_BT, kv_segments_BS, offset, last_B=None, further=False):
        B, T, D = x_BTD.shape
        K, G, E = self.num_kv_heads, self.num_heads // self.num_kv_heads, self.head_dim
        linear = partial(Linear, init_std=self.init_std)
        y = RMSNorm(self.epsilon, name="attention_norm")(x_BTD)
        asking, q_positions_BT = y, positions_BT
        if last_B is not None:
            T, rows = 1, jnp.arange(B)[:, None]
            x_BTD, asking, q_positions_BT, q_segments_BT = (
                z[rows, last_B[:, None]] for z in (x_BTD, y, positions_BT, q_segments_BT)
            )
        q = linear(K * G * E, ("embed", "heads"), self.qkv_bias, name="q")(asking).reshape(B, T, K * G, E)
        k = linear(K * E, ("embed", "kv_heads"), self.qkv_bias, name="k")(y).reshape(B, -1, K, E)
        v = linear(K * E, ("embed", "kv_heads"), self.qkv_bias, name="v")(y).reshape(B, -1, K, E)
        prompt = kv is not None and k.shape[1] > 1
        q = rotary(q, q_positions_BT, self.rope_theta)
        k = rotary(k, positions_BT, self.rope_theta, whole=prompt)
        q = q.reshape(B, T, K, G, E)
        if prompt:
            v = jax.lax.optimization_barrier(v)  # else the TPU compiler adds the bias twice, for `mixed` and the cache
        if kv is not None:
            kv = tuple(written(old, new, offset, further) for old, new in zip(kv, (k, v), strict=True))
        if kv is None:
            mixed = attention(q, k, v, q_segments_BT, kv_segments_BS, offset)
        elif T > 1 and further:
            keys, values = (x_BKES.transpose(0, 3, 1, 2) for x_BKES in kv)
            mixed = attention(q, keys, values, q_segments_BT, kv_segments_BS, offset)
        elif T > 1:
            mixed = prompt_attention(q, k, v, q_segments_BT)
        else:
            mixed = cached_attention(q[:, 0], *kv, q_segments_BT == kv_segments_BS)
        x = x_BTD + linear(D, ("heads", "embed"), name="o")(mixed.reshape(B, T, K * G * E))
        y = RMSNorm(self.epsilon, name="mlp_norm")(x)
        gate = jax.nn.silu(linear(self.mlp_dim, ("embed", "mlp"), name="gate")(y))
        up = linear(self.mlp_dim, ("embed", "mlp"), name="up")(y)
        hidden = gate * up
        if prompt and T > 1:  # else the TPU compiler puts `up` into the product `down`, which takes longer
            hidden = jax.lax.optimization_barrier(hidden)
        x = x + linear(D, ("mlp", "embed"), name="down")(hidden)
        return constrain(x, ("batch", None, None)), kv


class Decoder(nn.Module):
    """Maps embeddings to logits or losses: a causal language model.

    Attributes:
      vocab_size: rows of the embedding table.
      width: channels of the residual stream.
      num_layers: number of layers.
      num_heads: query heads of a layer.
      num_kv_heads: key-value heads of a layer; each serves num_heads / num_kv_heads query heads.
      mlp_dim: hidden width of the SwiGLU.
      head_dim: channels of a head; None means width / num_heads.
      rope_theta: base of the rotary frequencies.
      epsilon: term that keeps RMSNorm from dividing by zero.
      qkv_bias: whether the query, key and value layers have a bias: True for Qwen2, False for Llama.
      tie_embeddings: whether the logits reuse the embedding table instead of a separate `lm_head`.
      init_std: standard deviation of the initial weights; narrow models learn much sooner with 1 / sqrt(width) than
        with 0.02.
      context_length: number of positions the weights were trained for: generation keeps within it, exports record it.
      remat: policy of models/remat.py that says what the backward pass recomputes.
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

    @property
    def sizes_of_layer(self) -> dict:
        """Returns the constructor arguments of every DecoderLayer."""
        names = ("num_heads", "num_kv_heads", "mlp_dim", "rope_theta", "qkv_bias", "epsilon", "init_std")
        return {"head_dim": self.size_of_head, **{name: getattr(self, name) for name in names}}

    def layer(self, variables: dict, *args):
        """Applies one layer with its variables, by collection; see `DecoderLayer`."""
        return DecoderLayer(**self.sizes_of_layer, parent=None).apply(variables, *args)

    @nn.nowrap
    def _each_layer(self) -> list[dict]:
        """Returns the variables of each layer, by collection."""
        found = self.layers.variables
        trees = {name: unstacked(found[name], self.num_layers) for name in ("params", lora.NAME) if name in found}
        return [{name: layers[str(i)] for name, layers in trees.items()} for i in range(self.num_layers)]

    def setup(self):
        init = nn.initializers.normal(self.init_std)
        self.embedding = self.param(
            "embedding", sharded(init, ("vocab", None)), (self.vocab_size, self.width), jnp.float32
        )
        self.layers = nn.scan(
            rematted(DecoderLayer, self.remat),
            variable_axes={"params": 0, lora.NAME: 0},
            split_rngs={"params": True, lora.NAME: True},
            in_axes=(nn.broadcast,) * 5,
            out_axes=0,
            length=self.num_layers,
            metadata_params={nn.PARTITION_NAME: None},
        )(**self.sizes_of_layer)
        self.final_norm = RMSNorm(self.epsilon)
        if not self.tie_embeddings:
            self.lm_head = Linear(self.vocab_size, (None, "vocab"), init_std=self.init_std)

    def embed(self, tokens_BT: Array, dtype=jnp.float32) -> Array:
        """Looks up the token embeddings, [B, T, D] in `dtype`."""
        return embed(self.embedding, tokens_BT, dtype)

    def __call__(self, x_BTD: Array, positions_BT: Array, segments_BT: Array, targets_BT=None) -> Array:
        """Computes the logits, or with targets the losses, of a batch of embeddings.

        Args:
          x_BTD: embeddings.
          positions_BT: int32 positions inside the segment.
          segments_BT: int32 segment ids; 0 is padding.
          targets_BT: int32; if given, the loss of each token is returned and the logits are never stored.

        Returns:
          Logits [B, T, V] in the dtype of x, or with targets losses [B, T] in float32.
        """
        if "0" in self.layers.variables.get("params", {}):
            for variables in self._each_layer():
                x_BTD, _ = self.layer(variables, x_BTD, None, positions_BT, segments_BT, segments_BT, 0)
        else:
            x_BTD, _ = self.layers(x_BTD, None, positions_BT, segments_BT, segments_BT, 0)
        x_BTD = self.final_norm(x_BTD)
        if targets_BT is None:
            return self.logits(x_BTD)
        table_VD = (
            self.embedding
            if self.tie_embeddings
            else lora.adapted(self.lm_head, self.lm_head.variables["params"]["kernel"]).T
        )
        return cross_entropy(x_BTD, table_VD, targets_BT)

    def logits(self, x: Array) -> Array:
        """Returns the logits [..., V] of the last layer's normalised output [..., D], in its dtype."""
        return matmul(x, self.embedding.T.astype(x.dtype)) if self.tie_embeddings else self.lm_head(x)

    def extend(
        self, x_BTD: Array, positions_BT: Array, segments_BT: Array, cache: Cache, further: bool = False
    ) -> tuple[Array, Cache]:
        """Appends T slots to a cache; returns the logits [B, V] of the last token of each row, and the longer cache.

        Args:
          x_BTD: embeddings of a prompt, if the cache is empty; else of one further token a row, or with `further` of
            several.
          positions_BT, segments_BT: see `__call__`; a row's padding stands at its end.
          cache: cache with at least T free slots.
          further: whether several tokens attend to those in the cache too, as the next turn of a conversation does.
        """
        offset, T = cache.length, x_BTD.shape[1]
        kv_segments_BS = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segments_BT, offset, axis=1)
        caches, kvs = [], zip(cache.keys, cache.values, strict=True)
        for i, (variables, kv) in enumerate(zip(self._each_layer(), kvs, strict=True)):
            last_B = None
            if T > 1 and i == self.num_layers - 1:
                last_B = jnp.maximum(jnp.sum(segments_BT > 0, axis=1) - 1, 0)
            args = (positions_BT, segments_BT, kv_segments_BS, offset, last_B, further)
            x_BTD, kv = self.layer(variables, x_BTD, kv, *args)
            caches.append(kv)
        keys, values = zip(*caches, strict=True)
        return self.logits(self.final_norm(x_BTD[:, 0])), Cache(keys, values, kv_segments_BS, offset + T)

    def empty_cache(self, rows: int, slots: int, dtype=jnp.float32) -> Cache:
        """Returns a cache of `slots` free slots for each of `rows` rows."""
        zeros = (jnp.zeros((rows, self.num_kv_heads, self.size_of_head, slots), dtype),) * self.num_layers
        return Cache(zeros, zeros, jnp.zeros((rows, slots), jnp.int32), jnp.zeros((), jnp.int32))
