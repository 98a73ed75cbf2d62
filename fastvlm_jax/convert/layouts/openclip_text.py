"""Translates a text tower to and from open_clip's `text_cfg`, and says which text towers are not computed here."""

from collections.abc import Mapping
from typing import Any

from fastvlm_jax.models.text_tower import TextTower

# open_clip's key -> (our argument, open_clip's default)
SIZES = {
    "width": ("width", 512),
    "heads": ("num_heads", 8),
    "layers": ("num_layers", 12),
    "vocab_size": ("vocab_size", 49_408),
    "context_length": ("context_length", 77),
}
# Keys of `text_cfg` that choose what a tower computes -> open_clip's default.
CHOICES = {
    "no_causal_mask": False, "mlp_ratio": 4.0, "ls_init_value": None, "embed_cls": False, "final_ln_after_pool": False,
    "pool_type": "argmax", "proj_type": "linear", "proj_bias": False, "act_kwargs": None, "norm_kwargs": None,
    "block_type": None, "qk_norm": False, "scaled_cosine_attn": False, "scale_heads": False, "scale_attn_inner": False,
    "scale_attn": False, "scale_fc": False, "use_pad_mask": False, "hf_model_name": None,
}  # fmt: skip
COMPUTED = {**CHOICES, "no_causal_mask": True}
# Keys that choose the tokens, or that only towers with other `CHOICES` use.
UNUSED = (
    "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type",
    "pad_id", "eos_id", "correct_cls_mask", "output_tokens",
)  # fmt: skip


def why_not(config: Mapping[str, Any]) -> str | None:
    """Returns what in an open_clip `model_cfg` keeps its text tower from being computed here; None if nothing does."""
    text = config.get("text_cfg")
    if not isinstance(text, dict):
        return "text_cfg is missing or not an object"
    for key in ("quick_gelu", "multimodal_cfg"):
        if config.get(key):
            return f"{key} is {config[key]!r}, which this package does not compute"
    for key, value in {**CHOICES, **text}.items():
        if key in SIZES or key in UNUSED or (key == "norm_kwargs" and _epsilon(value)):
            continue
        if key not in COMPUTED:
            return f"text_cfg.{key} is unknown to this package"
        wanted = COMPUTED[key]
        if value != wanted and (value or wanted):
            return f"text_cfg.{key} is {value!r}, this package computes {wanted!r} alone"
    return None


def read_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of TextTower of an open_clip `model_cfg` for which `why_not` has nothing to say."""
    text = config["text_cfg"]
    args = {ours: text.get(theirs, default) for theirs, (ours, default) in SIZES.items()}
    return {"features": config.get("embed_dim"), **args, **(_epsilon(text.get("norm_kwargs")) or {})}


def text_cfg(tower: TextTower) -> dict[str, Any]:
    """Returns open_clip's `text_cfg` of a tower."""
    sizes = {theirs: getattr(tower, ours) for theirs, (ours, _) in SIZES.items()}
    norm = {} if tower.epsilon == TextTower.epsilon else {"norm_kwargs": {"eps": tower.epsilon}}
    return {**sizes, "no_causal_mask": True, **norm}


def _epsilon(norm: Any) -> dict[str, float] | None:
    """Returns {"epsilon": its value} of `norm_kwargs` that hold nothing else; None for others."""
    if isinstance(norm, dict) and set(norm) == {"eps"} and isinstance(norm["eps"], float):
        return {"epsilon": norm["eps"]}
    return None
