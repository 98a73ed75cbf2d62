"""Records to shards. A shard or manifest is under its final name only when it is whole."""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable

from array_record.python.array_record_module import ArrayRecordWriter

from fastvlm_jax.data.sources import MANIFEST, Record, incomplete_shards, pack, read_manifest


def write_shards(folder: str | os.PathLike, split: str, records: Iterable[Record], num_shards: int = 1) -> bool:
    """Writes one split; record i goes to shard `i % num_shards`, and they are read shard after shard.

    A split that is already complete is left as it is, and `records` is not read. One that was interrupted is redone.
    The manifest comes last: without it there is no dataset.

        FOLDER/train-00000-of-00002.array_record      FOLDER/manifest.json
        FOLDER/train-00001-of-00002.array_record        {"fingerprint", "splits": {"train": {"records", "shards": ...}}}

    Returns:
      True if it wrote, False if the split was there.
    """
    folder = pathlib.Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(folder)
    if split in manifest["splits"] and not incomplete_shards(folder, manifest, split):
        return False
    paths = [folder / f"{split}-{i:05d}-of-{num_shards:05d}.array_record" for i in range(num_shards)]
    partials = [path.with_name(path.name + ".partial") for path in paths]
    counts = [0] * num_shards
    try:
        # One record a group: random access decompresses nothing else.
        writers = [ArrayRecordWriter(str(partial), "group_size:1") for partial in partials]
        for i, record in enumerate(records):
            writers[i % num_shards].write(pack(record))
            counts[i % num_shards] += 1
        for writer in writers:
            writer.close()
        for partial, path in zip(partials, paths, strict=True):
            partial.replace(path)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
    shards = {
        path.name: {"records": count, "bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path, count in zip(paths, counts, strict=True)
    }
    manifest["splits"][split] = {"records": sum(counts), "shards": shards}
    manifest["fingerprint"] = hashlib.sha256(json.dumps(manifest["splits"], sort_keys=True).encode()).hexdigest()
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    partial.replace(folder / MANIFEST)
    return True


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
