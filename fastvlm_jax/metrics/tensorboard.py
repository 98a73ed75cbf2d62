"""Writes numbers, texts and images as TensorBoard reads them: Event messages, framed as TFRecords with their checksums.

TensorBoard's own writer writes in a thread of its own, whose errors come late. Here the thread that logs writes, and an
error is an error.
"""

import io
import pathlib
import socket
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from fastvlm_jax import disk
from fastvlm_jax.images.decode import size_of
from fastvlm_jax.metrics.log_file import LogFile


class Board:
    """Writes what a run tells to a new file of the folder; events behind `step` of files before are hidden."""

    def __init__(self, folder: pathlib.Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = LogFile(folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}")
        now, restart = time.time(), SessionLog(status=SessionLog.START)
        start = [Event(wall_time=now, file_version="brain.Event:2")]
        start.append(Event(wall_time=now, step=step + 1, session_log=restart))
        self._append(start)
        self._shows_images = False

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends the scalars of a step."""
        now = time.time()
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in scalars.items()]
        self._append([Event(wall_time=now, step=step, summary=Summary(value=[value])) for value in values])

    def write_predictions(self, step: int, rows: Sequence[Mapping[str, Any]], folder: pathlib.Path) -> None:
        """Appends sample questions with their answers, and the first time their images, which stay the same.

        Args:
          rows: lines of predictions.jsonl.
          folder: folder that the names of the images start from.
        """
        summaries = [text_pb(f"predictions/{number}", _told(row)) for number, row in enumerate(rows, 1)]
        if not self._shows_images:
            names = {
                f"{number}/image_{i}": name
                for number, row in enumerate(rows, 1)
                for i, name in enumerate(row["images"], 1)
            }
            summaries += [_image(f"predictions/{tag}", folder / name) for tag, name in names.items()]
        self._shows_images = True
        now = time.time()
        self._append([Event(wall_time=now, step=step, summary=summary) for summary in summaries])

    def flush(self) -> None:
        """Raises OSError if the disk does not take what is not yet written."""
        self._file.flush()

    def _append(self, events: Sequence[Event]) -> None:
        records = io.BytesIO()
        writer = RecordWriter(records)
        for event in events:
            writer.write(event.SerializeToString())
        self._file.append(records.getvalue())


def _told(row: Mapping[str, Any]) -> str:
    """Returns question, answer and truth in Markdown; an indented text is shown as it is."""
    parts = {"question": row["question"], "answer": row["answer"], "truth": "\n".join(row["references"])}
    return "\n\n".join(f"{name}\n\n{textwrap.indent(words or ' ', '    ', str)}" for name, words in parts.items())


def _image(tag: str, path: pathlib.Path) -> Summary:
    """Returns the image of a file; nothing if the file cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        disk.tell(f"{disk.describe(error)}; the run goes on, and TensorBoard shows no such image")
        return Summary()
    width, height = size_of(data)
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
    return Summary(value=[Summary.Value(tag=tag, image=image)])
