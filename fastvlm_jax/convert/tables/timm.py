"""Maps a FastViT to timm's names (`fastvit_mci0` to `fastvit_mci4`), in training form and in `inference_mode`.

Paths lie under `vision/`, as in FastVLM's variables.
"""

from fastvlm_jax.convert.mapping import CHANNELS, CONV, LINEAR, POINTWISE, Row
from fastvlm_jax.models.fastvit import FastViT

FIRST_MLP = "stages.0.blocks.0.mlp.fc1.weight"  # a tensor of every FastViT and ConvNeXt of timm, without a prefix


def tower_rows(vision: FastViT, prefix: str = "") -> list[Row]:
    """Returns the rows of a tower: timm's training form if vision.form is "branched", its inference_mode if "folded".

    `head.fc` is included if the tower has a CLIP projection.

    Args:
      vision: the tower, for its sizes and form.
      prefix: what precedes every tensor name in a larger checkpoint.

    Raises:
      ValueError: the tower's multi-scale pooling has weights, which timm's does not.
    """
    if vision.multiscale and vision.multiscale_pool == "depthwise":
        raise ValueError("vision.multiscale_pool='depthwise' has weights that only the native layout can hold")
    form = vision.form
    rows = _mobile_one("stem.0", "stem_0", form, scale=vision.stem_scale)
    rows += _mobile_one("stem.1", "stem_1", form, scale=vision.stem_scale)
    rows += _mobile_one("stem.2", "stem_2", form, skip=True)
    for i, (depth, mixer) in enumerate(zip(vision.layers, vision.mixers, strict=True)):
        if i > 0:
            rows += _patch_embed(f"stages.{i}.downsample.proj", f"patch_embed_{i}", form, i in vision.se_stages)
        if mixer == "attention":
            name, part = ("pos_enc", "conv") if form == "branched" else ("reparam_conv", "folded")
            rows += _conv(f"stages.{i}.pos_emb.{name}", f"positions_{i}/{part}")
        block, path = f"stages.{i}.blocks.{{i}}", f"stage_{i}"
        if mixer == "attention":
            one_block = _attention_block(block, path, vision.attention_norm)
        else:
            one_block = _rep_mixer_block(block, path, form)
        rows += [row._replace(depth=depth) for row in one_block]
    rows += _mobile_one("final_conv", "expand", form, scale=True)
    rows += _squeeze_excite("final_conv.se", "expand/se")
    if vision.head_features:
        rows += [Row("head.fc.weight", "params/head/kernel", LINEAR)]
        rows += [Row("head.fc.bias", "params/head/bias")] if vision.head_bias else []
    return [row._replace(torch=prefix + row.torch, path=row.path and _under_vision(row.path)) for row in rows]


def _under_vision(path: str) -> str:
    collection, rest = path.split("/", 1)
    return f"{collection}/vision/{rest}"


def _mobile_one(torch: str, path: str, form: str, scale: bool = False, skip: bool = False) -> list[Row]:
    if form == "folded":
        return _conv(f"{torch}.reparam_conv", f"{path}/folded")
    rows = _conv_bn(f"{torch}.conv_kxk.0", f"{path}/conv")
    rows += _conv_bn(f"{torch}.conv_scale", f"{path}/scale") if scale else []
    return rows + (_batch_norm(f"{torch}.identity", f"{path}/skip") if skip else [])


def _patch_embed(torch: str, path: str, form: str, squeeze_excite: bool) -> list[Row]:
    if form == "folded":
        rows = _conv(f"{torch}.0.reparam_conv", f"{path}/folded")
    else:
        rows = _conv_bn(f"{torch}.0.large_conv", f"{path}/large") + _conv_bn(f"{torch}.0.small_conv", f"{path}/small")
    rows += _squeeze_excite(f"{torch}.0.se", f"{path}/se") if squeeze_excite else []
    return rows + _mobile_one(f"{torch}.1", f"{path}/pointwise", form, skip=True)


def _squeeze_excite(torch: str, path: str) -> list[Row]:
    return _dense(f"{torch}.fc1", f"{path}/fc1") + _dense(f"{torch}.fc2", f"{path}/fc2")


def _rep_mixer_block(torch: str, path: str, form: str) -> list[Row]:
    if form == "folded":
        rows = _conv(f"{torch}.token_mixer.reparam_conv", f"{path}/mixer/folded")
    else:
        rows = _mobile_one(f"{torch}.token_mixer.mixer", f"{path}/mixer/mixer", form, scale=True, skip=True)
        rows += _batch_norm(f"{torch}.token_mixer.norm.identity", f"{path}/mixer/norm")
        rows += [Row(f"{torch}.token_mixer.layer_scale.gamma", f"params/{path}/mixer/layer_scale", CHANNELS)]
    return rows + _ffn(torch, path) + [Row(f"{torch}.layer_scale.gamma", f"params/{path}/layer_scale_ffn", CHANNELS)]


def _attention_block(torch: str, path: str, norm: str) -> list[Row]:
    norm_rows = _batch_norm(f"{torch}.norm", f"{path}/norm")
    return [
        *(norm_rows if norm == "batch" else norm_rows[:2]),  # LayerNorm has a weight and a bias only
        Row(f"{torch}.token_mixer.qkv.weight", f"params/{path}/mixer/qkv/kernel", LINEAR),
        Row(f"{torch}.token_mixer.proj.weight", f"params/{path}/mixer/proj/kernel", LINEAR),
        Row(f"{torch}.token_mixer.proj.bias", f"params/{path}/mixer/proj/bias"),
        Row(f"{torch}.layer_scale_1.gamma", f"params/{path}/layer_scale_mixer", CHANNELS),
        Row(f"{torch}.layer_scale_2.gamma", f"params/{path}/layer_scale_ffn", CHANNELS),
        *_ffn(torch, path),
    ]


def _ffn(torch: str, path: str) -> list[Row]:
    rows = _conv_bn(f"{torch}.mlp.conv", f"{path}/ffn/conv")
    return rows + _dense(f"{torch}.mlp.fc1", f"{path}/ffn/fc1") + _dense(f"{torch}.mlp.fc2", f"{path}/ffn/fc2")


def _conv_bn(torch: str, path: str) -> list[Row]:
    return [Row(f"{torch}.conv.weight", f"params/{path}/kernel", CONV), *_batch_norm(f"{torch}.bn", f"{path}/bn")]


def _conv(torch: str, path: str) -> list[Row]:
    return [Row(f"{torch}.weight", f"params/{path}/kernel", CONV), Row(f"{torch}.bias", f"params/{path}/bias")]


def _dense(torch: str, path: str) -> list[Row]:
    return [Row(f"{torch}.weight", f"params/{path}/kernel", POINTWISE), Row(f"{torch}.bias", f"params/{path}/bias")]


def _batch_norm(torch: str, path: str) -> list[Row]:
    return [
        Row(f"{torch}.weight", f"params/{path}/scale"),
        Row(f"{torch}.bias", f"params/{path}/bias"),
        Row(f"{torch}.running_mean", f"batch_stats/{path}/mean"),
        Row(f"{torch}.running_var", f"batch_stats/{path}/var"),
        Row(f"{torch}.num_batches_tracked", None),
    ]
