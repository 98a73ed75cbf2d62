"""The independent references: timm and transformers on CPU, with weights and statistics that hide no mistake."""

import functools

import flax
import jax
import numpy as np
import torch

from fastvlm_jax.bench.transformers_model import import_transformers
from fastvlm_jax.convert.mapping import to_jax
from fastvlm_jax.convert.tables.timm import tower_rows
from fastvlm_jax.models.fastvit import FastViT

transformers = import_transformers()  # timm too imports torchvision, whose compiled part need not fit this torch

import timm.optim  # noqa: E402
import timm.utils  # noqa: E402
from timm.models.fastvit import RepConditionalPosEnc  # noqa: E402

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
            elif name.endswith("num_batches_tracked"):
                x.zero_()
    return module


def timm_tower(model: FastViT, name: str | None = None) -> torch.nn.Module:
    """A random tower in eval mode with the form, depths, widths and head of `model`.

    All else is timm's of `name`, or without a name `model`'s.
    """
    args = dict(layers=model.layers, embed_dims=model.embed_dims, num_classes=model.head_features)
    if name is None:
        stages, positions = range(len(model.layers)), functools.partial(RepConditionalPosEnc, spatial_shape=(7, 7))
        args |= dict(
            token_mixers=model.mixers,
            pos_embs=[positions if mixer == "attention" else None for mixer in model.mixers],
            downsamples=[i > 0 for i in stages],
            se_downsamples=[i in model.se_stages for i in stages],
            mlp_ratios=[model.mlp_ratio for _ in stages],
            stem_use_scale_branch=model.stem_scale,
        )
        if model.attention_norm == "batch":
            args["norm_layer"] = torch.nn.BatchNorm2d
    with torch.device("meta"):  # timm's own initial weights would take longer than the rest
        tower = timm.create_model(name or "fastvit_mci3", inference_mode=model.form == "folded", **args)
    return randomise(tower.to_empty(device="cpu"), 0).eval()


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


def stored(module: torch.nn.Module | dict[str, torch.Tensor]) -> dict[str, Stored]:
    """The state dict of a module, or tensors by name, to import."""
    tensors = module if isinstance(module, dict) else module.state_dict()
    return {name: Stored(tensor) for name, tensor in tensors.items()}


def relative(ours, theirs) -> float:
    """||ours - theirs|| / ||theirs||, in float64."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@functools.cache
def tower_shapes(model: FastViT) -> dict[str, tuple[int, ...]]:
    """Path -> shape of a lone FastViT, named as in FastVLM."""
    images = jax.ShapeDtypeStruct((1, model.stride, model.stride, 3), np.float32)
    flat = flax.traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), images), sep="/")
    return {path.replace("/", "/vision/", 1): leaf.shape for path, leaf in flat.items()}


def tower_variables(model: FastViT, tower: torch.nn.Module | dict[str, torch.Tensor], rows=tower_rows) -> dict:
    """The variables of a lone FastViT with the weights of a timm tower, or of another layout's by its table `rows`."""
    tree = to_jax(rows(model), stored(tower), tower_shapes(model), "torch")
    return {name: jax.tree.map(np.asarray, tree[name]["vision"]) for name in ("params", "batch_stats")}


def to_nchw(images: np.ndarray) -> torch.Tensor:
    """[B, H, W, C] to torch's [B, C, H, W]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def calibrate(tower, images):
    """BatchNorm statistics as they come about in training: those of the activations of `images`.

    With arbitrary ones the activations of a deep tower grow until attention is a step function: timm itself is then
    8e-5 away from its float64 result (MCi0, 256 px).
    """
    norms = [module for module in tower.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        tower.train().forward_features(to_nchw(images))
    for norm in norms:
        norm.momentum = 0.1
        norm.num_batches_tracked.zero_()
    return tower.eval()


def released(tower):
    """A tower in training form, folded by timm; random folded weights would let nothing of the image through."""
    return timm.utils.reparameterize_model(tower.eval())
