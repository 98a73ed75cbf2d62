"""FastVLM.encode: what the encoder gets to see of the pixels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastvlm_jax.models.fastvit import FastViT
from fastvlm_jax.models.fastvlm import build, init_variables
from fastvlm_jax.models.sizes import CLIP_COLOURS, SIGLIP_COLOURS

VISION = dict(layers=(1, 1), embed_dims=(8, 32), mixers=("repmixer", "attention"))
# Every level of every colour, as an image.
LEVELS = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16, 1).repeat(3, 4)


def seen_by_encoder(images, dtype, **colours):
    """Returns what the encoder is called with; an encoder that returns its input needs no weights."""

    def returned(following, args, kwargs, context):
        encoder = isinstance(context.module, FastViT) and context.method_name == "__call__"
        return args[0] if encoder else following(*args, **kwargs)

    with nn.intercept_methods(returned):
        return build(VISION | colours, dtype=dtype).apply({}, images, method="encode")


@pytest.mark.parametrize("colours, worst", [(CLIP_COLOURS, 0.55), (SIGLIP_COLOURS, 0.26)])
@pytest.mark.parametrize("images", [LEVELS, LEVELS.astype(np.float32) / 255], ids=["uint8", "float"])
def test_a_normalised_colour_is_rounded_to_bfloat16_once(colours, worst, images):
    """bfloat16 has 8 bits: from 2 to 4 its numbers are 1/64 apart, 1.1 levels of 255 with a std of 0.27."""
    seen = seen_by_encoder(images, "bfloat16", **colours)
    assert seen.dtype == jnp.bfloat16
    mean, std = np.array(colours["image_mean"]), np.array(colours["image_std"])
    found, expected = np.asarray(seen).reshape(256, 3), LEVELS.reshape(256, 3)
    levels = (found.astype(np.float64) * std + mean) * 255
    assert abs(levels - expected).max() < worst  # 1.4 if every step is in bfloat16
    exact = (expected / 255.0 - mean) / std
    np.testing.assert_array_equal(found, exact.astype(np.float32).astype(jnp.bfloat16))


def test_without_mean_and_std_no_float32_image_is_made():
    """FastVLM's own encoder: pixels become bfloat16 at once, which holds every level of uint8."""
    model = build(VISION, dtype="bfloat16")
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((1, 1, 16, 16, 3), jnp.uint8)
    text = jax.jit(lambda v, x: model.apply(v, x, method="encode")).lower(nn.unbox(variables), images).as_text()
    assert "16x16x3xbf16>" in text and "16x16x3xf32>" not in text
