import pytest
import sentencepiece
import tokenizers

from fastvlm_jax.data.tokenizer import load_tokenizer, train_sentencepiece

LINES = ["what color is it?", "is it red?", "red", "no", "user", "assistant"] * 20
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "is it red?",
    "<|im_end|> <image> <|endoftext|> <unk> <0x0A>",
    "two  spaces\n\n and\ttabs \r\n",
    " leading and trailing ",
    "ünïcode 😀👩‍👩‍👧 日本語 ▁underline▁ \u2028",
    "\x00nul",
    "",
    "\n",
]


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(LINES, path, 400)
    return path


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), "isolated")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [split, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    model.train_from_iterator(LINES, trainer)
    model.save(str(path))
    return path


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


def test_offsets_after_wide_characters(sentencepiece_file):
    ids, offsets = load_tokenizer(sentencepiece_file).encode_with_offsets("é😀▁ red")
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    pieces = "<0xC3> <0xA9> <0xF0> <0x9F> <0x98> <0x80> <0xE2> <0x96> <0x81> ▁red"
    assert " ".join(model.id_to_piece(ids)) == pieces
    # The bytes of a character: all inside it; SentencePiece gives the character to the last one.
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
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("is it red?") == tokenizer.encode("is it red?")
    load_tokenizer(tmp_path).save(tmp_path)  # onto itself


def test_unknown_special_token_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"tokenizer\.(json|model) has no special token <tile>"):
        tokenizer.special_id("<tile>")
    with pytest.raises(ValueError, match="no special token red"):
        tokenizer.special_id("red")


def test_missing_and_wrong_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*tokenizer\.json or a tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*absent\.model"):
        load_tokenizer(tmp_path / "absent.model")
    for name in ("tokenizer.json", "bad.model"):
        (tmp_path / name).write_text("{not one}")
        with pytest.raises(ValueError, match=name) as caught:
            load_tokenizer(tmp_path / name)
        assert "\n" not in str(caught.value)
