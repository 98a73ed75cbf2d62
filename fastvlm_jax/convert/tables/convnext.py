"""Maps a ConvNeXt to timm's names (`convnext_large`, `convnext_xxlarge`) and to open_clip's (image tower of a CLIP).

The two differ only after the feature map:

    ours              timm                 open_clip, MLP           open_clip, matrix
    unused/norm       head.norm            trunk.head.norm          trunk.head.norm
    unused/fc1        head.pre_logits.fc   head.mlp.fc1             head.proj
    unused/fc2        head.fc              head.mlp.fc2
"""

from fastvlm_jax.convert.mapping import CONV, LINEAR, Row
from fastvlm_jax.models.convnext import ConvNeXt


def tower_rows(vision: ConvNeXt, prefix: str = "") -> list[Row]:
    """Returns the rows of a timm model; they also fit an open_clip trunk if vision.projection is ().

    Args:
      vision: the tower, for its sizes.
      prefix: what precedes every tensor name in the checkpoint.

    Raises:
      ValueError: the projection has more than two layers.
    """
    names = _projection_names(vision, ("head.pre_logits.fc", "head.fc"), "head.fc")
    return _finish(_trunk(vision) + _projection(vision, names), prefix)


def openclip_rows(vision: ConvNeXt, prefix: str = "visual.") -> list[Row]:
    """Returns the rows of the image tower in an open_clip checkpoint: `trunk.*` as in timm, `head.*` as in open_clip.

    Args:
      vision: the tower, for its sizes.
      prefix: what precedes every tensor name in the checkpoint.

    Raises:
      ValueError: the projection has more than two layers.
    """
    names = _projection_names(vision, ("head.mlp.fc1", "head.mlp.fc2"), "head.proj")
    trunk = [row._replace(torch=f"trunk.{row.torch}") for row in _trunk(vision)]
    return _finish(trunk + _projection(vision, names), prefix)


def _trunk(vision: ConvNeXt) -> list[Row]:
    rows = _conv("stem.0", "stem") + _norm("stem.1", "stem_norm")
    for i, depth in enumerate(vision.layers):
        if i > 0:
            rows += _norm(f"stages.{i}.downsample.0", f"downsample_norm_{i}")
            rows += _conv(f"stages.{i}.downsample.1", f"downsample_{i}")
        block, path = f"stages.{i}.blocks.{{i}}", f"stage_{i}"
        one_block = [
            *_conv(f"{block}.conv_dw", path),
            *_norm(f"{block}.norm", f"{path}/norm"),
            *_dense(f"{block}.mlp.fc1", f"{path}/fc1"),
            *_dense(f"{block}.mlp.fc2", f"{path}/fc2"),
            Row(f"{block}.gamma", f"{path}/layer_scale"),
        ]
        rows += [row._replace(depth=depth) for row in one_block]
    return rows + _norm("head.norm", "unused/norm")


def _projection_names(vision: ConvNeXt, mlp: tuple[str, str], matrix: str) -> tuple[str, ...]:
    if len(vision.projection) > 2:
        raise ValueError(f"vision.projection={tuple(vision.projection)} must have two widths at most")
    return ((), (matrix,), mlp)[len(vision.projection)]


def _projection(vision: ConvNeXt, names: tuple[str, ...]) -> list[Row]:
    rows = [row for i, name in enumerate(names, start=1) for row in _dense(name, f"unused/fc{i}")]
    return rows if vision.projection_bias else rows[:-1]  # the last row is the last layer's bias


def _finish(rows: list[Row], prefix: str) -> list[Row]:
    return [row._replace(torch=prefix + row.torch, path=f"params/vision/{row.path}") for row in rows]


def _conv(torch: str, path: str) -> list[Row]:
    return [Row(f"{torch}.weight", f"{path}/kernel", CONV), Row(f"{torch}.bias", f"{path}/bias")]


def _norm(torch: str, path: str) -> list[Row]:
    return [Row(f"{torch}.weight", f"{path}/scale"), Row(f"{torch}.bias", f"{path}/bias")]


def _dense(torch: str, path: str) -> list[Row]:
    return [Row(f"{torch}.weight", f"{path}/kernel", LINEAR), Row(f"{torch}.bias", f"{path}/bias")]
