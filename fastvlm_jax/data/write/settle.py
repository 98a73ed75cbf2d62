"""Settles which records go to validation once all records are known, and moves those that stand in the wrong split."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from fastvlm_jax.data.features import beside
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.write.held_out import limit_of
from fastvlm_jax.data.write.job import VALIDATION, Job, JobShards, save_result
from fastvlm_jax.data.write.shard import load_keys, load_pictures, read_record


def settle(jobs: Sequence[Job], done: Sequence[dict[str, Any]]) -> None:
    """Writes the shards of finished jobs anew where a record must change its split, and updates `done`.

    A job has put each entry where its own pictures belong. That stands, but for entries that share a picture with
    entries of the other split, and for data sets so small that a split would be empty.
    """
    place, pictures, stands = [], [], []  # of each picture: number of job and entry, hash, whether it is in validation
    for job, result in zip(jobs, done, strict=True):
        for shard in result["shards"]:
            rows = load_pictures(pathlib.Path(job.folder) / shard["name"])
            place.append(rows[:, 0] + np.uint64(job.number << 40))
            pictures.append(rows[:, 1])
            stands.append(np.full(len(rows), shard["split"] == VALIDATION))
    if not place:
        return
    place, stands = np.concatenate(place), np.concatenate(stands)
    held_out = choose(place, np.concatenate(pictures), jobs[0].settings.validation_share)
    owner = place >> np.uint64(40)
    wrong = set(owner[held_out != stands].tolist())
    for job, result in zip(jobs, done, strict=True):
        if job.number in wrong:
            mine = slice(*np.searchsorted(owner, np.array([job.number, job.number + 1], np.uint64)))
            _write_again(job, result, set((place[mine][held_out[mine]] & np.uint64(2**40 - 1)).tolist()))


def choose(entries: np.ndarray, pictures: np.ndarray, share: float) -> np.ndarray:
    """Returns for each picture of each entry whether it goes to validation, bool [P]; see held_out.py.

    Entries that share pictures, also through others, are one group. A group with more pictures than the whole share of
    the data set stays in training. If that leaves validation empty, the smallest group goes there, of equal ones the
    one with the lowest lead; if it leaves training empty, the group with the highest lead stays. One group alone cannot
    be split: all of it stays in training.

    Args:
      entries: uint64 [P], the entry that each picture belongs to.
      pictures: uint64 [P], hash of each picture.
      share: fraction of the pictures for validation, above 0.
    """
    found, picture = np.unique(pictures, return_inverse=True)
    _, entry = np.unique(entries, return_inverse=True)
    _, group = np.unique(_connected(entry, picture, len(found)), return_inverse=True)  # of each picture in `found`
    order = np.lexsort((found, found & np.uint64(0xFFFFFFFF), group))  # as held_out.lead_of
    counts = np.bincount(group)
    lead = found[order[np.cumsum(counts) - counts]]
    chosen = (lead < np.uint64(limit_of(share))) & (counts <= max(share * len(found), 1))
    if len(counts) == 1:
        chosen[:] = False
    elif not chosen.any():
        chosen[np.lexsort((lead, counts))[0]] = True
    elif chosen.all():
        chosen[np.argmax(lead)] = False
    return chosen[group][picture]


def _connected(entry: np.ndarray, picture: np.ndarray, num_pictures: int) -> np.ndarray:
    """Returns a label of each picture, the lowest picture that it is connected with through entries that share some."""
    label = np.arange(num_pictures)
    while True:
        of_entry = np.full(int(entry.max()) + 1, num_pictures)
        np.minimum.at(of_entry, entry, label[picture])
        lower = label.copy()
        np.minimum.at(lower, picture, of_entry[entry])
        lower = lower[lower]  # leaps along chains
        if np.array_equal(lower, label):
            return label
        label = lower


def _write_again(job: Job, result: dict[str, Any], held_out: set[int]) -> None:
    """Writes the records of a job again, the entries in `held_out` to validation, and removes its shards of before."""
    folder, shards = pathlib.Path(job.folder), JobShards(job, "-settled")
    before = [folder / shard["name"] for shard in result["shards"]]
    try:
        for number, record, data in _in_order(before):
            shards.add(number, record, data, held_out=number in held_out)
        result["shards"] = shards.close()
    finally:
        shards.abandon()
    save_result(job, result)
    for path in {*before} - {folder / shard["name"] for shard in result["shards"]}:
        path.unlink()
        pathlib.Path(beside(path)).unlink(missing_ok=True)


def _in_order(paths: Sequence[pathlib.Path]) -> Iterator[tuple[int, Record, bytes]]:
    """Yields (number of the entry, record, packed record) of a job's shards, in the order of the source."""
    readers = [ArrayRecordReader(str(path)) for path in paths]
    try:
        numbers = [load_keys(path)[:, 1].tolist() for path in paths]
        rows = [(number, shard, row) for shard, column in enumerate(numbers) for row, number in enumerate(column)]
        for number, shard, row in sorted(rows):
            yield number, *read_record(readers[shard], paths[shard], row)
    finally:
        for reader in readers:
            reader.close()
