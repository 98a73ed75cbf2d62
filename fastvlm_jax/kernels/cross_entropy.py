"""Cross-entropy over a large vocabulary that never stores the logits: it computes them in chunks of words, twice.

For 4,096 tokens and 151,936 words (vocabulary entries), float32 logits take 2.5 GB and their gradient as much again.
Here the logits of a chunk exist only while they are added to each token's log-sum-exp. The backward pass recomputes
them:

    words   0 ........ c ........ 2c ........ V       forward:   running maximum and sum of every token
    tokens  [ chunk 0 ][ chunk 1 ][ chunk 2 ]         backward:  softmax - onehot, for a chunk's rows of dtable and
                                                                 its part of dx
The chunks split the words and not the tokens, so that the gradient of the table is written once and only the small dx
is accumulated.

Legend: B rows, T positions, D width, V words, N tokens (B * T of this device).
"""

import functools

import jax
import jax.numpy as jnp

from fastvlm_jax.sharding import first_word, max_words, on_shards, reduce_words, sum_words, table_axes

MAX_LOGITS = 2**26  # elements in the logits of a chunk: 256 MB in float32
_ROWS, _WORDS, _TOKENS = ("batch", None, None), ("words", None), ("batch", None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, max_logits: int = MAX_LOGITS):
    """Computes -log softmax(x @ table.T)[target] of every token, float32 [B, T]; softmax and sums are in float32.

    Inside `jax.set_mesh` rows are sharded over the batch axes and words over `tensor`. The table is gathered along fsdp
    in the dtype of x. Its gradient is reduced once over all rows, in float32, into the shards of the parameter.

    Args:
      x_BTD: last hidden states.
      table_VD: output embeddings of the words, in the dtype of the parameter.
      targets_BT: int32 in [0, V).
      max_logits: limit on the elements of logits that exist at a time.
    """
    return _cross_entropy_forward(x_BTD, table_VD, targets_BT, max_logits)[0]


def _cross_entropy_forward(x, table, targets, max_logits):
    forward = functools.partial(_forward, max_logits=max_logits)
    forward = on_shards(forward, (_ROWS, _WORDS, _TOKENS), (_TOKENS, _TOKENS))
    losses, lse = forward(x, table.astype(x.dtype), targets)
    return losses, (x, table, targets, lse)


def _cross_entropy_backward(max_logits, residuals, dlosses):
    x, table, targets, lse = residuals
    backward = functools.partial(_backward, max_logits=max_logits)
    backward = on_shards(backward, (_ROWS, _WORDS, _TOKENS, _TOKENS, _TOKENS), (_ROWS, table_axes(len(table))))
    dx, dtable = backward(x, table.astype(x.dtype), targets, lse, dlosses)
    return dx.astype(x.dtype), dtable.astype(table.dtype), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def num_chunks(words: int, tokens: int, max_logits: int) -> int:
    """Returns the smallest number of equal chunks of words for which tokens * words / chunks <= max_logits.

    Up to twice that number, it prefers chunks of a multiple of 128 words, which fill whole tiles. If `max_logits` is
    below the number of tokens, each chunk is one word.
    """
    divisors = [n for n in range(1, words + 1) if words % n == 0 and tokens * (words // n) <= max_logits] or [words]
    aligned = [n for n in divisors if words // n % 128 == 0 and n <= 2 * divisors[0]]
    return (aligned or divisors)[0]


def _chunks(table, tokens, max_logits):
    """Returns the table as [n, V/n, D] and the first word of each of the n chunks."""
    n = num_chunks(len(table), tokens, max_logits)
    return table.reshape(n, -1, table.shape[1]), jnp.arange(n) * (len(table) // n)


def _logits(x_ND, chunk_CD):
    return jnp.einsum("nd,cd->nc", x_ND, chunk_CD, preferred_element_type=jnp.float32)


def _forward(x, table, targets, max_logits):
    """Returns (losses, log-sum-exp), both float32 [B, T]."""
    x_ND, targets_N = x.reshape(-1, x.shape[-1]), targets.reshape(-1) - first_word(len(table))
    N = len(x_ND)

    def add(carry, chunk):
        rows_CD, first = chunk
        top, total, hit = carry
        logits_NC = _logits(x_ND, rows_CD)
        higher = jnp.maximum(top, logits_NC.max(axis=1))
        total = total * jnp.exp(top - higher) + jnp.exp(logits_NC - higher[:, None]).sum(axis=1)
        own = jnp.arange(len(rows_CD)) == (targets_N - first)[:, None]
        return (higher, total, hit + jnp.where(own, logits_NC, 0).sum(axis=1)), None

    start = (jnp.full(N, -jnp.inf), jnp.zeros(N), jnp.zeros(N))
    (top, total, hit), _ = jax.lax.scan(add, start, _chunks(table, N, max_logits))
    highest = max_words(top)
    lse = highest + jnp.log(sum_words(total * jnp.exp(top - highest)))
    return (lse - sum_words(hit)).reshape(targets.shape), lse.reshape(targets.shape)


def _backward(x, table, targets, lse, dlosses, max_logits):
    """Returns (dx, dtable), both float32."""
    x_ND, targets_N = x.reshape(-1, x.shape[-1]), targets.reshape(-1) - first_word(len(table))
    lse_N, scale_N = lse.reshape(-1), dlosses.reshape(-1)

    def add(dx_ND, chunk):
        rows_CD, first = chunk
        own = jnp.arange(len(rows_CD)) == (targets_N - first)[:, None]
        probabilities = jnp.exp(_logits(x_ND, rows_CD) - lse_N[:, None])
        dlogits_NC = ((probabilities - own) * scale_N[:, None]).astype(x.dtype)
        dx_ND += jnp.einsum("nc,cd->nd", dlogits_NC, rows_CD, preferred_element_type=jnp.float32)
        return dx_ND, jnp.einsum("nc,nd->cd", dlogits_NC, x_ND, preferred_element_type=jnp.float32)

    dx_ND, dtable = jax.lax.scan(add, jnp.zeros(x_ND.shape, jnp.float32), _chunks(table, len(x_ND), max_logits))
    return sum_words(dx_ND).reshape(x.shape), reduce_words(dtable.reshape(table.shape))
