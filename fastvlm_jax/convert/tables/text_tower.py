"""Maps a CLIP's text tower, and the factor and bias of its logits, to open_clip's names."""

from fastvlm_jax.convert.mapping import LINEAR, Row
from fastvlm_jax.models.text_tower import TextTower

PREFIX = "text."
LOGITS = ("logit_scale", "logit_bias")


def tower_rows(tower: TextTower, prefix: str = PREFIX) -> list[Row]:
    """Returns the rows of a text tower.

    Args:
      tower: the tower, for its sizes.
      prefix: what precedes every tensor name; "" in files of one module, which older versions of open_clip wrote.
    """
    block = "transformer.resblocks.{i}"
    layer = [
        *_pair(f"{block}.ln_1", "attention_norm", "scale"),
        Row(f"{block}.attn.in_proj_weight", "qkv/kernel", LINEAR),
        Row(f"{block}.attn.in_proj_bias", "qkv/bias"),
        *_pair(f"{block}.attn.out_proj", "o", "kernel"),
        *_pair(f"{block}.ln_2", "mlp_norm", "scale"),
        *_pair(f"{block}.mlp.c_fc", "fc1", "kernel"),
        *_pair(f"{block}.mlp.c_proj", "fc2", "kernel"),
    ]
    rows = [
        Row("token_embedding.weight", "embedding"),
        Row("positional_embedding", "positions"),
        *(row._replace(path=f"layers/{row.path}", depth=tower.num_layers) for row in layer),
        *_pair("ln_final", "final_norm", "scale"),
        Row("text_projection", "projection"),
    ]
    return [row._replace(torch=prefix + row.torch, path=f"params/text/{row.path}") for row in rows]


def logit_rows(sigmoid: bool) -> list[Row]:
    """Returns the rows of the factor of the logits and, for a sigmoid loss, of their bias."""
    return [Row(name, f"params/{name}") for name in (LOGITS if sigmoid else LOGITS[:1])]


def _pair(torch: str, path: str, weight: str) -> list[Row]:
    transform = {"transform": LINEAR} if weight == "kernel" else {}
    return [Row(f"{torch}.weight", f"{path}/{weight}", **transform), Row(f"{torch}.bias", f"{path}/bias")]
