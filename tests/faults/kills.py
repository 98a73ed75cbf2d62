"""Kills runs with SIGKILL at every kind of moment, or asks them to stop with SIGTERM, and continues them."""

import pathlib
import random
import re
import time

from tests.faults import compare, preload, runs
from tests.faults.compare import expect
from tests.faults.preload import READS, WRITES
from tests.faults.runs import STEPS, Run

STOPPED = 75  # the exit status of a run that was asked to stop, has saved, and wants to be started again


def killed_in_a_step(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Kills a run shortly after it has told of a step, up to three times, then lets it end."""
    workdir, steps = folder / "run", sorted(rng.sample(range(1, STEPS), rng.randint(1, 3)))
    for step in steps:
        run = runs.train(base, workdir)
        run.until(lambda: compare.has_step(workdir, step))
        time.sleep(rng.uniform(0, 0.1))
        run.kill()
    before = compare.saved(workdir)
    runs.check_continued(base, workdir, before)
    return f"after the steps {steps}, with the checkpoints {before}"


def killed_at_any_time(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Kills a run after a random part of the time that it takes, from Python's start on."""
    workdir, seconds = folder / "run", rng.uniform(0, 8)
    run, begin = runs.train(base, workdir), time.monotonic()
    run.until(lambda: time.monotonic() - begin > seconds)
    run.kill()
    before = compare.saved(workdir)
    runs.check_continued(base, workdir, before)
    return f"after {seconds:.1f} s, with the checkpoints {before}"


def killed_in_a_save(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Kills a run at any file operation below its folder of checkpoints."""
    return _killed_at_operation(base, folder, rng, "checkpoints")


def killed_at_any_write(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Kills a run at any operation that changes its workdir, from the first folder that it makes on."""
    return _killed_at_operation(base, folder, rng, "")


def killed_in_a_restore(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Kills a run that continues while it reads its checkpoint."""
    workdir, log, at = folder / "run", folder / "operations", rng.randint(1, 40)
    runs.half_done(base, workdir)
    before = compare.saved(workdir)
    environment = preload.striking(base, workdir / "checkpoints", log, READS, at=at)
    runs.train(base, workdir, environment=environment).end()
    expect(set(before) <= set(compare.saved(workdir)), f"of the checkpoints {before} {compare.saved(workdir)} are left")
    runs.check_continued(base, workdir, compare.saved(workdir))
    return preload.struck(log) or f"less than {at} reads"


def killed_in_a_hand_over(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Kills a second stage while it reads the weights of the first one and makes its workdir."""
    parent, log, at = runs.straight(base), folder / "operations", rng.randint(1, 30)
    flags = [f"--config.parent={parent}", f"--config.steps={STEPS // 2}"]
    second = runs.straight(base, "second", *flags)
    below, kinds = rng.choice([(parent, READS), (folder / "run", WRITES)])
    environment = preload.striking(base, below, log, kinds, at=at)
    runs.train(base, folder / "run", *flags, environment=environment).end()
    runs.go_on(base, folder / "run", *flags)
    compare.check_same(folder / "run", second)
    return preload.struck(log) or f"less than {at} operations"


def killed_while_writing_data(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Kills `fastvlm data write` at any operation that changes its output, and compares every file in the end."""
    flags = ["--source", runs.source(base), "--validation_share=0.25", "--workers=1"]

    def write(output: pathlib.Path, environment: dict[str, str]) -> runs.Ended:
        command = [runs.FASTVLM, 1, "data", "write", *flags, "--output", output]
        return Run(output.parent, [command], environment).end()[0]

    straight, log = base / "data_undisturbed", base / "data.log"
    if not straight.exists():
        write(straight, preload.watching(base, straight, log))
    at = rng.randint(1, preload.count(log, straight, WRITES))
    environment = preload.striking(base, folder / "data", folder / "operations", WRITES, at=at)
    write(folder / "data", environment)
    ended = write(folder / "data", {})
    expect(ended.status == 0, f"continued, it ended with status {ended.status}: {ended.text[-1500:]}")
    mine, theirs = (
        {str(p.relative_to(data)): p.read_bytes() for p in data.rglob("*") if p.is_file()}
        for data in (folder / "data", straight)
    )
    differ = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    expect(not differ, f"the files {differ} differ from those of a write that was not killed")
    return preload.struck(folder / "operations")


def terminated(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Asks a run to stop with SIGTERM after any step; it must save that step or the next, and go on behind it."""
    workdir = folder / "run"
    run, step = runs.train(base, workdir), rng.randint(1, STEPS - 1)
    run.until(lambda: compare.has_step(workdir, step))
    run.processes[0].terminate()
    (ended,) = run.end()
    expect(ended.status in (STOPPED, 0), f"exit status {ended.status} after SIGTERM: {ended.text[-1500:]}")
    saved = compare.saved(workdir)
    if ended.status == STOPPED:
        said = re.search(r"stopped at step (\d+) of", ended.text)
        expect(said and saved[-1] == int(said[1]), f"it saved {saved}: {ended.text[-500:]}")
        expect(compare.rows(workdir)[-1]["step"] == saved[-1], "it took steps after the one that it saved")
    runs.check_continued(base, workdir, saved)
    return f"at step {step}, saved {saved}"


def _killed_at_operation(base: pathlib.Path, folder: pathlib.Path, rng: random.Random, below: str) -> str:
    workdir, log = folder / "run", folder / "operations"
    at = rng.randint(1, preload.count(base / "straight.log", runs.straight(base) / below, WRITES))
    environment = preload.striking(base, workdir / below, log, WRITES, at=at)
    runs.train(base, workdir, environment=environment).end()
    runs.check_continued(base, workdir, compare.saved(workdir))
    return preload.struck(log) or "it ended before"


FAULTS = [
    killed_in_a_step, killed_at_any_time, killed_in_a_save, killed_at_any_write, killed_in_a_restore,
    killed_in_a_hand_over, killed_while_writing_data, terminated,
]  # fmt: skip
