"""One process at a time in a folder: on this machine by the kernel's lock, on others by whether the file is touched."""

import errno
import fcntl
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from paths import ROOT

from fastvlm_jax import lock
from fastvlm_jax.lock import locked

WORK = "another process is training"
HOLDER = (
    "import pathlib, sys, time; from fastvlm_jax.lock import locked\n"
    "with locked(pathlib.Path(sys.argv[1]), ''):\n"
    "    print('held', flush=True); time.sleep(600)"
)


def owner(folder):
    return json.loads((folder / "lock").read_bytes() or b"{}")


def is_free(folder):
    """Whether the kernel's lock on the file can be had."""
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def elsewhere(folder, **changes):
    """Writes a lock of a process on another host."""
    folder.mkdir(exist_ok=True)
    there = {"host": "t1v-n-9", "boot": "x", "pid": 1, "since": "2026-01-02 03:04:05 UTC", **changes}
    (folder / "lock").write_text(json.dumps(there))


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def quick(monkeypatch):
    for name, seconds in {"WAIT_SECONDS": 0.2, "BEAT_SECONDS": 0.02, "STALE_SECONDS": 0.5}.items():
        monkeypatch.setattr(lock, name, seconds)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder tmp_path / "run"."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "run"], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_is_refused_with_the_name_of_the_first_and_the_folder_is_free_behind_it(tmp_path, quick):
    with locked(tmp_path / "run", WORK):
        assert not is_free(tmp_path / "run")
        assert owner(tmp_path / "run").items() >= {"host": platform.node(), "pid": os.getpid()}.items()
        who = rf"process {os.getpid()} on {platform.node()}, since 20\S+ \S+ UTC \(or what it started\)"
        with (
            pytest.raises(ValueError, match=rf"^{WORK} in {tmp_path}/run: {who}; wait"),
            locked(tmp_path / "run", WORK),
        ):
            pass
        assert owner(tmp_path / "run")["pid"] == os.getpid()
    assert is_free(tmp_path / "run") and owner(tmp_path / "run") == {}
    with locked(tmp_path / "run", WORK):
        pass


def test_a_killed_owner_is_noticed_at_once_and_a_frozen_one_lives(tmp_path, quick, holder, capsys):
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(ValueError, match=f"process {holder.pid} on "), locked(tmp_path / "run", WORK):
        pass
    holder.kill()
    holder.wait()
    begin = time.monotonic()
    with locked(tmp_path / "run", WORK):
        assert owner(tmp_path / "run")["pid"] == os.getpid()
    assert time.monotonic() - begin < lock.WAIT_SECONDS + 5
    assert f"is of process {holder.pid} on {platform.node()}" in (told := capsys.readouterr().err)
    assert "which has ended: taken over" in told and "watching" not in told


def test_an_owner_on_another_host_lives_as_long_as_the_file_is_touched(tmp_path, quick, monkeypatch, capsys):
    """Another host's clock may be wrong by years: only the change counts."""
    monkeypatch.setattr(lock, "STALE_SECONDS", 60.0)
    elsewhere(tmp_path)
    ended, year_2001 = threading.Event(), 10**9

    def touch():
        for second in range(10**6):
            if ended.wait(0.02):
                return
            os.utime(tmp_path / "lock", (year_2001 + second, year_2001 + second))

    thread = threading.Thread(target=touch)
    thread.start()
    with pytest.raises(ValueError, match="process 1 on t1v-n-9, since 2026-01-02 03:04:05 UTC"), locked(tmp_path, WORK):
        pass
    ended.set()
    thread.join()
    assert owner(tmp_path)["host"] == "t1v-n-9"
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.2)
    with locked(tmp_path, WORK):
        assert owner(tmp_path)["pid"] == os.getpid()
    assert "lock was not touched for 0.2 s: taken over" in capsys.readouterr().err


def test_where_files_cannot_be_locked_this_machine_s_own_lock_is_watched_too(tmp_path, quick, monkeypatch, capsys):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(lock, "STALE_SECONDS", 60.0)
    with locked(tmp_path, WORK):
        with pytest.raises(ValueError, match=f"process {os.getpid()} on "), locked(tmp_path, WORK):
            pass
        assert "watching for 60 s whether it lives" in capsys.readouterr().err


def test_who_loses_the_folder_to_another_is_told_and_leaves_the_other_s_lock_alone(tmp_path, quick):
    with locked(tmp_path, WORK) as held:
        held.check()
        elsewhere(tmp_path)

        def lost():
            try:
                held.check()
            except OSError as error:
                return str(error)

        wait_until(lost)
        assert lost().startswith(f"{tmp_path} was taken by process 1 on t1v-n-9, since")
    assert owner(tmp_path)["host"] == "t1v-n-9"
    with locked(tmp_path / "late", WORK):  # taken after the last beat
        elsewhere(tmp_path / "late")
    assert owner(tmp_path / "late")["host"] == "t1v-n-9"


def test_a_folder_that_vanishes_is_told(tmp_path, quick):
    with locked(tmp_path / "run", WORK) as held:
        shutil.rmtree(tmp_path / "run")
        wait_until(lambda: held._lost)
        with pytest.raises(OSError, match=f"^{tmp_path}/run/lock has vanished: nothing more can be saved"):
            held.check()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b'{"host": "t1', b"[]", b"\xff\x00", b"3"])
def test_a_torn_lock_is_watched_and_taken_over(tmp_path, quick, content, capsys):
    (tmp_path / "lock").write_bytes(content)
    with locked(tmp_path, WORK):
        assert owner(tmp_path)["pid"] == os.getpid()
    assert "is of another process: watching" in capsys.readouterr().err


def test_a_full_disk_is_told_with_the_name_of_the_lock_and_leaves_the_folder_free(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # a largest file size stands in for the full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        with pytest.raises(OSError, match=f"File too large: '{tmp_path}/lock'"), locked(tmp_path, WORK):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert is_free(tmp_path) and owner(tmp_path) == {}
