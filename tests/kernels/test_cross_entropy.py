"""Cross-entropy against optax and embedding lookup against NumPy, on one device and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fastvlm_jax import sharding
from fastvlm_jax.kernels.cross_entropy import cross_entropy, num_chunks
from fastvlm_jax.kernels.embedding import embed

B, T, D, V = 8, 6, 16, 64
MESHES = [None, (1, 8, 1, 1), (1, 2, 2, 2), (2, 2, 1, 2), (1, 1, 8, 1)]


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    x, table = rng.normal(size=(B, T, D)), rng.normal(size=(V, D)) * 3
    return [np.asarray(a, np.float32) for a in (x, table, rng.uniform(size=(B, T)))] + [rng.integers(0, V, (B, T))]


def on_mesh(sizes, function, *args):
    if sizes is None:
        return jax.jit(function)(*args)
    mesh = sharding.make_mesh(sizes)
    with jax.set_mesh(mesh):
        return jax.tree.map(np.asarray, jax.jit(function)(*args))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("max_logits", [100, 10**9])
def test_loss_and_gradients_are_optax_s(arrays, sizes, max_logits):
    x, table, weights, targets = arrays

    def expected(x, table):
        logits = jnp.einsum("btd,vd->btv", x, table, precision="highest")
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights)

    def ours(x, table):
        return jnp.sum(cross_entropy(x, table, targets, max_logits) * weights)

    wanted = jax.value_and_grad(expected, (0, 1))(x, table)
    found = on_mesh(sizes, jax.value_and_grad(ours, (0, 1)), x, table)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-5), wanted, found)


def test_words_that_fsdp_does_not_divide(arrays):
    """A table may be replicated along fsdp, for example when it is frozen."""
    x, table, _, targets = arrays
    table, targets = table[:26], targets % 26

    def both(table):
        return jnp.sum(cross_entropy(x, table, targets) + jnp.sum(embed(table, targets, jnp.float32) * x, -1))

    wanted, found = (on_mesh(sizes, jax.value_and_grad(both), table) for sizes in (None, (1, 1, 4, 2)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-5), wanted, found)


def test_large_logits_overflow_nowhere():
    x, table = jnp.full((1, 2, 4), 100.0), jnp.asarray([[100.0] * 4, [-100.0] * 4, [99.99] * 4, [0.0] * 4])
    # The logits are 40000, -40000, 39996 and 0: the second is 80000 below the first.
    losses, gradient = jax.value_and_grad(
        lambda x: cross_entropy(x, table, jnp.asarray([[0, 1]]), 2).sum(), has_aux=False
    )(x)
    np.testing.assert_allclose(losses, np.log1p(np.exp(-4.0)) * 2 + 80000, rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_logits_are_never_whole_in_memory():
    """4,096 tokens and Qwen2's vocabulary take 2.5 GB of float32 logits, of which a tenth may exist at a time."""
    x, table = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 2048, 64), (151_936, 64)))
    targets = jax.ShapeDtypeStruct((2, 2048), jnp.int32)

    def temporaries(loss):
        compiled = jax.jit(jax.grad(lambda *args: loss(*args).sum(), (0, 1))).lower(x, table, targets).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def plain(x, table, targets):
        logits = jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    logits = 4096 * 151_936 * 4
    assert temporaries(plain) > logits > 3 * temporaries(cross_entropy)


@pytest.mark.parametrize(
    "words, tokens, max_logits, chunks",
    [(151_936, 4096, 2**26, 16), (152_064, 4096, 2**26, 11), (512, 8, 2**26, 1), (30, 10, 60, 5), (7, 100, 1, 7)],
)
def test_chunks_divide_the_words_and_lie_in_tiles_where_they_can(words, tokens, max_logits, chunks):
    # 151936 = 128 * 1187, and 1187 is prime: the first chunk that fits is 151936 / 16 = 9496. 152064 / 11 = 108 * 128.
    assert num_chunks(words, tokens, max_logits) == chunks


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_lookup_and_its_gradient(arrays, sizes):
    x, table, _, tokens = arrays
    found = on_mesh(
        sizes, lambda table: jax.vjp(lambda t: embed(t, tokens, jnp.float32), table)[1](jnp.asarray(x))[0], table
    )
    wanted = np.zeros((V, D), np.float32)
    np.add.at(wanted, tokens, x)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_array_equal(on_mesh(sizes, lambda t: embed(t, tokens, jnp.float32), table), table[tokens])


def test_a_frequent_word_gets_all_of_its_small_gradients():
    """In bfloat16 256 + 1 is 256, so a sum of ones would stop there."""
    tokens, table = jnp.zeros((1, 1000), jnp.int32), jnp.ones((4, 1))
    (gradient,) = jax.vjp(lambda t: embed(t, tokens, jnp.bfloat16), table)[1](jnp.ones((1, 1000, 1), jnp.bfloat16))
    assert gradient[0, 0] == 1000


def test_the_table_is_gathered_once_and_its_gradient_lies_in_the_shards(arrays):
    x, table, _, targets = arrays
    mesh = sharding.make_mesh((1, 1, 8, 1))
    with jax.set_mesh(mesh):
        kept = NamedSharding(mesh, P("fsdp", None))
        grad = jax.jit(jax.grad(lambda x, t: cross_entropy(x, t, targets).sum(), 1))
        found = grad(x, jax.device_put(table, kept))
        text = grad.lower(x, jax.device_put(table, kept)).compile().as_text()
    assert found.sharding.is_equivalent_to(kept, 2)
    assert f"f32[{B},{T},{V}]" not in text
