"""Tests `fastvlm data write`: the same bytes after any interruption, and one clear line if it cannot go on."""

import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from fastvlm_jax.data.readers import Options
from fastvlm_jax.data.record import Record, pack, unpack
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.data.write import duplicates, write, write_shards
from fastvlm_jax.data.write.job import Settings
from fastvlm_jax.data.write.shard import Shard, save_keys

FILES, ROWS = 6, 40  # 240 records


def encoded(i, size=(32, 24), format="JPEG", **options):
    pixels = np.random.default_rng(i).integers(0, 256, (size[1] // 4, size[0] // 4, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).resize(size).save(file, format, **options)
    return file.getvalue()


def row(i, image=None):
    talk = [{"from": "human", "value": f"<image>\nwhat is {i}?"}, {"from": "gpt", "value": f"number {i}"}]
    return {"image": {"bytes": encoded(i) if image is None else image, "path": None}, "conversations": talk}


def parquet(folder, numbers, name="train-00000", **changes):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row(i) | changes.get(f"row{i}", {}) for i in numbers]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / f"{name}.parquet", row_group_size=10)


SCHEMA = pa.schema(
    {
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "conversations": pa.list_(pa.struct({"from": pa.string(), "value": pa.string()})),
    }
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Writes six files of forty rows, three of which cannot be used, and returns their folder."""
    folder = tmp_path_factory.mktemp("source") / "set"
    bad = {"row3": {"image": {"bytes": b"", "path": None}}, "row50": row(50, b"\xff\xd8 no picture"),
           "row51": {"conversations": [{"from": "human", "value": "<image>"}]}}  # fmt: skip
    for file in range(FILES):
        parquet(folder, range(file * ROWS, (file + 1) * ROWS), f"train-{file:05d}", **bad)
    return folder


SETTINGS = Settings(validation_share=0.1, shard_bytes=15_000)


@pytest.fixture(scope="module")
def straight(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "out"
    summary = write(source, folder, settings=SETTINGS, workers=1)
    return folder, summary


def tree(folder):
    paths = sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def records(folder, split="train"):
    source = read_shards(folder, split)
    return [source[i] for i in range(len(source))]


def command(source, output, *flags):
    argv = [sys.executable, "-m", "fastvlm_jax", "data", "write", f"--source={source}", f"--output={output}"]
    return [*argv, "--validation_share=0.1", *flags]


def start(*argv, **options):
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_every_row_is_a_record_or_is_named_with_its_reason(source, straight):
    folder, summary = straight
    found = {record.key: record for split in ("train", "validation") for record in records(folder, split)}
    bad = {3, 50, 51}
    assert found.keys() == {f"set/train-{i // ROWS:05d}/{i % ROWS}" for i in set(range(FILES * ROWS)) - bad}
    assert found["set/train-00002/7"] == Record(
        "set/train-00002/7", (encoded(87),), (("user", (0, "what is 87?")), ("assistant", ("number 87",)))
    )
    assert [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()] == [
        {"split": "train", "file": f"{source}/train-0000{file}.parquet", "key": f"set/train-0000{file}/{i}",
         "reason": reason}
        for file, i, reason in (
            (0, 3, "'image' is empty (0 bytes)"),
            (1, 10, summary.reasons[1][1]),
            (1, 11, "the conversation has no answer"),
        )
    ]  # fmt: skip
    assert summary.rejected == 3 and sum(count for count, _ in summary.reasons) == 3
    counts = {name: split["records"] for name, split in summary.splits.items()}
    assert counts == {name: len(records(folder, name)) for name in counts} and sum(counts.values()) == 237


def test_shards_keep_the_order_of_the_source_and_end_at_their_size(straight):
    folder, _ = straight
    numbers = [int(record.turns[1][1][0].split()[1]) for record in records(folder)]
    assert numbers == sorted(numbers)
    manifest = json.loads((folder / "manifest.json").read_text())
    shards = manifest["splits"]["train"]["shards"]
    assert len(shards) > FILES
    for name, shard in shards.items():
        data = (folder / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
        assert ArrayRecordReader(str(folder / name)).num_records() == shard["records"]
        sizes = [len(pack(unpack(data))) for data in ArrayRecordReader(str(folder / name)).read_all()]
        assert sum(sizes[:-1]) < 15_000


def test_the_index_holds_the_sizes_of_the_images(straight):
    folder, _ = straight
    with np.load(next((folder / "index").glob("train-00000-of-*.array_record.sizes.npz"))) as index:
        assert set(index["width"]) == {32} and set(index["height"]) == {24} and set(index["num_images"]) == {1}


def test_any_number_of_processes_writes_the_same_bytes(source, straight, tmp_path):
    reports = []
    write(source, tmp_path / "out", settings=SETTINGS, workers=3, progress=reports.append)
    assert tree(tmp_path / "out") == tree(straight[0])
    assert reports[-1].done == reports[-1].jobs == FILES and (reports[-1].records, reports[-1].rejected) == (237, 3)


def test_validation_does_not_depend_on_the_other_files(source, straight, tmp_path):
    only = tmp_path / "set"
    only.mkdir()
    shutil.copy(source / "train-00004.parquet", only)
    write(only, tmp_path / "out", settings=Settings(validation_share=0.1), workers=1)
    some = {record.key for record in records(tmp_path / "out", "validation")}
    whole = {record.key for record in records(straight[0], "validation")}
    assert some == {key for key in whole if "train-00004" in key} and 10 <= len(whole) <= 40
    assert not whole & {record.key for record in records(straight[0])}


@pytest.fixture(scope="module")
def slow(source, tmp_path_factory):
    """Returns a source that takes seconds (verified and shrunk photos), the flags, and the files of a straight run."""
    folder = tmp_path_factory.mktemp("slow")
    for file in range(5):
        images = {f"row{i}": row(i, encoded(i, (600, 500))) for i in range(file * 10, file * 10 + 10)}
        parquet(folder / "set", range(file * 10, file * 10 + 10), f"train-{file:05d}", **images)
    flags = ["--max_side=400", "--verify", "--workers=2"]
    done = subprocess.run(command(folder / "set", folder / "out", *flags), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{folder / 'out'} train: ")
    return folder / "set", flags, tree(folder / "out")


def wait_until(condition, process):
    end = time.monotonic() + 60
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.003)


def children(process):
    return pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


@pytest.mark.parametrize("jobs", [0, 3])
def test_killed_and_run_again_it_ends_in_the_same_bytes(slow, tmp_path, jobs):
    source, flags, expected = slow
    out = tmp_path / "out"
    staged = out / ".train.writing"
    process = start(*command(source, out, *flags))
    wait_until(lambda: len(list(staged.glob("job-*.json"))) >= jobs and list(staged.glob("job-*.partial")), process)
    process.kill()
    process.wait()
    assert not (out / "manifest.json").exists() and not list(out.glob("*.array_record"))
    finished = {path: path.stat().st_mtime_ns for path in staged.glob("job-*.array_record")}
    again = start(*command(source, out, *flags))
    wait_until(lambda: (out / "manifest.json").exists(), again)
    assert again.communicate()[1] == "" and again.returncode == 0
    assert tree(out) == expected and not staged.exists()
    kept = {path.stat().st_mtime_ns for path in out.glob("*.array_record")}
    assert len(kept & set(finished.values())) >= jobs


def test_what_a_write_left_that_was_killed_while_it_finished_is_removed(source, straight, tmp_path):
    for name in ("rejected.jsonl.x1y2z3_4.partial", "manifest.json.x1y2z3_4.partial"):  # the second at its very end
        (tmp_path / name).write_text("")
        write(source, tmp_path, settings=SETTINGS, workers=1)
        assert tree(tmp_path) == tree(straight[0])


def test_what_a_dead_worker_left_while_others_work_is_not_taken_for_a_file_of_the_data_set(source, straight, tmp_path):
    staged = tmp_path / "out/.train.writing"

    def leave(state):
        for path in [*staged.glob("job-*.array_record"), *staged.glob("index/job-*.npz")]:
            path.with_name(f"{path.name}.x1y2z3_4.partial").touch()

    write(source, tmp_path / "out", settings=SETTINGS, workers=1, progress=leave)
    assert tree(tmp_path / "out") == tree(straight[0])


def test_ctrl_c_is_one_line_and_status_130(slow, tmp_path):
    source, flags, _ = slow
    process = start(*command(source, tmp_path / "out", *flags), start_new_session=True)
    wait_until(lambda: list(tmp_path.glob("out/.train.writing/job-*.json")), process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the workers too
    assert process.communicate()[1] == "fastvlm data: stopped; the same command goes on from here\n"
    assert process.returncode == 130 and not list(tmp_path.glob("out/*.array_record"))


def test_a_killed_worker_is_told_and_the_next_run_goes_on(slow, tmp_path):
    source, flags, expected = slow
    process = start(*command(source, tmp_path / "out", *flags))
    wait_until(lambda: list(tmp_path.glob("out/.train.writing/job-*.partial")), process)
    commands = {int(pid): pathlib.Path(f"/proc/{pid}/cmdline").read_text() for pid in children(process)}
    os.kill(next(pid for pid, line in commands.items() if "spawn_main" in line), signal.SIGKILL)
    error = process.communicate()[1]
    assert process.returncode == 1 and error.count("\n") == 1
    assert "a worker process was killed (status -9" in error and "run the same command again" in error
    subprocess.run(command(source, tmp_path / "out", *flags), check=True, capture_output=True)
    assert tree(tmp_path / "out") == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_nothing_is_half_written(workers, source, tmp_path):
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "-"]  # no file may grow beyond 8 KiB
    argv = [*limited, *command(source, tmp_path / "out", f"--workers={workers}")]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "cannot be written" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".train.writing"]


def test_a_damaged_finished_job_is_done_again(source, straight, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def stop(state):
        if state.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        write(source, out, settings=SETTINGS, workers=1, progress=stop)
    staged = sorted((out / ".train.writing").glob("job-*-train-*.array_record"))
    damaged = bytearray(staged[0].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    staged[0].write_bytes(damaged)
    lost = next((out / ".train.writing" / "index").glob("job-00001-*.npz"))
    lost.rename(f"{lost}.x1y2z3_4.partial")
    write(source, out, settings=SETTINGS, workers=1)
    assert tree(out) == tree(straight[0])


def test_a_source_that_vanishes_midway_is_named_and_can_come_back(source, straight, tmp_path):
    gone, out = tmp_path / "set", tmp_path / "out"
    shutil.copytree(source, gone)

    def vanish(state):
        if state.done == 2:
            (gone / "train-00004.parquet").unlink(missing_ok=True)

    with pytest.raises(OSError, match=r"train-00004\.parquet cannot be read any more: .*No such file"):
        write(gone, out, settings=SETTINGS, workers=1, progress=vanish)
    assert not (out / "manifest.json").exists()
    with pytest.raises(ValueError, match=r"the source has changed since\): pass --overwrite"):
        write(gone, out, settings=SETTINGS, workers=1)
    shutil.copy(source / "train-00004.parquet", gone)
    write(gone, out, settings=SETTINGS, workers=1)
    assert records(out) == records(straight[0])


def test_what_is_complete_is_left_alone_and_other_settings_are_refused(source, tmp_path):
    out = tmp_path / "out"
    write(source, out, workers=1)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert write(source, out, workers=1).nothing_to_do
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    for settings, options in ((Settings(max_side=16), None), (Settings(), Options(questions=("what?",)))):
        with pytest.raises(ValueError, match="already holds 'train' of another source or of other settings"):
            write(source, out, settings=settings, options=options, workers=1)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    write(source, out, settings=Settings(split="more"), options=Options(), workers=1)
    assert (len(records(out)), len(records(out, "more"))) == (237, 237)
    assert {json.loads(line)["split"] for line in (out / "rejected.jsonl").open()} == {"train", "more"}


def test_overwriting_takes_the_old_validation_records_away_too(source, straight, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(straight[0], out)
    write(source, out, settings=Settings(max_side=16), workers=1, overwrite=True)
    with pytest.raises(ValueError, match="has no split 'validation'"):
        read_shards(out, "validation")
    assert len(records(out)) == 237 and not list(out.rglob("validation-*"))
    assert len(list((out / "index").iterdir())) == len(list(out.glob("*.array_record")))


def test_a_lost_shard_is_written_again(source, straight, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(straight[0], out)
    next(out.glob("train-*.array_record")).unlink()
    assert not write(source, out, settings=SETTINGS, workers=1).nothing_to_do
    assert tree(out) == tree(straight[0])


@pytest.mark.parametrize("shard_bytes", [1, 1500])  # one record a shard, so that whole shards vanish; or two records
def test_of_two_records_with_one_key_the_second_is_rejected(shard_bytes, tmp_path):
    def named(key, i):
        return Record(key, (b"bad" if key == "c" else encoded(i),), (("user", (0,)), ("assistant", (str(i),))))

    write_shards(tmp_path / "in", "train", [named(key, i) for i, key in enumerate("abacdbe")])
    summary = write(tmp_path / "in", tmp_path / "out", settings=Settings(shard_bytes=shard_bytes), workers=1)
    found = [(record.key, record.turns[1][1][0]) for record in records(tmp_path / "out")]
    assert found == [("a", "0"), ("b", "1"), ("d", "4"), ("e", "6")]
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").open()]
    assert [entry["key"] for entry in rejected] == ["a", "c", "b"]  # in the order of the source
    file = str(tmp_path / "in" / "train-00000-of-00001.array_record")
    assert rejected[0] == {
        "split": "train", "file": file, "key": "a", "reason": "an earlier record has the same key"
    }  # fmt: skip
    assert summary.rejected == 3 and summary.splits["train"]["records"] == summary.splits["train"]["images"] == 4
    shards = list((tmp_path / "out").glob("*.array_record"))
    assert len(shards) == len(list((tmp_path / "out" / "index").iterdir())) == summary.splits["train"]["shards"]
    for shard in shards:
        with np.load(tmp_path / "out" / "index" / f"{shard.name}.sizes.npz") as index:
            assert len(index["num_images"]) == ArrayRecordReader(str(shard)).num_records() > 0


def test_two_attempts_at_one_shard_do_not_write_to_one_file(tmp_path):
    shards = [Shard(tmp_path / "0.array_record") for _ in range(2)]
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == 2 and all(re.fullmatch(r"0\.array_record\.\w{8}\.partial", name) for name in names)
    for shard in shards:
        record = Record("a", (), (("user", ("?",)), ("assistant", ("!",))))
        shard.add(record, pack(record))
    assert shards[0].close() == shards[1].close()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["0.array_record"]


def test_equal_hashes_of_different_keys_are_no_duplicates(tmp_path):
    paths = [tmp_path / "0.array_record", tmp_path / "1.array_record"]
    for path, keys in zip(paths, (("a", "b"), ("c", "a")), strict=True):
        shard = Shard(path)
        for key in keys:
            record = Record(key, (), (("user", ("?",)), ("assistant", ("!",))))
            shard.add(record, pack(record))
        shard.close()
        save_keys(path, [(7, 0), (7, 1)])
    places = np.array([0, 1, 3, 2], np.uint64)
    late = duplicates._later_ones(np.array([7, 7, 7, 7], np.uint64), places, np.array([0, 2, 4]), paths)
    assert late.tolist() == [3]


def test_larger_images_are_shrunk_and_others_stay_byte_for_byte(tmp_path):
    images = [encoded(0, (200, 100)), encoded(1, (100, 100)), encoded(2, (100, 40)), encoded(3, (300, 400), "PNG")]
    parquet(tmp_path / "set", range(4), **{f"row{i}": row(i, image) for i, image in enumerate(images)})
    write(tmp_path / "set", tmp_path / "out", settings=Settings(max_side=100), workers=1)
    found = [record.images[0] for record in records(tmp_path / "out")]
    assert [PIL.Image.open(io.BytesIO(data)).size for data in found] == [(100, 50), (100, 100), (100, 40), (75, 100)]
    assert [PIL.Image.open(io.BytesIO(data)).format for data in found] == ["JPEG", "JPEG", "JPEG", "PNG"]
    assert found[1:3] == images[1:3]
    with np.load(next((tmp_path / "out" / "index").glob("*.sizes.npz"))) as index:
        assert list(zip(index["width"], index["height"], strict=True)) == [(100, 50), (100, 100), (100, 40), (75, 100)]


def test_verify_finds_what_headers_do_not_tell(tmp_path):
    cut = encoded(0, (200, 200))
    parquet(tmp_path / "set", range(3), row1=row(1, cut[: len(cut) // 2]))
    write(tmp_path / "set", tmp_path / "trusting", workers=1)
    summary = write(tmp_path / "set", tmp_path / "verified", settings=Settings(verify=True), workers=1)
    assert (len(records(tmp_path / "trusting")), len(records(tmp_path / "verified"))) == (3, 2)
    assert summary.rejected == 1


def test_a_source_without_one_usable_record_is_refused_and_leaves_only_its_reasons(tmp_path):
    parquet(tmp_path / "set", [0], row0=row(0, b"no picture"))
    with pytest.raises(ValueError, match=r"no record of .*set can be used: 1 entries were rejected, as in '"):
        write(tmp_path / "set", tmp_path / "out", workers=1)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) == 1


BAD_USE = {
    "a bucket": (["--output=gs://bucket/set"], "write to a local folder, then `gcloud storage cp"),
    "a file in the way": (["--output=FILE"], "is a file: choose a folder"),
    "a folder that cannot be": (["--output=/proc/none"], "/proc/none cannot be written to"),
    "a source that is not there": (["--source=/nowhere"], "there is no file or folder /nowhere"),
    "a share of all": (["--validation_share=1"], "--validation_share 1.0 must be"),
    "a split with a path": (["--split=../x"], "--split '../x'"),
    "an unreadable tokenizer": (["--tokenizer=FILE"], "FILE"),
    "no questions": (["--questions=FILE"], "holds no question"),
}


@pytest.mark.parametrize("case", BAD_USE)
def test_bad_use_is_one_line_and_writes_nothing(case, source, tmp_path, monkeypatch, capsys):
    from fastvlm_jax import cli

    flags, words = BAD_USE[case]
    (tmp_path / "FILE").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fastvlm", *command(source, "out")[3:], *flags])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 1 and not out and words in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


def test_a_source_for_too_many_shards_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("0.tar", "1.tar"):
        with (tmp_path / "set" / name).open("wb") as file:
            file.truncate(14 << 40)  # 28 TiB of nothing: over 99,999 times 256 MiB
    with pytest.raises(ValueError, match=r"^over 99,999 shards would be made of 31 TB: take --shard_mb 512$"):
        write(tmp_path / "set", tmp_path / "out", format="webdataset")
    assert not (tmp_path / "out").exists()


def test_two_writers_in_one_folder_are_refused(source, tmp_path):
    def second(state):
        with pytest.raises(ValueError, match="another process is writing to"):
            write(source, tmp_path / "out", settings=Settings(split="more"), workers=1)

    write(source, tmp_path / "out", workers=1, progress=second)
    assert len(records(tmp_path / "out")) == 237


def test_workers_start_without_jax():
    code = "import sys, fastvlm_jax.data.write.job, fastvlm_jax.data.readers.parquet; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
