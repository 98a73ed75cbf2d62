"""A tiny teacher with random weights, for the pairs of small_pairs.write_pairs; no PyTorch."""

import pathlib

from random_model import random_variables
from small_pairs import TEXT, VISION

from fastvlm_jax import convert
from fastvlm_jax.pair_processor import PairProcessor
from fastvlm_jax.text.caption_tokenizer import load_caption_tokenizer


def write_teacher(folder: pathlib.Path, tokenizer: pathlib.Path, features: int = 12, size: int = 16) -> pathlib.Path:
    """Writes a CLIP of this project with the tokenizer in a folder, and returns its own."""
    captions = load_caption_tokenizer(tokenizer)
    vision = {**VISION, "form": "branched", "head_features": features}
    text = {**TEXT, "features": features, "vocab_size": captions.vocab_size}
    config = {"vision": vision, "text": text, "sigmoid": False, "dtype": "float32"}
    processor = PairProcessor(captions, TEXT["context_length"], size)
    convert.write(folder, "native", random_variables(config)[1], config, processor, {})
    return folder
