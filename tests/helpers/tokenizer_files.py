"""Tokenizer files of each kind, trained on a few lines; conftest.py hands the fixtures to all tests."""

import io

import pytest
import sentencepiece
import tokenizers

from fastvlm_jax.text.tokenizer import train_sentencepiece

LINES = ["what color is it?", "is it red?", "red", "no", "user", "assistant"] * 20


QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(LINES, path, 400)
    return path


@pytest.fixture(scope="session")
def json_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_json(path)
    return path


def train_json(path):
    """A byte-level BPE tokenizer set up as Qwen2's."""
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), "isolated")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [split, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=297, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    model.train_from_iterator(LINES, trainer)
    model.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])  # behind the vocabulary, as Qwen2's
    model.save(str(path))


def train_like_llama(path, **options):
    """A SentencePiece model set up as Llama's: a space before each text, <unk> <s> </s> on 0 1 2."""
    model = io.BytesIO()
    settings = dict(
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*LINES, "USER: ASSISTANT:"] * 5), model_writer=model, **{**settings, **options}
    )
    path.write_bytes(model.getvalue())


@pytest.fixture(scope="session")
def llama_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_like_llama(path)
    return path
