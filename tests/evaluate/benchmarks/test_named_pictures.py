"""Pictures with classes or captions, in every published layout, and what is wrong with a folder in one line."""

import io
import json
import tarfile

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath

from fastvlm_jax.data.record import Record
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.evaluate.benchmarks.named_pictures import read_captions, read_classes


def png(shade):
    file = io.BytesIO()
    PIL.Image.new("RGB", (4, 3), (shade, 7, 9)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            data = data if isinstance(data, bytes) else data.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def exported(folder):
    """A set as CLIP_benchmark exports it: two tars, of which the second sorts behind the eleventh by name."""
    write_tar(folder / "test/2.tar", {"s0.cls": "1", "s0.webp": png(1), "s1.png": png(2), "s1.cls": "0\n"})
    write_tar(folder / "test/10.tar", {"s2.jpg": png(3), "s2.cls": "1"})
    (folder / "test/nshards.txt").write_text("2")
    (folder / "classnames.txt").write_text("cat\n dog \n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n{c}\n")
    return folder


def classes(folder, split=None):
    found = read_classes(epath.Path(folder), split)
    return [(named.id, named.picture.read(), named.name) for named in found.pictures], found.names, found.templates


def captions(folder, split=None):
    return [(named.id, named.picture.read(), named.name) for named in read_captions(epath.Path(folder), split)]


def test_exported_tars_have_classes(tmp_path):
    pictures, names, templates = classes(exported(tmp_path))
    assert pictures == [("test/2.tar/s0", png(1), 1), ("test/2.tar/s1", png(2), 0), ("test/10.tar/s2", png(3), 1)]
    assert (names, templates) == (("cat", "dog"), ("a photo of a {c}.", "{c}"))


def test_exported_tars_have_captions_a_line_each(tmp_path):
    write_tar(tmp_path / "test/0.tar", {"a/s0.jpg": png(1), "a/s0.txt": "a cat\r\n\nthe cat\n", "__meta__": ""})
    (tmp_path / "dataset_type.txt").write_text("retrieval\n")
    assert captions(tmp_path) == [("test/0.tar/a/s0", png(1), ("a cat", "the cat"))]
    with pytest.raises(ValueError, match=r"dataset_type\.txt says 'retrieval': give --benchmark retrieval"):
        classes(tmp_path)


def test_tables_bring_the_names_of_their_classes(tmp_path):
    features = {"fine_label": {"names": ["tabby", "husky"]}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    images = [{"bytes": png(i), "path": None} for i in range(3)]
    table = pa.table({"image": images, "label": [1, 0, 1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data/test-00000-of-00001.parquet")
    assert classes(tmp_path) == ([("0", png(0), 1), ("1", png(1), 0), ("2", png(2), 1)], ("cat", "dog"), ("{c}",))
    texts = pa.table({"image": images, "caption": [["a", "b"], ["c"], ["d"]]})
    pq.write_table(texts, tmp_path / "data/val-00000-of-00001.parquet")
    assert [name for _, _, name in captions(tmp_path, "val")] == [("a", "b"), ("c",), ("d",)]
    pq.write_table(pa.table({"img": images, "text": ["a\nb", "c", "d"]}), tmp_path / "data/val-00000-of-00001.parquet")
    assert captions(tmp_path, "val")[0] == ("0", png(0), ("a b",))


def test_folders_are_classes_by_their_names(tmp_path):
    names = ("n2/b.png", "n1/deep/a.JPG", "n1/c.jpg", "n1/notes.txt", "n1/z/a.png", "n1/b/a.png", "n1/a/a.png")
    for number, name in enumerate(names):
        (tmp_path / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / name).write_bytes(png(number))
    (tmp_path / "classnames.txt").write_text("cat\ndog")
    pictures, names, _ = classes(tmp_path, "val")
    order = ("n1/c.jpg", "n1/a/a.png", "n1/b/a.png", "n1/deep/a.JPG", "n1/z/a.png", "n2/b.png")
    assert [name for name, _, _ in pictures] == list(order)
    assert pictures[0] == ("n1/c.jpg", png(2), 0) and pictures[-1] == ("n2/b.png", png(0), 1)
    assert names == ("cat", "dog")


def pair(key, shade, caption, **extra):
    return Record(key, (png(shade),), (("user", (0, "what?")), ("assistant", (caption,))), extra)


def test_captions_of_shards_are_captions_and_classes(tmp_path):
    records = [
        pair("k", 1, "a red dot"),
        pair("k", 2, "a dot", captions=["one dot", "a dot"]),
        pair("m", 3, "a red dot"),
    ]
    write_shards(tmp_path, "validation", records)
    assert captions(tmp_path) == [
        ("k", png(1), ("a red dot",)),
        ("k (record 1)", png(2), ("one dot", "a dot")),
        ("m", png(3), ("a red dot",)),
    ]
    pictures, names, templates = classes(tmp_path)
    assert names == ("a red dot", "one dot") and [name for _, _, name in pictures] == [0, 1, 0]
    assert templates == ("{c}",)
    with pytest.raises(ValueError, match="has no split 'test': it has validation"):
        classes(tmp_path, "test")
    write_shards(tmp_path, "talks", [Record("q", (), (("user", ("what?",)), ("assistant", ("it",))))])
    with pytest.raises(ValueError, match="record 0, 'q': 0 images, a pair has one"):
        captions(tmp_path, "talks")


def edit(name, text):
    return lambda folder: (folder / name).write_text(text)


def without(name):
    return lambda folder: (folder / name).unlink()


def tar(**members):
    return lambda folder: write_tar(folder / "test/2.tar", {k.replace("__", "."): v for k, v in members.items()})


def cut(folder):
    data = (folder / "test/2.tar").read_bytes()
    (folder / "test/2.tar").write_bytes(data[:1500])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (without("classnames.txt"), "there is no .*classnames.txt: write the name of a class a line beside test"),
        (edit("classnames.txt", "cat\n"), "2.tar/s0 is of class 1, and .*classnames.txt names 1"),
        (edit("classnames.txt", "cat\n\ndog\n"), "classnames.txt: line 2 is empty"),
        (edit("classnames.txt", ""), "classnames.txt: it is empty"),
        (edit("zeroshot_classification_templates.txt", "a {c}\na {}"), "'a {}' has no {c}, where the name"),
        (edit("dataset_type.txt", "multilabel"), "says 'multilabel': several classes a picture are not scored here"),
        (edit("test/nshards.txt", "3"), "nshards.txt says '3' tars and 2 are there: copy the others"),
        (tar(a__jpg=png(1), a__cls="dog"), "2.tar/a: its class is 'dog', not a number"),
        (tar(a__jpg=png(1), a__cls="-1"), "its class is '-1', not a number"),
        (tar(a__jpg=png(1), b__cls="1"), "2.tar: 'a' has no .cls, nor have 1 others"),
        (tar(a__cls="1"), "2.tar: 'a' has no picture, nor have 0 others"),
        (tar(a__jpg=png(1), a__cls=b"\xff\xfe"), "'a.cls' is no text"),
        (tar(**{"../a__jpg": png(1), "a__cls": "1"}), "leads out of its folder"),
        (cut, "2.tar"),
        (edit("test/2.tar", "not a tar" * 100), "2.tar byte 0: this is no tar file: copy it again"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_a_line(tmp_path, harm, message):
    harm(exported(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as told:
        classes(tmp_path)
    assert "\n" not in str(told.value)


def test_a_folder_of_nothing_is_told(tmp_path):
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(FileNotFoundError, match=r"holds 'x\.csv': expected are test/\*\.tar; or test-\*\.parquet"):
        classes(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        captions(tmp_path / "no")
    write_tar(tmp_path / "test/0.tar", {"a.jpg": png(1), "a.txt": " \n"})
    with pytest.raises(ValueError, match=r"0\.tar/a has no caption"):
        captions(tmp_path)


def test_a_link_out_of_the_folder_of_a_class_is_not_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(5))
    (tmp_path / "set/cat").mkdir(parents=True)
    (tmp_path / "set/cat/a.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "set/classnames.txt").write_text("cat")
    with pytest.raises(ValueError, match=r"a\.png"):
        classes(tmp_path / "set")
