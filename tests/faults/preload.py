"""Builds the library of preload.c, and the environment that makes it watch or disturb a run's file operations."""

import collections
import functools
import os
import pathlib
import shutil
import subprocess

WRITES = "open write fsync rename mkdir"  # what a full or failing disk refuses
READS = "read"


class Skipped(Exception):
    """Raised where this machine cannot inject a fault; the message says why."""


@functools.cache
def library(base: pathlib.Path) -> pathlib.Path | None:
    """Compiles the library into `base`; None where there is no C compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    source, target = pathlib.Path(__file__).with_suffix(".c"), base / "preload.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", target, source, "-ldl"], check=True)
    return target


def watching(base: pathlib.Path, below: pathlib.Path, log: pathlib.Path, kinds=f"{READS} {WRITES}", **settings):
    """Returns the environment of a run whose operations below a folder are written to `log`; {} without a compiler.

    Args:
      settings: at, count (FAULT_FOR), percent, seed, error, seconds; see preload.c.
    """
    if library(base) is None:
        return {}
    if "count" in settings:
        settings["for"] = settings.pop("count")
    named = {"below": below, "log": log, "kinds": kinds, **settings}
    return {"LD_PRELOAD": str(library(base)), **{f"FAULT_{key.upper()}": str(value) for key, value in named.items()}}


def striking(base: pathlib.Path, below: pathlib.Path, log: pathlib.Path, kinds: str, **settings):
    """Returns the environment of a run whose operations are struck as `settings` say; see `watching`."""
    if library(base) is None:
        raise Skipped("there is no C compiler")
    return watching(base, below, log, kinds, **settings)


def count(log: pathlib.Path, below: pathlib.Path, kinds: str) -> int:
    """Returns how many operations of these kinds below a folder the busiest process of a log did."""
    if not log.exists():
        raise Skipped("there is no C compiler")
    found = collections.Counter()
    for line in log.read_text().splitlines():
        _, process, kind, path = line.split(" ", 3)
        if kind in kinds.split() and pathlib.Path(path).is_relative_to(below):
            found[process] += 1
    return max(found.values())


def struck(log: pathlib.Path) -> str:
    """Returns the first operation that was struck, as "write PATH"; "" if none was."""
    for line in log.read_text().splitlines() if log.exists() else ():
        what, _, kind, path = line.split(" ", 3)
        if what == "struck":
            return f"{kind} {path}"
    return ""
