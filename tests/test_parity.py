"""The numbers of PyTorch: timm's towers, transformers' decoders and FastVLM, live, with random weights and statistics.

Bounds: ||ours - theirs|| / ||theirs|| <= 1e-5 for outputs and statistics; for gradients 1e-4 of the larger of their own
norm and the median one (some vanish but for rounding, as the scale before a BatchNorm does).
"""

import functools
import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_reference import (
    jit,
    randomise,
    relative,
    stored,
    timm_tower,
    to_nchw,
    tower_shapes,
    tower_variables,
    transformers,
)

from fastvlm_jax.convert import hf
from fastvlm_jax.convert.mapping import shapes_of, to_jax, to_torch
from fastvlm_jax.convert.timm import tower_rows
from fastvlm_jax.models import fastvlm
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.models.fastvit import FastViT

TINY = dict(layers=(2, 1, 2, 1), embed_dims=(8, 16, 16, 96), mixers=("repmixer", "repmixer", "repmixer", "attention"))
MIDDLE = dict(layers=(2, 2, 4, 2, 2), embed_dims=(24, 48, 96, 192, 384))
LLM = dict(vocab_size=96, width=64, num_layers=3, num_heads=4, num_kv_heads=2, mlp_dim=112, rope_theta=1e4)
SPECIAL = {"<|endoftext|>": 0, "<|im_end|>": 1, "<image>": 2}


def random_images(*shape):
    return np.random.default_rng(0).random((*shape, 3), np.float32)


@pytest.mark.parametrize(
    "model",
    [
        FastViT(**TINY),
        FastViT(**MIDDLE, form="folded"),
        pytest.param(FastViT(), marks=pytest.mark.full),
        pytest.param(FastViT(form="folded"), marks=pytest.mark.full),
    ],
    ids=["tiny branched", "middle folded", "FastViTHD branched", "FastViTHD folded"],
)
def test_tower_in_inference_equals_timm(model):
    tower, images = timm_tower(model), random_images(1, 128, 256)
    with torch.no_grad():
        theirs = tower.forward_features(to_nchw(images)).permute(0, 2, 3, 1)
    ours = jit(model.apply)(tower_variables(model, tower), images)
    assert relative(ours, theirs) <= 1e-5


def test_training_step_of_the_tower_equals_timm():
    """Loss, every gradient and every updated statistic; ours also sees an empty image slot, which must not count."""
    model = FastViT(**TINY, batch_norm="train")
    tower, images = timm_tower(model).train(), random_images(4, 32, 64)
    variables = tower_variables(model, tower)
    target = np.random.default_rng(1).standard_normal((4, 1, 2, model.features), np.float32)

    their_loss = (tower.forward_features(to_nchw(images)) - to_nchw(target)).square().mean()
    their_loss.backward()
    gradients = {name: p.grad for name, p in tower.named_parameters()}
    statistics = {name: x for name, x in tower.named_buffers() if "running" in name}

    @jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, stats, images, mask):
        variables = {"params": params, "batch_stats": stats}
        y, updated = model.apply(variables, images, mask, train=True, mutable=["batch_stats"])
        return jnp.mean(jnp.square(y[:4] - target)), updated["batch_stats"]

    padded = np.concatenate([images, 100 * images[:1]])
    (our_loss, our_stats), our_grads = loss(variables["params"], variables["batch_stats"], padded, np.arange(5) < 4)

    np.testing.assert_allclose(our_loss, their_loss.item(), rtol=1e-5)
    rows = tower_rows(model.layers, model.mixers, "branched")
    ours = to_torch(rows, {"params": {"vision": our_grads}, "batch_stats": {"vision": our_stats}}, tower_shapes(model))
    median = np.median([g.norm() for g in gradients.values()])
    errors = {name: np.linalg.norm(ours[name] - g.numpy()) / max(g.norm(), median) for name, g in gradients.items()}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 1e-4, worst
    for name, theirs in statistics.items():
        assert relative(ours[name], theirs) <= 1e-5, name


@pytest.mark.parametrize(
    "variant", [{}, {"tie_embeddings": False}, {"qkv_bias": False, "head_dim": 24}], ids=["tied", "untied", "llama"]
)
def test_decoder_equals_transformers(variant):
    llm = Decoder(**LLM, **variant)
    config = transformers.AutoConfig.for_model(**hf.text_config(llm, SPECIAL))
    reference = randomise(transformers.AutoModelForCausalLM.from_config(config), 0).eval()
    assert type(reference).__name__ == ("Qwen2ForCausalLM" if llm.qkv_bias else "LlamaForCausalLM")
    tokens = np.random.default_rng(0).integers(0, llm.vocab_size, (2, 17))
    with torch.no_grad():
        theirs = reference(torch.from_numpy(tokens)).logits

    weights = {name.replace("model.", "model.language_model.", 1): x for name, x in stored(reference).items()}
    if llm.tie_embeddings:
        weights.pop("lm_head.weight")
    rows = [row for row in hf.rows(FastViT(), llm) if row.path and row.path.startswith("params/llm/")]
    positions = np.broadcast_to(np.arange(17), tokens.shape)
    abstract = jax.eval_shape(llm.init, jax.random.key(0), jnp.zeros((2, 17, llm.width)), positions, positions)
    flat = flax.traverse_util.flatten_dict(flax.linen.unbox(abstract)["params"], sep="/")
    variables = to_jax(rows, weights, {f"params/llm/{path}": leaf.shape for path, leaf in flat.items()}, "transformers")

    @jit
    def logits(variables):
        x = llm.apply(variables, tokens, method="embed")
        return llm.apply(variables, x, positions, np.ones_like(tokens))[0]

    ours = logits({"params": variables["params"]["llm"]})
    assert relative(ours, theirs) <= 1e-5
    assert np.array_equal(ours.argmax(-1), theirs.argmax(-1))


def test_fastvlm_logits_equal_transformers():
    """Two rows, each with text, an image of 2 features, and text again."""
    config = {"vision": {**TINY, "form": "folded"}, "llm": LLM}
    model = fastvlm.build(**config)
    vision, llm = FastViT(**model.vision_args), Decoder(**model.llm_args)
    reference = transformers.FastVlmForConditionalGeneration(
        transformers.FastVlmConfig(
            vision_config=hf.vision_config(vision),
            text_config=hf.text_config(llm, SPECIAL),
            image_token_index=SPECIAL["<image>"],
        )
    )
    reference = randomise(reference, 0).eval()
    weights = stored(reference)
    weights.pop("lm_head.weight")
    variables = to_jax(hf.rows(vision, llm), weights, shapes_of(model), "transformers")

    images, image = random_images(2, 32, 64), SPECIAL["<image>"]
    tokens = np.array([[5, 9, image, image, 40, 41, 42], [image, image, 7, 60, 61, 95, 1]])
    image_index = np.array([[-1, -1, 0, 1, -1, -1, -1], [2, 3, -1, -1, -1, -1, -1]])
    positions = np.broadcast_to(np.arange(7), tokens.shape)
    with torch.no_grad():
        theirs = reference(input_ids=torch.from_numpy(tokens), pixel_values=to_nchw(images)).logits
    ours = jit(model.apply)(variables, images, tokens, image_index, positions, np.ones_like(tokens))
    assert relative(ours, theirs) <= 1e-5
    assert np.abs(ours - theirs.numpy()).max() <= 1e-4
    assert np.array_equal(ours.argmax(-1), theirs.argmax(-1))


def test_parameter_counts_are_the_papers():
    """125.07 M with CLIP's projection [3072, 768], which a FastVLM does not have; BatchNorm statistics do not count."""

    def parameters(form):
        shapes = tower_shapes(FastViT(form=form))
        return sum(math.prod(shape) for path, shape in shapes.items() if path.startswith("params/"))

    projection = 3072 * 768
    assert round(parameters("folded") / 1e6, 3) == 122.714
    assert round((parameters("folded") + projection) / 1e6, 3) == 125.074
    assert round((parameters("branched") + projection) / 1e6, 3) == 125.235
