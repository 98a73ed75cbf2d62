"""Readers of published files: images that are read when they are needed, and what is wrong in one line."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from published_files import IMAGE, parquet, png, save

from fastvlm_jax.data.readers import files
from fastvlm_jax.evaluate import published, table
from fastvlm_jax.evaluate.benchmark import Row

RED, BLUE = png("red"), png("blue")


def read(path, *args, **kwargs):
    return published.read_parquet([epath.Path(path)], *args, **kwargs)


def test_images_of_a_table_are_read_when_they_are_needed(tmp_path):
    path = tmp_path / "test.parquet"
    images = [png((i, 0, 0)) for i in range(7)]
    rows = [{"id": i, "image": image, "image_url": "x"} for i, image in enumerate(images)]
    parquet(path, rows)
    pq.write_table(pq.read_table(path), path, row_group_size=3)
    found = read(path, ("id",), ("image",))
    assert [row["id"] for row in found] == list(range(7)) and "image_url" not in found[0]
    os.rename(path, tmp_path / "gone.parquet")  # nothing was read so far
    with pytest.raises(ValueError, match=r"test\.parquet cannot be read as Parquet: .*No such file"):
        found[0]["image"].read()
    os.rename(tmp_path / "gone.parquet", path)
    assert [found[i]["image"].read() for i in (6, 0, 3, 5)] == [images[i] for i in (6, 0, 3, 5)]
    assert found[4]["image"].name == f"{tmp_path.name}/test.parquet row 4 image" and found[4]["image"].file == path


def test_images_that_are_null_or_in_lists(tmp_path):
    parquet(tmp_path / "null.parquet", [{"image": RED}, {"image": None}])
    first, second = read(tmp_path / "null.parquet", (), ("image",))
    assert first["image"].read() == RED and second["image"] is None
    lists = pa.array([[{"bytes": RED}, {"bytes": BLUE}], [], None], pa.list_(IMAGE))
    pq.write_table(pa.table({"image": lists}), tmp_path / "lists.parquet")
    one, none, null = (row["image"] for row in read(tmp_path / "lists.parquet", (), ("image",)))
    assert [picture.read() for picture in one] == [RED, BLUE] and none == () and null is None
    assert published.pictures_of([one, none, null, one[1]]) == (*one, one[1])
    without_bytes = pa.array([{"bytes": None, "path": "a.png"}, {"bytes": RED, "path": "b.png"}], IMAGE)
    other = pa.array([{"bytes": RED, "path": "c.png"}] * 2, IMAGE)  # its name begins as the first one's
    pq.write_table(pa.table({"image": without_bytes, "image_1": other}), tmp_path / "bytes.parquet")
    lost, kept = read(tmp_path / "bytes.parquet", (), ("image",), ("image_1", "image_2"))
    assert lost["image"] is None and kept["image"].read() == lost["image_1"].read() == RED and "image_2" not in lost
    pq.write_table(pa.table({"image": pa.array([RED, None], pa.binary())}), tmp_path / "plain.parquet")
    plain, empty = read(tmp_path / "plain.parquet", (), ("image",))
    assert plain["image"].read() == RED and empty["image"] is None


def test_wrong_tables_are_named_in_one_line(tmp_path):
    parquet(tmp_path / "a.parquet", [{"id": 1, "image": b""}])
    with pytest.raises(ValueError, match=r"a\.parquet image' is empty"):
        read(tmp_path / "a.parquet", (), ("image",))[0]["image"].read()
    with pytest.raises(ValueError, match=r"a\.parquet has no column question: it has id, image$"):
        read(tmp_path / "a.parquet", ("question",))
    pq.write_table(pa.table({"image": ["a.png"]}), tmp_path / "names.parquet")
    with pytest.raises(ValueError, match=r"names\.parquet: the column image holds no images, it is string$"):
        read(tmp_path / "names.parquet", (), ("image",))
    whole = (tmp_path / "a.parquet").read_bytes()
    for data in (b"", b"PAR1", whole[:-20], whole[:20] + whole[40:], json.dumps([1]).encode()):
        save(tmp_path / "b.parquet", data)
        with pytest.raises(ValueError, match=r"b\.parquet cannot be read as Parquet: .") as error:
            read(tmp_path / "b.parquet", ("id",), ("image",))
        assert "\n" not in str(error.value)


def test_files_are_found_by_the_first_pattern_that_matches_and_a_part_is_missed(tmp_path):
    folder = epath.Path(tmp_path)
    for number in (2, 0):
        save(tmp_path / f"data/test-{number:05d}-of-00003.parquet", b"")
    save(tmp_path / "test.json", b"{}")
    save(tmp_path / ".test.json", b"{}")
    assert [path.name for path in published.find(folder, "*.jsonl", "*.json")] == ["test.json"]
    assert published.find(folder, "data/*.json") == []
    with pytest.raises(ValueError, match=r"data lacks test-00001-of-00003\.parquet: it has 2 of 3 parts"):
        published.find(folder, "data/test-*.parquet")
    save(tmp_path / "data/test-00001-of-00003.parquet", b"")
    assert [path.name[5:10] for path in published.find(folder, "data/test-*.parquet")] == ["00000", "00001", "00002"]


def test_a_bucket_is_refused_with_the_mend():
    with pytest.raises(ValueError, match=r"^gs://bucket/docvqa must be a folder of this machine: mount the bucket"):
        published.find(epath.Path("gs://bucket/docvqa"), "*.parquet")


def test_wrong_lists_are_named_in_one_line(tmp_path):
    path = epath.Path(tmp_path / "a.json")
    for data, words in [(b"[1", "it is not JSON"), (b"\xff", "it is not UTF-8"), (b"[" * 100000, "it nests too deep")]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"a.json: {words}"):
            published.read_json(path)
        with pytest.raises(ValueError, match=f"a.json line 1: {words}"):
            published.read_lines(path)
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": 2}')
    assert published.read_lines(path) == [{"a": 1}, {"a": 2}]


def test_a_line_of_more_bytes_than_any_row_has_is_named(tmp_path):
    path = epath.Path(tmp_path / "a.jsonl")
    path.write_text('{"a": 1}\n{"a": 123456}\n')
    assert [number for number, _ in files.objects(path, 13)] == [1, 2]
    with pytest.raises(ValueError, match=r"a\.jsonl line 2 has more than 8 bytes"):
        list(files.objects(path, 8))


def test_images_of_a_list_stay_in_their_folders(tmp_path):
    save(tmp_path / "images/a.png", RED)
    save(tmp_path / "more/b.png", BLUE)
    save(tmp_path / "secret.png", RED)
    os.symlink(tmp_path / "secret.png", tmp_path / "images/link.png")
    folder = epath.Path(tmp_path)
    images = published.Images(folder, "lost", "images", "more")
    assert [images(name).read() for name in ("a.png", "b.png", "a.png")] == [RED, BLUE, RED]
    assert images("b.png").file == folder / "more/b.png"
    images.check()
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "\0"):
        with pytest.raises(ValueError, match=r"leads out of|is a link out of|is not the name of a file"):
            images(name).read()
    images("c.png")
    with pytest.raises(FileNotFoundError, match=r"images or .*more lacks 2 of 7 images, the first '\\x00'$"):
        images.check()
    with pytest.raises(FileNotFoundError, match="has no folder of images: expected is png or jpg"):
        published.Images(folder, "png", "jpg")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 132735373\n"


@pytest.mark.parametrize(
    "read_file",
    [
        lambda path: published.read_parquet([path], ("id",)),
        published.read_json,
        published.read_lines,
        lambda path: table.read_table(path, ("index",)),
    ],
)
def test_a_pointer_of_git_lfs_is_told_by_name(tmp_path, read_file):
    save(tmp_path / "a.file", POINTER)
    with pytest.raises(
        ValueError, match=r"a\.file is a Git LFS pointer and not the content: run `git lfs pull` in its"
    ):
        read_file(epath.Path(tmp_path / "a.file"))


@pytest.mark.parametrize(
    "name, told",
    [
        ("data.zip", "; unpack 'data.zip' if they are in it"),
        ("data/images.tar.gz", "; unpack 'data/images.tar.gz' if they are in it"),
        (
            ".cache/a.incomplete",
            "; '.cache/a.incomplete' is the rest of a download that was not finished: start it again",
        ),
        ("link", "; 'link' is a link that leads nowhere: copy the files, not the links (cp -rL)"),
        ("repo/deep/a.json", "; its first file is 'repo/deep/a.json': name or move its folder if that is meant"),
        ("other.json", ""),
    ],
)
def test_what_stands_in_place_of_the_expected_files_is_told(tmp_path, name, told):
    save(tmp_path / name, b"x") if name != "link" else os.symlink("../blobs/1f", tmp_path / name)
    folder = epath.Path(tmp_path)
    holds = f"{tmp_path} holds '{name.split('/')[0]}': expected are a.json"
    assert str(published.wrong_layout(folder, ("a.json",))) == f"{holds}{told}"
    with pytest.raises(FileNotFoundError) as error:
        published.Images(folder, "images")
    assert str(error.value) == f"{tmp_path} has no folder of images: expected is images{told}"


def test_rows_are_checked(tmp_path):
    rows = [Row("a", "", (), ()), Row("b", "", (), ())]
    assert published.check_rows(rows, tmp_path, pictures=None) == rows
    for found, words in [
        ([], "holds no rows"),
        (rows, "row 0, id 'a', has no image"),
        (rows[:1] * 2, "'a' of row 1 stands"),
    ]:
        with pytest.raises(ValueError, match=words):
            published.check_rows(found, tmp_path, 1 if found == rows else None)
