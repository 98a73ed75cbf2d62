import base64
import itertools
import json

import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizer_files import LINES, train_like_llama

from fastvlm_jax.text.bpe import bpe_tokenizer
from fastvlm_jax.text.tokenizer import load_tokenizer, train_sentencepiece

TEXTS = [
    "is it red?",
    "<|im_end|> <image> <|endoftext|> <unk> <0x0A>",
    "two  spaces\n\n and\ttabs \r\n",
    " leading and trailing ",
    "ünïcode 😀👩‍👩‍👧 日本語 ▁underline▁ \u2028",
    "cafe\u0301",
    "\x00nul",
    "",
    "\n",
]


@pytest.fixture(params=["sentencepiece_file", "json_file"])
def tokenizer(request):
    return load_tokenizer(request.getfixturevalue(request.param))


@pytest.mark.parametrize("text", TEXTS)
def test_decode_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_text_never_yields_special_ids(tokenizer, text):
    special = {tokenizer.special_id(name) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")}
    assert len(special) == 4
    assert not special & set(tokenizer.encode(text))


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_are_characters_and_cover_the_text(tokenizer, text):
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text) and len(ids) == len(offsets)
    covered = {i for start, end in offsets for i in range(start, end)}
    assert covered == set(range(len(text)))
    assert offsets == sorted(offsets)


def test_half_a_surrogate_pair_is_a_value_error(tokenizer):
    for encode in (tokenizer.encode, tokenizer.encode_with_offsets):
        with pytest.raises(ValueError, match="surrogates not allowed"):
            encode("red \ud83d")


def test_offsets_hold_the_space_whatever_the_file_says(json_file, tmp_path):
    model = tokenizers.Tokenizer.from_file(str(json_file))
    model.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)  # as in GPT-2's files
    model.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode_with_offsets("is red")[1] == [(0, 2), (2, 6)]


def test_offsets_after_wide_characters(sentencepiece_file):
    ids, offsets = load_tokenizer(sentencepiece_file).encode_with_offsets("é😀▁ red")
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    pieces = "<0xC3> <0xA9> <0xF0> <0x9F> <0x98> <0x80> <0xE2> <0x96> <0x81> ▁red"
    assert " ".join(model.id_to_piece(ids)) == pieces
    # Each byte's span lies inside its character; SentencePiece gives the whole character to its last byte.
    assert offsets == [(0, 0), (0, 1), (1, 1), (1, 1), (1, 1), (1, 2), (2, 3), (2, 3), (2, 3), (3, 7)]


def test_special_tokens_are_left_out_of_decoded_text(tokenizer):
    end, image = tokenizer.special_id("<|im_end|>"), tokenizer.special_id("<image>")
    assert tokenizer.decode([end, *tokenizer.encode("red"), image, end]) == "red"


def test_ids_of_a_padded_vocabulary_decode_to_nothing(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("red"), tokenizer.vocab_size + 7]) == "red"


def test_ids_are_below_vocab_size(tokenizer):
    assert 0 <= tokenizer.special_id("<image>") < tokenizer.vocab_size
    assert max(tokenizer.encode("日本 is it red?")) < tokenizer.vocab_size


def test_image_token_takes_the_next_free_id(json_file):
    without = tokenizers.Tokenizer.from_file(str(json_file)).get_vocab_size()
    assert load_tokenizer(json_file).special_id("<image>") == without


def test_training_gives_the_same_bytes_twice(tmp_path, sentencepiece_file):
    train_sentencepiece(LINES, tmp_path / "again.model", 400)
    assert (tmp_path / "again.model").read_bytes() == sentencepiece_file.read_bytes()


def test_a_word_has_the_same_tokens_at_the_start_of_a_text_and_behind_a_space_if_asked(tmp_path):
    for word_start in (True, False):
        train_sentencepiece(["cat", "a cat", "cat on a mat"] * 9, tmp_path / "t.model", 300, word_start=word_start)
        tokenizer = load_tokenizer(tmp_path / "t.model")
        alone, behind = tokenizer.encode("cat"), tokenizer.encode("a cat")
        assert (alone == behind[1:]) == word_start
        assert [tokenizer.decode(tokenizer.encode(text)) for text in ("cat", "a cat")] == ["cat", "a cat"]


def test_vocabulary_that_cannot_be_filled_shrinks(tmp_path):
    train_sentencepiece(["ab ab"], tmp_path / "tokenizer.model", 5000)
    tokenizer = load_tokenizer(tmp_path)
    assert 256 < tokenizer.vocab_size < 300
    assert tokenizer.decode(tokenizer.encode("xyz ab")) == "xyz ab"


def test_vocabulary_of_the_least_size_is_trained(tmp_path):
    train_sentencepiece(["ab"], tmp_path / "tokenizer.model", 263)
    assert load_tokenizer(tmp_path).vocab_size == 263


@pytest.mark.parametrize(
    "lines, size, words", [(["ab"], 262, "at least 263"), ([], 400, "no text"), (["\n"], 400, "no")]
)
def test_untrainable_is_refused(tmp_path, lines, size, words):
    with pytest.raises(ValueError, match=words):
        train_sentencepiece(lines, tmp_path / "tokenizer.model", size)
    assert not list(tmp_path.iterdir())


def test_folder_and_file_load_the_same(sentencepiece_file, tmp_path):
    tokenizer = load_tokenizer(sentencepiece_file.parent)
    assert tokenizer.files == (sentencepiece_file,)
    assert load_tokenizer(sentencepiece_file).encode("is it red?") == tokenizer.encode("is it red?")


@pytest.mark.parametrize("kind", ["sentencepiece_file", "json_file", "llama_file"])
def test_saved_and_loaded_is_the_same_tokenizer(request, kind, tmp_path):
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    again.save(tmp_path)  # overwrites its own files
    for name in ("vocab_size", "bos", "end", "pad", "image", "image_id"):
        assert getattr(load_tokenizer(tmp_path), name) == getattr(again, name) == getattr(tokenizer, name)
    for text in TEXTS:
        assert again.encode_with_offsets(text) == tokenizer.encode_with_offsets(text)
    from_json = load_tokenizer(tmp_path / "tokenizer.json")
    assert [from_json.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert (from_json.bos, from_json.end, from_json.image_id) == (tokenizer.bos, tokenizer.end, tokenizer.image_id)


@pytest.mark.parametrize("kind", ["sentencepiece_file", "json_file", "llama_file"])
def test_transformers_reads_the_same_ids_from_a_saved_folder(request, kind, tmp_path):
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, use_fast=False)
    marked = ("<|im_end|>", "</s>")
    texts = [text for text in TEXTS if not any(mark in text for mark in marked)]
    assert len(texts) == len(TEXTS) - 1
    assert theirs(texts, add_special_tokens=False)["input_ids"] == [tokenizer.encode(text) for text in texts]
    ids = theirs(f"red{tokenizer.end}{tokenizer.image}no")["input_ids"]
    end, image = tokenizer.special_id(tokenizer.end), tokenizer.image_id
    first = [] if tokenizer.bos is None else [tokenizer.bos]
    assert ids == [*first, *tokenizer.encode("red"), end, image, *tokenizer.encode("no")]
    assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    assert (theirs.eos_token_id, theirs.bos_token_id) == (end, tokenizer.bos)


def test_marks_of_each_kind(sentencepiece_file, json_file, llama_file):
    ours, qwen, llama = map(load_tokenizer, (sentencepiece_file, json_file, llama_file))
    assert (ours.bos, ours.end, ours.image, ours.image_id, ours.pad) == (
        None,
        "<|im_end|>",
        "<image>",
        4,
        "<|endoftext|>",
    )
    assert (qwen.bos, qwen.end, qwen.image, qwen.image_id) == (None, "<|im_end|>", "<image>", 285)
    assert (llama.bos, llama.end, llama.image, llama.image_id, llama.pad) == (1, "</s>", "<unk>", 0, "<unk>")
    assert [llama.special_id(name) for name in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    with pytest.raises(ValueError, match="no special token <image>"):
        llama.special_id("<image>")


@pytest.mark.parametrize("text", [*TEXTS, "▁", "▁▁ ▁red", " red", "</s>red<s>"])
def test_a_published_model_gives_the_ids_of_plain_sentencepiece(llama_file, text):
    tokenizer = load_tokenizer(llama_file)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(llama_file))
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert tokenizer.encode(text) == ids == plain.encode(text)
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == text.replace("▁", " ")  # without the space in front
    assert {i for start, end in offsets for i in range(start, end)} == set(range(len(text)))
    assert offsets == sorted(offsets)


def test_offsets_leave_out_the_space_in_front(llama_file):
    ids, offsets = load_tokenizer(llama_file).encode_with_offsets("red  é red")
    plain = sentencepiece.SentencePieceProcessor(model_file=str(llama_file))
    assert " ".join(plain.id_to_piece(ids)) == "▁red ▁ ▁ <0xC3> <0xA9> ▁red"
    assert offsets == [(0, 3), (3, 4), (4, 5), (5, 5), (5, 6), (6, 10)]


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(model_type="unigram", vocab_size=290), "must be a BPE model without text normalisation"),
        (dict(normalization_rule_name="nmt_nfkc"), "must be a BPE model without text normalisation"),
        (dict(remove_extra_whitespaces=True), "must be a BPE model without text normalisation"),
        (dict(byte_fallback=False, vocab_size=60), "no byte fallback for unknown characters"),
        (dict(user_defined_symbols=["<tile>"]), "user-defined pieces"),
        (dict(eos_id=-1), "no special token that ends a turn"),
    ],
)
def test_other_sentencepiece_models_are_refused(tmp_path, options, words):
    train_like_llama(tmp_path / "tokenizer.model", **options)
    with pytest.raises(ValueError, match=rf"tokenizer\.model .*{words}"):
        load_tokenizer(tmp_path)


def test_tokens_added_to_a_sentencepiece_model_are_kept(llama_file, tmp_path):
    """As in llava-1.5-7b-hf, where only tokenizer.json has <image>."""
    load_tokenizer(llama_file).save(tmp_path)
    model = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    free = model.get_vocab_size()
    model.add_special_tokens(["<image>"])
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.special_id("<image>"), tokenizer.image_id, tokenizer.bos) == (free, free, 1)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    assert load_tokenizer(tmp_path).bos is None


def smollm():
    """Returns a tokenizer of SmolLM2's layout, with the special tokens inside the vocabulary."""
    names = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        "ab",
    ]
    return bpe_tokenizer(
        {name: i for i, name in enumerate(names)},
        [("a", "b")],
        {name: i for i, name in enumerate(names[:3])},
        "smollm",
        "x.gguf",
    )


def test_special_tokens_inside_the_vocabulary_keep_it_as_long_as_it_is():
    tokenizer = smollm()
    assert (tokenizer.vocab_size, tokenizer.end, tokenizer.pad) == (260, "<|im_end|>", "<|endoftext|>")
    assert (tokenizer.image, tokenizer.image_id) == ("<|endoftext|>", 0)
    assert tokenizer.encode("ab")[0] == 259
    assert tokenizer.decode([1, 259, 2]) == "ab"


@pytest.mark.parametrize("kind", ["sentencepiece_file", "json_file", "llama_file", "smollm"])
def test_an_image_token_is_added_on_demand(request, kind, tmp_path):
    tokenizer = smollm() if kind == "smollm" else load_tokenizer(request.getfixturevalue(kind))
    size = tokenizer.vocab_size
    added = tokenizer.with_image(size + 1)
    at = tokenizer.image_id if tokenizer.image == "<image>" else size
    assert (added.image, added.image_id, added.special_id("<image>")) == ("<image>", at, at)
    assert (tokenizer.vocab_size, added.vocab_size) == (size, max(size, at + 1))
    for name in ("bos", "end", "pad"):
        assert getattr(added, name) == getattr(tokenizer, name)
    assert [added.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    added.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.image_id, again.vocab_size, again.bos, again.end) == (at, added.vocab_size, added.bos, added.end)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, use_fast=False)
    assert theirs("<image>", add_special_tokens=False)["input_ids"] == [at]


# All bytes, then "re", "red", " red", "12" and "é".
BYTES = [bytes([i]) for i in range(256)]
RANKS = [*BYTES, b"re", b"red", b" red", b"12", "é".encode()]


def tiktoken_file(path, ranks=RANKS):
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ranks)))
    return path


def test_tiktoken_ranks_with_qwens_special_tokens(tmp_path):
    tokenizer = load_tokenizer(tiktoken_file(tmp_path / "qwen.tiktoken"))
    # Each digit is a word of its own, and NFC joins e and its accent.
    assert tokenizer.encode("a red 12e\u0301\n") == [97, 258, 32, 49, 50, 260, 10]
    assert [tokenizer.special_id(f"<{name}>") for name in ("|endoftext|", "|im_start|", "|im_end|", "image")] == [
        261,
        262,
        263,
        264,
    ]
    assert (tokenizer.vocab_size, tokenizer.image_id, tokenizer.bos) == (265, 264, None)
    tokenizer.save(tmp_path)
    for name in ("tokenizer.json", "vocab.json"):
        assert load_tokenizer(tmp_path / name).encode(" red<image>") == tokenizer.encode(" red<image>")


@pytest.mark.parametrize(
    "data, words",
    [
        (b"AA== 0\n!!! 1\n", "line 2 is not a base64 token and its rank"),
        (b"AA== zero\n", "line 1 is not a base64 token"),
        (b"AA== 0\n\nAQ== 1", "line 2 is not"),
        (b"", "the ranks are not 0, 1, 2"),
        (
            b"".join(base64.b64encode(b) + b" %d\n" % i for i, b in enumerate([*BYTES, b"a" * 1025])),
            "more than 1024 bytes",
        ),
        (b"".join(base64.b64encode(b) + b" 7\n" for b in BYTES), "the ranks are not 0, 1, 2"),
        (
            b"".join(base64.b64encode(b) + b" %d\n" % i for i, b in enumerate([*BYTES, b"red"])),
            "no two tokens of lower",
        ),
    ],
)
def test_bad_ranks_are_named(tmp_path, data, words):
    (tmp_path / "qwen.tiktoken").write_bytes(data)
    with pytest.raises(ValueError, match=rf"qwen\.tiktoken.*{words}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "kind, words",
    [
        ("qwen2", ["it", "'S", " red", " ", "1", "2", ",", " x", "\n"]),
        ("smollm", ["it", "'", "S", " red", " ", "1", "2", ",", " x", "\n"]),
        ("gpt2", ["it", "'", "S", " red", " 12", ",", " x", "\n"]),
    ],
)
def test_words_of_each_kind_of_bpe(kind, words):
    spelling = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens = [spelling.pre_tokenize_str(word)[0][0] for word in words]
    # Merges that make each of these words one token, after merges that would join a word with its neighbour.
    inside = {pair for token in tokens for pair in itertools.pairwise(token)}
    across = [(left[-1], right[0]) for left, right in itertools.pairwise(tokens)]
    merges = [pair for pair in dict.fromkeys(across) if pair not in inside]
    assert len(merges) >= 6
    merges += dict.fromkeys((token[:cut], token[cut]) for token in tokens for cut in range(1, len(token)))
    vocab = {char: i for i, char in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    special = {"<|im_end|>": len(vocab)}
    tokenizer = bpe_tokenizer(vocab, merges, special, kind, "file.gguf")
    assert tokenizer.encode("it'S red 12, x\n") == [vocab[token] for token in tokens]


@pytest.mark.parametrize(
    "merges, special, kind, words",
    [
        ([], {"<|im_end|>": 2}, "bert", "file.gguf: unknown kind of BPE tokenizer 'bert': choose one of qwen2"),
        ([], {"<|im_end|>": 5}, "qwen2", "file.gguf: the special token <|im_end|> has id 5, it must be 2"),
        ([], {"a": 1}, "qwen2", "file.gguf: the special token a has id 1, it must be 0"),
        ([("a", "c")], {"<|im_end|>": 2}, "qwen2", "file.gguf: vocabulary and merges do not fit"),
        ([], {"<tile>": 2}, "qwen2", "file.gguf has no special token that ends a turn"),
    ],
)
def test_tables_that_do_not_fit_are_refused(merges, special, kind, words):
    with pytest.raises(ValueError) as caught:
        bpe_tokenizer({"a": 0, "b": 1}, merges, special, kind, "file.gguf")
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def vocab_folder(tmp_path):
    """A folder as published beside old Qwen2 checkpoints: vocab.json and merges.txt."""
    folder = tmp_path / "vocab"
    folder.mkdir()
    load_tokenizer(tiktoken_file(tmp_path / "qwen.tiktoken")).save(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


def test_vocab_and_merges_with_and_without_their_added_tokens(vocab_folder):
    assert load_tokenizer(vocab_folder).encode("a red") == [97, 258]
    assert load_tokenizer(vocab_folder).special_id("<|im_end|>") == 263
    added = {"<|im_end|>": 261, "<tool>": 262}
    (vocab_folder / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = load_tokenizer(vocab_folder)
    assert [tokenizer.special_id(name) for name in ("<|im_end|>", "<tool>", "<image>")] == [261, 262, 263]
    decoder = {"261": {"content": "<|im_end|>", "special": True}, "262": {"content": "<tool>", "special": False}}
    config = {"added_tokens_decoder": decoder, "bos_token": {"content": "<|im_end|>"}, "add_bos_token": True}
    (vocab_folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(vocab_folder)
    assert tokenizer.encode("<tool><|im_end|>")[0] == 262 and 261 not in tokenizer.encode("<tool><|im_end|>")
    assert tokenizer.bos == 261
    for name, words in (("Qwen2TokenizerFast", [97, 32, 49, 50]), ("GPT2Tokenizer", [97, 32, 259])):
        (vocab_folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        assert load_tokenizer(vocab_folder).encode("a 12") == words


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("vocab.json", "{", r"vocab\.json and merges\.txt cannot be read"),
        ("merges.txt", "#version: 0.2\na b c\n", r"vocab\.json and merges\.txt cannot be read"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json holds no JSON object"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is not readable JSON"),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "BertTokenizer"}',
            "a vocab.json of tokenizer_class BertTokenizer is not",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "added tokens are not names with their ids"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"261": {}}}', "added tokens .* one has no content"),
        ("vocab.json", '{"a": 0, "b": 7}', r"the ids of the vocabulary are not 0, 1, 2"),
        ("added_tokens.json", '{"<|im_end|>": 300}', "the special token <.im_end.> has id 300, it must be 261"),
    ],
)
def test_bad_tables_are_named(vocab_folder, name, text, words):
    (vocab_folder / name).write_text(text)
    if name == "vocab.json":
        (vocab_folder / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=words) as caught:
        load_tokenizer(vocab_folder)
    assert "\n" not in str(caught.value)


def test_vocab_without_merges_is_named(vocab_folder):
    (vocab_folder / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"vocab\.json needs a merges\.txt beside it"):
        load_tokenizer(vocab_folder)


def test_unknown_special_token_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"tokenizer\.(json|model) has no special token <tile>"):
        tokenizer.special_id("<tile>")
    with pytest.raises(ValueError, match="no special token red"):
        tokenizer.special_id("red")


def test_missing_and_wrong_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*tokenizer\.json, tokenizer\.model, qwen"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*absent\.model"):
        load_tokenizer(tmp_path / "absent.model")
    for name in ("tokenizer.json", "bad.model"):
        (tmp_path / name).write_text("{not one}")
        with pytest.raises(ValueError, match=name) as caught:
            load_tokenizer(tmp_path / name)
        assert "\n" not in str(caught.value)
