"""Writes the features of a shard's records to the file beside it; data/features.py describes and reads that file."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from fastvlm_jax.data.features import beside, checksum, describe, is_beside
from fastvlm_jax.data.record import Record
from fastvlm_jax.files import put_in_place, sha256


class FeaturesFile:
    """Takes the features out of a shard's records, to a file that gets its name only when it is complete."""

    def __init__(self, shard: pathlib.Path):
        self._path = pathlib.Path(beside(shard))
        self._partial = self._path.with_name(f"{self._path.name}.{os.getpid()}.partial")
        self._file, self._kind, self._rows = None, None, 0

    def add(self, record: Record) -> Record:
        """Returns a record that tells where its features lie; the record itself if none are of the file's kind.

        Raises:
          ValueError: its features lie beside the shard that it was read from.
        """
        teacher = record.extra.get("teacher")
        if not isinstance(teacher, dict):
            return record
        if any(map(is_beside, teacher.values())):
            raise ValueError(
                f"the features of record {record.key} are not in it but beside its shard: pass "
                "`whole(source[i], source.features_file(i))` of fastvlm_jax.data.features, not `source[i]`"
            )
        told = {name: self._take(stored, name) for name, stored in teacher.items()}
        if all(told[name] is stored for name, stored in teacher.items()):
            return record
        return dataclasses.replace(record, extra=record.extra | {"teacher": told})

    def close(self) -> dict[str, Any]:
        """Puts the file in place; returns {"features": its bytes and sha256}, or {} if no record needs it."""
        if self._file is None:
            self._path.unlink(missing_ok=True)  # of an earlier shard of this name
            return {}
        with _naming(self._path):
            self._file.close()
        told = {"bytes": self._partial.stat().st_size, "sha256": sha256(self._partial)}
        put_in_place(self._partial, self._path)
        return {"features": told}

    def abandon(self) -> None:
        """Deletes the unfinished file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # the error that led here is already on its way
                self._file.close()
            self._partial.unlink(missing_ok=True)

    def _take(self, stored: Any, name: str) -> Any:
        """Writes features of the file's kind; returns what the record is to hold in their place."""
        try:
            features = describe(stored, name)
        except ValueError:  # a run that asks for them will say why they are none
            return stored
        kind = features.dtype, features.width
        if not features.data or kind != (self._kind or kind):
            return stored
        with _naming(self._path):
            self._file = self._file or self._partial.open("wb")
            self._file.write(features.data)
        first, stride = self._rows, features.stride
        self._kind, self._rows = kind, first + features.rows
        crc32 = b"".join(checksum(features.data[at : at + stride]) for at in range(0, len(features.data), stride))
        return {"dtype": stored["dtype"], "shape": stored["shape"], "row": first, "crc32": crc32}


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Gives an OSError of the block the name of the file, which the system's error of a full disk lacks."""
    try:
        yield
    except OSError as error:
        error.filename = os.fspath(path)
        raise
