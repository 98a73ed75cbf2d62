"""Opens the shards of a data set and reads their records in any order.

A data set is a folder, local or gs://: shards `SPLIT-00000-of-00004.array_record`, perhaps with features of teachers
beside them (features.py), a `manifest.json` and a folder `index`, all written by data/write/.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath

from fastvlm_jax.data.features import beside
from fastvlm_jax.data.record import Record, unpack
from fastvlm_jax.files import read_small

MANIFEST = "manifest.json"


class _Shard(NamedTuple):
    """Describes a whole shard in ArrayRecord's terms, so that its records are counted without opening it."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class RecordSource:
    """Reads the records of one split: `len(source)`, `source[i] -> Record`; safe to use from several threads.

    Attributes:
      folder: folder of the data set.
      split: name of the split.
      shards: number of records of each shard, by path, in order.
      fingerprint: SHA-256 over the contents of the whole data set, hexadecimal.
    """

    def __init__(self, folder: epath.Path, split: str, shards: dict[epath.Path, int], fingerprint: str):
        self.folder, self.split, self.shards, self.fingerprint = folder, split, shards, fingerprint
        self._ends, self._paths = np.cumsum(list(shards.values())), list(shards)
        parts = [_Shard(os.fspath(path), 0, count, count) for path, count in shards.items() if count]
        self._raw = ArrayRecordDataSource(parts) if parts else ()

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, index: int) -> Record:
        """Returns record `index`; its features of teachers may lie beside its shard, see `features_file`.

        Raises:
          IndexError: there is no such record.
          ValueError: the record is damaged; the message names the shard and the record.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            return unpack(self._raw[index])
        except Exception as error:  # ArrayRecord raises plain RuntimeErrors of many lines
            raise ValueError(
                f"{self.where(index)} is damaged ({_first_line(error)}): write the data set again"
            ) from error

    def where(self, index: int) -> str:
        """Returns where record `index` is stored, for messages: "FOLDER/train-00000-of-00002.array_record record 7"."""
        shard = self._shard(index)
        number = index - int(self._ends[shard] - self.shards[self._paths[shard]])
        return f"{self._paths[shard]} record {number}"

    def features_file(self, index: int) -> str:
        """Returns the path of the file with the features of record `index`, if they are not in the record itself."""
        return beside(self._paths[self._shard(index)])

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """Returns the manifest of a data set folder, or an empty one if the folder has none.

    Raises:
      ValueError: the file is damaged or of another format; the message names it.
    """
    path = epath.Path(folder) / MANIFEST
    if not path.is_file():
        return {"splits": {}, "fingerprint": ""}
    try:
        manifest = json.loads(read_small(path))
        for split in manifest["splits"].values():
            for name, shard in split["shards"].items():
                if name != epath.Path(name).name or not 0 <= int(shard["records"]) <= int(shard["bytes"]):
                    raise ValueError(f"shard {name!r}")
                if "features" in shard and int(shard["features"]["bytes"]) < 1:
                    raise ValueError(f"features of {name!r}")
        if not isinstance(manifest["fingerprint"], str):
            raise ValueError("fingerprint")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path} is damaged: delete the folder and write the dataset again") from error
    return manifest


def files_of(manifest: dict[str, Any], split: str) -> dict[str, dict[str, Any]]:
    """Returns what the manifest tells of each file of a split, by name: its "bytes" and its "sha256"."""
    files = {}
    for name, shard in manifest["splits"][split]["shards"].items():
        files[name] = shard
        if "features" in shard:
            files[beside(name)] = shard["features"]
    return files


def incomplete_shards(folder: str | os.PathLike, manifest: dict[str, Any], split: str) -> list[str]:
    """Returns the names of the files of `split` that are missing or whose size differs from the manifest's."""
    sizes = {name: file["bytes"] for name, file in files_of(manifest, split).items()}

    def whole(name: str) -> bool:
        try:
            return (epath.Path(folder) / name).stat().length == sizes[name]
        except OSError:
            return False

    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # each file is a round trip to a bucket
        return [name for name, fine in zip(sizes, pool.map(whole, sizes), strict=True) if not fine]


def read_shards(folder: str | os.PathLike, split: str, only: str | None = None) -> RecordSource:
    """Opens one split of a data set folder, or only its shard named `only`.

    Raises:
      FileNotFoundError: there is no such folder, or it holds no complete data set.
      ValueError: the folder has no such split, or a shard does not match the manifest.
    """
    folder = epath.Path(folder).expanduser()
    manifest = read_manifest(folder)
    if not manifest["splits"]:
        found = f"{folder} holds no complete dataset" if folder.is_dir() else f"there is no dataset folder {folder}"
        raise FileNotFoundError(f"{found}: write one with `fastvlm data write --source PATH --output {folder}`")
    if split not in manifest["splits"]:
        raise ValueError(f"{folder} has no split {split!r}: it has {', '.join(sorted(manifest['splits']))}")
    if broken := incomplete_shards(folder, manifest, split):
        raise ValueError(f"{folder / broken[0]} is missing or not as it was written: write the dataset again")
    shards = manifest["splits"][split]["shards"]
    counts = {folder / name: shard["records"] for name, shard in shards.items() if only in (None, name)}
    return RecordSource(folder, split, counts, manifest["fingerprint"])


def fingerprint(sources: Sequence[RecordSource]) -> str:
    """Returns the fingerprint of one data set, or a combined one for several."""
    if len(sources) == 1:
        return sources[0].fingerprint
    return hashlib.sha256(" ".join(source.fingerprint for source in sources).encode()).hexdigest()


def contents_of(sources: Sequence[RecordSource]) -> list[dict[str, Any]]:
    """Returns {"fingerprint", "records": {split: number}} of each data set, which tells a data set that was changed."""
    found = []
    for source in sources:
        splits = read_manifest(source.folder)["splits"]
        counts = {name: sum(shard["records"] for shard in split["shards"].values()) for name, split in splits.items()}
        found.append({"fingerprint": source.fingerprint, "records": counts})
    return found
