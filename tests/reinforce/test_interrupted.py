"""Tests that a reinforcement that was stopped ends in the same bytes, and that a folder holds what one plan tells."""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import jax
import numpy as np
import pytest
from pictures import FORMATS
from small_pairs import write_pairs
from small_teacher import write_teacher

from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.reinforce import Settings, reinforce

COUNT = 20  # records, of which number 9 is none
SETTINGS = Settings(augmentations=3, image_size=16, tar_records=4, batch_size=4, workers=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pairs, one of which is damaged, and two teachers."""
    root = tmp_path_factory.mktemp("resume")
    write_pairs(root / "all", train=COUNT, validation=2)
    found = read_shards(root / "all", "train")
    damaged = Record("bad", (FORMATS["png"][:200],), found[9].turns)
    write_shards(root / "pairs", "train", [damaged if i == 9 else found[i] for i in range(COUNT)])
    write_teacher(root / "a", root / "all")
    write_teacher(root / "b", root / "all", features=5)
    return root


def run(root, output, settings=SETTINGS, teachers="a", source="pairs", **options):
    named = [str(root / name) for name in teachers]
    return reinforce(root / source, named, output, settings, devices=jax.devices()[:1], **options)


def tree(folder):
    paths = sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def straight(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "out"
    summary = run(root, folder)
    assert (summary.pairs, summary.rejected, summary.tars, summary.written) == (COUNT - 1, 1, 5, COUNT - 1)
    return folder


def test_a_straight_run_leaves_tars_their_index_and_the_two_lists(straight):
    names = [f"{i:08d}" for i in range(5)]
    expected = [f"{name}.tar" for name in names] + [f"index/{name}.json" for name in names]
    assert sorted(tree(straight)) == sorted([*expected, "reinforced.json", "rejected.jsonl"])
    assert (straight / "00000000.tar").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("every", [5, 7, 10])
def test_stopped_again_and_again_it_ends_in_the_same_bytes(root, straight, tmp_path, every):
    """Each run is stopped behind so many records, so that it ends one tar or two."""
    stops, summary = 0, None
    while summary is None:
        done, seen = len(list(tmp_path.glob("out/index/*.json"))), []

        def stop(state):
            seen.append(state)
            if len(seen) == every:
                raise KeyboardInterrupt

        try:
            summary = run(root, tmp_path / "out", progress=stop)
        except KeyboardInterrupt as error:
            assert str(error) == "stopped; the same command goes on from here"
            stops += 1
        assert seen[0].done == 4 * done + 1 and seen[-1].records == COUNT
    assert (stops, summary.pairs) == ({5: 4, 7: 4, 10: 2}[every], COUNT - 1)
    assert tree(tmp_path / "out") == tree(straight)


@pytest.mark.parametrize("workers, ahead", [(1, 4), (3, 2)])
def test_threads_and_a_failure_change_nothing(root, straight, tmp_path, workers, ahead):
    settings = dataclasses.replace(SETTINGS, workers=workers)

    def fail(state):
        if state.done == 10 + ahead:
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        run(root, tmp_path / "out", settings, progress=fail)
    assert not list(tmp_path.rglob("*.partial"))
    run(root, tmp_path / "out", settings)
    assert tree(tmp_path / "out") == tree(straight)


def damage(folder, what):
    if what == "partial":
        (folder / "00000009.tar.abcd1234.partial").write_bytes(b"x")
        (folder / "index" / "00000009.json.abcd1234.partial").write_bytes(b"x")
    elif what == "cut":
        os.truncate(folder / "00000002.tar", 1000)
    else:
        (folder / what).unlink()


@pytest.mark.parametrize(
    "what, written",
    [
        ("partial", 0),
        ("cut", 3),
        ("00000000.tar", 4),
        ("index/00000004.json", 4),
        ("rejected.jsonl", 0),
    ],
)
def test_what_is_missing_or_was_left_by_a_kill_is_mended(root, straight, tmp_path, what, written):
    shutil.copytree(straight, tmp_path / "out")
    kept = (straight / "00000003.tar").stat()
    os.utime(tmp_path / "out" / "00000003.tar", ns=(kept.st_atime_ns, kept.st_mtime_ns))
    damage(tmp_path / "out", what)
    summary = run(root, tmp_path / "out")
    assert summary.written == written and tree(tmp_path / "out") == tree(straight)
    assert (tmp_path / "out" / "00000003.tar").stat().st_mtime_ns == kept.st_mtime_ns
    assert summary.describe().startswith("nothing to do: ") == (not written)


OTHERS = {
    "seed": {"settings": dataclasses.replace(SETTINGS, seed=1)},
    "augmentations": {"settings": dataclasses.replace(SETTINGS, augmentations=2)},
    "size": {"settings": dataclasses.replace(SETTINGS, image_size=20)},
    "dtype": {"settings": dataclasses.replace(SETTINGS, dtype="bfloat16")},
    "records": {"settings": dataclasses.replace(SETTINGS, tar_records=10)},
    "teachers": {"teachers": "ab"},
    "source": {"source": "all"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_of_another_plan_is_refused(root, straight, tmp_path, name):
    before = tree(straight)
    with pytest.raises(ValueError, match="holds pairs of another source, by other teachers or with other settings"):
        run(root, straight, **OTHERS[name])
    assert tree(straight) == before


def test_overwrite_leaves_nothing_of_the_plan_before(root, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    run(root, tmp_path / "out", **OTHERS["records"], overwrite=True)
    run(root, tmp_path / "new", **OTHERS["records"])
    found = tree(tmp_path / "out")
    assert found.pop("notes.txt") and found == tree(tmp_path / "new") and len(found) == 6
    told = json.loads((tmp_path / "out" / "reinforced.json").read_text())
    assert told["tar_records"] == 10 and told["teachers"][0]["features"] == 12


def test_another_batch_size_goes_on_in_the_same_folder_and_changes_no_more_than_rounding(root, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "out")
    (tmp_path / "out" / "00000001.tar").unlink()
    assert run(root, tmp_path / "out", dataclasses.replace(SETTINGS, batch_size=7)).written == 4
    before, after = (members_of(folder / "00000001.tar") for folder in (straight, tmp_path / "out"))
    assert before.keys() == after.keys() and len(before) == 20
    for name in before:
        if not name.endswith(".npz"):
            assert before[name] == after[name]
            continue
        ours, theirs = (np.load(io.BytesIO(found[name])) for found in (before, after))
        for array in ours:
            np.testing.assert_allclose(ours[array], theirs[array], rtol=0, atol=1e-5)


def members_of(path):
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive.getmembers()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_tars_of_somebody_else_are_never_touched(root, tmp_path, overwrite):
    (tmp_path / "00000000.tar").write_bytes(b"theirs")
    with pytest.raises(ValueError, match=r"00000000.tar was not written by this command: choose another --output"):
        run(root, tmp_path, overwrite=overwrite)
    assert tree(tmp_path).keys() == {"00000000.tar"}


@pytest.mark.full
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_stopped_ends_in_the_same_bytes(root, tmp_path, how):
    """The whole program, on one device; its tars appear one after the other."""
    argv = [sys.executable, "-m", "fastvlm_jax", "data", "reinforce", f"--source={root / 'pairs'}", "--tar_records=1"]
    argv += [f"--teacher={root / 'a'}", "--augmentations=20", "--image_size=600", "--batch_size=4", "--workers=1"]
    environment = {**os.environ, "XLA_FLAGS": ""}
    process = subprocess.Popen(
        [*argv, f"--output={tmp_path / 'a'}"], env=environment, stderr=subprocess.PIPE, text=True
    )
    while len(list(tmp_path.glob("a/index/*.json"))) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(how)
    _, error = process.communicate()
    assert process.returncode == (130 if how == signal.SIGINT else -9)
    assert "stopped; the same command goes on from here" in error or how == signal.SIGKILL
    assert len(list(tmp_path.glob("a/index/*.json"))) < COUNT
    for folder in "ab":
        subprocess.run([*argv, f"--output={tmp_path / folder}"], env=environment, check=True, capture_output=True)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
