"""Counts a model's floating-point operations (FLOPs) from its sizes: forward, per training step, and as chips run it.

The counts include matrix products and convolutions, a multiply-add as 2. They leave out operations that are linear in
the activations (norms, GELUs, softmax, lookups) and the optimizer. A convolution counts all its taps, including those
on the padding, as fvcore and timm do.

    trained                 forward + gradient of the input + gradient of the weights           3x, the first layer 2x
    frozen, after a
    trained parameter       forward + gradient of the input                                     2x (attention 3x)
    frozen, before all
    trained parameters      forward                                                             1x

The decoder's attention counts the causally visible pairs of a whole row, half of the square: packed segments need less,
and PaLM's convention (arXiv 2204.02311, appendix B) counts the full square. The encoder's attention is over all
positions. The products of adapters (LoRA) are left out: they are about rank / width of a layer's.
"""

import functools
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from fastvlm_jax.models.clip import CLIP
from fastvlm_jax.models.convnext import ConvNeXt
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.models.fastvit import FastViT
from fastvlm_jax.models.fastvlm import make_encoder
from fastvlm_jax.models.kinds import Model
from fastvlm_jax.models.text_tower import TextTower
from fastvlm_jax.models.vit import ViT
from fastvlm_jax.optim import kernel_of

PARTS = ("vision", "projector", "llm", "text", "loss")
# Policy of models/remat.py -> kinds of products that the backward pass recomputes.
RECOMPUTED = {
    "none": (),
    "full": ("conv", "conv7", "dot", "scores", "mixed"),
    "dots": ("conv", "conv7", "scores", "mixed"),
    "attention": ("conv", "conv7", "dot", "scores"),
    "depthwise": ("conv", "dot", "scores"),
}


class Product(NamedTuple):
    """Describes the products of activations with one weight, or with each other, summed over all blocks of a stage.

    Attributes:
      part: one of PARTS.
      path: path of the weight among the parameters; for a product of two activations, the path of their module.
      flops: FLOPs of the forward pass.
      kind: "conv", a convolution; "conv7", the 7x7 of a ConvFFN or patch embed; "dot", a matrix product with a weight;
        "scores" and "mixed" (weights x values), the two products of attention; "last", a dot at the end of a block,
        whose result no gradient needs; "loss", the product with the vocabulary; "pairs", that of images and texts.
      remat: remat policy of what the product is in; None if the policy does not matter there.
    """

    part: str
    path: str
    flops: float
    kind: str
    remat: str | None = None

    @property
    def unit(self) -> str:
        """Path of the module or stage that contains the product, as "vision/stage_0" or "llm/layers"."""
        return "/".join(self.path.split("/")[:2])


def forward_flops(
    model: Model, images: int, height: int, width: int, rows: int, row_length: int, *, causal: bool = True
) -> dict[str, float]:
    """Counts the FLOPs of one forward pass by part, one of PARTS.

    "loss" is the product with the vocabulary, or in stage 0 that of all images with all texts, without the teachers'.

    Args:
      images: number of image slots.
      height, width: size of each image in pixels.
      rows: number of text rows, full or not; texts in stage 0.
      row_length: tokens per row.
      causal: False counts the full square of the decoder's attention, which plain attention computes.

    Raises:
      ValueError: the encoder does not accept this image size.
    """
    return _by_part((p, p.flops) for p in products(model, images, height, width, rows, row_length, causal))


def train_flops(
    model: Model,
    trainable: Collection[str],
    images: int,
    height: int,
    width: int,
    rows: int,
    row_length: int,
    *,
    causal: bool = True,
) -> dict[str, float]:
    """Counts the FLOPs of one training step by part, without recomputation: the model FLOPs of MFU.

    Args:
      trainable: paths of the trainable parameters ("llm/layers/q/kernel"), as `optim.split` returns them. For the other
        arguments see forward_flops.
    """
    counted = products(model, images, height, width, rows, row_length, causal)
    return _by_part((p, p.flops * (1 + backward)) for p, backward in _backward(counted, trainable))


def useful_flops(
    model: Model, trainable: Collection[str], sizes: Mapping[tuple[int, int], int], tokens: int, row_length: int
) -> dict[str, float]:
    """Counts the `train_flops` of the images, tiles and tokens in a batch, without its empty slots and padding.

    Args:
      trainable: paths of the trainable parameters.
      sizes: (height, width) in pixels -> number of images and tiles of this size.
      tokens: number of tokens, image placeholders included; each counts as the same share of a row.
      row_length: tokens per row.
    """
    total = dict.fromkeys(PARTS, 0.0)
    for (height, width), images in sizes.items():
        for part, count in train_flops(model, trainable, 1, height, width, 0, 0).items():
            total[part] += count * images
    size = next(iter(sizes), None) or _any_size(model)
    for part, count in train_flops(model, trainable, 0, *size, 1, row_length).items():
        total[part] += count * tokens / row_length
    return total


def hardware_flops(
    model: Model,
    trainable: Collection[str],
    images: int,
    height: int,
    width: int,
    rows: int,
    row_length: int,
    *,
    causal: bool = False,
) -> dict[str, float]:
    """Counts the FLOPs that one training step executes, by part, with what remat and the chunked loss compute twice.

    Args:
      causal: True counts only the visible pairs of the decoder's attention, for kernels that skip masked blocks; False
        counts the full square. For the other arguments see train_flops.
    """

    def recomputed(product: Product) -> bool:
        return product.kind in ("loss", "pairs") or product.kind in RECOMPUTED[product.remat or "none"]

    counted = _backward(products(model, images, height, width, rows, row_length, causal), trainable)
    return _by_part((p, p.flops * (1 + backward + (recomputed(p) and backward > 0))) for p, backward in counted)


def _any_size(model: Model) -> tuple[int, int]:
    """Returns an image size that the encoder accepts, for counts without images."""
    encoder = make_encoder(**(model.vision_args or {}), parent=None)
    return (getattr(encoder, "image_size", None) or encoder.stride,) * 2


def _by_part(counts) -> dict[str, float]:
    total = dict.fromkeys(PARTS, 0.0)
    for product, flops in counts:
        total[product.part] += flops
    return total


def _backward(counted: Sequence[Product], trainable: Collection[str]) -> Iterator[tuple[Product, int]]:
    """Yields each product with the number of products of the same size that its gradients take.

    Gradients flow through everything that follows a trainable parameter in the forward pass. The scan over the equal
    blocks of a stage is one loop: if one weight of the stage is trained, gradients flow through all its blocks. Nothing
    of the image tower comes before the text tower.
    """
    # Through a kernel with an adapter gradients flow as through a trained one, but it has none itself.
    adapted = {kernel_of(path) for path in trainable} - set(trainable)
    trained_units = {"/".join(path.split("/")[:2]) for path in (*trainable, *adapted)}
    gradients_flow, of_images = False, False
    for unit, group in itertools.groupby(counted, key=lambda product: product.unit):
        if unit == "text/embedding":
            gradients_flow, of_images = False, gradients_flow
        for product in group:
            if product.part == "loss":
                gradients_flow |= of_images
            input_grad = gradients_flow or (product.remat is not None and unit in trained_units)
            weight_grad = product.path in trainable
            if product.kind in ("scores", "mixed", "pairs"):
                yield product, 2 * input_grad
            else:
                yield product, input_grad + weight_grad
            if product.remat is None:
                gradients_flow |= weight_grad or product.path in adapted
        gradients_flow |= unit in trained_units


@functools.lru_cache(maxsize=64)
def products(
    model: Model, images: int, height: int, width: int, rows: int, row_length: int, causal: bool = True
) -> tuple[Product, ...]:
    """Returns all products of the forward pass in the order of execution; for the arguments see forward_flops."""
    counted = []
    if model.vision_args is not None:
        encoder = make_encoder(**model.vision_args, parent=None)
        h, w = encoder.grid(height, width)
        count = {FastViT: _fastvit, ViT: _vit, ConvNeXt: _convnext}[type(encoder)]
        counted += [p._replace(flops=p.flops * images) for p in count(encoder, height, width)]
        if isinstance(model, CLIP):
            counted += _clip(model, encoder, images, rows, row_length)
        if model.llm_args is not None:
            counted += _projector(encoder.features, model.llm_args["width"], images * h * w)
    if model.llm_args is not None:
        counted += _decoder(Decoder(**model.llm_args, parent=None), rows, row_length, causal)
    return tuple(counted)


def _dot(path: str, inputs: int, outputs: int, positions: int, remat: str | None = None, kind: str = "dot") -> Product:
    """Describes x [positions, inputs] @ kernel [inputs, outputs]."""
    return Product(path.split("/")[0], f"{path}/kernel", 2.0 * inputs * outputs * positions, kind, remat)


def _conv(path: str, taps: int, features: int, positions: int, remat: str | None = None, kind: str = "conv") -> Product:
    """Describes a convolution with `taps` multiply-adds per output: k * k if depthwise, k * k * inputs otherwise."""
    return Product("vision", f"{path}/kernel", 2.0 * taps * features * positions, kind, remat)


def _attention(path: str, pairs: int, channels: int, remat: str) -> list[Product]:
    """Describes the scores and the weighted sums of attention over `pairs` of a query and a key."""
    part = path.split("/")[0]
    return [Product(part, path, 2.0 * pairs * channels, kind, remat) for kind in ("scores", "mixed")]


def _squeeze_excite(path: str, channels: int, reduction: int, remat: str | None = None) -> list[Product]:
    inner = channels // reduction
    return [_dot(f"{path}/fc1", channels, inner, 1, remat), _dot(f"{path}/fc2", inner, channels, 1, remat)]


def _fastvit(tower: FastViT, height: int, width: int) -> list[Product]:
    """Lists the products for one image; see models/blocks.py."""
    folded = tower.form == "folded"

    def mobile_one(path, taps, features, positions, inputs=1, scale=True, remat=tower.remat, kind="conv"):
        if folded:
            return [_conv(f"{path}/folded", taps * inputs, features, positions, remat, kind)]
        branches = [_conv(f"{path}/conv", taps * inputs, features, positions, remat, kind)]
        if scale and taps > 1:
            branches.append(_conv(f"{path}/scale", inputs, features, positions, remat))
        return branches

    dims, positions = tower.embed_dims, height * width // 16
    counted = mobile_one("vision/stem_0", 9, dims[0], 4 * positions, inputs=3, scale=tower.stem_scale)
    counted += mobile_one("vision/stem_1", 9, dims[0], positions, scale=tower.stem_scale)
    counted += mobile_one("vision/stem_2", 1, dims[0], positions, inputs=dims[0], kind="dot")
    for i, (depth, C, mixer) in enumerate(zip(tower.layers, dims, tower.mixers, strict=True)):
        if i > 0:
            positions //= 4
            path = f"vision/patch_embed_{i}"
            sizes = {"folded": 49} if folded else {"large": 49, "small": 9}
            counted += [
                _conv(f"{path}/{name}", taps, C, positions, tower.remat, "conv7") for name, taps in sizes.items()
            ]
            counted += _squeeze_excite(f"{path}/se", C, 4, tower.remat) if i in tower.se_stages else []
            counted += mobile_one(f"{path}/pointwise", 1, C, positions, inputs=C, kind="dot")
        if mixer == "attention":
            counted.append(_conv(f"vision/positions_{i}/{'folded' if folded else 'conv'}", 49, C, positions))
        stage, all_positions = f"vision/stage_{i}", depth * positions
        if mixer == "attention":
            counted.append(_dot(f"{stage}/mixer/qkv", C, 3 * C, all_positions, tower.remat))
            counted += _attention(f"{stage}/mixer", all_positions * positions, C, tower.remat)
            counted.append(_dot(f"{stage}/mixer/proj", C, C, all_positions, tower.remat))
        else:
            path = f"{stage}/mixer" if folded else f"{stage}/mixer/mixer"
            counted += mobile_one(path, 9, C, all_positions)
        wide = int(C * tower.mlp_ratio)
        counted.append(_conv(f"{stage}/ffn/conv", 49, C, all_positions, tower.remat, "conv7"))
        counted.append(_dot(f"{stage}/ffn/fc1", C, wide, all_positions, tower.remat))
        counted.append(_dot(f"{stage}/ffn/fc2", wide, C, all_positions, tower.remat, "last"))
        if i in tower.multiscale and tower.multiscale_pool == "depthwise":
            counted.append(_conv(f"vision/pool_{i}", 1, C, positions))
    counted += mobile_one("vision/expand", 9, 2 * dims[-1], positions, remat=None)
    return counted + _squeeze_excite("vision/expand/se", 2 * dims[-1], 16)


def _vit(tower: ViT, height: int, width: int) -> list[Product]:
    """Lists the products for one image."""
    h, w = tower.grid(height, width)
    C, N, path = tower.width, h * w + int(tower.cls_token), "vision/layers"
    positions = tower.used_layers * N
    counted = [_conv("vision/patch_embed", 3 * tower.patch_size**2, C, h * w)]
    counted += [_dot(f"{path}/{name}", C, C, positions, tower.remat) for name in "qkv"]
    counted += _attention(path, positions * N, C, tower.remat)
    counted.append(_dot(f"{path}/o", C, C, positions, tower.remat))
    counted.append(_dot(f"{path}/fc1", C, tower.mlp_dim, positions, tower.remat))
    return [*counted, _dot(f"{path}/fc2", tower.mlp_dim, C, positions, tower.remat, "last")]


def _convnext(tower: ConvNeXt, height: int, width: int) -> list[Product]:
    """Lists the products for one image."""
    dims, positions = tower.embed_dims, height * width // 16
    counted = [_conv("vision/stem", 16 * 3, dims[0], positions)]
    for i, (depth, C) in enumerate(zip(tower.layers, dims, strict=True)):
        if i > 0:
            positions //= 4
            counted.append(_conv(f"vision/downsample_{i}", 4 * dims[i - 1], C, positions))
        stage, all_positions = f"vision/stage_{i}", depth * positions
        counted.append(_conv(stage, 49, C, all_positions, tower.remat))
        counted.append(_dot(f"{stage}/fc1", C, 4 * C, all_positions, tower.remat))
        counted.append(_dot(f"{stage}/fc2", 4 * C, C, all_positions, tower.remat))
    return counted


def _clip(model: CLIP, encoder, images: int, texts: int, length: int) -> list[Product]:
    """Lists the products behind the image tower of a CLIP: its head, the text tower, and the logits of all pairs."""
    tower = TextTower(**model.text_args, parent=None)
    C, path, tokens = tower.width, "text/layers", tower.num_layers * texts * length
    head = "vision/head" if isinstance(encoder, FastViT) else "image_head"
    counted = [_dot(head, encoder.features, tower.features, images)._replace(part="vision")]
    counted.append(Product("text", "text/embedding", 0.0, "dot"))  # a lookup without FLOPs, as in the decoder
    counted.append(_dot(f"{path}/qkv", C, 3 * C, tokens, tower.remat))
    counted += _attention(path, tokens * length, C, tower.remat)
    counted += [_dot(f"{path}/o", C, C, tokens, tower.remat), _dot(f"{path}/fc1", C, 4 * C, tokens, tower.remat)]
    counted.append(_dot(f"{path}/fc2", 4 * C, C, tokens, tower.remat, "last"))
    counted.append(Product("text", "text/projection", 2.0 * C * tower.features * texts, "dot"))
    return [*counted, Product("loss", "logit_scale", 2.0 * tower.features * images * texts, "pairs")]


def _projector(features: int, width: int, positions: int) -> list[Product]:
    return [_dot("projector/fc1", features, width, positions), _dot("projector/fc2", width, width, positions)]


def _decoder(llm: Decoder, rows: int, row_length: int, causal: bool) -> list[Product]:
    D, F, heads, kv_heads = llm.width, llm.mlp_dim, *(n * llm.size_of_head for n in (llm.num_heads, llm.num_kv_heads))
    tokens, path = rows * row_length * llm.num_layers, "llm/layers"
    pairs = tokens * (row_length + 1) // 2 if causal else tokens * row_length
    table = Product("llm", "llm/embedding", 0.0, "dot")  # a lookup without FLOPs, to which gradients flow back
    counted = [table, _dot(f"{path}/q", D, heads, tokens, llm.remat)]
    counted += [_dot(f"{path}/{name}", D, kv_heads, tokens, llm.remat) for name in "kv"]
    counted += _attention(path, pairs, heads, llm.remat)
    counted.append(_dot(f"{path}/o", heads, D, tokens, llm.remat))
    counted += [_dot(f"{path}/{name}", D, F, tokens, llm.remat) for name in ("gate", "up")]
    counted.append(_dot(f"{path}/down", F, D, tokens, llm.remat, "last"))
    words = "llm/embedding" if llm.tie_embeddings else "llm/lm_head/kernel"
    return [*counted, Product("loss", words, 2.0 * D * llm.vocab_size * rows * row_length, "loss")]
