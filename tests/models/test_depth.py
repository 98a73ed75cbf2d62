"""In which layer a parameter lies, and the factor of its rate, against tables written by hand."""

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from fastvlm_jax import config as config_lib
from fastvlm_jax.models import depth, kinds
from fastvlm_jax.models.sizes import CLIP_SIZES

TINY_VIT = dict(
    family="vit", image_size=8, patch_size=4, width=8, num_layers=4, num_heads=2, mlp_dim=16, select_layer=-2
)
TINY = dict(layers=(2, 1, 1), embed_dims=(8, 16, 32), mixers=("repmixer", "repmixer", "attention"), multiscale=(0,))
LLM = dict(width=8, num_layers=3, num_heads=2, num_kv_heads=1, mlp_dim=16, vocab_size=32, tie_embeddings=False)
TEXT = dict(width=8, features=8, num_layers=2, num_heads=2, vocab_size=32, context_length=4)


def factors_of(config, **decays):
    params = kinds.abstract_variables(kinds.build(**config))["params"]
    return params, depth.rate_factors(params, {"vision": 1.0, "llm": 1.0, "text": 1.0} | decays)


def test_rates_of_a_fastvlm_by_hand():
    """Four blocks in three stages make layers 1 to 4 of the encoder, 3 blocks layers 1 to 3 of the language model."""
    params, found = factors_of(dict(vision=TINY, llm=LLM), vision=0.5, llm=0.1)
    expected = {
        "vision/stem_0/conv/kernel": 1 / 32,
        "vision/stage_0/ffn/fc1/kernel": [1 / 16, 1 / 8],
        "vision/stage_0/layer_scale_ffn": [1 / 16, 1 / 8],
        "vision/patch_embed_1/pointwise/conv/kernel": 1 / 4,
        "vision/stage_1/ffn/fc1/kernel": [1 / 4],
        "vision/positions_2/conv/kernel": 1 / 2,
        "vision/stage_2/mixer/qkv/kernel": [1 / 2],
        "vision/expand/conv/kernel": 1,
        "llm/embedding": 1e-4,
        "llm/layers/q/kernel": [1e-3, 1e-2, 1e-1],
        "llm/layers/attention_norm/scale": [1e-3, 1e-2, 1e-1],
        "llm/final_norm/scale": 1,
        "llm/lm_head/kernel": 1,
    }
    for path, factor in expected.items():
        np.testing.assert_allclose(found[path].ravel(), np.ravel(factor), rtol=1e-6, err_msg=path)
    paths = flatten_dict(params, sep="/")
    assert set(found) == {path for path in paths if not path.startswith("projector/")}
    for path, factor in found.items():  # an array of blocks is multiplied along its leading axis
        assert factor.dtype == np.float32 and np.broadcast_shapes(factor.shape, paths[path].shape) == paths[path].shape
    assert found["vision/stage_0/ffn/fc1/kernel"].shape == (2, 1, 1) and found["llm/embedding"].shape == ()


def test_rates_of_a_clip_of_two_transformers_by_hand():
    """Of four layers of the tower three are used, and what is unused lies behind the last one."""
    _, found = factors_of(dict(vision=TINY_VIT, text=TEXT), vision=0.5, text=0.1)
    expected = {
        "vision/patch_embed/kernel": 1 / 16,
        "vision/cls_token": 1 / 16,
        "vision/positions": 1 / 16,
        "vision/pre_norm/scale": 1 / 16,
        "vision/layers/fc1/kernel": [1 / 8, 1 / 4, 1 / 2],
        "vision/unused/layer_3/fc1/kernel": 1,
        "text/embedding": 1e-3,
        "text/positions": 1e-3,
        "text/layers/qkv/kernel": [1e-2, 1e-1],
        "text/final_norm/scale": 1,
        "text/projection": 1,
    }
    for path, factor in expected.items():
        np.testing.assert_allclose(found[path].ravel(), np.ravel(factor), rtol=1e-6, err_msg=path)
    assert {path.partition("/")[0] for path in found} == {"vision", "text"}  # not image_head, not logit_scale


def test_an_adapter_learns_at_the_rate_of_what_it_adapts():
    shapes = {"layers": {"q": {"kernel": np.zeros((3, 8, 8))}}, "embedding": np.zeros((32, 8))}
    adapters = {"layers": {"q": {"kernel": {"a": np.zeros((3, 8, 2)), "b": np.zeros((3, 2, 8))}}}}
    found = depth.rate_factors({"llm": shapes, "lora": {"llm": adapters}}, {"llm": 0.5})
    for name in ("a", "b"):
        np.testing.assert_array_equal(found[f"lora/llm/layers/q/kernel/{name}"], found["llm/layers/q/kernel"])
    assert found["llm/layers/q/kernel"].ravel().tolist() == [1 / 8, 1 / 4, 1 / 2]


def test_without_decay_no_rate_has_a_factor_and_a_name_that_tells_no_layer_is_refused():
    assert factors_of(dict(vision=TINY, llm=LLM))[1] == {}
    with pytest.raises(ValueError, match=r"^layer_decay\.llm=0\.5: models/depth\.py does not know .* llm/x lies"):
        depth.rate_factors({"llm": {"x": np.zeros(3), "layers": {"y": np.zeros((2, 3))}}}, {"llm": 0.5})


@pytest.mark.parametrize("size", ["7b", "tiny,mci2", "tiny,siglip_so400m_384", "tiny,convnext_xxl", "s3"])
def test_every_parameter_of_every_size_lies_in_a_layer(size):
    pairs = size in CLIP_SIZES
    config = (config_lib.pairs_of if pairs else config_lib.get_base)(size).model.to_dict()
    params, found = factors_of(config, vision=0.5, **{"text" if pairs else "llm": 0.5})
    in_towers = {path for path in flatten_dict(params, sep="/") if path.startswith(("vision/", "llm/", "text/"))}
    assert set(found) == in_towers
