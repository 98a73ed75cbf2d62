"""Tokenizers that would take for ever, or make texts without end, are refused in one line; published ones are not."""

import base64
import json
import time

import pytest

from fastvlm_jax.text.tokenizer import load_tokenizer
from fastvlm_jax.text.tokenizer_config import QWEN2_WORDS
from fastvlm_jax.text.tokenizer_json import REGEXES

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+"
)
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


def split(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def changed(json_file, folder, **parts):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(json_file.read_text()), **parts}))
    return path


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"pre_tokenizer": split("(a+)+$")}, r"the regular expression '\(a\+\)\+\$' is not that of a published tok"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split("(.*)*x")]}}, "the regular expression"),
        (
            {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a|aa)+$"}, "content": ""}},
            "the regular expression",
        ),
        ({"decoder": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}}, "the regular expression"),
        ({"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 40}}, "replaces 1 characters by 2"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "a"}}, "replaces 0 characters by 1"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 17}}, "puts more than 16 characters before a text"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 300}}, "more than 64 steps"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "compiled replacements"),
        (
            {"model": {"type": "BPE", "vocab": {"a": 10**9}, "merges": []}},
            "a token has the id 1000000000",
        ),
        ({"added_tokens": [{"id": 2**31, "content": "x", "special": True}]}, "a token has the id 2147483648"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}, "is not a tokenizer.json"),
    ],
)
def test_hostile_tokenizer_is_refused_in_a_line(json_file, tmp_path, parts, words):
    path = changed(json_file, tmp_path, **parts)
    with pytest.raises(ValueError, match=words) as refused:
        load_tokenizer(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_published_regular_expressions_are_read(json_file, tmp_path):
    for regex in (QWEN2_WORDS, LLAMA_3):
        assert load_tokenizer(changed(json_file, tmp_path, pre_tokenizer=split(regex))).encode("12345")
    assert {QWEN2_WORDS, LLAMA_3} < REGEXES


def test_long_texts_of_any_kind_are_split_by_the_published_ones(json_file, tmp_path):
    for regex in REGEXES:
        tokenizer = load_tokenizer(changed(json_file, tmp_path, pre_tokenizer=split(regex)))
        begin = time.process_time()
        for text in ("a" * 20_000, " " * 20_000 + "x", "\n" * 20_000, "1" * 20_000, "!" * 20_000, "' s" * 7_000):
            tokenizer.encode(text)
        assert time.process_time() - begin < 10, regex


def test_panic_of_the_library_is_one_line(json_file, tmp_path, monkeypatch):
    monkeypatch.setattr("fastvlm_jax.text.tokenizer_json.REGEXES", {"(a|aa)+$"})
    tokenizer = load_tokenizer(changed(json_file, tmp_path, pre_tokenizer=split("(a|aa)+$")))
    with pytest.raises(ValueError, match=r"tokenizer.json cannot split a text of 61 characters: .*retry-limit"):
        tokenizer.encode("a" * 60 + "!")


def test_tiktoken_of_many_long_tokens_is_refused(tmp_path):
    lines = [b"%s %d" % (base64.b64encode(bytes([i])), i) for i in range(256)]
    lines += [b"%s %d" % (base64.b64encode(b"ab" * 500 + b"%d" % i), i) for i in range(256, 500)]
    (tmp_path / "qwen.tiktoken").write_bytes(b"\n".join(lines))
    begin = time.process_time()
    with pytest.raises(ValueError, match=r"qwen\.tiktoken has a token of more than 1024 bytes, or too many long ones"):
        load_tokenizer(tmp_path / "qwen.tiktoken")
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    ("vocab", "merges", "words"),
    [
        ({"a": "x"}, "", r"vocab\.json and merges\.txt cannot be read: the token 'a' has no id"),
        ({"a": True}, "", r"vocab\.json and merges\.txt cannot be read: the token 'a' has no id"),
        ({"a": 0, "b": 1}, "#version: 0.2\na\n", r"merges\.txt line 2 is not a pair of tokens"),
        ({"a": 0, "b": 1}, "a b c\n", r"merges\.txt line 1 is not a pair of tokens"),
    ],
)
def test_damaged_vocabulary_is_named(tmp_path, vocab, merges, words):
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(ValueError, match=words):
        load_tokenizer(tmp_path)
