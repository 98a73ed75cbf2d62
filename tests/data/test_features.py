"""Features are read by the row, from disks and buckets, and a file that is not the record's own is told in a line."""

import json
import os

import numpy as np
import pytest
from bucket_server import serve

from fastvlm_jax.data.features import beside, checksum, describe, read_rows
from fastvlm_jax.data.inspect.contents import check_shards, verify
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.data.write import write_shards

TURNS = (("user", (0,)), ("assistant", ("a",)))
ROWS = np.arange(5 * 3, dtype=np.float32).reshape(5, 3)


def stored(array):
    return {"dtype": "float32", "shape": list(array.shape), "data": array.tobytes()}


def placed(first, count):
    """Describes the rows [first, first + count) of ROWS in a file that holds them all."""
    crc32 = b"".join(checksum(row.tobytes()) for row in ROWS[first : first + count])
    return describe({"dtype": "float32", "shape": [count, 3], "row": first, "crc32": crc32}, "image")


def record(number, **changes):
    arrays = {name: ROWS + 100 * number + i for i, name in enumerate(("image", "text"))} | changes
    teacher = {name: stored(array) for name, array in arrays.items()}
    return Record(str(number), (b"\x89PNG",), TURNS, {"teacher": teacher})


def test_checksums_are_crc32_in_little_endian():
    assert checksum(b"123456789") == bytes.fromhex("2639f4cb")  # the check value of CRC-32: cbf43926


def test_rows_of_a_file_and_of_records_themselves_come_in_the_order_asked_for(tmp_path):
    path = tmp_path / "x.features"
    path.write_bytes(ROWS.tobytes())
    own = describe(stored(ROWS[::-1]), "text")
    found = read_rows([(placed(1, 3), [2, 0, 2]), (own, [4, 1]), (placed(4, 1), [0])], str(path))
    for array, expected in zip(found, (ROWS[[3, 1, 3]], ROWS[[0, 3]], ROWS[[4]]), strict=True):
        np.testing.assert_array_equal(array, expected)
        assert array.dtype == np.float32
    (array,) = read_rows([(own, [0])], "/nowhere")  # not asked for what it does not have
    np.testing.assert_array_equal(array, ROWS[[4]])


def test_no_other_rows_are_read(tmp_path):
    path = tmp_path / "x.features"
    damaged = np.full_like(ROWS, np.nan)
    damaged[3] = ROWS[3]
    path.write_bytes(damaged.tobytes())
    np.testing.assert_array_equal(read_rows([(placed(2, 3), [1])], str(path))[0], ROWS[[3]])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), r"cannot be read \(No such file or directory\)"),
        (lambda path: path.write_bytes(b""), "is damaged or belongs to another shard"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged or belongs to another shard"),
        (lambda path: path.write_bytes(path.read_bytes()[:-12]), "is damaged or belongs to another shard"),
        (lambda path: path.write_bytes(path.read_bytes()[12:]), "is damaged or belongs to another shard"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\1"), "is damaged or belongs to another shard"),
        (lambda path: path.write_bytes((ROWS + 1).tobytes()), "is damaged or belongs to another shard"),
    ],
)
def test_rows_that_are_not_the_records_own_are_refused(tmp_path, damage, reason):
    path = tmp_path / "x.features"
    path.write_bytes(ROWS.tobytes())
    damage(path)
    with pytest.raises(ValueError, match=rf"x\.features {reason}: write the data set again") as caught:
        read_rows([(placed(3, 2), [1])], str(path))
    assert "\n" not in str(caught.value)


CRC = bytes(4)
NONE = [
    None, 3, [], {}, {"dtype": "float32"}, {"dtype": "float32", "shape": [1, 1]},
    {"dtype": "float32", "shape": [1, 1], "row": -1, "crc32": CRC},
    {"dtype": "float32", "shape": [1, 1], "row": 2**63, "crc32": CRC},
    {"dtype": "float32", "shape": [1, 1], "row": True, "crc32": CRC},
    {"dtype": "float32", "shape": [1, 1], "row": 0, "crc32": CRC[:3]},
    {"dtype": "float32", "shape": [2, 1], "row": 0, "crc32": CRC},
    {"dtype": "float32", "shape": [-1, -1], "row": 0, "crc32": b""},
    {"dtype": "float32", "shape": [1], "row": 0, "crc32": CRC},
    {"dtype": "float32", "shape": [1, 1], "row": 0, "crc32": "text"},
    {"dtype": "float32", "shape": [float("inf"), 1], "row": 0, "crc32": CRC},
    {"dtype": "float32", "shape": [-1, -1], "data": bytes(4)},
    {"dtype": "float32", "shape": [1, 2], "data": bytes(4)},
    {"dtype": "float64", "shape": [1, 1], "data": bytes(8)},
]  # fmt: skip


@pytest.mark.parametrize("found", NONE)
def test_what_describes_no_features_is_refused(found):
    with pytest.raises(ValueError, match="image features of"):
        describe(found, "image")


def test_widths_that_no_file_has_take_no_memory(tmp_path):
    path = tmp_path / "x.features"
    path.write_bytes(ROWS.tobytes())
    huge = {"dtype": "float32", "shape": [1, 2**58], "row": 0, "crc32": CRC}
    with pytest.raises(ValueError, match=r"x\.features is damaged"):
        read_rows([(describe(huge, "image"), [0])], str(path))


def test_a_bucket_is_asked_for_these_rows_alone_in_forked_processes_too(tmp_path, monkeypatch):
    pytest.importorskip("gcsfs", reason="pip install 'fastvlm_jax[gcs]'")
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "x.features").write_bytes(ROWS.tobytes())
    server, requests = serve(tmp_path)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")

    def right():
        (found,) = read_rows([(placed(1, 4), [3, 0])], "gs://bucket/x.features")
        return np.array_equal(found, ROWS[[4, 1]])

    assert right()
    assert sorted(request.split("bytes=")[1] for request in requests) == ["12-23", "48-59"]
    with pytest.raises(ValueError, match=r"gs://bucket/y.features cannot be read \(.+\): write the data set again"):
        read_rows([(placed(0, 1), [0])], "gs://bucket/y.features")
    child = os.fork()
    if not child:
        os._exit(0 if right() else 1)
    assert os.waitpid(child, 0)[1] == 0
    server.shutdown()


# Data sets


def test_a_missing_or_cut_file_is_told_when_the_data_set_is_opened(tmp_path):
    write_shards(tmp_path, "train", [record(n) for n in range(4)], num_shards=2)
    path = tmp_path / "train-00001-of-00002.array_record.features"
    data = path.read_bytes()
    for damaged in (data[:-1], data + b"\0", None):
        if damaged is None:
            path.unlink()
        else:
            path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"train-00001-of-00002\.array_record\.features is missing or not as it"):
            read_shards(tmp_path, "train")
        with pytest.raises(ValueError, match=r"1 of 4 files are missing or not .*train-00001-of-00002.*\.features\)"):
            check_shards(tmp_path, "train")
    path.write_bytes(data)
    assert read_shards(tmp_path, "train").features_file(1) == beside(tmp_path / "train-00000-of-00002.array_record")
    assert read_shards(tmp_path, "train").features_file(2) == str(path)
    assert read_shards(tmp_path, "train", only="train-00001-of-00002.array_record").features_file(0) == str(path)


def test_checksums_are_compared_when_asked(tmp_path):
    write_shards(tmp_path, "train", [record(n) for n in range(4)], num_shards=2)
    verify(read_shards(tmp_path, "train"))
    one, other = sorted(tmp_path.glob("*.features"))
    swapped = one.read_bytes(), other.read_bytes()
    other.write_bytes(swapped[0])
    with pytest.raises(ValueError, match=r"1 of 4 files are damaged, .*\(train-00001-of-00002\.array_record\.features"):
        verify(read_shards(tmp_path, "train"))
    one.write_bytes(swapped[1])
    with pytest.raises(ValueError, match="2 of 4 files are damaged"):
        verify(read_shards(tmp_path, "train"))


def test_other_features_are_another_data_set(tmp_path):
    for name, changes in (("a", {}), ("b", {}), ("c", {"text": ROWS + 0.5}), ("d", {"text": ROWS[:4]})):
        write_shards(tmp_path / name, "train", [record(0, **changes)])
    a, b, c, d = (read_shards(tmp_path / name, "train").fingerprint for name in "abcd")
    assert a == b and len({a, c, d}) == 3


@pytest.mark.parametrize("features", [3, {}, {"bytes": 0}, {"bytes": "x"}, {"bytes": -5}, None])
def test_a_manifest_that_tells_nonsense_of_features_is_damaged(tmp_path, features):
    write_shards(tmp_path, "train", [record(0)])
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    next(iter(manifest["splits"]["train"]["shards"].values()))["features"] = features
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: delete the folder and write the dataset again"):
        read_shards(tmp_path, "train")
