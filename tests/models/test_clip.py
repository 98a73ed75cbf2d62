"""CLIP: what both towers refuse, what the text tower reads, and other encoders in the place of FastViTHD."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastvlm_jax.models import clip

TEXT = dict(features=12, width=16, num_layers=1, num_heads=2, vocab_size=50, context_length=5)
FASTVIT = dict(layers=(1,), embed_dims=(8,), mixers=("repmixer",), head_features=12)
VIT = dict(family="vit", image_size=8, patch_size=4, width=8, num_layers=2, num_heads=2, mlp_dim=16)
CONVNEXT = dict(family="convnext", layers=(1,), embed_dims=(8,), projection=(12,))
TOKENS = jnp.array([[48, 7, 9, 49, 0], [48, 3, 49, 0, 0]])  # 49 is the end token


def init_variables(model, rng):
    return nn.unbox(clip.init_variables(model, rng))


def images(side=8):
    return np.random.default_rng(0).integers(0, 256, (1, 2, side, side, 3), np.uint8)


@pytest.mark.parametrize("vision", [FASTVIT, VIT, CONVNEXT], ids=["fastvit", "vit", "convnext"])
def test_every_encoder_embeds_images_beside_texts(vision):
    model = clip.build(vision, TEXT)
    variables = init_variables(model, jax.random.key(0))
    for embeddings in model.apply(variables, images(), TOKENS):
        assert embeddings.shape == (2, 12) and embeddings.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-6)
    assert ("image_head" in variables["params"]) == (vision is not FASTVIT)


def test_the_text_tower_reads_what_follows_a_token_and_the_padding_too():
    model = clip.build(FASTVIT, TEXT)
    variables = init_variables(model, jax.random.key(0))

    def embedded(tokens):
        return np.asarray(model.apply(variables, tokens, method="embed_texts"))

    other_padding = TOKENS.at[0, 4].set(5)
    assert np.abs(embedded(other_padding)[0] - embedded(TOKENS)[0]).max() > 1e-4
    np.testing.assert_allclose(embedded(other_padding)[1], embedded(TOKENS)[1], rtol=1e-6)


def test_a_text_of_another_length_and_an_encoder_without_a_fitting_head_are_refused():
    message = "^texts of 4 tokens must have 5: pad them"
    with pytest.raises(ValueError, match=message):
        model = clip.build(FASTVIT, TEXT)
        model.init(jax.random.key(0), images(), TOKENS[:, :4])
    for width in (0, 8):
        with pytest.raises(
            ValueError, match=rf"^model\.vision\.head_features={width} must be 12, the width of the text"
        ):
            init_variables(clip.build({**FASTVIT, "head_features": width}, TEXT), jax.random.key(0))


def test_the_factor_of_the_logits_stays_from_1_to_100_and_starts_as_published():
    np.testing.assert_allclose(clip.clamped(jnp.array([-1.0, 2.0, 9.0])), [0, 2, np.log(100)], rtol=1e-6)
    softmax, sigmoid = (
        init_variables(clip.build(FASTVIT, TEXT, sigmoid=sigmoid), jax.random.key(0))["params"]
        for sigmoid in (False, True)
    )
    np.testing.assert_allclose(softmax["logit_scale"], 2.6593, rtol=1e-4)
    np.testing.assert_allclose([sigmoid["logit_scale"], sigmoid["logit_bias"]], [2.3026, -10], rtol=1e-4)
    assert "logit_bias" not in softmax


def test_the_text_tower_starts_as_open_clips():
    """Deviations of the weights: see initial_weights; biases of the MLP are uniform, those of attention zero."""
    sizes = {**TEXT, "width": 64, "num_layers": 3, "vocab_size": 500}
    text = init_variables(clip.build(FASTVIT, sizes), jax.random.key(0))["params"]["text"]
    layers, inwards = text["layers"], 64**-0.5 * 6**-0.5
    expected = {"qkv": 64**-0.5, "o": inwards, "fc1": 128**-0.5, "fc2": inwards}
    for name, deviation in expected.items():
        np.testing.assert_allclose(layers[name]["kernel"].std(), deviation, rtol=0.05)
    for name, bound in (("fc1", 64**-0.5), ("fc2", 256**-0.5)):
        biases = np.abs(layers[name]["bias"])
        assert 0.9 * bound < biases.max() <= bound
    assert not layers["qkv"]["bias"].any() and not layers["o"]["bias"].any()
    np.testing.assert_allclose(text["embedding"].std(), 0.02, rtol=0.05)
    np.testing.assert_allclose(text["positions"].std(), 0.01, rtol=0.2)
    np.testing.assert_allclose(text["projection"].std(), 64**-0.5, rtol=0.1)
