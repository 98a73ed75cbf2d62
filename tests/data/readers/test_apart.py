"""Files that keep PDFium or Arrow busy, or end the process: each costs its part of the source, and no more."""

import json
import os
import re
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath

from fastvlm_jax.data.readers import Options, Part, apart
from fastvlm_jax.data.readers.recognise import reader
from fastvlm_jax.data.record import Record, Rejected
from fastvlm_jax.data.write import write
from tests.helpers.pdf_files import pdf
from tests.helpers.pictures import PHOTO, encode

PNG = encode(PHOTO, format="PNG")
LINES = "".join(f"BT /F1 14 Tf 72 {700 - 20 * i} Td (the line {i} of a page) Tj ET\n" for i in range(5)).encode()


def entries(format, path, options=None):
    options = options or Options()
    parts = apart.parts(format, epath.Path(path), options)
    return [entry for part in parts for entry in apart.entries(format, part, options)]


def table(path, *captions, **options):
    pq.write_table(pa.table({"image": [PNG] * len(captions), "caption": list(captions)}), path, **options)
    return path


def test_parts_and_entries_are_those_of_the_reader(tmp_path):
    table(tmp_path / "a.parquet", "one", "two", "", row_group_size=2)
    (tmp_path / "a.pdf").write_bytes(pdf(LINES, b"", LINES, packed=True))
    for format in apart.FORMATS:
        path, options = epath.Path(tmp_path / f"a.{format}"), Options(questions=("what?", "which?"))
        parts = reader(format).parts(path, options)
        assert apart.parts(format, path, options) == parts
        expected = [entry for part in parts for entry in reader(format).read(part, options)]
        assert entries(format, path, options) == expected and {type(e) for e in expected} == {Record, Rejected}


def test_errors_are_those_of_the_reader(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*none\.pdf"):
        entries("pdf", tmp_path / "none.pdf")
    pq.write_table(pa.table({"number": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: .*expected are an image column"):
        entries("parquet", tmp_path / "a.parquet")


def test_page_of_a_million_drawing_commands_is_stopped_and_costs_the_rest_of_its_file(tmp_path, monkeypatch):
    source = tmp_path / "files"
    source.mkdir()
    (source / "a.pdf").write_bytes(pdf(LINES, LINES + b"0 0 m 600 700 l S\n" * 1_000_000, LINES, packed=True))
    (source / "b.pdf").write_bytes(pdf(LINES))
    assert (source / "a.pdf").stat().st_size < 100_000
    monkeypatch.setattr(apart, "SECONDS", 1)
    first, stopped, other = entries("pdf", source)
    assert (first.key, other.key) == ("files/a.pdf/1", "files/b.pdf/1")
    assert stopped == Rejected(
        str(source / "a.pdf"), "a.pdf/0+1",
        "it needs more than 1 s of processor time: this entry and what follows it in the part are left out",
    )  # fmt: skip


def test_page_of_a_table_that_asks_for_too_much_memory_is_refused(tmp_path, monkeypatch):
    table(tmp_path / "a.parquet", "x" * (64 << 20), compression="zstd", use_dictionary=False, write_statistics=False)
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    monkeypatch.setattr(apart, "MEMORY", 50 << 20)
    (refused,) = entries("parquet", tmp_path / "a.parquet")
    assert refused.key == f"{tmp_path.name}/a/0"
    assert re.search("row group 0 cannot be read: (MemoryError|malloc of size .* failed)", refused.reason)
    monkeypatch.setattr(apart, "MEMORY", 6 << 30)
    (whole,) = entries("parquet", tmp_path / "a.parquet")
    assert len(whole.turns[1][1][0]) == 64 << 20


def test_process_that_is_killed_costs_a_part_and_the_next_has_another(tmp_path):
    path = table(tmp_path / "a.parquet", *map(str, range(100)))
    (part,) = apart.parts("parquet", epath.Path(path), Options())
    (child,) = apart._idle
    found = apart.entries("parquet", part, Options())
    next(found)
    os.kill(child.process.pid, signal.SIGKILL)
    *_, last = found
    assert last.key.startswith("a.parquet/0+") and "the process that read it ended with status -9" in last.reason
    assert len(list(apart.entries("parquet", Part(str(path)), Options()))) == 100


def test_a_source_of_such_files_is_written_without_them(tmp_path, monkeypatch):
    source = tmp_path / "files"
    source.mkdir()
    (source / "a.pdf").write_bytes(pdf(LINES + b"0 0 m 600 700 l S\n" * 1_000_000, packed=True))
    (source / "b.pdf").write_bytes(pdf(LINES))
    monkeypatch.setattr(apart, "SECONDS", 1)
    write(source, tmp_path / "out", workers=1)
    (line,) = (tmp_path / "out/rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "a.pdf/0+0"
    assert sorted(os.listdir(tmp_path)) == ["files", "out"]
