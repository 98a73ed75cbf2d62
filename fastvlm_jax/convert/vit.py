"""CLIP and SigLIP image towers as transformers stores them: the names of the weights, and the config.json.

The names of a tower begin with `vision_model.` in published checkpoints, whether of the tower or of the whole model,
and with nothing in what transformers 5 writes for a tower alone.
"""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from fastvlm_jax.config import CLIP_COLOURS, SIGLIP_COLOURS
from fastvlm_jax.convert.mapping import CONV, LINEAR, Row
from fastvlm_jax.models.vit import ACTIVATIONS, ViT

PUBLISHED_PREFIX = "vision_model."
OTHER_PARTS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
# Our argument -> transformers' key, and its default where the key is left out (SigLIP's published file does).
SIZES = {
    "image_size": ("image_size", 224, 224),
    "patch_size": ("patch_size", 32, 16),
    "width": ("hidden_size", 768, 768),
    "num_layers": ("num_hidden_layers", 12, 12),
    "num_heads": ("num_attention_heads", 12, 12),
    "mlp_dim": ("intermediate_size", 3072, 3072),
}
KINDS = {
    "clip_vision_model": dict(
        activation="quick_gelu",
        epsilon=1e-5,
        cls_token=True,
        pre_norm=True,
        pooling_head=False,
        **CLIP_COLOURS,
    ),
    "siglip_vision_model": dict(
        activation="gelu_pytorch_tanh",
        epsilon=1e-6,
        cls_token=False,
        pre_norm=False,
        pooling_head=True,
        **SIGLIP_COLOURS,
    ),
}
LINEARS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.out_proj"}
LINEARS |= {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}


def tower_rows(vision: ViT, prefix: str = "") -> list[Row]:
    """The layout of a tower; `prefix` ends with `vision_model.` in a published checkpoint."""
    rows = [
        Row("embeddings.patch_embedding.weight", "patch_embed/kernel", CONV),
        Row("embeddings.position_embedding.weight", "positions"),
        *_layer("encoder.layers.{i}", "layers", vision.used_layers),
        *(
            row
            for i in range(vision.used_layers, vision.num_layers)
            for row in _layer(f"encoder.layers.{i}", f"unused/layer_{i}", None)
        ),
        *_norm("post_layernorm", "unused/final_norm"),
    ]
    if vision.cls_token:
        rows.append(Row("embeddings.class_embedding", "cls_token"))
    if vision.pre_norm:
        rows += _norm("pre_layrnorm", "pre_norm")  # transformers' spelling
    else:
        rows.append(Row("embeddings.patch_embedding.bias", "patch_embed/bias"))
    if vision.pooling_head:
        rows += [
            Row("head.probe", "unused/head/probe"),
            Row("head.attention.in_proj_weight", "unused/head/qkv/kernel", LINEAR),
            Row("head.attention.in_proj_bias", "unused/head/qkv/bias"),
            *_dense("head.attention.out_proj", "unused/head/o"),
            *_norm("head.layernorm", "unused/head/mlp_norm"),
            *_dense("head.mlp.fc1", "unused/head/fc1"),
            *_dense("head.mlp.fc2", "unused/head/fc2"),
        ]
    return [row._replace(torch=prefix + row.torch, path=f"params/vision/{row.path}") for row in rows]


def tower_prefix(names: Iterable[str]) -> str:
    """What the names of the tower begin with in a checkpoint of it or of the whole CLIP or SigLIP model."""
    return PUBLISHED_PREFIX if any(name.startswith(PUBLISHED_PREFIX) for name in names) else ""


def is_beside_tower(vision: ViT, name: str) -> bool:
    """Whether a tensor of a CLIP or SigLIP checkpoint is no weight of its image tower, and left aside on import.

    These are the text tower, the projections, the scale and bias of the logits, the counter `position_ids` of older
    files, and the pooling head where `vision` goes without it.
    """
    head = () if vision.pooling_head else ("head.", f"{PUBLISHED_PREFIX}head.")
    return name.startswith(OTHER_PARTS + head) or name.endswith(".position_ids")


def _layer(torch: str, path: str, depth: int | None) -> list[Row]:
    rows = _norm(f"{torch}.layer_norm1", f"{path}/attention_norm") + _norm(f"{torch}.layer_norm2", f"{path}/mlp_norm")
    for ours, theirs in LINEARS.items():
        rows += _dense(f"{torch}.{theirs}", f"{path}/{ours}")
    return [row._replace(depth=depth) for row in rows]


def _norm(torch: str, path: str) -> list[Row]:
    return [Row(f"{torch}.weight", f"{path}/scale"), Row(f"{torch}.bias", f"{path}/bias")]


def _dense(torch: str, path: str) -> list[Row]:
    return [Row(f"{torch}.weight", f"{path}/kernel", LINEAR), Row(f"{torch}.bias", f"{path}/bias")]


def vision_config(vision: ViT) -> dict[str, Any]:
    """The tower's config.json for CLIPVisionModel or SiglipVisionModel, also `vision_config` in that of a whole model.

    select_layer, normalisation and the training arguments have no place in it.

    Raises:
      ValueError: a mixture of CLIP and SigLIP that neither class computes.
    """
    model_type = "clip_vision_model" if vision.cls_token else "siglip_vision_model"
    if vision.pre_norm != vision.cls_token or (vision.cls_token and vision.pooling_head):
        raise ValueError(
            f"vision.cls_token={vision.cls_token}, pre_norm={vision.pre_norm}, pooling_head={vision.pooling_head} has "
            "no transformers layout: CLIP is True, True, False; SigLIP False, False, True or False"
        )
    head = {} if vision.cls_token else {"vision_use_head": vision.pooling_head}
    return {
        "model_type": model_type,
        **{key: getattr(vision, ours) for ours, (key, *_) in SIZES.items()},
        "num_channels": 3,
        "hidden_act": vision.activation,
        "layer_norm_eps": vision.epsilon,
        "attention_dropout": 0.0,
        **head,
    }


def read_vision_config(file: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder arguments (with "family") in the config.json of a tower, or of a whole CLIP or SigLIP model.

    image_mean and image_std are those of OpenAI's CLIP and of SigLIP; preprocessor_config.json may say otherwise.

    Args:
      file: where `config` is from, for messages.
      config: the parsed config.json; or the `vision_config` in it.

    Raises:
      ValueError: naming the file and the key that is wrong, or whose value this package does not compute.
    """
    prefix = ""
    if (whole := config.get("model_type")) in ("clip", "siglip"):
        prefix = "vision_config."
        config = {"model_type": f"{whole}_vision_model", **_nested(file, config)}
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{file}: {prefix}model_type is {kind!r}, it must be one of {', '.join(KINDS)}")
    args = {"family": "vit", **KINDS[kind]}
    for ours, (key, clip, siglip) in SIZES.items():
        args[ours] = config.get(key, clip if kind == "clip_vision_model" else siglip)
        if type(args[ours]) is not int or args[ours] < 1:
            raise ValueError(f"{file}: {prefix}{key} is {args[ours]!r}, it must be a positive whole number")
    args["activation"] = config.get("hidden_act", args["activation"])
    if not isinstance(args["activation"], str) or args["activation"] not in ACTIVATIONS:
        raise ValueError(
            f"{file}: {prefix}hidden_act is {args['activation']!r}, this package computes {', '.join(ACTIVATIONS)}"
        )
    args["epsilon"] = config.get("layer_norm_eps", args["epsilon"])
    if type(args["epsilon"]) is not float or not 0 < args["epsilon"] < 1:
        raise ValueError(f"{file}: {prefix}layer_norm_eps is {args['epsilon']!r}, it must lie between 0 and 1")
    if kind == "siglip_vision_model":
        args["pooling_head"] = config.get("vision_use_head", True)
    allowed = {"vision_use_head": (True, False), "num_channels": (3,), "attention_dropout": (0.0,)}
    for key, values in allowed.items():
        if (found := config.get(key, values[0])) not in values:
            raise ValueError(f"{file}: {prefix}{key} is {found!r}, this package computes {values[0]!r} only")
    return args


def _nested(file: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(nested := config.get("vision_config", {}), dict):
        raise ValueError(f"{file}: vision_config is {nested!r}, it must be an object")
    return nested
