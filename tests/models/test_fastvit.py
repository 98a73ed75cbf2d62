"""FastViT: drop path, BatchNorm with empty slots, grids, invalid arguments and the CLIP projection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fastvlm_jax.models.fastvit import FastViT
from fastvlm_jax.models.layers import BatchNorm, drop_path


def test_drop_path_drops_whole_images_and_rescales_the_rest():
    x = jnp.ones((64, 2, 2, 3))
    y = np.asarray(drop_path(x, jnp.float32(0.25), jax.random.key(0)))
    kept = y.reshape(64, -1)
    assert {tuple(np.unique(row)) for row in kept} == {(0.0,), (np.float32(1 / 0.75),)}
    assert 36 <= (kept[:, 0] > 0).sum() <= 58  # 48 expected; the bounds are three standard deviations
    assert drop_path(x, jnp.float32(0.25), None) is x


def test_drop_path_acts_in_the_last_block_only_with_its_rng():
    """The rate grows linearly from 0 at the first block: with two stages of one block, only the second block drops."""
    tower = FastViT((1, 1), (8, 32), ("repmixer", "repmixer"), layer_scale_init=1.0, drop_path=0.5, form="folded")
    x = jnp.linspace(0, 1, 4 * 16 * 16 * 3).reshape(4, 16, 16, 3)
    variables = jax.jit(tower.init)(jax.random.key(0), x)
    still = jax.jit(tower.apply)(variables, x)
    moved = jax.jit(lambda rngs: tower.apply(variables, x, rngs=rngs))({"drop_path": jax.random.key(1)})
    assert not np.allclose(still, moved)


def test_an_empty_slot_counts_in_no_statistic():
    """Two images of values 1 and 3 and an empty slot: mean 2, variance 1 (stored unbiased over 8 values: 8/7)."""
    x = jnp.stack([jnp.full((2, 2, 1), 1.0), jnp.full((2, 2, 1), 3.0), jnp.full((2, 2, 1), 99.0)])
    norm = BatchNorm(batch_stats=True)
    variables = norm.init(jax.random.key(0), x)
    y, updated = norm.apply(variables, x, jnp.array([True, True, False]), mutable=["batch_stats"])
    np.testing.assert_allclose(y[:2, 0, 0, 0], [-1, 1], atol=1e-4)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], [0.1 * 2], rtol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["var"], [0.9 + 0.1 * 8 / 7], rtol=1e-5)
    _, untouched = norm.apply(variables, x, jnp.zeros(3, bool), mutable=["batch_stats"])
    np.testing.assert_array_equal(untouched["batch_stats"]["var"], variables["batch_stats"]["var"])


@pytest.mark.parametrize("size", [(96, 64), (64, 100)], ids=str)
def test_sizes_that_the_strides_do_not_divide_are_refused(size):
    tower = FastViT((1, 1, 1, 1, 1), (8, 16, 32, 64, 64))
    message = f"image size {size[0]}x{size[1]} must be a multiple of 64"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, *size, 3)))
    with pytest.raises(ValueError, match=message):
        tower.grid(*size)


def test_non_square_images_give_their_grid_row_by_row():
    tower = FastViT((1, 1), (8, 32), ("repmixer", "attention"))
    shape = jax.eval_shape(lambda: nn.unbox(tower.init_with_output(jax.random.key(0), jnp.zeros((2, 16, 32, 3)))[0]))
    assert shape.shape == (2, *tower.grid(16, 32), tower.features) == (2, 2, 4, 64)


@pytest.mark.parametrize(
    "args, message",
    [
        ({"form": "fused"}, "form='fused' must be one of"),
        ({"attention_norm": "group"}, "attention_norm='group' must be one of"),
        ({"multiscale": (1,)}, r"multiscale=\(1,\) must name stages from \(0,\)"),
        ({"multiscale": (0, 0)}, "each once"),
        ({"se_stages": (0,)}, r"se_stages=\(0,\) must name stages with a patch embed: \(1,\)"),
    ],
    ids=str,
)
def test_arguments_that_describe_no_tower_are_refused(args, message):
    tower = FastViT((1, 1), (8, 32), ("repmixer", "attention"), **args)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize("mixers, at", [(("repmixer", "attention"), 1), (("attention", "repmixer"), 0)])
def test_an_attention_stage_that_heads_of_32_channels_do_not_divide_is_refused(mixers, at):
    dims = (24, 48)
    with pytest.raises(ValueError, match=rf"embed_dims\[{at}\]={dims[at]} must be a multiple of 32, the width of"):
        jax.eval_shape(FastViT((1, 1), dims, mixers).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_the_projection_exists_before_it_is_used():
    tower = FastViT((1, 1), (8, 32), ("repmixer", "attention"), head_features=5)
    x = jnp.zeros((2, 16, 16, 3))
    variables = jax.eval_shape(tower.init, jax.random.key(0), x)
    assert {name: leaf.shape for name, leaf in variables["params"]["head"].items()} == {"kernel": (64, 5)}
    assert jax.eval_shape(tower.apply, variables, x).shape == (2, 2, 2, 64)
    assert jax.eval_shape(lambda v, x: tower.apply(v, x, embed=True), variables, x).shape == (2, 5)
    with pytest.raises(ValueError, match="head_features"):
        jax.eval_shape(lambda v, x: tower.clone(head_features=0).apply(v, x, embed=True), variables, x)
