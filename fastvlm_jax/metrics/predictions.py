"""Keeps the answers to a run's sample questions, time after time, beside the images that they are about.

predictions.jsonl     a line for each answer: {"step": 500, "id": "7", "question": "what colour?", "answer": "red",
                      "references": ["blue"], "score": 0.0, "images": ["predictions_images/2f0c9a61d0e5b7c4.jpg"]}
predictions_images/   the images, small, named by their contents
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from fastvlm_jax import disk
from fastvlm_jax.evaluate.benchmark import Result
from fastvlm_jax.evaluate.shown_images import write_images
from fastvlm_jax.metrics.log_file import LogFile
from fastvlm_jax.metrics.rows import keep_until

FILE = "predictions.jsonl"


class Predictions:
    """Writes answers of process 0 to a workdir; a disk that fails does not end the run.

    A run that goes on drops the lines behind the step it goes on from. The file is made with the first answers.

    Attributes:
      folder: the workdir.
      path: the file of answers in it.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        self.folder, self.path = workdir, workdir / FILE
        if self.path.exists():
            keep_until(self.path, step)
        self._rows = LogFile(self.path)

    def write(self, step: int, results: Sequence[Result]) -> list[dict[str, Any]]:
        """Appends the answers of a step, and returns their rows."""
        try:
            images = write_images(self.folder, results)
        except OSError as error:
            disk.tell(f"{disk.describe(error)}; the run goes on, and images of sample questions are missing")
            images = {}
        rows = [_row(step, result, images) for result in results]
        self._rows.append("".join(json.dumps(row) + "\n" for row in rows).encode())
        return rows

    def flush(self) -> None:
        """Raises OSError if the disk does not take what is not yet written."""
        self._rows.flush()


def _row(step: int, result: Result, images: dict[str, dict[str, Any]]) -> dict[str, Any]:
    shown = [images.get(picture.name, {}) for picture in result.row.pictures]
    return {
        "step": step,
        "id": _whole(result.row.id),
        "question": _whole(result.row.question),
        "answer": _whole(result.answer),
        "references": [_whole(text) for text in result.row.references or ()],
        "score": None if result.mark is None else float(result.mark.score),
        "images": [image["file"] for image in shown if "file" in image],
    }


def _whole(text: str) -> str:
    """Returns a text without lone surrogates, which UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()
