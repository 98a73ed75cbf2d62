"""A source of any format to shards, by several processes, in steps that survive a kill.

    parts ──grouped──> jobs ──processes──> OUTPUT/.train.writing/job-*      finished jobs are kept when it is run again
                                             └─> repeated keys out ─> OUTPUT/train-00000-of-00004.array_record
                                                                     OUTPUT/index/train-00000-of-00004.array_record.*
                                                                     OUTPUT/rejected.jsonl, last OUTPUT/manifest.json

Which records a shard holds follows from the source and the settings alone: not from the number of processes, nor from
where an earlier run was stopped. Without its entry in the manifest there is no split.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence

from etils import epath

from fastvlm_jax.data.readers import Options, Part, reader, recognise
from fastvlm_jax.data.record import Record, pack
from fastvlm_jax.data.sources import incomplete_shards, read_manifest
from fastvlm_jax.data.write.duplicates import drop_duplicates
from fastvlm_jax.data.write.finalize import finalize, save_manifest
from fastvlm_jax.data.write.job import VALIDATION, Job, Settings, Shard, finished, read_result
from fastvlm_jax.data.write.job import run as run_job
from fastvlm_jax.data.write.summary import Summary, summarise
from fastvlm_jax.data.write.workers import share_out
from fastvlm_jax.files import json_digest, write_whole

_MAX_QUESTIONS = 1 << 20  # bytes
_SMALL_FILES = 64 << 20  # whole files share a job up to this size together


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a write is: jobs done of all, and what this run wrote."""

    done: int = 0
    jobs: int = 0
    records: int = 0
    bytes: int = 0
    rejected: int = 0


def write(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    format: str = "auto",
    options: Options | None = None,
    settings: Settings | None = None,
    workers: int = 0,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Writes a source as one split of the data set in the folder `output`, or two with `settings.validation_share`.

    A run that was stopped goes on with the jobs that are not finished. Other splits in the folder stay.

    Args:
      source: file or folder, local or gs://.
      output: local folder.
      format: a name in readers.READERS, or "auto".
      workers: processes; 0 for one a core.
      overwrite: replaces a split of another source or other settings, or what is left of writing one.
      progress: called a few times a second.

    Raises:
      FileNotFoundError: no such source.
      ValueError: a source of no known format, an occupied output, a record that no process could write.
      OSError: the disk is full, or the like.
    """
    options, settings = options or Options(), settings or Settings()
    source, output = epath.Path(source).expanduser(), _local(output)
    _check(settings)
    format = recognise(source) if format == "auto" else format
    parts = reader(format).parts(source, options)
    if format == "shards" and not overwrite and source.exists() and output.exists() and output.samefile(source):
        raise ValueError(f"--output {output} is the source: name another folder")
    sizes = _sizes(parts)
    described = {"format": format, "path": os.fspath(source)}
    described["fingerprint"] = _fingerprint(source, format, parts, sizes, options, settings)
    with _locked(output, settings.split) as folder:
        splits = [settings.split, *([VALIDATION] if settings.validation_share else [])]
        manifest = read_manifest(output)
        if _is_there(output, manifest, splits, described, overwrite):
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed at its very end
            return summarise(output, manifest, splits, nothing_to_do=True)
        _start(folder, described["fingerprint"], overwrite, output)
        jobs = [
            Job(number, format, tuple(group), options, settings, os.fspath(folder))
            for number, group in enumerate(_grouped(parts, sizes))
        ]
        _run(jobs, workers, progress)
        done = [read_result(job) for job in jobs]
        drop_duplicates(jobs, done)
        finalize(output, manifest, splits, jobs, done, described)
        shutil.rmtree(folder)
        return summarise(output, manifest, splits, nothing_to_do=False)


def write_shards(folder: str | os.PathLike, split: str, records: Iterable[Record], num_shards: int = 1) -> bool:
    """Writes one split of records at hand; record i goes to shard `i % num_shards`, they are read shard after shard.

    A split that is already complete is left as it is, and `records` is not read. One that was interrupted is redone.

    Returns:
      True if it wrote, False if the split was there.
    """
    folder = _local(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(folder)
    if split in manifest["splits"] and not incomplete_shards(folder, manifest, split):
        return False
    names = [f"{split}-{i:05d}-of-{num_shards:05d}.array_record" for i in range(num_shards)]
    for name in names:
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
    """Returns the lines of a text file, one question each; ValueError where there is none, or no text."""
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
        raise ValueError(f"--split {settings.split!r}: a split's name is of letters, digits and _")
    if not 0 <= settings.validation_share < 1:
        raise ValueError(f"--validation_share {settings.validation_share} must be at least 0 and below 1")
    if settings.validation_share and settings.split == VALIDATION:
        raise ValueError("--validation_share takes records out of another split than validation: change --split")
    if settings.max_side < 0 or not 1 <= settings.quality <= 100 or settings.shard_bytes < 1:
        raise ValueError("--max_side must be 0 or more, --quality 1 to 100, the size of a shard at least 1 byte")
    _ = settings.counter  # an unreadable tokenizer is told now, not by every process


def _local(output: str | os.PathLike) -> pathlib.Path:
    if "://" in os.fspath(output):
        raise ValueError(
            f"{output} is not local: write to a local folder, then `gcloud storage cp --recursive FOLDER {output}`"
        )
    output = pathlib.Path(output).expanduser()
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file: choose a folder")
    return output


def _sizes(parts: Sequence[Part]) -> dict[str, int]:
    """Bytes of each file that has parts."""
    files = list(dict.fromkeys(part.path for part in parts))

    def size(file: str) -> int:
        try:
            return epath.Path(file).stat().length
        except OSError as error:
            raise FileNotFoundError(f"{file} cannot be read: {error.strerror or error}") from error

    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # each is a round trip to a bucket
        return dict(zip(files, pool.map(size, files), strict=True))


def _grouped(parts: Sequence[Part], sizes: dict[str, int]) -> Iterator[list[Part]]:
    """Parts to jobs. A range of a file is a job; whole files share one until they make a decent shard.

    The less there is in all, the smaller the jobs: many processes then have something to do.
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
    """Stands for what decides the contents: the source's files and their sizes, the options, the settings."""
    kept = dataclasses.asdict(settings)
    for name in ("tokenizer", "template", "turns"):  # of the index alone, which can be made at any time
        del kept[name]
    if not settings.max_side:
        kept["quality"] = None
    start = os.fspath(source).rstrip("/")
    files = [[part.path.removeprefix(start), part.start, part.stop, sizes[part.path]] for part in parts]
    content = [format, files, dataclasses.asdict(options), kept]
    return json_digest(content)


@contextlib.contextmanager
def _locked(output: pathlib.Path, split: str) -> Iterator[pathlib.Path]:
    """The folder that `split` is written in, while no other process writes to `output`."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise OSError(f"{output} cannot be written to: {error.strerror or error}") from error
    try:
        with contextlib.suppress(PermissionError):  # some network file systems do not lock folders
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield output / f".{split}.writing"
    except BlockingIOError as error:
        raise ValueError(f"another process is writing to {output}: wait for it") from error
    finally:
        os.close(descriptor)


def _is_there(output, manifest, splits: list[str], described: dict[str, str], overwrite: bool) -> bool:
    """Whether the splits are complete; ValueError if they are and of something else."""
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
    """Makes the folder to write in, or takes up the one that a stopped run left."""
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
        stale.unlink()
    if not plan.is_file():
        write_whole(plan, fingerprint.encode())


def _run(jobs: list[Job], workers: int, progress: Callable[[Progress], None] | None) -> None:
    to_do = [job for job in jobs if finished(job) is None]
    state = Progress(len(jobs) - len(to_do), len(jobs))

    def told(job: Job, *counts: int) -> None:
        nonlocal state
        records, size, rejected = counts or (0, 0, 0)
        state = Progress(
            state.done + (not counts), state.jobs, state.records + records, state.bytes + size,
            state.rejected + rejected,
        )  # fmt: skip
        if progress:
            progress(state)

    if progress:
        progress(state)
    try:
        share_out(run_job, to_do, workers or len(os.sched_getaffinity(0)), told)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on from here") from None
