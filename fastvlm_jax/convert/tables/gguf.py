"""Maps a decoder to the tensor names of Llama and Qwen2 language models in GGUF, llama.cpp's file format."""

from fastvlm_jax.convert.mapping import LINEAR, SAME, Row
from fastvlm_jax.models.decoder import Decoder

ARCHITECTURES = {"llama": False, "qwen2": True}  # architecture -> whether q, k and v have biases
MLP = ("gate", "up", "down")


def gguf_rows(llm: Decoder, path: str = "params/llm") -> list[Row]:
    """Returns the rows of a language model; the head has its own row only if it is not tied to the embedding.

    The rows of a Llama's query and key matrices lie in another order in a file, see `permuted_heads`.

    Args:
      llm: the decoder, for its sizes.
      path: '/'-joined path of the decoder in the variables.
    """
    layers, depth = f"{path}/layers", llm.num_layers
    rows = [
        Row("token_embd.weight", f"{path}/embedding"),
        Row("output_norm.weight", f"{path}/final_norm/scale"),
        Row("blk.{i}.attn_norm.weight", f"{layers}/attention_norm/scale", SAME, depth),
        Row("blk.{i}.ffn_norm.weight", f"{layers}/mlp_norm/scale", SAME, depth),
        *(Row(f"blk.{{i}}.attn_{x}.weight", f"{layers}/{x}/kernel", LINEAR, depth) for x in "qkv"),
        *(Row(f"blk.{{i}}.attn_{x}.bias", f"{layers}/{x}/bias", SAME, depth) for x in "qkv" if llm.qkv_bias),
        Row("blk.{i}.attn_output.weight", f"{layers}/o/kernel", LINEAR, depth),
        *(Row(f"blk.{{i}}.ffn_{x}.weight", f"{layers}/{x}/kernel", LINEAR, depth) for x in MLP),
    ]
    return rows if llm.tie_embeddings else [*rows, Row("output.weight", f"{path}/lm_head/kernel", LINEAR)]


def permuted_heads(llm: Decoder) -> dict[str, int]:
    """Returns the name of each matrix whose rows a file holds in another order -> its number of heads.

    llama.cpp's rotary embedding pairs neighbouring rows of a Llama, ours and Qwen2's the two halves of a head: row
    (head, i, half) of the file is our row (head, half, i).
    """
    heads = {} if llm.qkv_bias else {"q": llm.num_heads, "k": llm.num_kv_heads}
    return {f"blk.{i}.attn_{x}.weight": count for i in range(llm.num_layers) for x, count in heads.items()}
