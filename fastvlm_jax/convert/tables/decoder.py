"""Maps a decoder to the tensor names of Qwen2 and Llama language models in transformers.

A plain `Qwen2ForCausalLM` or `LlamaForCausalLM`, transformers' FastVLM and ml-fastvlm's layout use the same names; only
the prefix before `layers.0` differs.
"""

from fastvlm_jax.convert.mapping import LINEAR, SAME, Row
from fastvlm_jax.models.decoder import Decoder

FIRST_NORM = "layers.0.input_layernorm.weight"  # a tensor of every language model, without its prefix
MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def decoder_rows(llm: Decoder, prefix: str, path: str = "params/llm") -> list[Row]:
    """Returns the rows of a language model; the head has its own row only if it is not tied to the embedding.

    Args:
      llm: the decoder, for its sizes.
      prefix: what precedes `layers.0`: "model." in a plain model and in ml-fastvlm, "model.language_model." in
        transformers' FastVLM. `lm_head.weight` never has a prefix.
      path: '/'-joined path of the decoder in the variables.
    """
    layer, layers, depth = f"{prefix}layers.{{i}}", f"{path}/layers", llm.num_layers
    rows = [
        Row(f"{prefix}embed_tokens.weight", f"{path}/embedding"),
        Row(f"{prefix}norm.weight", f"{path}/final_norm/scale"),
        Row(f"{layer}.input_layernorm.weight", f"{layers}/attention_norm/scale", SAME, depth),
        Row(f"{layer}.post_attention_layernorm.weight", f"{layers}/mlp_norm/scale", SAME, depth),
        *(Row(f"{layer}.self_attn.{x}_proj.weight", f"{layers}/{x}/kernel", LINEAR, depth) for x in "qkvo"),
        *(Row(f"{layer}.self_attn.{x}_proj.bias", f"{layers}/{x}/bias", SAME, depth) for x in "qkv" if llm.qkv_bias),
        *(Row(f"{layer}.mlp.{torch}.weight", f"{layers}/{x}/kernel", LINEAR, depth) for x, torch in MLP.items()),
    ]
    return rows if llm.tie_embeddings else [*rows, Row("lm_head.weight", f"{path}/lm_head/kernel", LINEAR)]
