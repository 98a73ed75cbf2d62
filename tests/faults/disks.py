"""Takes the disk away from runs: full, failing, read-only, vanished. Once it is back, the same command goes on.

What is promised: a run never hangs; it either ends with one line that names the file and the disk's reason, or goes on
without its log and says so; the last checkpoint stays as it was.
"""

import contextlib
import errno
import importlib.util
import os
import pathlib
import random
import shutil
import subprocess
from collections.abc import Iterator

from tests.faults import compare, preload, runs
from tests.faults.compare import expect
from tests.faults.preload import WRITES, Skipped
from tests.faults.runs import STEPS, Ended

# What disks and network file systems say when they fail.
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.EACCES)


def full_disk_for_good(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Refuses every write from any one on, as a full disk does: "No space left on device"."""
    kinds = WRITES.replace("rename ", "")  # a full disk can still rename
    at = rng.randint(1, preload.count(base / "straight.log", runs.straight(base), kinds))
    return _disturb(base, folder, kinds, at=at, error=errno.ENOSPC)


def one_failing_write(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Lets one operation fail, or a few in a row, with any error of a disk."""
    at = rng.randint(1, preload.count(base / "straight.log", runs.straight(base), WRITES))
    return _disturb(base, folder, WRITES, at=at, count=rng.choice([1, 1, 3, 10]), error=rng.choice(ERRORS))


def failing_writes_by_chance(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Lets each operation fail with a chance of 1 to 20 percent."""
    chance = dict(percent=rng.choice([1, 2, 5, 20]), seed=rng.randrange(1 << 30))
    return _disturb(base, folder, WRITES, error=rng.choice(ERRORS), **chance)


def full_tmpfs(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Trains on a tmpfs that is too small, or has too few inodes, then makes it larger."""
    return _fill(base, folder, rng)


def full_tmpfs_with_wandb(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Does the same while Weights & Biases, a program that the preloaded library does not reach, writes there too."""
    if importlib.util.find_spec("wandb") is None:
        raise Skipped("wandb is not installed")
    return _fill(base, folder, rng, "--config.wandb=faults", environment={"WANDB_MODE": "offline"})


def vanished_workdir(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Moves the workdir away while the run trains, as an unmounted file system does, and back again."""
    workdir, away = folder / "run", folder / "away"
    run, step = runs.train(base, workdir), rng.randint(1, STEPS - 2)
    run.until(lambda: compare.has_step(workdir, step))
    workdir.rename(away)
    (ended,) = run.end()
    said = _told(ended, "")
    shutil.rmtree(workdir, ignore_errors=True)  # what the run may have begun anew in its place
    away.rename(workdir)
    runs.check_continued(base, workdir, compare.saved(workdir))
    return f"after step {step}: {said}"


def _fill(base: pathlib.Path, folder: pathlib.Path, rng: random.Random, *flags: str, environment=None) -> str:
    files = list(runs.straight(base).rglob("*"))
    space = sum(path.stat().st_size for path in files)
    limit = rng.choice([f"size={4096 + int(space * rng.random())}", f"nr_inodes={rng.randint(3, len(files))}"])
    with mounted(folder / "run", limit) as workdir:
        (ended,) = runs.train(base, workdir, *flags, environment=environment).end()
        said = _told(ended, f"{os.strerror(errno.ENOSPC)}|no inode left")
        subprocess.run(["mount", "-o", "remount,size=1g,nr_inodes=100000", workdir], check=True)
        runs.check_continued(base, workdir, compare.saved(workdir))
    return f"{limit}: {said}"


def _disturb(base: pathlib.Path, folder: pathlib.Path, kinds: str, **settings: int) -> str:
    """Trains with failing operations, checks how the run ended and what is left, and continues it."""
    workdir, log = folder / "run", folder / "operations"
    environment = preload.striking(base, workdir, log, kinds, **settings)
    (ended,) = runs.train(base, workdir, environment=environment).end()
    if not (struck := preload.struck(log)):
        return "nothing struck"
    said = _told(ended, os.strerror(settings["error"]))
    runs.check_continued(base, workdir, compare.saved(workdir))
    return f"{struck}: {said}"


def _told(ended: Ended, because: str) -> str:
    """Checks that a run said why it ended, or, if it went on to its end, that it did so without a traceback."""
    if ended.status == 0:
        expect("Traceback" not in ended.text, f"it went on, with a traceback: {ended.text[-1500:]}")
        return "went on to its end"
    return ended.refusal(because)


@contextlib.contextmanager
def mounted(folder: pathlib.Path, limit: str) -> Iterator[pathlib.Path]:
    """Mounts a tmpfs with a limit at `folder`; Skipped where that is not allowed."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", limit, "none", folder], capture_output=True, text=True)
    if done.returncode:
        raise Skipped(f"no tmpfs can be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


FAULTS = [
    full_disk_for_good, one_failing_write, failing_writes_by_chance, full_tmpfs, full_tmpfs_with_wandb,
    vanished_workdir,
]  # fmt: skip
