"""A few mutations of every kind of file, always the same; `python -m tests.faults` tries thousands of others."""

import random
import subprocess

import pytest

from tests.faults import files
from tests.faults.originals import KINDS
from tests.faults.watched import Watch


def test_files_of_strangers_are_read_or_refused_in_a_line(tmp_path):
    told = files.campaign(list(KINDS), tmp_path, random.Random(0), 12 * len(KINDS))
    assert told.startswith("132 mutations, ")


def outside(folder, out):
    (out.parent.parent / "outside.txt").write_text("x")
    return []


def unnamed(folder, out):
    raise ValueError("something is wrong")


def two_lines(folder, out):
    raise ValueError(f"{folder} is wrong\nin two ways")


def traceback(folder, out):
    return [][0]


def secret(folder, out):
    open("/etc/passwd").close()
    return []


def program(folder, out):
    subprocess.run(["true"], check=True)
    return []


def large(folder, out):
    return [str(len(b"x" * (100 << 20)))]


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (outside, "done outside: ['written: "), (unnamed, "not one line with the file: 'something is wrong'"),
        (two_lines, "not one line"), (traceback, "IndexError"), (secret, "done outside: ['read: /etc/passwd'"),
        (program, "subprocess.Popen"), (large, " MB"),
    ],
)  # fmt: skip
def test_promises_that_a_reader_breaks_are_told(tmp_path, monkeypatch, use, words):
    monkeypatch.setattr(files, "MEMORY", 50)
    judged = files.judge(tmp_path, {"a": b"x"}, use, Watch(tmp_path / "case"))
    assert words in judged["bad"], judged


def test_a_reader_that_keeps_them_is_not_blamed(tmp_path):
    def use(folder, out):
        out.mkdir()
        (out / "b").write_bytes((folder / "a").read_bytes())
        return ["a line"]

    assert files.judge(tmp_path, {"a": b"x"}, use, Watch(tmp_path / "case")) | {"seconds": 0, "mb": 0} == {
        "bad": "", "refused": True, "seconds": 0, "mb": 0
    }  # fmt: skip
