"""What `fastvlm data write` says to a newcomer's first mistakes: the wrong folder of images, images as the source."""

import json

import PIL.Image
import pytest
from command import fastvlm


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "empty").mkdir()
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "pictures/cat.jpg")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    (tmp_path / "mine.json").write_text(json.dumps([{"image": "cat.jpg", "conversations": talk}]))
    return tmp_path


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--source=mine.json", "--images=empty"],
            ["1 entries", "'cat.jpg' is not in empty", "--images names the folder"],
        ),
        (["--source=mine.json"], ["'cat.jpg' is not in .", "--images names the folder"]),
        (["--source=mine.json", "--images=picture"], ["there is no folder of images picture"]),
        (["--source=pictures"], ["pictures holds images and no text about them", "--images their folder"]),
        (["--source=mine.jsn"], ["there is no file or folder mine.jsn"]),
    ],
    ids=lambda x: " ".join(x) if x[0].startswith("--source") else "",
)
def test_a_first_mistake_is_told_with_its_mend(own, monkeypatch, capsys, flags, words):
    status, out, err = fastvlm(monkeypatch, capsys, "data", "write", *flags, "--output=shards", "--workers=1")
    assert (status, out) == (1, "") and err.count("\n") == 1 and all(word in err for word in words), err
    assert not (own / "shards/manifest.json").exists()


def test_the_right_folder_of_images_is_taken(own, monkeypatch, capsys):
    argv = ("data", "write", "--source=mine.json", "--images=pictures", "--output=shards", "--workers=1")
    assert fastvlm(monkeypatch, capsys, *argv)[:2] == (0, "shards train: 1 records, 1 images, 1 shards\n")
