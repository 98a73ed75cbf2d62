"""The independent references: timm and transformers on CPU, with weights and statistics that hide no mistake."""

import functools

import flax
import jax
import numpy as np
import torch

from fastvlm_jax.convert.mapping import to_jax
from fastvlm_jax.convert.timm import tower_rows
from fastvlm_jax.models.fastvit import FastViT

# timm imports torchvision, whose compiled part does not fit a CPU-only torch: declare the two operators it looks up.
_LIBRARY = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402
import transformers  # noqa: E402

transformers.utils.logging.disable_progress_bar()

# The same operations, compiled many times faster: most of a parity test's time would go into XLA's code generation.
_QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
jit = functools.partial(jax.jit, compiler_options=_QUICK)


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random weights in place: unit gain, layer scales in [0.1, 1], BatchNorm statistics far from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(x, low, high):
        x.copy_(low + (high - low) * torch.rand(x.shape, generator=generator))

    with torch.no_grad():
        for name, x in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith("gamma"):
                uniform(x, 0.1, 1)
            elif name.endswith("running_var") or (name.endswith("weight") and x.ndim == 1):
                uniform(x, 0.5, 2)
            elif name.endswith(("bias", "running_mean")):
                uniform(x, -0.5, 0.5)
            elif name.endswith("weight"):
                x.copy_(torch.randn(x.shape, generator=generator) * 0.7 * x[0].numel() ** -0.5)
    return module


def timm_tower(model: FastViT) -> torch.nn.Module:
    """A random fastvit_mci3 of the sizes and the form of `model`, without head, in eval mode."""
    sizes = dict(layers=model.layers, embed_dims=model.embed_dims, inference_mode=model.form == "folded")
    return randomise(timm.create_model("fastvit_mci3", num_classes=0, **sizes), 0).eval()


class Stored:
    """A tensor in memory that reads like a slice of a safetensors file."""

    def __init__(self, tensor: torch.Tensor):
        self.array = tensor.detach().numpy()

    def get_shape(self):
        return list(self.array.shape)

    def get_dtype(self):
        return {"float32": "F32", "int64": "I64"}[self.array.dtype.name]

    def __getitem__(self, index):
        return self.array[index]


def stored(module: torch.nn.Module) -> dict[str, Stored]:
    """The state dict of a module, to import."""
    return {name: Stored(tensor) for name, tensor in module.state_dict().items()}


def relative(ours, theirs) -> float:
    """||ours - theirs|| / ||theirs||, in float64."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def tower_shapes(model: FastViT) -> dict[str, tuple[int, ...]]:
    """Path -> shape of a lone FastViT, named as in FastVLM."""
    images = jax.ShapeDtypeStruct((1, model.stride, model.stride, 3), np.float32)
    flat = flax.traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), images), sep="/")
    return {path.replace("/", "/vision/", 1): leaf.shape for path, leaf in flat.items()}


def tower_variables(model: FastViT, tower: torch.nn.Module) -> dict:
    """The variables of a lone FastViT with the weights of a timm tower."""
    rows = tower_rows(model.layers, model.mixers, model.form)
    return {name: tree["vision"] for name, tree in to_jax(rows, stored(tower), tower_shapes(model), "timm").items()}


def to_nchw(images: np.ndarray) -> torch.Tensor:
    """[B, H, W, C] to torch's [B, C, H, W]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
