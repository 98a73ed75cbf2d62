import dataclasses
import json

import msgpack
import numpy as np
import pytest

from fastvlm_jax.data.record import Record, check, pack, unpack
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.data.write import write_shards


def record(i):
    turns = (("user", (0, f"what is {i}?")), ("assistant", ("naught",)))
    return Record(f"train/{i}", (b"\x89PNG" + bytes([i]) * 2000, b""), turns)


RECORDS = [record(i) for i in range(7)]


def test_records_come_back_as_written(tmp_path):
    assert write_shards(tmp_path, "train", RECORDS, num_shards=3) is True
    source = read_shards(tmp_path, "train")
    assert [source[i] for i in range(len(source))] == [RECORDS[i] for i in (0, 3, 6, 1, 4, 2, 5)]
    names = [f"train-0000{i}-of-00003.array_record" for i in range(3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "manifest.json", *names]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [manifest["splits"]["train"]["shards"][name]["records"] for name in names] == [3, 2, 2]
    assert manifest["fingerprint"] == source.fingerprint and len(source.fingerprint) == 64


def test_same_records_give_the_same_fingerprint(tmp_path):
    for name, records in (("a", RECORDS), ("b", RECORDS), ("c", RECORDS[:6])):
        write_shards(tmp_path / name, "train", records)
    a, b, c = (read_shards(tmp_path / name, "train").fingerprint for name in "abc")
    assert a == b != c


def test_a_complete_split_is_left_alone(tmp_path):
    def must_not_be_read():
        raise AssertionError
        yield

    write_shards(tmp_path, "train", RECORDS)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert write_shards(tmp_path, "train", must_not_be_read()) is False
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    write_shards(tmp_path, "test", RECORDS[:2])
    assert (len(read_shards(tmp_path, "train")), len(read_shards(tmp_path, "test"))) == (7, 2)


def test_an_interrupted_write_leaves_nothing_and_is_redone(tmp_path):
    def interrupted():
        yield from RECORDS[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, "train", interrupted(), num_shards=2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="holds no complete dataset"):
        read_shards(tmp_path, "train")
    assert write_shards(tmp_path, "train", RECORDS, num_shards=2) is True
    assert len(read_shards(tmp_path, "train")) == 7


def test_a_killed_write_is_redone(tmp_path):
    write_shards(tmp_path, "train", RECORDS)
    shard = tmp_path / "train-00000-of-00001.array_record"
    whole = shard.read_bytes()
    (tmp_path / "manifest.json").unlink()  # killed before the manifest, and again in the middle of the next attempt
    shard.with_name(shard.name + ".1.partial").write_bytes(whole[:1000])
    with pytest.raises(FileNotFoundError, match="no complete dataset"):
        read_shards(tmp_path, "train")
    assert write_shards(tmp_path, "train", RECORDS) is True
    assert shard.read_bytes() == whole
    assert not list(tmp_path.glob("*.partial"))


def test_a_cut_or_missing_shard_is_named_and_rewritten(tmp_path):
    write_shards(tmp_path, "train", RECORDS)
    shard = tmp_path / "train-00000-of-00001.array_record"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"train-00000-of-00001\.array_record is missing or not as it was written: write the dataset"
    ):
        read_shards(tmp_path, "train")
    shard.unlink()
    with pytest.raises(ValueError, match="is missing or not as it was written"):
        read_shards(tmp_path, "train")
    assert write_shards(tmp_path, "train", RECORDS) is True
    assert len(read_shards(tmp_path, "train")) == 7


@pytest.mark.parametrize(
    "place, what",
    [(35_000, "train-00000-of-00001.array_record record 3"), (-65_500, "train-00000-of-00001.array_record record 2")],
)
def test_a_damaged_record_or_file_is_named(tmp_path, place, what):
    noise = [Record(f"train/{i}", (np.random.default_rng(i).bytes(10_000),), ()) for i in range(7)]
    write_shards(tmp_path / "data", "train", noise)
    shard = tmp_path / "data" / "train-00000-of-00001.array_record"
    data = bytearray(shard.read_bytes())
    data[place] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=what + " is damaged .*: write the data set again") as caught:
        source = read_shards(tmp_path / "data", "train")
        assert source[2] == noise[2]
        source[3]
    assert "\n" not in str(caught.value)


def test_a_missing_folder_names_the_command_that_mends_it(tmp_path):
    folder = tmp_path / "absent"
    with pytest.raises(FileNotFoundError) as caught:
        read_shards(folder, "train")
    assert str(caught.value) == (
        f"there is no dataset folder {folder}: write one with `fastvlm data write --source PATH --output {folder}`"
    )


def test_a_missing_split_names_those_there_are(tmp_path):
    write_shards(tmp_path, "train", RECORDS)
    write_shards(tmp_path, "test", RECORDS)
    with pytest.raises(ValueError, match="has no split 'validation': it has test, train"):
        read_shards(tmp_path, "validation")


def test_a_damaged_manifest_is_named(tmp_path):
    for text in ("{", "[]", '{"splits": 3, "fingerprint": ""}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
            read_shards(tmp_path, "train")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        msgpack.packb(3),
        msgpack.packb({"key": "a", "images": [], "turns": [["user", [0]]]}),  # the record holds no image 0
        msgpack.packb({"key": "a", "images": ["text"], "turns": []}),
        msgpack.packb({"key": "a", "images": [], "turns": [["user"]]}),
        pack(RECORDS[0])[:-3],
    ],
)
def test_what_is_not_a_record_is_refused(data):
    with pytest.raises(ValueError, match=r"not a record|does not hold"):
        unpack(data)


def test_more_images_or_turns_than_the_index_can_count_are_refused():
    talk = (("user", (0, "what")), ("assistant", ("red",)))
    fine = Record("a", (b"x",) * 1000, talk * 2000)
    assert unpack(pack(dataclasses.replace(fine, turns=talk))).images == fine.images
    assert check(dataclasses.replace(fine, turns=talk * 1000)) is None
    reason = "it has more than 4,000 turns or 1,000 images"
    assert check(fine) == check(dataclasses.replace(fine, images=(b"x",) * 1001, turns=talk)) == reason
    assert check(Record("a", (b"x",), (("user", (0,) * 1001), talk[1]))) == reason
    assert check(Record("a", (), (("user", ("q",)), talk[1]) * 2001)) == reason
    with pytest.raises(ValueError, match="more than 1,000 images"):
        unpack(pack(Record("a", (b"x",) * 1001, talk)))
