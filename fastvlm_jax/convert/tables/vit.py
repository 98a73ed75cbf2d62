"""Maps a ViT to the tensor names of CLIP and SigLIP image towers in transformers.

The names begin with `vision_model.` in published checkpoints, both of a tower and of a whole model; transformers 5
writes a tower alone without that prefix.
"""

from collections.abc import Iterable

from fastvlm_jax.convert.mapping import CONV, LINEAR, Row
from fastvlm_jax.models.vit import ViT

PUBLISHED_PREFIX = "vision_model."
OTHER_PARTS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
LINEARS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.out_proj"}
LINEARS |= {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}


def tower_rows(vision: ViT, prefix: str = "") -> list[Row]:
    """Returns the rows of a tower.

    Args:
      vision: the tower, for its sizes.
      prefix: what precedes every tensor name; it ends with `vision_model.` in a published checkpoint.
    """
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
        rows += _norm("pre_layrnorm", "pre_norm")  # spelled so in transformers
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
    """Returns the prefix of the tower's tensors among the tensor names of a checkpoint, "vision_model." or ""."""
    return PUBLISHED_PREFIX if any(name.startswith(PUBLISHED_PREFIX) for name in names) else ""


def is_beside_tower(vision: ViT, name: str) -> bool:
    """Returns whether import ignores a tensor of a CLIP or SigLIP checkpoint, as not part of its image tower.

    Ignored are the text tower, the projections, the scale and bias of the logits, the buffer `position_ids` of older
    files, and the pooling head if `vision` has none.
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
