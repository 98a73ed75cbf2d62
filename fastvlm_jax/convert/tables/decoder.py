"""Qwen2 and Llama language models in transformers' names: tensors and the config.json that describes them.

The same names stand in a plain `Qwen2ForCausalLM` or `LlamaForCausalLM`, in FastVLM of transformers and in the layout
of ml-fastvlm; only what stands before `layers.0` differs.
"""

from fastvlm_jax.convert.mapping import LINEAR, SAME, Row
from fastvlm_jax.models.decoder import Decoder

MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def decoder_rows(llm: Decoder, prefix: str, path: str = "params/llm") -> list[Row]:
    """The tensors of a language model.

    Args:
      llm: gives the sizes; the head is a tensor of its own only where it is not tied to the embedding.
      prefix: what stands before `layers.0`: "model." in a plain model and in ml-fastvlm, "model.language_model." in
        FastVLM of transformers. `lm_head.weight` never has one.
      path: of the decoder in the variables.
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
