"""`fastvlm data tokenizer`: a tokenizer of a data set's own texts, which training finds beside the shards."""

import pytest
import sentencepiece
from command import fastvlm
from small import ask

from fastvlm_jax.data.record import Record
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.text.tokenizer import load_tokenizer

TALK = (("Which fruit lies on the table?", "a banana"), ("Is it ripe?", "yes"))


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path / "mine", "train", [Record(str(i), (), ask(*TALK, images=0)) for i in range(20)])
    return tmp_path / "mine"


def test_it_lies_beside_the_shards_and_knows_their_words_and_those_of_templates(folder, monkeypatch, capsys):
    status, out, err = fastvlm(monkeypatch, capsys, "data", "tokenizer", f"--data={folder}")
    assert (status, out, err) == (0, f"wrote {folder / 'tokenizer.model'}\n", "")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert reference.vocab_size() <= 512
    # Without the data's words "banana" would be six letters.
    assert [len(reference.encode(text)) for text in ("user", "assistant", "a banana")] == [1, 1, 2]
    assert (
        reference.decode(reference.encode("Ärger  <image>\n漢")) == "Ärger  <image>\n漢"
    )  # as bytes, and nothing lost
    assert load_tokenizer(folder).vocab_size == reference.vocab_size()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--vocab_size=200"], "vocab_size 200 is too small for these texts: it needs at least 2"),
        (["--split=test"], "has no split 'test': it has train"),
        (["--data=/nowhere"], "there is no dataset folder /nowhere"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_one_line_and_writes_nothing(folder, monkeypatch, capsys, flags, message):
    status, out, err = fastvlm(monkeypatch, capsys, "data", "tokenizer", f"--data={folder}", *flags)
    assert (status, out) == (1, "") and message in err and err.count("\n") == 1
    assert not (folder / "tokenizer.model").exists()


def test_a_tokenizer_that_is_there_is_kept(folder, monkeypatch, capsys):
    (folder / "tokenizer.model").write_bytes(b"mine")
    status, _, err = fastvlm(monkeypatch, capsys, "data", "tokenizer", f"--data={folder}")
    assert status == 1 and "tokenizer.model is there already: delete it to train another" in err
    assert (folder / "tokenizer.model").read_bytes() == b"mine"
