"""Tries every fault in turn for as long as wanted, and prints what was kept and what was broken; see __init__.py."""

import argparse
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

from tests.faults import bad_numbers, damage, disks, files, kills, processes
from tests.faults.compare import Broken
from tests.faults.preload import Skipped
from tests.faults.runs import rng_of

ROOMS = (kills, disks, damage, bad_numbers, processes, files)
FAULTS = {fault.__name__: fault for room in ROOMS for fault in room.FAULTS}


class Trial(NamedTuple):
    """Tells how a trial went: the fault, its seed, "kept", "broken" or "skipped", what happened, and seconds."""

    fault: str
    seed: int
    result: str
    what: str
    seconds: float


def main() -> None:
    """Runs the trials; exits with status 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=0, help="how long to go on; 0 tries each fault once")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=FAULTS, metavar="FAULT", help="faults to try")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first round; the next has the next number")
    parser.add_argument("--folder", type=pathlib.Path, help="where to train; broken trials stay there")
    options = parser.parse_args()
    folder = options.folder or pathlib.Path(tempfile.mkdtemp(prefix="faults-"))
    trials: list[Trial] = []
    base, seed, end = folder / "shared", options.seed, time.monotonic() + 60 * options.minutes
    base.mkdir(parents=True)
    while seed == options.seed or time.monotonic() < end:
        for name in options.only:
            if seed == options.seed or time.monotonic() < end:
                trials.append(attempt(FAULTS[name], seed, base, folder / f"{name}-{seed}"))
                print(f"{trials[-1].result:8}--only {name} --seed {seed}: {trials[-1].what}", flush=True)
        seed += 1
    print(table(trials))
    broken = any(trial.result == "broken" for trial in trials)
    if not broken:
        shutil.rmtree(folder)
    sys.exit(broken)


def attempt(fault: Callable, seed: int, base: pathlib.Path, folder: pathlib.Path) -> Trial:
    """Tries a fault with a seed; its folder is removed unless a promise was broken."""
    folder.mkdir()
    begin, result = time.monotonic(), "kept"
    try:
        what = fault(base, folder, rng_of(fault, seed))
    except Skipped as skipped:
        result, what = "skipped", str(skipped)
    except Broken as broken:
        result, what = "broken", str(broken)
    except Exception as error:  # such as a file that is missing; it must not end hours of trials
        result, what = "broken", f"{type(error).__name__}: {error}"
    if result != "broken":
        shutil.rmtree(folder)
    what = " ".join(what.replace(f"{folder}/", "").split())
    return Trial(fault.__name__, seed, result, what, time.monotonic() - begin)


def table(trials: list[Trial]) -> str:
    """Returns a row for each fault, in Markdown, and below it the trials that broke a promise."""
    lines = ["", "| fault | tried | kept | broken | skipped | seconds a trial |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(trial.fault for trial in trials):
        own = [trial for trial in trials if trial.fault == name]
        counts = [sum(trial.result == result for trial in own) for result in ("kept", "broken", "skipped")]
        seconds = sum(trial.seconds for trial in own) / len(own)
        lines.append(f"| {name} | {len(own)} | {' | '.join(map(str, counts))} | {seconds:.0f} |")
    broken = [trial for trial in trials if trial.result == "broken"]
    return "\n".join([*lines, "", *(f"--only {t.fault} --seed {t.seed}: {t.what}" for t in broken)])


if __name__ == "__main__":
    main()
