"""A tiny CLIP of timm's image tower and open_clip's text tower, and the same as a model directory of this project."""

import pathlib

import flax
import numpy as np
import torch
from torch_reference import randomise, stored, timm_tower

from fastvlm_jax import convert
from fastvlm_jax.convert.mapping import read_tree, to_jax
from fastvlm_jax.convert.tables import text_tower, timm
from fastvlm_jax.models import clip, kinds
from fastvlm_jax.models.fastvit import FastViT
from fastvlm_jax.pair_processor import PairProcessor

from open_clip.transformer import TextTransformer  # isort: skip  after torch_reference, which makes torchvision importable

LENGTH = 16  # tokens of a text
MEAN, STD = (0.5, 0.4, 0.3), (0.3, 0.25, 0.2)


class TinyClip(torch.nn.Module):
    """A random CLIP, named as open_clip names its parameters; embeddings have length 1."""

    def __init__(self, features: int, vocab_size: int, seed: int):
        super().__init__()
        vision = dict(layers=(1,), embed_dims=(8,), mixers=("repmixer",), form="branched", mlp_ratio=2.0)
        self.vision = {**vision, "head_features": features, "head_bias": True, "image_mean": MEAN, "image_std": STD}
        sizes = dict(width=32, num_heads=2, num_layers=1, vocab_size=vocab_size, context_length=LENGTH)
        self.sizes = {"features": features, **sizes}
        self.visual = torch.nn.Module()
        self.visual.trunk = randomise(timm_tower(FastViT(**self.vision)), seed).eval()
        torch.manual_seed(seed)
        self.text = TextTransformer(
            context_length=LENGTH, vocab_size=vocab_size, width=32, heads=2, layers=1, output_dim=features,
            no_causal_mask=True,
        ).eval()  # fmt: skip
        with torch.no_grad():
            for parameter in self.text.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
        self.logit_scale = torch.nn.Parameter(torch.tensor(float(np.log(20 + seed))))

    def images(self, views: np.ndarray) -> np.ndarray:
        """Embeddings of uint8 [N, H, W, 3]."""
        pixels = (views / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
        with torch.no_grad():
            return _unit(self.visual.trunk(torch.tensor(pixels.transpose(0, 3, 1, 2))))

    def texts(self, tokens) -> np.ndarray:
        """Embeddings of whole numbers [N, LENGTH]."""
        with torch.no_grad():
            return _unit(self.text(torch.as_tensor(np.asarray(tokens))))

    def write(self, folder: pathlib.Path, tokenizer, image_size: int) -> pathlib.Path:
        """Writes the same model as a directory of this project, and returns its folder."""
        config = {"vision": self.vision, "text": self.sizes, "sigmoid": False, "dtype": "float32"}
        model = kinds.build(**config)
        rows = [
            *timm.tower_rows(clip.make_encoder(**model.vision_args), "visual.trunk."),
            *text_tower.tower_rows(clip.TextTower(**model.text_args)),
            *text_tower.logit_rows(False),
        ]
        shapes = flax.traverse_util.flatten_dict(kinds.abstract_variables(model), sep="/")
        leaves = to_jax(rows, stored(self), {path: x.shape for path, x in shapes.items()}, "torch")
        variables = {key: read_tree(leaves[key], np.float32, np.array) for key in ("params", "batch_stats")}
        processor = PairProcessor(tokenizer, LENGTH, image_size, MEAN, STD)
        convert.write(folder, "native", variables, config, processor, {"stage": "tiny"})
        return folder


def _unit(features: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(features, dim=-1).numpy()
