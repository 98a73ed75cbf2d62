"""Files that appear whole or not at all, JSON, checksums, the cache folder."""

import errno
import gzip
import json
import os
import pathlib
import stat
import threading

import numpy as np
import pytest

from fastvlm_jax import files


def test_a_file_appears_whole_with_its_name_and_mode(tmp_path):
    path = tmp_path / "deep" / "x.json"
    files.write_json(path, {"b": 1, "a": [2]})
    assert path.read_text() == '{\n  "b": 1,\n  "a": [\n    2\n  ]\n}\n'
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="disk"), files.whole_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
        raise RuntimeError("disk")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_gzip_is_unpacked_up_to_a_limit():
    packed = gzip.compress(b"ab" * 9)
    assert files.gunzip(packed, 18) == b"ab" * 9
    with pytest.raises(ValueError, match="it is over 0 MB"):
        files.gunzip(packed, 17)
    for data, words in ((packed[:-1], "cut"), (packed + b"x", "follow"), (b"ab", "damaged"), (b"", "cut")):
        with pytest.raises(ValueError, match=words):
            files.gunzip(data, 18)


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*/x'$"), files.whole_file(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_writers_of_one_name_do_not_meet(tmp_path):
    """Two hosts write the same file at once; each file is whole, and one of them wins."""
    barrier, path = threading.Barrier(2), tmp_path / "x.npz"

    def write(number):
        with files.whole_file(path) as file:
            barrier.wait()
            np.savez(file, x=np.full(1000, number))
            barrier.wait()

    threads = [threading.Thread(target=write, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(np.load(path)["x"].tolist()) in ({1}, {2}) and list(tmp_path.iterdir()) == [path]


def test_checksums_are_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert files.sha256(tmp_path / "x") == known
    assert files.json_digest({"a": 1, "b": 2}) == files.json_digest(json.loads('{"b": 2, "a": 1}'))
    assert files.json_digest({"a": 1, "b": 2}) != files.json_digest({"a": 2, "b": 1})


@pytest.mark.parametrize("content, words", [("[1]", "holds no JSON object"), ("{", "is not readable JSON")])
def test_a_file_that_holds_no_object_is_named(tmp_path, content, words):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=f"x.json {words}"):
        files.read_object(tmp_path / "x.json")


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.delenv("FASTVLM_CACHE", raising=False)
    assert files.cache_folder() == pathlib.Path("/caches/fastvlm_jax")
    monkeypatch.setenv("FASTVLM_CACHE", "/mine")
    assert files.cache_folder() == pathlib.Path("/mine")
