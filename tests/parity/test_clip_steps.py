"""Five steps of stage 0 against two replicas of open_clip's towers, optimizer and schedule in PyTorch."""

import math
import runpy

import flax
import jax
import numpy as np
import torch
from paths import ROOT
from small_pairs import TEACHERS, VISION, distilled, random_pairs
from torch_reference import stored, timm_tower

from fastvlm_jax import config_checks, sharding, stage
from fastvlm_jax.convert.mapping import read_tree, to_jax
from fastvlm_jax.convert.tables import text_tower, timm
from fastvlm_jax.models import clip, kinds
from fastvlm_jax.models.fastvit import FastViT

from open_clip.loss import ClipLoss  # isort: skip  after torch_reference, which makes torchvision importable
from open_clip.transformer import TextTransformer  # isort: skip

RATE, DECAY, WARMUP, STEPS = 1e-2, 0.2, 2, 5


class Towers(torch.nn.Module):
    """A random FastViT of timm and a random text tower of open_clip, named as open_clip names them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.visual = torch.nn.Module()
        self.visual.trunk = timm_tower(FastViT(**VISION)).train()
        self.text = TextTransformer(
            context_length=6, vocab_size=60, width=32, heads=1, layers=1, output_dim=12, no_causal_mask=True
        )
        self.logit_scale = torch.nn.Parameter(torch.tensor(0.005))

    def features(self, pixels, tokens):
        """Of both halves of a batch, each with BatchNorm statistics of its own, as two replicas have them."""
        images = torch.cat([self.visual.trunk(half) for half in pixels.chunk(2)])
        texts = torch.stack([self.text(tokens[:, s]) for s in range(tokens.shape[1])])
        return torch.nn.functional.normalize(images, dim=-1), torch.nn.functional.normalize(texts, dim=-1)


def distillation(images, texts, scale, taught):
    """DataCompDR's term, as in its patch of open_clip: a cross-entropy, averaged over directions and rows."""
    value = 0
    for x, y, a, b in ((images, texts, *taught), (texts, images, *taught[::-1])):
        starts = np.cumsum([0, *(width for width, _ in TEACHERS)])
        target = sum(
            (factor * a[:, i : i + width] @ b[:, i : i + width].T).softmax(1)
            for i, (width, factor) in zip(starts, TEACHERS, strict=False)
        ) / len(TEACHERS)
        value -= (target * (scale * x @ y.T).log_softmax(1)).sum(1).mean() / 2
    return value


def torch_losses(model, batch):
    """The losses before each of the steps; AdamW, decay and schedule as open_clip of March 2025 has them."""

    def decays(name, x):
        return x.ndim >= 2 and not any(word in name for word in ("bn", "ln", "bias", "logit_scale"))

    named = list(model.named_parameters())
    groups = [
        {"params": [x for name, x in named if decays(name, x)], "weight_decay": DECAY},
        {"params": [x for name, x in named if not decays(name, x)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8)
    pixels = torch.tensor(batch.images.reshape(-1, *batch.images.shape[2:]).transpose(0, 3, 1, 2) / np.float32(255))
    tokens = torch.tensor(batch.texts.reshape(-1, *batch.texts.shape[2:]).astype(np.int64))
    taught_images = torch.tensor(batch.teacher_images.reshape(len(pixels), -1))
    taught_texts = torch.tensor(batch.teacher_texts.reshape(len(pixels), 2, -1))
    losses, clamped = [], 0
    for step in range(STEPS):
        if step < WARMUP:
            rate = RATE * (step + 1) / WARMUP
        else:
            rate = 0.5 * RATE * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        images, texts = model.features(pixels, tokens)
        scale, loss = model.logit_scale.exp(), 0
        for s in range(2):
            soft = distillation(images, texts[s], scale, (taught_images, taught_texts[:, s]))
            loss += 0.5 * ClipLoss()(images, texts[s], scale) + soft
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            clamped += float(model.logit_scale) < 0
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(float(loss))
    assert clamped, "the clamp has nothing to do"
    return losses


def test_five_steps_are_those_of_two_replicas_of_pytorch():
    """The config's decayed parameters are those of stage0_clip.py; 2 groups of BatchNorm, on a mesh of two devices."""
    torch.set_num_threads(1)
    batch, theirs = random_pairs(groups=2, images=4), Towers()
    config = distilled(
        data__groups=2, data__image_size=8, steps=STEPS, warmup="open_clip", warmup_ratio=WARMUP / STEPS, beta2=0.95,
        decayed=runpy.run_path(ROOT / "configs/stage0_clip.py")["get_config"]("s3").decayed,
        groups=((".*", RATE, DECAY),),
    )  # fmt: skip
    config_checks.validate(config)
    model = kinds.build(**config.model.to_dict())
    rows = [
        *timm.tower_rows(clip.make_encoder(**model.vision_args), "visual.trunk."),
        *text_tower.tower_rows(clip.TextTower(**model.text_args)),
        *text_tower.logit_rows(False),
    ]
    shapes = flax.traverse_util.flatten_dict(kinds.abstract_variables(model), sep="/")
    leaves = to_jax(rows, stored(theirs), {path: x.shape for path, x in shapes.items()}, "torch")
    variables = {key: read_tree(leaves[key], np.float32, np.array) for key in ("params", "batch_stats")}
    expected = torch_losses(theirs, batch)
    mesh = sharding.make_mesh((1, 2, 1, 1), jax.devices()[:2])
    with jax.set_mesh(mesh):
        step = stage.make_step(config, model, mesh, steps=STEPS)
        state, losses = step.make_state(jax.random.key(0), variables), []
        placed = jax.device_put(batch, sharding.batch_sharding(mesh))
        for _ in range(STEPS):
            state, metrics = step.fn(state, placed)
            losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert expected[-1] < 0.9 * expected[0]
    assert abs(float(state.params["logit_scale"]) - float(theirs.logit_scale.detach())) < 1e-4
