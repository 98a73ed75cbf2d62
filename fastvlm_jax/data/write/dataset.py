"""Writes a source of any format as shards, with several processes; a write that was killed goes on when run again.

    parts ──grouped──> jobs ──processes──> OUTPUT/.train.writing/job-*      finished jobs are kept for the next run
                                             └─> drop repeated keys, settle what is validation
                                                   └─> OUTPUT/train-00000-of-00004.array_record, perhaps with .features
                                                       OUTPUT/index/train-00000-of-00004.array_record.*
                                                       OUTPUT/rejected.jsonl, then OUTPUT/manifest.json

The records in a shard depend on the source and the settings alone, not on the number of processes or on where an
earlier run was stopped. A split exists only when it has its entry in the manifest.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence

from etils import epath

from fastvlm_jax.data.readers import Options, Part, apart, shards
from fastvlm_jax.data.readers.joined import path_of
from fastvlm_jax.data.readers.recognise import check_options, recognise
from fastvlm_jax.data.record import Record, pack
from fastvlm_jax.data.sources import MANIFEST, incomplete_shards, read_manifest
from fastvlm_jax.data.write import ray_runner
from fastvlm_jax.data.write.duplicates import drop_duplicates
from fastvlm_jax.data.write.excluded import read_excluded
from fastvlm_jax.data.write.finalize import finalize, save_manifest
from fastvlm_jax.data.write.folder import local_folder, locked, locked_for_hosts
from fastvlm_jax.data.write.held_out import RULE
from fastvlm_jax.data.write.job import VALIDATION, Job, Settings, read_result
from fastvlm_jax.data.write.progress import Progress, run_jobs
from fastvlm_jax.data.write.settle import settle
from fastvlm_jax.data.write.shard import Shard
from fastvlm_jax.data.write.summary import Summary, summarise
from fastvlm_jax.data.write.workers import share_out
from fastvlm_jax.files import PARTIALS, json_digest, write_whole

_MAX_SHARDS = 99_999  # of a split: their names have five digits
_MAX_QUESTIONS = 1 << 20  # bytes of the file
_SMALL_FILES = 64 << 20  # bytes; whole files share a job until they reach this size together


def write(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    format: str = "auto",
    options: Options | None = None,
    settings: Settings | None = None,
    workers: int = 0,
    runner: str = "processes",
    address: str | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Writes a source as one split of the data set in the folder `output`, or two with `settings.validation_share`.

    If an earlier run was stopped, only the jobs that it did not finish are run. Other splits in the folder are kept.

    Args:
      source: file or folder, local or gs://.
      output: local folder; with Ray all nodes see it under this path.
      format: name in READERS of readers/recognise.py, or "auto" to recognise it.
      options: what the reader must know and cannot find in the source.
      settings: what is done to the records.
      workers: number of processes, or of Ray's tasks at once; 0 for one a core of the machine or the cluster.
      runner: who runs the jobs: "processes" of this machine, or "ray", a cluster's tasks.
      address: HOST:PORT of the Ray cluster; None for RAY_ADDRESS, or without it a cluster on this machine.
      overwrite: whether to replace a split of another source or other settings, or an unfinished write of one.
      progress: function that is called with the progress a few times a second.

    Returns:
      Summary of what the splits hold.

    Raises:
      FileNotFoundError: the source does not exist.
      ValueError: the format is unknown, the output is occupied, no record can be used, `settings.exclude`
        is no list of records, a worker process failed, or a node of the cluster cannot do its part.
      OSError: the output cannot be written, for example because the disk is full.
    """
    options, settings = options or Options(), settings or Settings()
    source, output = epath.Path(source).expanduser(), local_folder(output)
    _check(settings)
    _check_runner(runner, address)
    format = recognise(source) if format == "auto" else format
    check_options(format, options)
    parts = apart.parts(format, source, options)
    local = "://" not in os.fspath(source) and source.exists() and output.exists()
    if format == "shards" and not overwrite and local and output.samefile(os.fspath(source)):
        raise ValueError(f"--output {output} is the source: name another folder")
    sizes = _sizes(parts)
    _check_count(sum(sizes.values()), settings)
    described = {"format": format, "path": os.fspath(source)}
    described["fingerprint"] = _fingerprint(source, format, parts, sizes, options, settings)
    if settings.exclude:
        described["exclude"] = {"list": settings.exclude, "records": len(read_excluded(settings.exclude))}
    hosts = locked_for_hosts(output) if runner == "ray" else contextlib.nullcontext(lambda: None)
    with locked(output), hosts as check:
        folder = output / f".{settings.split}.writing"
        for stale in output.glob(PARTIALS):  # of a run that was killed while it finished
            stale.unlink()
        splits = [settings.split, *([VALIDATION] if settings.validation_share else [])]
        manifest = read_manifest(output)
        if _is_there(output, manifest, splits, described, overwrite):
            shutil.rmtree(folder, ignore_errors=True)  # leftover of a run that was killed at its very end
            return summarise(output, manifest, splits, nothing_to_do=True)
        _start(folder, described["fingerprint"], overwrite, output)
        jobs = [
            Job(number, format, tuple(group), options, settings, os.fspath(folder))
            for number, group in enumerate(_grouped(parts, sizes))
        ]
        if runner == "ray":
            share = functools.partial(
                ray_runner.share_out, workers=workers, address=address, folder=folder,
                sees=[os.fspath(source), *options.roots, options.pictures, settings.tokenizer, settings.exclude],
            )  # fmt: skip
        else:
            share = functools.partial(share_out, workers=workers or len(os.sched_getaffinity(0)))
        run_jobs(jobs, share, progress)
        check()
        done = [read_result(job) for job in jobs]
        drop_duplicates(jobs, done)
        if settings.validation_share:
            settle(jobs, done)
        finalize(output, manifest, splits, jobs, done, described)
        shutil.rmtree(folder)
        return summarise(output, manifest, splits, nothing_to_do=False)


def write_shards(folder: str | os.PathLike, split: str, records: Iterable[Record], num_shards: int = 1) -> bool:
    """Writes `records` as one split. Record i goes to shard `i % num_shards`; they are read shard after shard.

    A split that is already complete is left as it is, and `records` is not read. An interrupted split is written anew.

    Returns:
      True if the split was written, False if it was there already.
    """
    folder = local_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(folder)
    if split in manifest["splits"] and not incomplete_shards(folder, manifest, split):
        return False
    names = [f"{split}-{i:05d}-of-{num_shards:05d}.array_record" for i in range(num_shards)]
    for name in (*names, MANIFEST):
        for stale in folder.glob(f"{name}.*.partial"):  # of a run that was killed
            stale.unlink()
    shards: list[Shard] = []
    try:
        for name in names:
            shards.append(Shard(folder / name))
        for i, record in enumerate(records):
            shards[i % num_shards].add(record, pack(record))
        written = {shard.path.name: shard.close() for shard in shards}
    except BaseException:
        for shard in shards:
            shard.abandon()
        raise
    images = sum(shard.pop("images") for shard in written.values())
    records = sum(shard["records"] for shard in written.values())
    manifest["splits"][split] = {"records": records, "images": images, "rejected": 0, "shards": written}
    save_manifest(folder, manifest)
    return True


def read_questions(path: str | os.PathLike) -> tuple[str, ...]:
    """Returns the questions in a text file, one a line.

    Raises:
      FileNotFoundError: the file cannot be read.
      ValueError: the file is not text in UTF-8, or holds no question.
    """
    path = epath.Path(path).expanduser()
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_QUESTIONS).decode()
    except OSError as error:
        raise FileNotFoundError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not text in UTF-8: write one question a line") from error
    found = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not found:
        raise ValueError(f"{path} holds no question: write one a line")
    return found


def _check(settings: Settings) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_]+", settings.split):
        raise ValueError(f"--split {settings.split!r}: a split's name may hold letters, digits and _ only")
    if not 0 <= settings.validation_share < 1:
        raise ValueError(f"--validation_share {settings.validation_share} must be at least 0 and below 1")
    if settings.validation_share and settings.split == VALIDATION:
        raise ValueError("--validation_share moves records to the split validation: give the rest another --split")
    if settings.max_side < 0 or not 1 <= settings.quality <= 100 or settings.shard_bytes < 1:
        raise ValueError("--max_side must be 0 or more, --quality 1 to 100, the size of a shard at least 1 byte")
    if settings.exclude:
        read_excluded(settings.exclude)
    _ = settings.counter  # an unreadable tokenizer is an error now, not later in every process


def _check_count(size: int, settings: Settings) -> None:
    """Raises ValueError if a source of `size` bytes, stored as it is, makes more shards than their names count."""
    if size > _MAX_SHARDS * max(settings.shard_bytes, 1 << 20):  # a smaller shard ends behind its first record
        enough = 1 << (size // _MAX_SHARDS >> 20).bit_length()
        raise ValueError(f"over {_MAX_SHARDS:,} shards would be made of {size / 1e12:.0f} TB: take --shard_mb {enough}")


def _check_runner(runner: str, address: str | None) -> None:
    if runner not in ("processes", "ray"):
        raise ValueError(f"--runner {runner!r} is neither processes nor ray")
    if address and runner != "ray":
        raise ValueError(f"--address {address} names a Ray cluster: add --runner=ray")
    if runner == "ray":
        ray_runner.load()  # a missing package is an error now, not after the source is listed


def _sizes(parts: Sequence[Part]) -> dict[str, int]:
    """Returns the size in bytes of each file that has parts."""
    files = list(dict.fromkeys(part.path for part in parts))

    def size(file: str) -> int:
        try:
            return epath.Path(file).stat().length
        except OSError as error:
            raise FileNotFoundError(f"{file} cannot be read: {error.strerror or error}") from error

    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # each size is a round trip to a bucket
        return dict(zip(files, pool.map(size, files), strict=True))


def _grouped(parts: Sequence[Part], sizes: dict[str, int]) -> Iterator[list[Part]]:
    """Groups parts into jobs. A range of a file is a job; whole files share a job until they are enough for a shard.

    The smaller the source, the smaller the jobs, so that many processes have something to do.
    """
    limit = min(max(sum(sizes.values()) // 64, 1 << 20), _SMALL_FILES)
    group: list[Part] = []
    for part in parts:
        ranged = (part.start, part.stop) != (0, -1)
        if group and (ranged or sum(sizes[p.path] for p in group) + sizes[part.path] > limit):
            yield group
            group = []
        group.append(part)
        if ranged:
            yield group
            group = []
    if group:
        yield group


def _fingerprint(source, format: str, parts, sizes: dict[str, int], options: Options, settings: Settings) -> str:
    """Returns a digest of what decides the contents: the source's files and their sizes, the options, the settings."""
    kept = dataclasses.asdict(settings)
    for name in ("tokenizer", "template", "turns"):  # these concern the index alone, which can be made at any time
        del kept[name]
    if not settings.max_side:
        kept["quality"] = None
    start = os.fspath(source).rstrip("/")
    files = [[part.path.removeprefix(start), part.start, part.stop, sizes[part.path]] for part in parts]
    if settings.validation_share:
        kept["held_out"] = RULE
    del kept["exclude"]  # data sets written before there was this option keep their fingerprint
    if settings.exclude:
        kept["excluded"] = json_digest(read_excluded(settings.exclude))
    told = dataclasses.asdict(options)
    told["images"] = options.roots if len(options.roots) > 1 else "".join(options.roots)
    new = ("follow_links", "pictures", "synthetic_keys", "keep_augmentations", "keep_captions", "boxes")
    for name in new:  # data sets written before there were these options keep their fingerprint
        if getattr(options, name) == getattr(Options(), name):
            del told[name]
    if options.pictures:
        there = [path for part in parts if (path := path_of(part, options))]
        told["pictures"] = list(_sizes([Part(str(path)) for path in there]).items())
    if format == "shards" and (features := shards.features(source, options)):
        told["features"] = features
    return json_digest([format, files, told, kept])


def _is_there(output, manifest, splits: list[str], described: dict[str, str], overwrite: bool) -> bool:
    """Returns whether the splits are complete; raises ValueError if one exists that has another source or settings."""
    present = [split for split in splits if split in manifest["splits"]]
    same = [
        manifest["splits"][split].get("source", {}).get("fingerprint") == described["fingerprint"] for split in present
    ]
    if all(same):
        return len(present) == len(splits) and not any(incomplete_shards(output, manifest, s) for s in splits)
    if not overwrite:
        raise ValueError(
            f"{output} already holds {present[same.index(False)]!r} of another source or of other settings: "
            "choose another --output or --split, or pass --overwrite"
        )
    return False


def _start(folder: pathlib.Path, fingerprint: str, overwrite: bool, output: pathlib.Path) -> None:
    """Makes the folder to write in, or takes over the one that a stopped run left."""
    plan = folder / "plan"
    if plan.is_file() and plan.read_text() != fingerprint:
        if not overwrite:
            raise ValueError(
                f"{output} holds an unfinished write of another source or other settings (or the source has changed "
                "since): pass --overwrite to drop it, or choose another --output"
            )
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    for stale in folder.rglob("*.partial"):
        stale.unlink(missing_ok=True)  # its writer may live for a moment, on another host
    if not plan.is_file():
        write_whole(plan, fingerprint.encode())
