import errno
import os
import re
import resource
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from small_state import small_mesh, small_state

from fastvlm_jax import checkpoint, distributed
from fastvlm_jax.checkpoint import saving
from fastvlm_jax.checkpoint.saving import find_steps


@pytest.fixture
def mesh():
    return small_mesh(jax.devices()[:1])


def folders(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize("late", [1, None])
def test_processes_wait_for_a_checkpoint_that_one_sees_late(monkeypatch, tmp_path, late):
    """Process 1 of 2, on a network file system, sees step 8 after `late` looks, or never."""
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    sleeps = []

    def sleep(seconds):
        sleeps.append(seconds)
        if len(sleeps) == late:
            (tmp_path / "checkpoints" / "8").mkdir()

    monkeypatch.setattr(distributed, "exchange", lambda name, own: [[4, 8], own])
    monkeypatch.setattr(time, "sleep", sleep)
    if late:
        assert find_steps(tmp_path) == [4, 8]
    else:
        with pytest.raises(ValueError, match="process 1 does not see the checkpoint of step 8, which process 0 does"):
            find_steps(tmp_path)


def test_a_checkpoint_that_comes_late_stays_in_the_place_of_the_nth():
    assert checkpoint.Retention(1, every=4).removed([3, 5, 7, 8, 10]) == [3, 7]


@pytest.mark.parametrize(
    "retention, kept",
    [
        (checkpoint.Retention(1), "6"),
        (checkpoint.Retention(2), "5 6"),
        (checkpoint.Retention(1, every=2), "2 4 6"),
        (checkpoint.Retention(2, best=lambda: 3), "3 5 6"),
        (checkpoint.Retention(9), "1 2 3 4 5 6"),
        (checkpoint.Retention(1, held=lambda: True), "1 2 3 4 5 6"),
    ],
)
def test_the_latest_the_best_and_every_nth_checkpoint_stay(mesh, tmp_path, retention, kept):
    checkpointer = checkpoint.open_checkpointer(tmp_path, retention)
    for step in range(1, 7):
        checkpoint.save(checkpointer, small_state(mesh, step, rows=8), step, lineage={})
    checkpointer.close()
    assert folders(tmp_path) == kept.split() == list(map(str, checkpointer.steps))


def test_a_checkpoint_that_somebody_removed_to_make_space_is_not_missed(mesh, tmp_path):
    checkpointer = checkpoint.open_checkpointer(tmp_path, checkpoint.Retention(1))
    checkpoint.save(checkpointer, small_state(mesh, 1, rows=8), 1, lineage={})
    checkpointer.wait()
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    checkpoint.save(checkpointer, small_state(mesh, 2, rows=8), 2, lineage={})
    checkpointer.close()
    assert folders(tmp_path) == ["2"] and checkpointer.steps == [2]


def test_what_killed_saves_and_removals_left_is_removed_and_damaged_ones_stay(tmp_path):
    for name in ("2", "4.orbax-checkpoint-tmp", "1.removed", "3.damaged"):
        (tmp_path / "checkpoints" / name / "model").mkdir(parents=True)
    assert checkpoint.open_checkpointer(tmp_path, checkpoint.Retention(2)).steps == [2]
    assert folders(tmp_path) == ["2", "3.damaged"]


def test_a_save_that_failed_is_raised_with_the_reason_of_the_disk(mesh, tmp_path):
    """Files of this process may hold 4 kB, as on a full disk; the operating system says so, not this test."""
    checkpointer = checkpoint.open_checkpointer(tmp_path, checkpoint.Retention(2))
    checkpoint.save(checkpointer, small_state(mesh, 1), 1, lineage={})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    while checkpointer.saving is not None and not checkpointer.saving.done():
        checkpoint.raise_failed(checkpointer)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        checkpoint.save(checkpointer, small_state(mesh, 2, rows=4096), 2, lineage={})
        with pytest.raises(OSError) as failed:
            while True:
                checkpoint.raise_failed(checkpointer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (failed.value.errno, failed.value.filename) == (errno.EFBIG, str(tmp_path / "checkpoints" / "2"))
    said = f"{os.strerror(errno.EFBIG)}; this checkpoint was not written, the last one is of step 1"
    assert failed.value.strerror == said
    checkpointer.close()  # it is raised once
    checkpointer = checkpoint.open_checkpointer(tmp_path, checkpoint.Retention(2))
    checkpoint.save(checkpointer, small_state(mesh, 2, rows=4096), 2, lineage={})
    checkpointer.close()
    assert folders(tmp_path) == ["1", "2"]


def test_a_disk_that_takes_no_folder_is_told_at_once_and_leaves_no_thread_that_waits(mesh, tmp_path):
    """Orbax's threads would hold up the end of the process until they have waited for the folder for minutes."""
    (tmp_path / "checkpoints").touch()  # what is no folder takes none, as a disk without inodes
    checkpointer = checkpoint.open_checkpointer(tmp_path, checkpoint.Retention(2))
    before = set(threading.enumerate())
    with pytest.raises(FileExistsError, match="this checkpoint was not written, there is none before it"):
        checkpoint.save(checkpointer, small_state(mesh, 1), 1, lineage={})
    assert not [thread for thread in set(threading.enumerate()) - before if not thread.daemon]
    checkpointer.close()
    assert checkpointer.steps == []


def test_a_workdir_that_vanishes_is_told_in_our_words(mesh, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    checkpointer = checkpoint.open_checkpointer(workdir, checkpoint.Retention(2))
    checkpoint.save(checkpointer, small_state(mesh, 1), 1, lineage={})
    checkpointer.wait()
    shutil.rmtree(workdir)
    checkpointer.steps.append(2)
    failed = saving.not_written(checkpointer, ValueError("No ArrayMetadata found in checkpoint"))
    assert failed.filename == str(workdir / "checkpoints" / "2")
    said = "the workdir is no longer there; this checkpoint was not written, the last one is of step 1"
    assert failed.strerror == said


def test_a_state_that_is_not_finite_is_not_saved(mesh, tmp_path):
    checkpointer = checkpoint.open_checkpointer(tmp_path, checkpoint.Retention(2))
    state = small_state(mesh, 1)
    bad = state.replace(batch_stats={"vision": {"mean": state.batch_stats["vision"]["mean"].at[3].set(jnp.nan)}})
    with pytest.raises(FloatingPointError, match=re.escape("batch_stats.vision.mean first")):
        checkpoint.save(checkpointer, bad, 1, lineage={})
    checkpointer.close()
    assert checkpointer.steps == [] and not list(tmp_path.rglob("*/1"))
