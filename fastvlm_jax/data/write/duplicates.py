"""Drops records with repeated keys: the first record with a key is kept, later ones are rejected."""

import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from fastvlm_jax.data.record import Record
from fastvlm_jax.data.write.job import Job, save_result
from fastvlm_jax.data.write.shard import Shard, load_keys, load_pictures, read_record, save_keys, save_pictures


def drop_duplicates(jobs: Sequence[Job], done: Sequence[dict[str, Any]]) -> None:
    """Rewrites the shards of finished jobs that repeat a key of an earlier record, and updates `done`.

    Hashes of 8 bytes are compared for all records; where two are equal, the keys themselves are read and compared.
    """
    places = [(job, result, shard) for job, result in zip(jobs, done, strict=True) for shard in result["shards"]]
    paths = [pathlib.Path(job.folder) / shard["name"] for job, _, shard in places]
    if not paths:
        return
    keys = [load_keys(path) for path in paths]
    first = np.cumsum([0] + [len(rows) for rows in keys])
    # Place in the source: the shards of a job's splits hold its entries interleaved.
    places_of = [rows[:, 1] + np.uint64(job.number << 40) for rows, (job, *_) in zip(keys, places, strict=True)]
    late = _later_ones(np.concatenate(keys)[:, 0], np.concatenate(places_of), first, paths)
    changed = {}
    for number, (job, result, shard) in enumerate(places):
        start, stop = np.searchsorted(late, first[number : number + 2])
        rows = late[start:stop] - first[number]
        if len(rows):
            _rewrite(paths[number], job, result, shard, set(rows.tolist()))
            changed[job.number] = (job, result)
    for job, result in changed.values():
        result["shards"] = [shard for shard in result["shards"] if shard["records"]]
        save_result(job, result)


def _later_ones(hashes: np.ndarray, place: np.ndarray, first: np.ndarray, paths: list[pathlib.Path]) -> np.ndarray:
    """Returns the rows, counted over all shards, whose key a row with a lower place in the source has too."""
    order = np.lexsort((place, hashes))
    equal = hashes[order[1:]] == hashes[order[:-1]]
    late = []
    ends = np.flatnonzero(~np.append(equal, False))  # last row of each run of equal hashes
    starts = np.append(0, ends[:-1] + 1)
    for start, end in zip(starts[ends > starts], ends[ends > starts], strict=True):
        seen = set()
        for row in order[start : end + 1]:
            shard = int(np.searchsorted(first, row, side="right")) - 1
            ((record, _),) = _records(paths[shard], [int(row - first[shard])])
            if record.key in seen:
                late.append(row)
            seen.add(record.key)
    return np.array(sorted(late), np.int64)


def _records(path: pathlib.Path, rows: Iterable[int]) -> Iterator[tuple[Record, bytes]]:
    """Yields what `read_record` returns for some rows of a shard."""
    reader = ArrayRecordReader(str(path))
    try:
        for row in rows:
            yield read_record(reader, path, row)
    finally:
        reader.close()


def _rewrite(path: pathlib.Path, job: Job, result: dict, shard: dict, late: set[int]) -> None:
    """Writes a shard again without the rows in `late`, and adds these to the duplicates in `result`."""
    keys, kept = load_keys(path), Shard(path, job.settings.counter)
    try:
        for row, (record, data) in enumerate(_records(path, range(len(keys)))):
            if row in late:
                number = int(keys[row, 1])
                file = [name for name, start in result["firsts"] if start <= number][-1]
                reason = "an earlier record has the same key"
                result["duplicates"].append([number, file, record.key, reason])
            else:
                kept.add(record, data)
        shard.pop("features", None)
        shard.update(kept.close())
    except BaseException:
        kept.abandon()
        raise
    save_keys(path, [tuple(pair) for row, pair in enumerate(keys.tolist()) if row not in late])
    if job.settings.validation_share:
        gone = {int(keys[row, 1]) for row in late}
        save_pictures(path, [tuple(pair) for pair in load_pictures(path).tolist() if pair[0] not in gone])
