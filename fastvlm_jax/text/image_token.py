"""Gives a tokenizer the token `<image>`, which transformers requires, without a change of the model's distribution.

A row that is added to a model's vocabulary takes probability from all others, in sampling and in the loss: its logit is
the product of the last hidden state with the row, and no row has a low product with every state. So `<image>` takes an
id that the model already has:

    vocabulary        model's rows   <image>
    Qwen2, 151,646    151,936        151,646   a row of the padded table
    Llama, 32,000     32,000         0         `<unk>` renamed: bytes spell every text, so that none becomes <unk>
    SmolLM2, 49,152   49,152         3         `<repo_name>` renamed, a reserved token
    Qwen2, 151,646    151,646        151,643   `<|endoftext|>` renamed, where nothing else is left
"""

import json
from collections.abc import Collection

import tokenizers

IMAGE = "<image>"


def place_image(model: tokenizers.Tokenizer, rows: int, used: Collection[str], last: str) -> tokenizers.Tokenizer:
    """Returns a copy of `model` in which `<image>` is a special token with an id below `rows`.

    Args:
      model: tokenizer of the library; its `<image>`, if any, may lie behind the model's vocabulary.
      rows: size of the model's vocabulary.
      used: special tokens that templates write.
      last: special token to rename if all others are in use.

    Raises:
      ValueError: every id below `rows` is in use.
    """
    content = json.loads(model.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != IMAGE]
    bare = tokenizers.Tokenizer.from_str(json.dumps(content))
    ids = bare.get_vocab()
    if max(ids.values(), default=-1) + 1 < rows:
        bare.add_special_tokens([tokenizers.AddedToken(IMAGE, normalized=False)])
        return bare
    special = {token.content: i for i, token in bare.get_added_tokens_decoder().items() if token.special and i < rows}
    unknown = content["model"].get("unk_token")
    free = [name for name in sorted(special, key=special.get) if name not in used and name != last]
    spare = unknown if unknown in free else next(iter(free), last if last in special else None)
    if spare is None:
        raise ValueError(f"no token of the vocabulary can stand for {IMAGE}: all {rows} ids are in use")
    for token in content["added_tokens"]:
        token["content"] = IMAGE if token["content"] == spare else token["content"]
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {IMAGE if name == spare else name: at for name, at in vocab.items()}
    content["model"]["unk_token"] = IMAGE if unknown == spare else unknown
    return tokenizers.Tokenizer.from_str(json.dumps(content))
