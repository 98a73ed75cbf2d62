"""Both towers of MobileCLIP2 against open_clip's, with random weights.

The weights of the image towers are of seeds with which open_clip itself comes within 4e-6 of its results in float64;
with some others it is off by 1e-4.
"""

import flax
import jax
import numpy as np
import pytest
import torch
from torch_reference import jit, randomise, relative, stored

from fastvlm_jax.convert.mapping import read_tree, to_jax
from fastvlm_jax.convert.tables import text_tower, timm
from fastvlm_jax.models import clip
from fastvlm_jax.models.fold import fold_variables
from fastvlm_jax.models.sizes import CLIP_COLOURS, TEXT_SIZES, VISION_SIZES

import open_clip  # isort: skip  after torch_reference, which makes torchvision importable

SIZES = {"MobileCLIP2-S0": ("mci0", {}, "512", 3), "MobileCLIP2-S3": ("mci3", CLIP_COLOURS, "768", 0)}
TEXT_PARAMETERS = {"MobileCLIP2-S0": 63_428_096, "MobileCLIP2-S3": 123_650_304}
TEXTS = ["a photo of a dog", "Two red boxes! on a table, and a rather long caption " * 4, ""]


def random_model(name, seed):
    """open_clip's model with weights of unit gain, biases and positions far from 0."""
    torch.manual_seed(0)
    model = open_clip.create_model(name, pretrained=None).eval()
    randomise(model.visual, seed)
    with torch.no_grad():
        for parameter in model.text.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        model.logit_scale.fill_(2.0)
    return model


@pytest.mark.parametrize("name", ["MobileCLIP2-S0", pytest.param("MobileCLIP2-S3", marks=pytest.mark.full)])
def test_features_and_logits_of_both_forms_are_open_clips(name):
    vision, colours, text, seed = SIZES[name]
    theirs = random_model(name, seed)
    sizes = {**VISION_SIZES[vision], **colours, "head_features": int(text), "head_bias": True}
    models = {form: clip.build({**sizes, "form": form}, TEXT_SIZES[text]) for form in ("branched", "folded")}
    model = models["branched"]
    images = np.random.default_rng(0).random((3, 256, 256, 3), np.float32)
    tokens = open_clip.get_tokenizer(name)(TEXTS)
    shapes = jax.eval_shape(lambda rng: flax.linen.unbox(clip.init_variables(model, rng)), jax.random.key(0))
    counted = [sum(x.size for x in jax.tree.leaves(shapes["params"][part])) for part in ("vision", "text")]
    assert counted == [sum(x.numel() for x in part.parameters()) for part in (theirs.visual, theirs.text)]
    assert counted[1] == TEXT_PARAMETERS[name]
    shapes = {path: x.shape for path, x in flax.traverse_util.flatten_dict(shapes, sep="/").items()}
    rows = [
        *timm.tower_rows(clip.make_encoder(**model.vision_args), "visual.trunk."),
        *text_tower.tower_rows(clip.TextTower(**model.text_args)),
        *text_tower.logit_rows(False),
    ]
    leaves = to_jax(rows, stored(theirs), shapes, "torch")
    variables = {key: read_tree(leaves[key], np.float32, np.asarray) for key in ("params", "batch_stats")}
    with torch.no_grad():
        x = images
        if colours:
            x = (x - np.float32(colours["image_mean"])) / np.float32(colours["image_std"])
        theirs_images = theirs.encode_image(torch.tensor(x.transpose(0, 3, 1, 2)), normalize=True)
        theirs_texts = theirs.encode_text(tokens, normalize=True)
        logits = theirs.logit_scale.exp() * theirs_images @ theirs_texts.T
    for form, given in (("branched", variables), ("folded", fold_variables(variables))):
        ours = jit(models[form].apply)(given, images[None], tokens.numpy().astype(np.int32))
        assert relative(ours[0], theirs_images) <= 1e-5 and relative(ours[1], theirs_texts) <= 1e-5
        scale = np.exp(given["params"]["logit_scale"])  # of a logit whose embeddings are the same
        assert np.abs(scale * ours[0] @ ours[1].T - logits.numpy()).max() <= 1e-5 * scale
