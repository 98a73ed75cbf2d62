"""A run's log on a disk that fails: it costs neither the run nor a row, and each file is named."""

import json
import struct

import pytest
from full_disk import files_of_at_most
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from fastvlm_jax.metrics.rows import read_metrics
from fastvlm_jax.metrics.writer import MetricsWriter


def crc32c(data):
    """Castagnoli's CRC, bit by bit (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def masked(data):
    """The checksum of a TFRecord: rotated by 15 bits, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def events(folder):
    """The events of all files of TensorBoard in a folder, every checksum verified."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            body = data[12 : 12 + length]
            assert struct.unpack("<I", data[8:12]) == (masked(data[:8]),)
            assert struct.unpack("<I", data[12 + length : 16 + length]) == (masked(body),)
            found.append(Event.FromString(body))
            data = data[16 + length :]
    return found


def scalars(folder):
    return [(event.step, value.tag, value.simple_value) for event in events(folder) for value in event.summary.value]


def test_the_checksum_of_the_tests_is_the_published_one():
    assert crc32c(b"123456789") == 0xE3069283


def test_a_full_disk_stops_no_run_and_costs_no_row_once_there_is_space(tmp_path, capsys):
    writer = MetricsWriter(tmp_path, "name", 0, 40)
    writer.write(1, {"loss": 1.5, "lr": 0.25})
    with files_of_at_most(150):
        for step in range(2, 40):  # a writer with a thread of its own waited for ever behind ten rows
            writer.write(step, {"loss": 1 / step, "lr": 0.25})
        with pytest.raises(OSError, match=r"File too large: '.*metrics\.jsonl'"):
            writer.flush()
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("name step")]
    assert len(told) == 2 and all("File too large" in line and "the run goes on" in line for line in told)
    assert sorted(line.removeprefix(f"{tmp_path}/").partition(".")[0] for line in told) == [
        "metrics", "tensorboard/events"
    ]  # fmt: skip
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]  # 150 bytes hold no third row, and no part of it
    writer.write(40, {"loss": 0.5, "lr": 0.25})
    writer.flush()
    writer.close()
    assert capsys.readouterr().err.count("is written to again, nothing is missing") == 2
    wanted = [(1, 1.5), *((step, 1 / step) for step in range(2, 40)), (40, 0.5)]
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == wanted
    drawn = [(step, value) for step, tag, value in scalars(tmp_path / "tensorboard") if tag == "loss"]
    assert drawn == [(step, pytest.approx(loss)) for step, loss in wanted]


def test_rows_that_never_reach_the_disk_are_told_at_the_end(tmp_path, capsys):
    writer = MetricsWriter(tmp_path, "name", 0, 3)
    with files_of_at_most(100):
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0})
        writer.close()
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"{tmp_path}/metrics.jsonl: File too large: ") and "the last rows are missing there" in told


def test_a_run_that_goes_on_drops_what_is_behind_its_step_and_hides_it_in_tensorboard(tmp_path):
    writer = MetricsWriter(tmp_path, "name", 0, 9)
    for step in range(1, 7):
        writer.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # killed here
    writer = MetricsWriter(tmp_path, "name", 4, 9)
    writer.write(5, {"loss": 50.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50)]
    starts = [e.step for e in events(tmp_path / "tensorboard") if e.session_log.status == SessionLog.START]
    assert starts == [1, 5]  # TensorBoard drops the events from this step on that it read before


def test_a_full_disk_at_the_start_loses_no_row_of_before(tmp_path):
    rows = [json.dumps({"step": step, "seconds": 1.0, "loss": 1.0}) + "\n" for step in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    with files_of_at_most(50), pytest.raises(OSError, match=r"File too large: '.*metrics\.jsonl'"):
        MetricsWriter(tmp_path, "name", 4, 9)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(rows)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
