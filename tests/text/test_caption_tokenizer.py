"""Captions as tokens of a text tower: CLIP's as open_clip has them, and other tokenizers' with two more ids."""

import numpy as np
import pytest
import torch  # noqa: F401  open_clip's tokenizer needs it
from clip_vocabulary import open_clip_tokenizer

from fastvlm_jax.text.caption_tokenizer import OwnCaptionTokenizer, load_caption_tokenizer
from fastvlm_jax.text.clip_tokenizer import ClipTokenizer
from fastvlm_jax.text.tokenizer import load_tokenizer

TEXTS = ["a photo of a dog", "", "DON'T  stop &amp; go", "red " * 100]


@pytest.fixture(scope="module")
def theirs():
    return open_clip_tokenizer()


@pytest.fixture(scope="module")
def clip(theirs):
    return load_caption_tokenizer(theirs.default_bpe())


@pytest.mark.parametrize("length", [77, 9])
def test_clips_vocabulary_gives_open_clips_tokens(clip, theirs, length):
    assert clip.vocab_size == 49408
    tokens = clip(TEXTS, length)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, theirs.SimpleTokenizer()(TEXTS, length).numpy())


def test_saved_clip_tokenizer_is_loaded_from_its_folder_and_from_a_workdir(clip, tmp_path):
    clip.save(tmp_path / "processor")
    for path in (tmp_path / "processor", tmp_path, tmp_path / "processor" / "merges.txt"):
        again = load_caption_tokenizer(path)
        assert isinstance(again, ClipTokenizer)
        np.testing.assert_array_equal(again(TEXTS, 20), clip(TEXTS, 20))


def test_clips_merges_are_told_from_others_beside_a_vocabulary(clip, tmp_path, json_file):
    (tmp_path / "tokenizer.json").write_bytes(json_file.read_bytes())
    clip.save(tmp_path)
    assert isinstance(load_caption_tokenizer(tmp_path), ClipTokenizer)
    merges = (tmp_path / "merges.txt").read_text()
    for others in (merges + "a b\n", merges.replace("</w>", "")):
        (tmp_path / "merges.txt").write_text(others)
        assert isinstance(load_caption_tokenizer(tmp_path), OwnCaptionTokenizer)


@pytest.mark.parametrize("kind", ["json_file", "sentencepiece_file"])
def test_other_tokenizers_get_a_start_and_an_end_that_is_the_largest_id(request, tmp_path, kind):
    path = request.getfixturevalue(kind)
    own, captions = load_tokenizer(path), load_caption_tokenizer(path)
    start, end, pad = own.vocab_size, own.vocab_size + 1, own.special_id(own.pad)
    assert captions.vocab_size == own.vocab_size + 2
    ids = own.encode("is it red?")
    tokens = captions(["is it red?", "red" * 50, ""], len(ids) + 4)
    assert tokens.dtype == np.int32
    assert tokens[0].tolist() == [start, *ids, end, pad, pad]
    assert tokens[1].tolist() == [start, *own.encode("red" * 50)[: len(ids) + 2], end]
    assert tokens[2].tolist() == [start, end, *[pad] * (len(ids) + 2)]
    assert tokens.max() == end and (tokens == end).sum() == 3
    captions.save(tmp_path / "saved")
    np.testing.assert_array_equal(load_caption_tokenizer(tmp_path / "saved")(TEXTS, 12), captions(TEXTS, 12))


def test_what_is_no_vocabulary_is_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*; or bpe_simple_vocab_16e6.txt.gz or a merges.txt"):
        load_caption_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version\na b\n")
    with pytest.raises(ValueError, match=r"merges.txt is not CLIP's vocabulary: it needs 48894 lines"):
        load_caption_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    (tmp_path / "vocabulary.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"vocabulary.gz is not CLIP's vocabulary") as caught:
        load_caption_tokenizer(tmp_path / "vocabulary.gz")
    assert "\n" not in str(caught.value)
