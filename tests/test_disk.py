"""What is wrong with a disk: real errors of the system and of TensorStore, in a line with the file and a mend."""

import errno
import io
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorstore
from full_disk import files_of_at_most

from fastvlm_jax import disk, files

AGAIN = "then run the same command again"


@pytest.fixture
def mounted(tmp_path):
    """A function that mounts a small file system in memory, which only root may."""
    folders = []

    def mount(name, options):
        (tmp_path / name).mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", tmp_path / name], capture_output=True)
        if done.returncode:
            pytest.skip("this user may not mount a file system")
        folders.append(tmp_path / name)
        return tmp_path / name

    yield mount
    for folder in folders:
        subprocess.run(["umount", folder], check=True)


def error_of(act):
    with pytest.raises(OSError) as caught:
        act()
    return disk.describe(caught.value)


def test_a_full_disk_one_without_inodes_and_one_that_is_read_only_each_get_their_mend(mounted):
    full, many, read_only = mounted("full", "size=64k"), mounted("many", "nr_inodes=4"), mounted("read", "ro")
    assert error_of(lambda: files.write_whole(full / "x", bytes(10**6))) == (
        f"{full}/x: No space left on device: make space on that disk, {AGAIN}"
    )
    for name in ("a", "b", "c"):
        (many / name).touch()
    assert error_of((many / "d").touch) == (
        f"{many}/d: its disk has no inode left for a new file: remove files there, of any size, {AGAIN}"
    )
    told = error_of((read_only / "x").mkdir)
    assert (
        told == f"{read_only}/x: Read-only file system: mount that disk for writing, {AGAIN}, or choose another folder"
    )


def test_errors_without_a_mend_or_a_file_keep_their_words(tmp_path):
    assert error_of((tmp_path / "none").read_bytes) == f"{tmp_path}/none: No such file or directory"
    assert disk.describe(OSError("the workdir was taken")) == "the workdir was taken"
    assert disk.describe(OSError(errno.EBADF, "Bad file descriptor", 7)) == str(
        OSError(errno.EBADF, "Bad file descriptor", 7)
    )


def test_what_tensorstore_says_of_a_disk_is_the_system_s_error(tmp_path):
    store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/array/"}}
    about = {"metadata": {"shape": [9999], "data_type": "uint8"}}
    array = tensorstore.open({**store, **about}, create=True).result()
    with files_of_at_most(100), pytest.raises(ValueError) as caught:
        array.write(np.random.default_rng(0).integers(0, 255, 9999, np.uint8)).result()
    found = disk.error_in(str(caught.value))
    assert found.errno == errno.EFBIG and found.strerror == "File too large"
    assert found.filename.startswith(f"{tmp_path}/array")


@pytest.mark.parametrize(
    "message, number, path",
    [
        (
            'RESOURCE_EXHAUSTED: Error writing "a/c/0" in OCDBT database at local file "/runs/a/checkpoints/8/": '
            'Failed writing: "/runs/a/checkpoints/8/d/f48c.__lock": Failed to write 803516 bytes to file 4: No space '
            "left on device [os_error_code='28']",
            errno.ENOSPC, "/runs/a/checkpoints/8/",
        ),
        ("No space left on device (os error 28)", errno.ENOSPC, None),
        ("RESOURCE_EXHAUSTED: /runs/a/host.xplane.pb; No space left on device", errno.ENOSPC, "/runs/a/host.xplane.pb"),
    ],
)  # fmt: skip
def test_the_file_of_a_library_s_message_is_found(message, number, path):
    found = disk.error_in(message)
    assert (found.errno, found.filename) == (number, path)


def test_a_device_s_memory_is_no_disk():
    assert disk.error_in("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17 bytes at /device:TPU:0") is None
    assert disk.error_in("my notes on 'No space left on device', /runs/a") is None


def test_an_append_is_whole_or_nothing(tmp_path):
    files.append(tmp_path / "x", b"first\n")
    with files_of_at_most(10), pytest.raises(OSError, match=f"File too large: '{tmp_path}/x'"):
        files.append(tmp_path / "x", b"second\n")  # 4 bytes of it reach the file
    assert (tmp_path / "x").read_bytes() == b"first\n"
    files.append(tmp_path / "x", b"second\n")
    assert (tmp_path / "x").read_bytes() == b"first\nsecond\n"
    with pytest.raises(FileNotFoundError, match="none/x"):
        files.append(tmp_path / "none" / "x", b"")
    if os.path.exists("/dev/full"):
        with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
            files.append("/dev/full", b"x")


def test_a_line_for_a_full_disk_is_lost_and_one_for_a_reader_that_is_gone_is_an_error(monkeypatch):
    with io.TextIOWrapper(open("/dev/full", "wb", 0), write_through=True) as full:
        monkeypatch.setattr(sys, "stderr", full)
        disk.tell("a line")
    read, write = os.pipe()
    os.close(read)
    with io.TextIOWrapper(open(write, "wb", 0), write_through=True) as gone, pytest.raises(BrokenPipeError):
        monkeypatch.setattr(sys, "stderr", gone)
        disk.tell("a line")
