"""Maps a FastViT to the names of Apple's `mci.py` (ml-fastvlm, ml-mobileclip), in training form and folded form.

The tensors are timm's under other names, except the CLIP projection, which is stored [features, width] without a bias.
The parts of all stages form one list, `network`; FastViTHD's is:

    0        1      2        3      4        5      6          7        8      9          10
    stage 0  embed  stage 1  embed  stage 2  embed  positions  stage 3  embed  positions  stage 4
"""

from fastvlm_jax.convert.mapping import SAME, Row
from fastvlm_jax.convert.tables import timm
from fastvlm_jax.models.fastvit import FastViT

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
