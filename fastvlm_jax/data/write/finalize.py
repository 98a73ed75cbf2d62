"""Finishes a write: gives the shards and their index their names, lists rejected entries, and updates the manifest."""

import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

from fastvlm_jax.data.features import SUFFIX, beside
from fastvlm_jax.data.index import FOLDER as INDEX
from fastvlm_jax.data.rejected import FILE as REJECTED
from fastvlm_jax.data.rejected import split_of
from fastvlm_jax.data.sources import MANIFEST
from fastvlm_jax.data.write.excluded import MARK
from fastvlm_jax.data.write.job import Job
from fastvlm_jax.files import json_digest, whole_file, write_json


def finalize(
    output: pathlib.Path,
    manifest: dict[str, Any],
    splits: Sequence[str],
    jobs: Sequence[Job],
    done: Sequence[dict[str, Any]],
    source: dict[str, Any],
) -> None:
    """Adds the splits of finished jobs to the data set `output` and updates its manifest.

    If it is killed anywhere, the next run does it again: the jobs' own files are kept until it is done.

    Raises:
      ValueError: no job has a record.
    """
    rejected, excluded, example = _merge_rejected(output, splits[0], jobs, done)
    if not any(result["shards"] for result in done):
        raise ValueError(
            f"no record of {source['path']} can be used: "
            + (f"{rejected} entries were rejected, as in {example!r}" if rejected else "it has no entries")
            + ("; --images names the folder that the names of images begin in" if " is not in " in example else "")
        )
    _drop(output, manifest, splits)
    (output / INDEX).mkdir(exist_ok=True)
    index = _index_files(pathlib.Path(jobs[0].folder))
    for split in splits:
        shards = [
            (pathlib.Path(job.folder), shard)
            for job, result in zip(jobs, done, strict=True)
            for shard in result["shards"]
            if shard["split"] == split
        ]
        names = [f"{split}-{i:05d}-of-{len(shards):05d}.array_record" for i in range(len(shards))]
        for (folder, shard), name in zip(shards, names, strict=True):
            for file in index[shard["name"]]:
                _link(file, output / INDEX / file.name.replace(shard["name"], name))
            if "features" in shard:
                _link(pathlib.Path(beside(folder / shard["name"])), pathlib.Path(beside(output / name)))
            _link(folder / shard["name"], output / name)
        manifest["splits"][split] = {
            "records": sum(shard["records"] for _, shard in shards),
            "images": sum(shard["images"] for _, shard in shards),
            "rejected": rejected if split == splits[0] else 0,
            "shards": {
                name: {key: shard[key] for key in ("records", "bytes", "sha256", "features") if key in shard}
                for name, (_, shard) in zip(names, shards, strict=True)
            },
            "source": source,
        }
    if "exclude" in source:
        manifest["splits"][splits[0]]["excluded"] = excluded
    save_manifest(output, manifest)


def save_manifest(folder: pathlib.Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, with a fingerprint of the contents of its shards."""
    content = {name: [split["records"], split["shards"]] for name, split in manifest["splits"].items()}
    manifest["fingerprint"] = json_digest(content)
    write_json(folder / MANIFEST, manifest, sort_keys=True)


def _drop(output: pathlib.Path, manifest: dict[str, Any], splits: Sequence[str]) -> None:
    """Removes the splits that are written anew, and the validation split that an earlier write took out of them."""
    old = [manifest["splits"][split].get("source") for split in splits if split in manifest["splits"]]
    of_them = [split for split, entry in manifest["splits"].items() if entry.get("source") and entry["source"] in old]
    gone = {*splits, *of_them}
    if gone & manifest["splits"].keys():  # first the entries, then the files
        manifest["splits"] = {split: entry for split, entry in manifest["splits"].items() if split not in gone}
        save_manifest(output, manifest)
    for split in gone:
        for suffix in ("", SUFFIX):
            for stale in output.glob(f"{split}-?????-of-?????.array_record{suffix}"):
                stale.unlink()
        for stale in (output / INDEX).glob(f"{split}-?????-of-?????.array_record.*"):
            stale.unlink()


def _index_files(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Returns the index files of each shard of the jobs by its name, from one listing: there may be 100,000 of them."""
    found: dict[str, list[pathlib.Path]] = {}
    for file in (folder / INDEX).glob("*.npz"):  # a worker that died may have left partial ones
        shard, extension, _ = file.name.partition(".array_record")
        found.setdefault(shard + extension, []).append(file)
    return found


def _link(file: pathlib.Path, name: pathlib.Path) -> None:
    """Gives a file a second name; it keeps its first, so that the run after a kill finds it again."""
    try:
        os.link(file, name)
    except OSError:  # a file system without hard links
        with file.open("rb") as source, whole_file(name) as copy:
            shutil.copyfileobj(source, copy)


def _merge_rejected(output: pathlib.Path, split: str, jobs, done) -> tuple[int, int, str]:
    """Updates OUTPUT/rejected.jsonl: keeps the lines of other splits, and lists this split's in the source's order.

    Returns:
      Number of rejected entries of this split, how many of these --exclude left out, and the reason of the first.
    """
    path, count, excluded, example = output / REJECTED, 0, 0, ""
    with whole_file(path, "w") as file:
        if path.is_file():
            with path.open() as old:
                file.writelines(line for line in old if split_of(line) != split)
        for job, result in zip(jobs, done, strict=True):
            with (pathlib.Path(job.folder) / f"{job.name}.rejected.jsonl").open() as lines:
                entries = [*map(json.loads, lines), *result["duplicates"]]
            for _, name, key, reason in sorted(entries, key=lambda entry: entry[0]):
                file.write(json.dumps({"split": split, "file": name, "key": key, "reason": reason}) + "\n")
                example = example or reason
                excluded += reason.startswith(MARK)
            count += len(entries)
    return count, excluded, example
