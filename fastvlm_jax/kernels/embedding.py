"""Lookup in an embedding table whose words are sharded over devices, with a gradient that is summed in float32."""

import functools

import jax
import jax.numpy as jnp

from fastvlm_jax.sharding import batch_shards, first_word, on_shards, reduce_words, sum_words, table_axes, words_here

_ROWS, _WORDS, _TOKENS = ("batch", None, None), ("words", None), ("batch", None)


def embed(table_VD: jax.Array, tokens_BT: jax.Array, dtype) -> jax.Array:
    """Looks up the embeddings of tokens [B, T] in a table [V, D]; returns [B, T, D] in `dtype`.

    Inside `jax.set_mesh` rows are sharded over the batch axes and words over `tensor`; the table is gathered along fsdp
    in `dtype`. Because a frequent word gets thousands of small gradients, they are summed in float32 and reduced once.
    """
    if len(tokens_BT) % batch_shards():  # rows that do not divide, as in generation: every device computes all
        return table_VD.astype(dtype)[tokens_BT]
    return _sharded(table_VD, tokens_BT, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sharded(table_VD: jax.Array, tokens_BT: jax.Array, dtype) -> jax.Array:
    return on_shards(_embed, (_WORDS, _TOKENS), (_ROWS,))(table_VD.astype(dtype), tokens_BT)[0]


def _embed(table, tokens):
    index = tokens - first_word(len(table))
    own = (index >= 0) & (index < len(table))
    return (sum_words(jnp.where(own[..., None], table[jnp.where(own, index, 0)], 0)),)


def _forward(table, tokens, dtype):
    return _sharded(table, tokens, dtype), (tokens, jnp.zeros((len(table), 0), table.dtype))


def _backward(dtype, residuals, dx):
    tokens, like = residuals
    count = words_here(len(like))

    def add(tokens, dx):
        index = tokens - first_word(count)
        index = jnp.where(index >= 0, index, count)  # drops the words of other devices
        dtable = jnp.zeros((count, dx.shape[-1]), jnp.float32).at[index].add(dx.astype(jnp.float32), mode="drop")
        return (reduce_words(dtable),)

    (dtable,) = on_shards(add, (_TOKENS, _ROWS), (table_axes(len(like)),))(tokens, dx)
    return dtable.astype(like.dtype), None


_sharded.defvjp(_forward, _backward)
