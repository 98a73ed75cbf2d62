import collections
import json
import pathlib
import sys

import easy_vqa
import jax
import numpy as np
import PIL.Image
import pytest
from loading import config, segments_of, sharding, take

from fastvlm_jax.data.load.from_config import eval_batches, make_loader
from fastvlm_jax.data.sets.easy_vqa import caption, write_easy_vqa
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.tokenizer import load_tokenizer

SHAPES = {64: {"rows_per_group": 6, "row_length": 256}, 128: {"rows_per_group": 7, "row_length": 256}}
HELD_OUT = set(range(0, 4000, 20))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("easy") / "vqa"
    assert write_easy_vqa(folder) == {"train": 3800, "validation": 200, "test": 1000}
    return folder


def settings(folder, size, **changes):
    return config(folder, image_size=size, images_per_group=8, **SHAPES[size], **changes)


def processor(folder, size):
    return Processor(load_tokenizer(folder), "chatml", size, (size // 64) ** 2)


def test_records_hold_the_published_questions_and_bytes(folder):
    for split, published in (("train", "train"), ("validation", "train"), ("test", "test")):
        texts, answers, numbers = getattr(easy_vqa, f"get_{published}_questions")()
        paths = getattr(easy_vqa, f"get_{published}_image_paths")()
        source = read_shards(folder, split)
        found = collections.Counter()
        for i in range(len(source)):
            record = source[i]
            number = int(record.key.removeprefix(f"{published}/"))
            assert (number in HELD_OUT) == (split == "validation") or split == "test"
            assert record.images == (pathlib.Path(paths[number]).read_bytes(),)
            words = [[part for part in content if part != 0] for _, content in record.turns]
            assert record.turns[0][1][0] == 0 and all(len(part) == 1 for part in words)
            found.update((q, a, number) for (q,), (a,) in zip(words[::2], words[1::2], strict=True))
        wanted = zip(texts, answers, numbers, strict=True)
        assert found == collections.Counter(
            item for item in wanted if split == "test" or (item[2] in HELD_OUT) == (split == "validation")
        )


def test_writing_again_changes_nothing(folder):
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()}
    write_easy_vqa(folder)
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()} == before


def test_another_choice_of_images_in_the_same_folder_is_refused(folder):
    with pytest.raises(
        ValueError, match=r"already holds another dataset \(train: 3800 records\): choose another folder"
    ):
        write_easy_vqa(folder, validation_images=100)


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file: choose a folder"):
        write_easy_vqa(tmp_path / "file")


def test_every_word_of_the_questions_is_one_token(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 512
    assert len(tokenizer.encode("does the image not contain a rectangle?")) == 8
    assert len(tokenizer.encode("user\n")) == len(tokenizer.encode("assistant\n")) == 2


def test_a_missing_package_names_the_mend(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ValueError, match=r"easy-vqa is missing: pip install 'fastvlm_jax\[demo\]'"):
        write_easy_vqa(tmp_path)


def test_other_counts_than_the_published_fail_loudly(monkeypatch, tmp_path):
    texts, answers, numbers = easy_vqa.get_test_questions()
    monkeypatch.setattr(easy_vqa, "get_test_questions", lambda: (texts[1:], answers[1:], numbers[1:]))
    with pytest.raises(ValueError, match="easy-vqa's test split has 9672 questions on 1000 images, not 9673 on 1000"):
        write_easy_vqa(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_every_question_of_an_epoch_appears_once_beside_its_image(folder):
    texts, answers, numbers = easy_vqa.get_train_questions()
    paths, tokenizer = easy_vqa.get_train_image_paths(), load_tokenizer(folder)
    pixels = {np.asarray(PIL.Image.open(paths[i]).convert("RGB")).tobytes(): i for i in HELD_OUT}
    found = collections.Counter()
    for batch in map(
        jax.device_get, eval_batches(settings(folder, 64), processor(folder, 64), "validation", sharding=sharding(1))
    ):
        for group, row, at in segments_of(batch):
            slot = batch.image_index[group, row, at].max()
            supervised = at[batch.loss_mask[group, row, at]]
            text = tokenizer.decode(batch.tokens[group, row, at])
            answer = tokenizer.decode(batch.targets[group, row, supervised])
            found[text, answer, pixels[batch.images[group, slot].tobytes()]] += 1
    assert found == collections.Counter(
        (f"user\n\n{question}\nassistant\n{answer}\n", f"{answer}\n", number)
        for question, answer, number in zip(texts, answers, numbers, strict=True)
        if number in HELD_OUT
    )


@pytest.mark.parametrize("size", SHAPES)
def test_the_suggested_groups_are_nearly_full(folder, size):
    loader = make_loader(settings(folder, size), processor(folder, size), "train", seed=0, sharding=sharding(8))
    (batch,) = take(loader, 1)
    assert loader.token_fill > 0.92 and loader.image_fill > 0.92
    assert (batch.segment_ids > 0).mean() > 0.9
    assert 3800 / 8 / 8 < loader.batches_per_epoch < 70


def test_manifest_counts(folder):
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    assert {name: split["records"] for name, split in splits.items()} == {
        "train": 3800,
        "validation": 200,
        "test": 1000,
    }


def test_caption_tells_what_questions_and_answers_tell():
    assert caption([("what color is the circle?", "red"), ("is there a blue shape?", "no")]) == "a red circle"
    assert caption([("what is the teal shape?", "triangle")]) == "a teal triangle"
    assert caption([("is there not a teal shape?", "no"), ("is a circle present?", "yes")]) == "a teal circle"
    assert caption([("is no rectangle present?", "no")]) == "a rectangle"
    assert caption([("is there not a circle?", "yes"), ("does the image contain a red shape?", "no")]) == "a shape"


def test_captions_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="contradict"):
        caption([("what color is the shape?", "red"), ("is there a blue shape?", "yes")])


def test_captions_are_of_the_training_images_only(folder):
    """No test image has a caption, and the same images are held out."""
    questions, captions = (
        [read_shards(where, split) for split in ("train", "validation")] for where in (folder, folder / "captions")
    )
    for a, b in zip(questions, captions, strict=True):
        assert [a[i].key for i in range(len(a))] == [b[i].key for i in range(len(b))]
    with pytest.raises(ValueError, match="no split 'test'"):
        read_shards(folder / "captions", "test")
    assert captions[0][0].turns == (("user", (0,)), ("assistant", ("a blue triangle",)))
