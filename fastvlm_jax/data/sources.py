"""Records on disk, read in any order.

A dataset is a folder: shards `SPLIT-00000-of-00004.array_record` and a `manifest.json`, both made by write.py.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import grain
import msgpack

from fastvlm_jax.data.conversation import Turn

MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Record:
    """Encoded images and the conversation about them.

    Attributes:
      key: names the record in messages, such as "train/17".
      images: encoded files (JPEG, PNG ...), untouched.
      turns: (role, content) in order; content holds texts, and ints that number `images`.
    """

    key: str
    images: tuple[bytes, ...]
    turns: tuple[Turn, ...]


def pack(record: Record) -> bytes:
    """Returns the bytes of `record` as a shard holds them (msgpack)."""
    return msgpack.packb({"key": record.key, "images": record.images, "turns": record.turns})


def unpack(data: bytes) -> Record:
    """The inverse of `pack`; raises ValueError for anything that is not a record."""
    try:
        raw = msgpack.unpackb(data)
        turns = tuple((str(role), tuple(content)) for role, content in raw["turns"])
        record = Record(str(raw["key"]), tuple(raw["images"]), turns)
        numbers = [part for _, content in turns for part in content if not isinstance(part, str)]
        if all(isinstance(image, bytes) for image in record.images) and all(
            isinstance(number, int) and 0 <= number < len(record.images) for number in numbers
        ):
            return record
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise ValueError(f"not a record: {type(error).__name__} {error}") from error
    raise ValueError(f"record {record.key} names an image that it does not hold")


class RecordSource:
    """The records of one split: `len(source)`, `source[i] -> Record`; safe to read from several threads.

    Attributes:
      fingerprint: sha256 over the whole dataset's contents, hexadecimal.
    """

    def __init__(self, folder: pathlib.Path, split: str, shards: list[pathlib.Path], fingerprint: str):
        self._where = f"{folder} ({split})"
        try:
            self._raw = grain.sources.ArrayRecordDataSource([str(shard) for shard in shards])
        except Exception as error:
            raise ValueError(f"{self._where} is damaged ({_first_line(error)}): write it again") from error
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, index: int) -> Record:
        try:
            return unpack(self._raw[index])
        except Exception as error:  # the reader raises bare RuntimeErrors of many lines
            where = f"record {index} of {self._where}"
            raise ValueError(f"{where} is damaged ({_first_line(error)}): write it again") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """Returns the manifest of a dataset folder, or an empty one where there is none yet.

    Raises:
      ValueError: the file is not one that write.py made.
    """
    path = pathlib.Path(folder) / MANIFEST
    if not path.is_file():
        return {"splits": {}, "fingerprint": ""}
    try:
        manifest = json.loads(path.read_text())
        manifest["fingerprint"], manifest["splits"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: delete the folder and write the dataset again") from error
    return manifest


def incomplete_shards(folder: str | os.PathLike, manifest: dict[str, Any], split: str) -> list[str]:
    """Returns the shards of `split` that are missing or not of the size the manifest gives."""
    sizes = {name: shard["bytes"] for name, shard in manifest["splits"][split]["shards"].items()}
    paths = {name: pathlib.Path(folder) / name for name in sizes}
    return [name for name, path in paths.items() if not path.is_file() or path.stat().st_size != sizes[name]]


def read_shards(folder: str | os.PathLike, split: str) -> RecordSource:
    """Opens one split of a dataset folder.

    Raises:
      FileNotFoundError: no such folder, or it holds no complete dataset.
      ValueError: no such split, or shards that do not fit the manifest.
    """
    folder = pathlib.Path(folder).expanduser()
    manifest = read_manifest(folder)
    if not manifest["splits"]:
        found = f"{folder} holds no complete dataset" if folder.is_dir() else f"there is no dataset folder {folder}"
        raise FileNotFoundError(f"{found}: write one with `fastvlm data easy-vqa --output {folder}`")
    if split not in manifest["splits"]:
        raise ValueError(f"{folder} has no split {split!r}: it has {', '.join(sorted(manifest['splits']))}")
    if broken := incomplete_shards(folder, manifest, split):
        raise ValueError(f"{folder / broken[0]} is missing or cut short: write the dataset again")
    shards = [folder / name for name in manifest["splits"][split]["shards"]]
    return RecordSource(folder, split, shards, manifest["fingerprint"])
