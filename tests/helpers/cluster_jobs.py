"""Jobs for workers of a Ray cluster, which import them by name: each attempt leaves a file in the job's folder."""

import os
import pathlib
import signal
import tempfile
from typing import NamedTuple


class Job(NamedTuple):
    name: str
    folder: str
    ends: str = "well"  # well, killed, or the name of an error


def work(job, report):
    with tempfile.NamedTemporaryFile(dir=job.folder, prefix=f"{job.name}-", delete=False):
        pass
    report(1, 10, 0)
    report(2, 0, 1)
    if job.ends == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif job.ends == "ValueError":
        raise ValueError("set.parquet cannot be read")
    elif job.ends == "OSError":
        raise OSError(28, "No space left on device", "/full/train-00000")
    elif job.ends == "KeyError":
        raise KeyError("image")


def attempts(folder):
    """Returns how often each job was begun."""
    names = [path.name.rpartition("-")[0] for path in pathlib.Path(folder).iterdir()]
    return {name: names.count(name) for name in names}
