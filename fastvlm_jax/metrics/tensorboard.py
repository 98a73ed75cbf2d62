"""Writes scalars as TensorBoard reads them: records of Event messages, framed as TFRecords with their checksums.

The writers of tensorboardX write in a thread of their own. On a full disk it dies, and its queue fills until the run
waits for ever. Here the thread that logs writes, and an error is an error.
"""

import pathlib
import socket
import struct
import time
from collections.abc import Mapping

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from fastvlm_jax.metrics.log_file import LogFile


class Board:
    """Writes the scalars of a run to a new file of the folder; events behind `step` of files before are hidden."""

    def __init__(self, folder: pathlib.Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = LogFile(folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}")
        now, restart = time.time(), SessionLog(status=SessionLog.START)
        start = [Event(wall_time=now, file_version="brain.Event:2")]
        start.append(Event(wall_time=now, step=step + 1, session_log=restart))
        self._file.append(b"".join(map(_record, start)))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends the scalars of a step."""
        now = time.time()
        events = [Event(wall_time=now, step=step, summary=scalar(key, value)) for key, value in scalars.items()]
        self._file.append(b"".join(map(_record, events)))

    def flush(self) -> None:
        """Raises OSError if the disk does not take what is not yet written."""
        self._file.flush()


def _record(event: Event) -> bytes:
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
