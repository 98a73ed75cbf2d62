"""Tests the names of images as other systems write them, links, several folders of images, and lists in UTF-16."""

import io
import json
import os
import pathlib
import unicodedata

import pytest
from etils import epath
from PIL import Image

from fastvlm_jax.data.readers import Options, recognise
from fastvlm_jax.data.record import Rejected
from fastvlm_jax.data.write import write

COLOURS = ("red", "lime", "blue", "cyan")
BEFORE = "b415e0d5388d49689e016f0964f4ab656fe267c894bc374834789a5d4f538d81"


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


def entry(name, number: int = 0) -> dict:
    talk = [{"from": "human", "value": f"What is picture {number}?"}, {"from": "gpt", "value": "a colour"}]
    return {"id": str(number), "image": name, "conversations": talk}


def read_all(path, options: Options) -> list:
    module = recognise.reader(recognise.recognise(epath.Path(path)))
    return [found for part in module.parts(epath.Path(path), options) for found in module.read(part, options)]


def read_one(folder: pathlib.Path, name: str, **options):
    """Returns the bytes of the image that a list beside `folder` calls `name`, or the reason why there is none."""
    (folder.parent / "list.json").write_text(json.dumps([entry(name)]))
    (found,) = read_all(folder.parent / "list.json", Options(**{"images": str(folder)} | options))
    return found.reason if isinstance(found, Rejected) else found.images[0]


@pytest.fixture
def images(tmp_path) -> pathlib.Path:
    """A folder with red images under the names that files have, and a secret one outside."""
    folder = tmp_path / "images"
    (folder / "coco" / "train").mkdir(parents=True)
    (folder / "b c").mkdir()
    for name in ("coco/train/1.jpg", "b c/2 3.png", "50%.png", "back\\slash.png", "end .png", "IMG.jpg", "~a.png"):
        (folder / name).write_bytes(png("red"))
    (folder / "a%20b.png").write_bytes(png("blue"))
    (folder / "a b.png").write_bytes(png("red"))
    (folder / unicodedata.normalize("NFD", "caf\u00e9.png")).write_bytes(png("red"))
    (folder / unicodedata.normalize("NFC", "\u00fcber.png")).write_bytes(png("red"))
    (tmp_path / "secret.png").write_bytes(png("lime"))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "coco\\train\\1.jpg",
        ".\\coco\\train\\1.jpg",
        "./coco/./train//1.jpg",
        "coco/val/../train/1.jpg",
        "../images/coco/train/1.jpg",
        "ROOT/coco/train/1.jpg",
        "file://ROOT/coco/train/1.jpg",
        "FILE://localhostROOT/coco/train/1.jpg",
        "file://ROOT/b%20c/2%203.png",
        " coco/train/1.jpg\r\n",
        "b%20c/2%203.png",
        "b%20c\\2 3.png ",
        "b c%2F2 3.png",
        "50%.png",
        "back\\slash.png",
        "end .png",
        "~a.png",
        "caf\u00e9.png",
        "u\u0308ber.png",
    ],
)
def test_names_of_other_systems_are_understood(images, name):
    assert read_one(images, name.replace("ROOT", str(images))) == png("red")


def test_a_name_that_stands_as_it_is_comes_before_what_it_may_mean(images):
    assert read_one(images, "a%20b.png") == png("blue")


def test_an_absolute_name_may_be_written_with_or_without_the_links_of_the_folder(images):
    linked = images.parent / "linked"
    os.symlink(images, linked)
    assert read_one(linked, f"{linked}/coco/train/1.jpg") == png("red")
    assert read_one(linked, f"{images}/coco/train/1.jpg") == png("red")
    assert "leads out" in read_one(images, f"{linked}/coco/train/1.jpg")  # nothing tells that this is the same folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("../secret.png", "leads out of the images' folder"),
        ("coco/../../secret.png", "leads out of the images' folder"),
        ("ROOT/../secret.png", "leads out of the images' folder"),
        ("ROOT2/1.png", "leads out of the images' folder"),
        ("..%2Fsecret.png", "leads out of the images' folder"),
        ("%2e%2e/secret.png", "leads out of the images' folder"),
        ("coco\\..\\..\\secret.png", "leads out of the images' folder"),
        (" /etc/hostname", "leads out of the images' folder"),
        ("\\\\server\\share\\1.jpg", "leads out of the images' folder"),
        ("file:///etc/hostname", "leads out of the images' folder"),
        ("file://ROOT/%2e%2e/secret.png", "leads out of the images' folder"),
        ("file://server/share/1.jpg", "is not in ROOT"),
        ("s3://bucket/1.jpg", "is an address, not a file"),
        ("https://example.org/a/../../1.jpg", "is an address, not a file"),
        ("a%00.png", "is not the name of a file"),
        ("ROOT", "leads out of the images' folder"),
        (".", "leads out of the images' folder"),
        ("coco\\", "is not the name of a file"),
        ("C:\\data\\coco\\1.jpg", "is a path on a disk of Windows: names must be relative to the images' folder ROOT"),
        ("file:///D:/coco/1.jpg", "is a path on a disk of Windows"),
        ("no\\such.jpg", "is not in ROOT, nor is 'no/such.jpg'"),
        ("IMG.JPG", "'IMG.JPG' is not in ROOT, but 'IMG.jpg' is: write the name that the file has"),
        ("img.jpg", "'img.jpg' is not in ROOT"),
        ("coco/train/1.JPG", "but 'coco/train/1.jpg' is"),
        ("COCO/TRAIN/1.jpg", "but 'coco/train/1.jpg' is"),
        ("coco/train/1", "but 'coco/train/1.jpg' is"),
        ("coco/train/1.png", "but 'coco/train/1.jpg' is"),
        ("images/coco/train/1.jpg", "but 'coco/train/1.jpg' is"),
        ("some/where/IMG.jpg", "but 'IMG.jpg' is"),
    ],
)
def test_the_rejection_names_the_cause(images, name, expected):
    (images.parent / "images2").mkdir()
    (images.parent / "images2" / "1.png").write_bytes(png("lime"))
    found = read_one(images, name.replace("ROOT", str(images)))
    assert isinstance(found, str) and expected.replace("ROOT", str(images)) in found
    assert found.isprintable()


def test_links_out_of_the_folder_are_followed_only_with_the_flag_or_into_a_second_folder(images):
    disk, blobs = images.parent / "disk2", images.parent / "blobs"
    (disk / "gqa").mkdir(parents=True)
    blobs.mkdir()
    (disk / "gqa" / "7.jpg").write_bytes(png("blue"))
    (blobs / "0f3a").write_bytes(png("cyan"))
    os.symlink(disk / "gqa", images / "gqa")
    os.symlink("../blobs/0f3a", images / "8.jpg")
    for name, other, colour in (("gqa/7.jpg", disk, "blue"), ("8.jpg", blobs, "cyan")):
        assert "is a link out of the images' folder: pass --follow_links" in read_one(images, name)
        assert "is a link out" in read_one(images, name, images=(str(images), str(images / "coco")))
        assert read_one(images, name, follow_links=True) == png(colour)
        assert read_one(images, name, images=(str(images), str(other))) == png(colour)


def test_with_the_flag_only_regular_files_are_opened_and_names_still_stay_inside(images):
    os.mkfifo(images.parent / "pipe")
    (images.parent / "big").touch()
    os.truncate(images.parent / "big", (256 << 20) + 1)
    targets = {
        "a.jpg": "/dev/zero",
        "b.jpg": "../pipe",
        "c.jpg": "..",
        "d.jpg": "/nowhere/x",
        "e.jpg": "/proc/self/environ",
    }
    for name, target in (targets | {"f.jpg": "f.jpg", "g.jpg": "../big", "up": ".."}).items():
        os.symlink(target, images / name)
    reasons = {
        name: read_one(images, name, follow_links=True) for name in [*targets, "f.jpg", "g.jpg", "up/../secret.png"]
    }
    expected = {
        "a.jpg": "is not a regular file",
        "b.jpg": "is not a regular file",
        "c.jpg": "is not a regular file",
        "d.jpg": "leads through a link to '/nowhere/x', where there is no file",
        "e.jpg": "is empty (0 bytes)",
        "f.jpg": "cannot be read (Too many levels of symbolic links)",
        "g.jpg": "is over 256 MB",
        "up/../secret.png": "is not in",
    }
    assert all(text in reasons[name] for name, text in expected.items()), reasons
    assert read_one(images, "up/secret.png", follow_links=True) == png("lime")
    assert "leads out" in read_one(images, "up/../../secret.png", follow_links=True)


def test_a_name_is_looked_up_in_each_folder_in_order(images):
    second = images.parent / "second"
    (second / "coco" / "train").mkdir(parents=True)
    (second / "coco" / "train" / "1.jpg").write_bytes(png("blue"))
    (second / "IMG.jpg").mkdir()
    (second / "9.png").write_bytes(png("cyan"))
    (images / "9.png").mkdir()
    both = (str(images), str(second))
    assert read_one(images, "coco/train/1.jpg", images=both) == png("red")
    assert read_one(images, "coco/train/1.jpg", images=both[::-1]) == png("blue")
    assert read_one(images, f"{second}/coco\\train/1.jpg", images=both) == png("blue")
    assert "'9.png' is not a regular file" in read_one(images, "9.png", images=both)
    assert f"is not in {images} or {second}" in read_one(images, "none.png", images=both)
    assert "'../second/9.png' leads out" in read_one(images, "../second/9.png")
    assert read_one(images, "../second/9.png", images=both) == png("cyan")
    with pytest.raises(FileNotFoundError, match=r"there is no folder of images .*third"):
        read_one(images, "9.png", images=(*both, str(images.parent / "third")))


def test_a_name_in_a_bucket_is_relative_or_the_whole_address():
    """No bucket can be asked here: the paths are those that would be asked for."""
    from fastvlm_jax.data.readers.image_names import inside

    root = "gs://bucket/images"
    assert inside((root,), "coco/1.jpg") == inside((root,), "./coco//1.jpg") == "coco/1.jpg"
    assert inside((root,), "gs://bucket/images/coco/1.jpg") == "coco/1.jpg"
    for name in (
        "gs://bucket/images2/1.jpg",
        "gs://other/images/1.jpg",
        "../1.jpg",
        "/1.jpg",
        "gs://bucket/images/../1",
    ):
        assert inside((root,), name) is None


@pytest.mark.parametrize("none", ["", None, [], [""]])
def test_an_entry_without_an_image_is_text_alone(images, none):
    listed = [entry(none, 0), entry("IMG.jpg", 1), entry(["IMG.jpg", ""], 2)]
    listed.append(listed[0] | {"id": "3", "images": "IMG.jpg"})
    listed[3] |= {} if isinstance(none, list) else {"image": none}
    (images.parent / "list.json").write_text(json.dumps(listed))
    found = read_all(images.parent / "list.json", Options(images=str(images)))
    assert found[0].images == () and found[0].turns[0] == ("user", ("What is picture 0?",))
    assert found[1].images == (png("red"),) and isinstance(found[2], Rejected)
    if not isinstance(none, list):
        assert found[3].images == (png("red"),)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["list.json", "list.jsonl", "list.csv", "list.tsv"])
def test_lists_in_utf_16_are_read_as_those_in_utf_8(images, name, encoding, monkeypatch):
    """Excel saves "Unicode text" so, and PowerShell what is redirected to a file."""
    from fastvlm_jax.data.readers import llava, table

    texts = ["r\u00f6d", "\u8d64\u8272\u7684\u56fe\u7247" * 9, "\U0001f534", "red, or 'rot'"]
    for colour in COLOURS:
        (images / f"{colour}.png").write_bytes(png(colour))
    entries = [entry(f"{colour}.png", i) for i, colour in enumerate(COLOURS)]
    for found, text in zip(entries, texts, strict=True):
        found["conversations"][1]["value"] = text
    tab = "\t" if name.endswith("tsv") else ","
    rows = [("image", "caption"), *zip([f"{colour}.png" for colour in COLOURS], texts, strict=True)]
    if name.endswith(".json"):
        content = json.dumps(entries, ensure_ascii=False)
    elif name.endswith(".jsonl"):
        content = "\r\n".join(json.dumps(found, ensure_ascii=False) for found in entries)
    else:
        content = "\r\n".join(f'{image}{tab}"{text}"' for image, text in rows)
    # Small parts, so that several begin inside the file.
    monkeypatch.setattr(llava, "PART_BYTES", 200)
    monkeypatch.setattr(table, "PART_ROWS", 2)
    mark = "\ufeff" if encoding.endswith("be") else ""  # Python writes the others with a mark
    (images.parent / name).write_bytes((mark + content).encode(encoding))
    found = read_all(images.parent / name, Options(images=str(images)))
    assert [record.turns[1] for record in found] == [("assistant", (text,)) for text in texts]
    assert [record.images for record in found] == [(png(colour),) for colour in COLOURS]


def test_a_broken_list_in_utf_16_is_refused_in_a_line(images):
    whole = json.dumps([entry("IMG.jpg")]).encode("utf-16")
    (images.parent / "list.json").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"list\.json is cut or broken UTF-16 at byte \d+: save it as UTF-8"):
        read_all(images.parent / "list.json", Options(images=str(images)))


def test_the_fingerprint_tells_folders_and_links_and_is_that_of_before(images, monkeypatch):
    """The digest below was written by the version before there were several folders and links to follow."""
    monkeypatch.chdir(images.parent)
    pathlib.Path("list.json").write_text(json.dumps([entry("IMG.jpg")]))

    def fingerprint(output: str, options: Options) -> str:
        write("list.json", output, options=options, workers=1)
        manifest = json.loads(pathlib.Path(output, "manifest.json").read_text())
        return manifest["splits"]["train"]["source"]["fingerprint"]

    one, two = fingerprint("a", Options("images")), fingerprint("b", Options(("images", "images/coco")))
    assert one == fingerprint("c", Options(("images",))) == BEFORE
    assert len({one, two, fingerprint("d", Options("images", follow_links=True))}) == 3
