"""Maps a FastViT, and the text tower beside it, to Apple's names (ml-fastvlm, ml-mobileclip).

A FastViT has the names of `mci.py`, in training form and folded form.

The tensors are timm's under other names, except the CLIP projection, which is stored [features, width] without a bias.
The parts of all stages form one list, `network`; FastViTHD's is:

    0        1      2        3      4        5      6          7        8      9          10
    stage 0  embed  stage 1  embed  stage 2  embed  positions  stage 3  embed  positions  stage 4
"""

from fastvlm_jax.convert.mapping import SAME, Row
from fastvlm_jax.convert.tables import text_tower, timm
from fastvlm_jax.models.fastvit import FastViT
from fastvlm_jax.models.text_tower import TextTower

POSITIONS = "positional_embedding.pos_embed.pos_embed"  # of the text tower
# (timm's word, Apple's word), replaced in this order after the stages have become parts of `network`.
WORDS = (
    ("stem.", "patch_embed."),
    ("final_conv.se.fc1", "conv_exp.se.reduce"),
    ("final_conv.se.fc2", "conv_exp.se.expand"),
    ("final_conv.", "conv_exp."),
    (".conv_kxk.", ".rbr_conv."),
    (".conv_scale.", ".rbr_scale."),
    (".identity.", ".rbr_skip."),
    (".proj.0.reparam_conv.", ".proj.0.lkb_reparam."),
    (".large_conv.", ".lkb_origin."),
    (".pos_enc.", ".pe."),
    (".mlp.", ".convffn."),
    (".gamma", ""),
    ("head.fc.weight", "head.proj"),
)
# (open_clip's word, Apple's word) of the text tower.
TEXT_WORDS = (
    ("token_embedding", "embedding_layer"),
    ("positional_embedding", POSITIONS),
    ("transformer.resblocks.", "transformer."),
    ("ln_1", "pre_norm_mha.0"),
    ("attn.in_proj_", "pre_norm_mha.1.qkv_proj."),
    ("attn.out_proj", "pre_norm_mha.1.out_proj"),
    ("ln_2", "pre_norm_ffn.0"),
    ("mlp.c_fc", "pre_norm_ffn.1"),
    ("mlp.c_proj", "pre_norm_ffn.4"),
    ("ln_final", "final_layer_norm"),
    ("text_projection", "projection_layer"),
)


def tower_rows(vision: FastViT, prefix: str = "") -> list[Row]:
    """Returns the rows of a tower: its training form if vision.form is "branched", its released form if "folded".

    `head.proj` is included if the tower has a CLIP projection.

    Args:
      vision: the tower, for its sizes and form.
      prefix: what precedes every tensor name in the checkpoint.

    Raises:
      ValueError: the projection has a bias, or the tower's multi-scale pooling has weights.
    """
    if vision.head_bias:
        raise ValueError("vision.head_bias=True: Apple's CLIP projection has no bias; use the timm or native layout")
    words = (*_network(vision), *WORDS)
    rows = []
    for row in timm.tower_rows(vision):
        name = row.torch
        for timm_word, apple_word in words:
            name = name.replace(timm_word, apple_word)
        transform = SAME if name == "head.proj" else row.transform
        rows.append(row._replace(torch=prefix + name, transform=transform))
    return rows


def _network(vision: FastViT) -> list[tuple[str, str]]:
    """Returns (timm's prefix, Apple's prefix) of each part of the stages, in the order of Apple's flat list."""
    parts = []
    for i, mixer in enumerate(vision.mixers):
        parts += [f"stages.{i}.downsample."] if i > 0 else []
        parts += [f"stages.{i}.pos_emb."] if mixer == "attention" else []
        parts += [f"stages.{i}.blocks."]
    return [(part, f"network.{place}.") for place, part in enumerate(parts)]


def text_rows(tower: TextTower, prefix: str = "text_encoder.") -> list[Row]:
    """Returns the rows of a text tower under ml-mobileclip's names, whose positions have two more dimensions of size 1.

    Args:
      tower: the tower, for its sizes.
      prefix: what precedes every tensor name in the checkpoint.
    """
    rows = []
    for row in text_tower.tower_rows(tower, ""):
        name = row.torch
        for their_word, apple_word in TEXT_WORDS:
            name = name.replace(their_word, apple_word)
        rows.append(row._replace(torch=prefix + name))
    return rows
