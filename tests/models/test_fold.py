"""Folding the training form of the encoder changes its structure but not its function."""

import copy

import flax
import jax
import numpy as np
import pytest
from torch_reference import jit, relative, timm_tower, tower_shapes, tower_variables

from fastvlm_jax.models.fastvit import FastViT
from fastvlm_jax.models.fold import fold, fold_variables

# A tower with every optional part.
BRANCHED = FastViT(
    layers=(2, 1, 2),
    embed_dims=(16, 32, 96),
    mixers=("repmixer", "repmixer", "attention"),
    stem_scale=True,
    se_stages=(2,),
    attention_norm="batch",
    head_features=8,
    head_bias=True,
    multiscale=(0,),
    multiscale_pool="depthwise",
)
FOLDED = BRANCHED.clone(form="folded")
BRANCHED_APPLY, FOLDED_APPLY = jit(BRANCHED.apply), jit(FOLDED.apply)


@pytest.fixture(scope="module")
def variables():
    """Variables of the training form with random weights, layer scales and BatchNorm statistics."""
    tower = BRANCHED.clone(multiscale=())
    variables = tower_variables(tower, timm_tower(tower))
    kernel = np.random.default_rng(1).standard_normal((4, 4, 1, 16), np.float32)
    return {**variables, "params": {**variables["params"], "pool_0": {"kernel": kernel}}}


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((2, 32, 48, 3), np.float32)


def test_folded_output_equals_branched_inference(variables, images):
    assert relative(FOLDED_APPLY(fold(variables), images), BRANCHED_APPLY(variables, images)) <= 1e-5


def test_fold_gives_the_tree_that_init_gives(variables):
    flat = flax.traverse_util.flatten_dict(fold(variables), sep="/")
    found = {path.replace("/", "/vision/", 1): leaf.shape for path, leaf in flat.items()}
    assert found == tower_shapes(FOLDED)
    assert {leaf.dtype for leaf in flat.values()} == {np.dtype(np.float32)}


def test_fold_leaves_its_input_alone(variables):
    before = copy.deepcopy(variables)
    fold(variables)
    jax.tree.map(np.testing.assert_array_equal, before, variables)


def test_folding_twice_is_folding_once(variables):
    once = fold(variables)
    jax.tree.map(np.testing.assert_array_equal, once, fold(once))


def test_fold_variables_touches_the_encoder_only(variables):
    kept = {"projector": {"fc1": {"kernel": np.ones((2, 2))}}, "llm": {"embedding": np.ones((3, 2))}}
    whole = {"params": {"vision": variables["params"], **kept}, "batch_stats": {"vision": variables["batch_stats"]}}
    folded = fold_variables(whole)
    assert {name: folded["params"][name] for name in kept} == kept
    lone = {name: collection["vision"] for name, collection in folded.items()}
    jax.tree.map(np.testing.assert_array_equal, lone, fold(variables))


@pytest.mark.parametrize(
    "leaf",
    [
        "batch_stats/stem_0/conv/bn/mean",
        "params/stem_2/skip/bias",
        "params/stage_1/mixer/mixer/scale/kernel",
        "batch_stats/stage_0/mixer/mixer/skip/var",
        "batch_stats/stage_0/mixer/norm/mean",
        "params/stage_0/mixer/layer_scale",
        "params/patch_embed_1/small/kernel",
        "params/patch_embed_2/pointwise/skip/scale",
        "params/positions_2/conv/bias",
        "batch_stats/stem_1/scale/bn/mean",
        "params/patch_embed_2/se/fc1/bias",
        "batch_stats/stage_2/norm/var",
        "params/pool_0/kernel",
        "batch_stats/expand/scale/bn/var",
    ],
)
def test_every_branch_is_folded_and_the_rest_kept(variables, images, leaf):
    """Changing one leaf changes the folded output far more than rounding, and as much as the branched output."""
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    flat[leaf] = flat[leaf] * 1.5 + 0.1
    changed = flax.traverse_util.unflatten_dict(flat, sep="/")
    folded_output = FOLDED_APPLY(fold(changed), images)
    assert relative(folded_output, FOLDED_APPLY(fold(variables), images)) > 1e-3
    assert relative(folded_output, BRANCHED_APPLY(changed, images)) <= 1e-5
