"""Keeps the answers of an evaluation while it runs, so that it can be killed and started again.

    docvqa-paper.journal-0.jsonl      a file for each process, one line an answer, written out after every batch
    {"key": "8c1f...", "id": "337", "text": "1/8/93", "images": ["98ceaf199bddfea3"]}

The key is a digest of all that the answer depends on: the model, what the benchmark's files say of the row, its images,
the protocol, the conversation and the longest answer. So a journal may hold answers of several models, any number of
processes can go on with it, and a benchmark takes the answers that another which it is a part of already has, as
pope-random those of pope.
"""

import contextlib
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from fastvlm_jax import distributed
from fastvlm_jax.evaluate import fingerprint
from fastvlm_jax.evaluate.answers import Answer, exchange_name
from fastvlm_jax.evaluate.benchmark import Benchmark, Protocol
from fastvlm_jax.evaluate.questions import Question
from fastvlm_jax.files import json_digest


class Journal:
    """Holds the journal of one benchmark and protocol in a folder, for one model."""

    def __init__(self, folder: os.PathLike, benchmark: Benchmark, protocol: Protocol, model: str):
        """Opens the journal; nothing is written yet.

        Args:
          folder: folder of the results.
          model: fingerprint of the model; see fingerprint.of_model.
        """
        self._folder, self._protocol = pathlib.Path(folder), protocol.name
        self._name = f"{benchmark.name}-{protocol.name}"
        self._run = [model, protocol.name, protocol.version]
        self._keys: list[str] = []
        self._file: io.FileIO | None = None

    def known(self, questions: Sequence[Question], max_tokens: int) -> dict[int, Answer]:
        """Returns the answers that it holds, by the number of the question, the same in all processes."""
        rows = fingerprint.of_rows([question.row for question in questions])
        self._keys = [
            json_digest([*self._run, max_tokens, row, question.turns, [p.name for p in question.pictures]])[:32]
            for row, question in zip(rows, questions, strict=True)
        ]
        held = self._read()
        found = {number: held[key] for number, key in enumerate(self._keys) if key in held}
        # All must agree on what is missing: the others add what process 0 cannot see, on disks of their own.
        (first, *_) = distributed.exchange(exchange_name("journal"), found if jax.process_index() == 0 else None)
        first = {int(number): Answer(*answer) for number, answer in first.items()}
        more = {number: answer for number, answer in found.items() if number not in first}
        for values in distributed.exchange(exchange_name("journal"), more):
            first |= {int(number): Answer(*answer) for number, answer in values.items() if int(number) not in first}
        return {number: Answer(text, tuple(images)) for number, (text, images) in first.items()}

    def append(self, questions: Sequence[Question], answers: Mapping[int, Answer]) -> None:
        """Writes the answers of a batch, by the numbers of `known`'s questions, and hands them to the system."""
        if not answers:
            return
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{self._name}.journal-{jax.process_index()}.jsonl"
            torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
            self._file = path.open("ab", buffering=0)
            if torn:  # the line that was being written when the process was killed
                self._write(b"\n")
        lines = [
            {"key": self._keys[number], "id": questions[number].row.id, **answer._asdict()}
            for number, answer in answers.items()
        ]
        self._write("".join(json.dumps(line) + "\n" for line in lines).encode())

    def _write(self, data: bytes) -> None:
        """Appends bytes at once, so that another process that goes on with the same file tears no line of a batch."""
        left = memoryview(data)
        while left:
            try:
                left = left[self._file.write(left) :]
            except OSError as error:  # a full disk, whose error names no file
                error.filename = self._file.name
                raise

    def close(self) -> None:
        """Closes the file of this process."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self) -> dict[str, Answer]:
        """Returns the answers in all files that this process can see, by their keys; torn lines are passed over."""
        held: dict[str, Answer] = {}
        for path in sorted(self._folder.glob(f"*-{self._protocol}.journal-*.jsonl")):
            for line in path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    held.setdefault(*_entry(json.loads(line)))
        return held


def _entry(line: dict[str, Any]) -> tuple[str, Answer]:
    key, text, images = line["key"], line["text"], line["images"]
    if not isinstance(key, str) or not isinstance(text, str) or not all(isinstance(image, str) for image in images):
        raise ValueError("not a line of a journal")
    return key, Answer(text, tuple(images))
