"""The whole FastVLM against transformers' FastVlmForConditionalGeneration, live, with random weights and statistics.

Bounds: ||ours - theirs|| / ||theirs|| <= 1e-5 for float32 logits, with the same most likely token everywhere; bfloat16
no farther from float32 than 1.25 times as far as torch's own bfloat16 is; losses of five optimizer steps 1e-4.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from torch_reference import calibrate, jit, randomise, relative, released, stored, to_nchw, transformers

from fastvlm_jax import guard, optim
from fastvlm_jax.batch import Batch
from fastvlm_jax.convert.layouts import fastvlm as layout
from fastvlm_jax.convert.layouts.peft import adapter_rows
from fastvlm_jax.convert.layouts.text_config import text_config
from fastvlm_jax.convert.mapping import read_tree, shapes_of, to_jax
from fastvlm_jax.losses import next_token
from fastvlm_jax.models import fastvlm
from fastvlm_jax.models.lora import Lora, paths_of, with_adapters
from fastvlm_jax.models.sizes import LLM_SIZES, VISION_SIZES
from fastvlm_jax.train_state import TrainState
from fastvlm_jax.train_step import train_step

from peft import LoraConfig, PeftModel  # isort: skip  after torch_reference, which makes torchvision importable

VISION = dict(layers=(2, 1, 2, 1), embed_dims=(8, 16, 16, 96), mixers=("repmixer", "repmixer", "repmixer", "attention"))
LLM = dict(vocab_size=96, width=64, num_layers=3, num_heads=4, num_kv_heads=2, mlp_dim=112, rope_theta=1e4)
IMAGE = 2


def pair(vision, llm):
    """A random model of transformers, and (our model, its variables); a folded tower is one that timm folded."""
    model = fastvlm.build(vision=vision, llm=llm)
    tower, decoder = fastvlm.make_encoder(**model.vision_args), fastvlm.Decoder(**model.llm_args)
    config = transformers.FastVlmConfig(
        vision_config=layout.vision_config(tower.clone(form="branched")),
        text_config=text_config(decoder, bos_token_id=0, eos_token_id=1, pad_token_id=0),
        image_token_index=IMAGE,
    )
    reference = randomise(transformers.FastVlmForConditionalGeneration(config), 0)
    with torch.no_grad():
        for layer in reference.model.language_model.layers:
            layer.self_attn.q_proj.weight *= 3  # queries large enough for attention to choose
    wrapper = reference.model.vision_tower
    calibrate(
        wrapper.timm_model, np.random.default_rng(1).random((2, 2 * tower.stride, 2 * tower.stride, 3), np.float32)
    )
    if tower.form == "folded":
        wrapper.timm_model = released(wrapper.timm_model)
    weights = stored(reference)
    if decoder.tie_embeddings:
        weights.pop("lm_head.weight")
    return reference, model, read_tree(to_jax(layout.rows(tower, decoder), weights, shapes_of(model), "transformers"))


def inputs(model, rows, height, width, text):
    """Rows of text, one image in the middle, and text again: (images, tokens, image_index, positions, segment_ids)."""
    rng = np.random.default_rng(0)
    rows_, columns = fastvlm.make_encoder(**model.vision_args).grid(height, width)
    features = rows_ * columns
    tokens = rng.integers(3, model.llm_args["vocab_size"], (rows, text + features))
    image_index = np.full(tokens.shape, -1)
    for row in range(rows):
        start = 1 + row
        tokens[row, start : start + features] = IMAGE
        image_index[row, start : start + features] = row * features + np.arange(features)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return rng.random((rows, height, width, 3), np.float32), tokens, image_index, positions, np.ones_like(tokens)


def logits_of(reference, images, tokens, dtype=torch.float32):
    with torch.no_grad():
        return (
            reference(input_ids=torch.from_numpy(tokens), pixel_values=to_nchw(images).to(dtype)).logits.float().numpy()
        )


SMALL = ({**VISION, "form": "folded"}, LLM, 2, 32, 64, 7)
FULL = ({**VISION_SIZES["fastvithd"], "form": "folded"}, LLM_SIZES["0.5b"], 1, 1024, 1024, 24)
SIZES = [pytest.param(SMALL, id="small"), pytest.param(FULL, id="FastVLM-0.5B at 1024 px", marks=pytest.mark.full)]


@pytest.mark.parametrize("size", SIZES)
def test_logits_equal_transformers(size):
    vision, llm, rows, height, width, text = size
    reference, model, variables = pair(vision, llm)
    images, tokens, *rest = inputs(model, rows, height, width, text)
    theirs = logits_of(reference.eval(), images, tokens)
    assert relative(logits_of(reference, images[:, ::-1].copy(), tokens), theirs) > 0.02  # the image matters
    ours = np.asarray(jit(model.apply)(variables, images, tokens, *rest))
    print(f"relative error {relative(ours, theirs):.1e}")
    assert relative(ours, theirs) <= 1e-5
    assert np.array_equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_is_as_near_to_float32_as_torchs_bfloat16(size):
    vision, llm, rows, height, width, text = size
    reference, model, variables = pair(vision, llm)
    images, tokens, *rest = inputs(model, rows, height, width, text)
    exact = logits_of(reference.eval(), images, tokens)
    theirs = relative(logits_of(reference.bfloat16(), images, tokens, torch.bfloat16), exact)
    half = fastvlm.build(vision=vision, llm=llm, dtype="bfloat16")
    ours = relative(np.asarray(jit(half.apply)(variables, images, tokens, *rest), np.float32), exact)
    print(f"error in bfloat16: ours {ours:.2e}, torch's {theirs:.2e}, ratio {ours / theirs:.2f}")
    assert 0 < ours <= 1.25 * theirs


def training_batch(model):
    """Four rows with an image of 2 features each: (a Batch; images, tokens and labels for transformers)."""
    side = fastvlm.make_encoder(**model.vision_args).stride
    images, tokens, image_index, positions, segment_ids = inputs(model, 4, 2 * side, side, 9)
    labels = np.where(image_index < 0, tokens, -100)
    labels[:, :3] = -100
    targets = np.concatenate([labels[:, 1:], np.full((4, 1), -100)], axis=1)
    batch = Batch(
        images=images[:, None],
        image_mask=np.ones((4, 1), bool),
        tokens=tokens[:, None],
        image_index=(image_index - np.arange(4)[:, None] * 2 * (image_index >= 0))[:, None],
        targets=np.maximum(targets, 0)[:, None],
        loss_mask=(targets >= 0)[:, None],
        segment_ids=segment_ids[:, None],
        positions=positions[:, None],
    )
    return batch, (to_nchw(images), torch.from_numpy(tokens), torch.from_numpy(labels))


def test_five_training_steps_equal_torch():
    """Losses, with AdamW, warm-up and cosine, clipping, and batch statistics that are updated; then the statistics."""
    vision = dict(layers=(2, 1), embed_dims=(8, 16), mixers=("repmixer", "repmixer"), batch_norm="train")
    reference, model, variables = pair(vision, {**LLM, "num_layers": 2, "tie_embeddings": False})
    reference.train()
    batch, (pixels, tokens, labels) = training_batch(model)
    steps, peak, decay, clip = 5, 1e-3, 0.1, 1.0
    groups = ((".*", peak, decay),)
    optimizer = optim.make_optimizer(
        variables["params"], groups, optim.Course(steps, 0.4), beta1=0.9, beta2=0.999, epsilon=1e-8, clip_norm=clip
    )
    trainable, _ = optim.split(variables["params"], groups)
    slots = optimizer.init(trainable)
    state = TrainState(jnp.int32(0), variables["params"], variables["batch_stats"], slots, guard.begin())
    step = jit(
        lambda state, batch: train_step(
            state, batch, loss=next_token(model), optimizer=optimizer, groups=groups, seed=0
        )
    )
    ours = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        ours.append(float(metrics["loss"]))

    # Kernels and the embedding decay; vectors and layer scales, here [C, 1, 1], do not.
    decays = [p for name, p in reference.named_parameters() if p.ndim > 1 and not name.endswith("gamma")]
    others = [p for name, p in reference.named_parameters() if p.ndim <= 1 or name.endswith("gamma")]
    adamw = torch.optim.AdamW(
        [{"params": decays, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}], lr=peak
    )
    # Linear warm-up over 2 steps from 0, then half a cosine over the other 3.
    rates = [0.0, peak / 2, *(peak * (1 + np.cos(np.pi * i / 3)) / 2 for i in range(3))]
    theirs = []
    for rate in rates:
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.zero_grad()
        out = reference(input_ids=tokens, pixel_values=pixels, labels=labels)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), clip)
        adamw.step()
        theirs.append(out.loss.item())
    print("losses", ours, theirs)
    assert abs(theirs[-1] - theirs[0]) > 0.05  # it learns: a wrong step would show
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    buffers = dict(reference.named_buffers())
    for name in ("stem.0.conv_kxk.0.bn.running_var", "final_conv.conv_scale.bn.running_mean"):
        path = {"stem.0": "stem_0/conv/bn/var", "final_": "expand/scale/bn/mean"}[name[:6]].split("/")
        leaf = state.batch_stats["vision"]
        for key in path:
            leaf = leaf[key]
        assert relative(leaf, buffers[f"model.vision_tower.timm_model.{name}"]) <= 1e-4


@pytest.mark.parametrize("stabilised", [False, True])
def test_five_steps_with_adapters_equal_peft(stabilised):
    """Losses and all adapters: of the decoder, the projector, the encoder's MLPs, attention and 1x1 convolutions."""
    vision = dict(VISION, layers=(1, 1, 1, 1), form="folded")
    reference, model, variables = pair(vision, {**LLM, "num_layers": 2})
    batch, (pixels, tokens, labels) = training_batch(model)
    lora = Lora(4, alpha=6.0, targets="(llm/layers|projector|vision)/.*", stabilised=stabilised)
    params = with_adapters(variables["params"], lora, jax.random.key(0))
    rows = layout.rows(fastvlm.make_encoder(**model.vision_args), fastvlm.Decoder(**model.llm_args))
    paths = {f"params/{path}" for path in paths_of(variables["params"], lora.targets)}
    kernels = [row for row in rows if row.path in paths]
    names = [name.removesuffix(".weight") for row in kernels for name in row.names()]
    theirs = LoraConfig(r=4, lora_alpha=6.0, target_modules=names, use_rslora=stabilised)
    reference = PeftModel(reference, theirs).eval()  # BatchNorm with stored statistics
    rows = adapter_rows(kernels)
    shapes = {path: x.shape for path, x in flatten_dict({"params": {"lora": params["lora"]}}, sep="/").items()}

    def adapters():
        tensors = {name.replace(".default", ""): x for name, x in reference.state_dict().items() if "lora_" in name}
        tree = to_jax(rows, stored(tensors), shapes, "peft")
        return {path: np.array(x) for path, x in flatten_dict(tree["params"]["lora"], sep="/").items()}

    params["lora"] = unflatten_dict({path: jnp.asarray(x) for path, x in adapters().items()}, sep="/")
    # With the usual epsilon the rounding of a small gradient may turn the direction of its step.
    peak, epsilon = 0.05, 0.1
    groups = (("lora/.*", peak, 0.1), (".*", 0.0, 0.0))
    optimizer = optim.make_optimizer(
        params, groups, optim.Course(5, 0.4), beta1=0.9, beta2=0.999, epsilon=epsilon, clip_norm=1.0
    )
    slots = optimizer.init(optim.split(params, groups)[0])
    state = TrainState(jnp.int32(0), params, variables["batch_stats"], slots, guard.begin())
    step = jit(
        lambda state, batch: train_step(
            state, batch, loss=next_token(model), optimizer=optimizer, groups=groups, seed=0, adapters=lora
        )
    )
    adamw = torch.optim.AdamW(
        [p for p in reference.parameters() if p.requires_grad], lr=peak, eps=epsilon, weight_decay=0.1
    )
    losses = []
    for rate in [0.0, peak / 2, *(peak * (1 + np.cos(np.pi * i / 3)) / 2 for i in range(3))]:
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.zero_grad()
        out = reference(input_ids=tokens, pixel_values=pixels, labels=labels)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        adamw.step()
        state, metrics = step(state, batch)
        losses.append((float(metrics["loss"]), out.loss.item()))
    ours, peft = zip(*losses, strict=True)
    print("losses", ours, peft)
    assert abs(peft[-1] - peft[0]) > 0.05
    np.testing.assert_allclose(ours, peft, rtol=1e-4)
    found, expected = flatten_dict(state.params["lora"], sep="/"), adapters()
    worst = {path: relative(found[path], x) for path, x in expected.items()}
    print("adapters", max(worst.values()))
    assert len(worst) == 2 * len(kernels) and max(worst.values()) <= 1e-4
