"""Features beside shards: whatever is dropped, moved or interrupted, each record keeps the rows that its source has."""

import hashlib
import io
import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import PIL.Image
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from command import fastvlm

from fastvlm_jax.data.features import whole
from fastvlm_jax.data.record import Record, pack
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.data.write import Settings, write, write_shards

DTYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TURNS = (("user", (0,)), ("assistant", ("a",)))


def picture(number):
    file = io.BytesIO()
    PIL.Image.new("RGB", (4, 3), (number % 256, number // 256, 90)).save(file, "PNG")
    return file.getvalue()


def stored(array, dtype="float32"):
    array = np.asarray(array, np.float32).astype(DTYPES[dtype])
    return {"dtype": dtype, "shape": list(array.shape), "data": array.tobytes()}


def record(number, rows=(3, 2), width=4, dtype="float32", **changes):
    """A record of which row r of the image features is [number, r, 0, 0], of the text features [-number, r, 0, 0]."""
    teacher = {}
    for name, count, sign in zip(("image", "text"), rows, (1, -1), strict=True):
        array = np.zeros((count, width))
        array[:, 0], array[:, 1] = sign * number, np.arange(count)
        teacher[name] = stored(array, dtype)
    given = {"key": str(number), "images": (picture(number),), "turns": TURNS, "extra": {"seed": 7, "teacher": teacher}}
    return Record(**given | changes)


def random_records(draw, count):
    """Records with and without features, of several types, widths and numbers of rows; keys and pictures repeat."""
    records = []
    for number in range(count):
        kind = draw.choice(["plain", "usual", "usual", "usual", "others", "image", "strange"])
        own = record(number)
        if kind != "plain":
            rows = tuple(map(int, draw.integers(1, 5, 2)))
            own = record(number, rows)
        if kind == "others":
            own = record(number, rows, int(draw.choice([3, 4])), str(draw.choice(list(DTYPES))))
        teacher = own.extra["teacher"]
        if kind == "image":
            teacher = {"image": teacher["image"], "note": "no text"}
        if kind == "strange":
            odd = [{"dtype": "int32", "shape": [1, 1], "data": bytes(4)}, stored(np.zeros((0, 4))), stored([1.0]), None]
            teacher = teacher | {"audio": odd[draw.integers(4)]}
        extra = {"seed": number} | ({} if kind == "plain" else {"teacher": teacher})
        key, image = (str(int(draw.integers(count))) for _ in range(2))
        key = key if draw.random() < 0.2 else f"own {number}"
        image = picture(int(image)) if draw.random() < 0.3 else picture(count + number)
        records.append(Record(key, (image,), TURNS, extra))
    return records


def read(folder, split="train"):
    """The records of a split with their features in them, and as they are stored."""
    source = read_shards(folder, split)
    kept = [source[i] for i in range(len(source))]
    return [whole(one, source.features_file(i)) for i, one in enumerate(kept)], kept


def tree(folder):
    paths = sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def check_files(folder, expected):
    """Checks a data set's files of features against the records that it was made of, by key; returns their number."""
    manifest = json.loads((folder / "manifest.json").read_text())
    names = set()
    for split, told in manifest["splits"].items():
        source, place = read_shards(folder, split), 0
        for shard, facts in told["shards"].items():
            records = [source[place + i] for i in range(facts["records"])]
            place += len(records)
            arrays = [
                (one.key, name, array)
                for one in records
                for name, array in (one.extra.get("teacher") or {}).items()
                if isinstance(array, dict) and "data" not in array
            ]
            assert ("features" in facts) == bool(arrays)
            if not arrays:
                continue
            names.add(f"{shard}.features")
            data = (folder / f"{shard}.features").read_bytes()
            assert facts["features"] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            (kind,) = {(array["dtype"], array["shape"][1]) for *_, array in arrays}
            rows, next_row = np.frombuffer(data, DTYPES[kind[0]]).reshape(-1, kind[1]), 0
            for key, name, array in arrays:  # one behind the other, without a gap
                assert array["row"] == next_row
                next_row += array["shape"][0]
                assert rows[array["row"] : next_row].tobytes() == expected[key].extra["teacher"][name]["data"]
            assert next_row == len(rows)
    assert {path.name for path in folder.rglob("*.features")} == names
    return len(names)


@pytest.mark.parametrize("seed", range(4))
def test_each_record_keeps_the_rows_of_its_source(seed, tmp_path):
    draw = np.random.default_rng(seed)
    records = random_records(draw, 150)
    write_shards(tmp_path / "in", "train", records, num_shards=3)
    first = {}
    for one in (one for shard in range(3) for one in records[shard::3]):
        first.setdefault(one.key, one)
    found, _ = read(tmp_path / "in")
    assert found == [one for shard in range(3) for one in records[shard::3]]
    settings = Settings(validation_share=0.3, shard_bytes=int(draw.choice([800, 4000, 1 << 20])))
    write(tmp_path / "in", tmp_path / "out", settings=settings, workers=1)
    train, validation = (read(tmp_path / "out", split)[0] for split in ("train", "validation"))
    assert len(train) > 50 and len(validation) > 10
    by_key = {one.key: one for one in train + validation}
    assert by_key == first and len(train) + len(validation) == len(first) < 150
    assert check_files(tmp_path / "out", first) > 1


def test_rows_lie_one_behind_the_other_and_what_differs_stays_in_its_record(tmp_path):
    records = [
        Record("plain", (picture(9),), TURNS), record(1), record(2, (1, 1)), record(3, width=5),
        record(4, dtype="bfloat16"), record(5, (1, 2)),
    ]  # fmt: skip
    write_shards(tmp_path, "train", records)
    found, kept = read(tmp_path)
    assert found == records
    rows = [[one.extra.get("teacher", {}).get(name, {}).get("row") for name in ("image", "text")] for one in kept]
    assert rows == [[None, None], [0, 3], [5, 6], [None, None], [None, None], [7, 8]]
    held = np.fromfile(tmp_path / "train-00000-of-00001.array_record.features", "<f4").reshape(-1, 4)
    expected = [[1, 0], [1, 1], [1, 2], [-1, 0], [-1, 1], [2, 0], [-2, 0], [5, 0], [-5, 0], [-5, 1]]
    assert held[:, :2].tolist() == expected and not held[:, 2:].any()
    assert kept[1].extra["teacher"]["image"]["shape"] == [3, 4] and "data" not in kept[1].extra["teacher"]["image"]
    assert kept[3] == records[3] and kept[4] == records[4]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Writes 120 records with features in four shards; each picture is that of two or three records."""
    folder = tmp_path_factory.mktemp("source") / "set"
    records = [record(n, images=(picture(n % 50),), key=str(n % 110)) for n in range(120)]
    write_shards(folder, "train", records, num_shards=4)
    return folder


SETTINGS = Settings(validation_share=0.3, shard_bytes=4000)


@pytest.fixture(scope="module")
def straight(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "out"
    write(source, folder, settings=SETTINGS, workers=1)
    return folder


def test_any_number_of_processes_writes_the_same_bytes(source, straight, tmp_path):
    write(source, tmp_path / "out", settings=SETTINGS, workers=2)
    assert tree(tmp_path / "out") == tree(straight)
    assert sum(name.endswith(".features") for name in tree(straight)) > 4


@pytest.mark.parametrize("damage", ["none", "cut", "flipped", "gone"])
def test_a_stopped_write_ends_in_the_same_bytes_whatever_became_of_its_features(source, straight, tmp_path, damage):
    def stop(state):
        if state.done == 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write(source, out, settings=SETTINGS, workers=1, progress=stop)
    beside = sorted((out / ".train.writing").glob("job-*.features"))
    data = bytearray(beside[0].read_bytes())
    data[-1] ^= damage == "flipped"
    beside[0].write_bytes(data[:-4] if damage == "cut" else data)
    if damage == "gone":
        beside[0].unlink()
    (out / ".train.writing" / "job-00002-train-00000.array_record.features.1.partial").write_bytes(b"of a killed run")
    write(source, out, settings=SETTINGS, workers=1)
    assert tree(out) == tree(straight)


def test_stopped_behind_the_last_move_it_ends_in_the_same_bytes(source, straight, tmp_path):
    blocked = tmp_path / "out" / next(name for name in tree(straight) if name.endswith(".features"))
    blocked.mkdir(parents=True)  # where a file must go
    with pytest.raises(OSError):
        write(source, tmp_path / "out", settings=SETTINGS, workers=1)
    assert not (tmp_path / "out" / "manifest.json").exists()
    blocked.rmdir()
    write(source, tmp_path / "out", settings=SETTINGS, workers=1)
    assert tree(tmp_path / "out") == tree(straight)


def test_a_lost_or_cut_file_of_features_is_written_again(source, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "out")
    lost, cut = sorted((tmp_path / "out").glob("*.features"))[:2]
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    assert not write(source, tmp_path / "out", settings=SETTINGS, workers=1).nothing_to_do
    assert tree(tmp_path / "out") == tree(straight)
    assert write(source, tmp_path / "out", settings=SETTINGS, workers=1).nothing_to_do


def test_overwriting_and_writing_anew_leave_no_features_of_before(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "out")
    write_shards(tmp_path / "plain", "train", [record(n, extra={}) for n in range(9)])
    write(tmp_path / "plain", tmp_path / "out", workers=1, overwrite=True)
    assert not list((tmp_path / "out").rglob("*.features"))
    whole_set = tmp_path / "mine"
    write_shards(whole_set, "train", [record(1)])
    (shard,) = whole_set.glob("*.array_record")
    shard.unlink()  # so that the split is written anew, now without features
    write_shards(whole_set, "train", [record(1, extra={})])
    assert not list(whole_set.rglob("*.features")) and len(read(whole_set)[0]) == 1


def test_dropping_all_records_with_features_drops_their_file(tmp_path):
    records = [record(1, extra={}), record(2, key="1"), record(3, extra={})]
    write_shards(tmp_path / "in", "train", records)
    write(tmp_path / "in", tmp_path / "out", workers=1)
    assert [one.key for one in read(tmp_path / "out")[0]] == ["1", "3"]
    assert not list(tmp_path.glob("out/*.features"))
    check_files(tmp_path / "out", {})


def test_shards_of_other_features_are_another_source(tmp_path):
    write_shards(tmp_path / "in", "train", [record(1), record(2)])
    write(tmp_path / "in", tmp_path / "out", workers=1)
    manifest = json.loads((tmp_path / "in" / "manifest.json").read_text())
    (shard,) = manifest["splits"]["train"]["shards"].values()
    shard["features"]["sha256"] = "0" * 64
    (tmp_path / "in" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="of another source or of other settings"):
        write(tmp_path / "in", tmp_path / "out", workers=1)


def test_a_source_without_its_features_is_told_and_damaged_rows_are_rejected(tmp_path, monkeypatch, capsys):
    write_shards(tmp_path / "in", "train", [record(n) for n in range(4)])
    beside = tmp_path / "in" / "train-00000-of-00001.array_record.features"
    data = bytearray(beside.read_bytes())
    data[2 * 5 * 16 + 3] ^= 1  # in the first row of record 2
    beside.write_bytes(data)
    argv = ["data", "write", f"--source={tmp_path / 'in'}", f"--output={tmp_path / 'out'}", "--workers=1"]
    status, out, err = fastvlm(monkeypatch, capsys, *argv)
    assert status == 0 and "rejected: 1 entries" in out and not err
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "train-00000-of-00001.array_record/2"
    assert json.loads(line)["reason"] == f"{beside} is damaged or belongs to another shard: write the data set again"
    assert read(tmp_path / "out")[0] == [record(n) for n in (0, 1, 3)]
    beside.unlink()
    status, _, err = fastvlm(monkeypatch, capsys, *argv, "--overwrite")
    assert status == 1 and f"{beside} is missing: write the data set again" in err and err.count("\n") == 1


def test_data_sets_of_earlier_versions_are_moved_out_of_their_records_when_written_again(tmp_path):
    records = [record(n) for n in range(5)]
    write_shards(tmp_path / "in", "train", [record(n, extra={}) for n in range(5)])
    (shard,) = (tmp_path / "in").glob("*.array_record")
    writer = ArrayRecordWriter(str(shard), "group_size:1,uncompressed")
    for one in records:
        writer.write(pack(one))
    writer.close()
    write(tmp_path / "in", tmp_path / "out", workers=1)
    found, kept = read(tmp_path / "out")
    assert found == records and all("data" not in one.extra["teacher"]["text"] for one in kept)
    assert check_files(tmp_path / "out", {one.key: one for one in records}) == 1


def test_records_whose_features_lie_elsewhere_are_refused(tmp_path):
    write_shards(tmp_path / "in", "train", [record(1)])
    source = read_shards(tmp_path / "in", "train")
    with pytest.raises(ValueError, match=r"features of record 1 are not in it but beside its shard: pass `whole\("):
        write_shards(tmp_path / "out", "train", [source[0]])
    assert not list((tmp_path / "out").iterdir())
    partial = tmp_path / "out" / "train-00000-of-00001.array_record.features.1.partial"
    partial.write_bytes(b"of a run that was killed")
    write_shards(tmp_path / "out", "train", [whole(source[0], source.features_file(0))])
    assert not partial.exists()
    assert read(tmp_path / "out")[0] == [record(1)]


def test_a_full_disk_is_told_by_the_name_of_the_file(tmp_path, monkeypatch, capsys):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(OSError) as caught:
            write_shards(tmp_path, "train", [record(1, (300, 300), width=200)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path / "train-00000-of-00001.array_record.features")
    assert not list(tmp_path.iterdir())
