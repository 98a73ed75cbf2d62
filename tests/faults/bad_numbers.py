"""Plants NaNs and spikes in batches, and trains at rates that no model survives.

What is promised: exactly the updates of the planted batches are left out, bit for bit; where they do not end, the run
goes back and does without the batches; nothing that is not finite is ever saved. tests/helpers/planted_process.py
plants, and leaves updates and batches out by hand for comparison.
"""

import json
import pathlib
import random

from tests.faults import compare, runs
from tests.faults.compare import expect
from tests.faults.runs import STEPS, TESTS

ENOUGH = 17  # batches before which a run has no level that a spike could stand out from
IN_A_ROW = 5  # bad steps in a row after which a run goes back


def nan_planted(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Plants NaNs in one to three batches that do not follow each other."""
    batches = sorted(rng.sample(range(rng.randint(1, 2), STEPS + 1, 2), rng.randint(1, 3)))
    return _plant(base, folder, rng, "nan", batches, "omit")


def spike_planted(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Plants a huge finite gradient in a batch or two of a run that has a level by then."""
    batches = sorted(rng.sample(range(ENOUGH + 1, STEPS + 1), rng.randint(1, 2)))
    return _plant(base, folder, rng, "spike", batches, "omit")


def nans_in_a_row(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Plants NaNs in batches that follow each other: the run goes back once and passes over them."""
    first = rng.randint(1, STEPS - IN_A_ROW)
    return _plant(base, folder, rng, "nan", list(range(first, first + IN_A_ROW)), "without")


def rates_too_high(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Trains at rates at which every number overflows: the run stops and says so, and its checkpoints are finite."""
    workdir, rate = folder / "run", 10.0 ** rng.randint(8, 30)
    flags = [f"--config.groups=(('.*',{rate},0.0),)", "--config.checkpoint_every=1", "--config.log_every=5"]
    (ended,) = runs.train(base, workdir, *flags).end()
    said = ended.refusal("rate|groups")
    expect(
        compare.all_finite(workdir),
        f"one of the checkpoints {compare.saved(workdir)} holds numbers that are not finite",
    )
    return f"rate {rate:g}: {said}"


def _plant(base, folder: pathlib.Path, rng: random.Random, kind: str, batches: list[int], reference: str) -> str:
    """Trains with planted batches, killed once on the way, and compares with a run that does without by hand."""
    numbers, by_hand, workdir = ",".join(map(str, batches)), folder / "by_hand", folder / "run"
    program = [TESTS / "helpers/planted_process.py"]
    runs.go_on(base, by_hand, program=[*program, reference, numbers])
    run, killed = runs.train(base, workdir, program=[*program, kind, numbers]), rng.randint(1, STEPS)
    run.until(lambda: compare.has_step(workdir, killed))
    run.kill()
    runs.go_on(base, workdir, program=[*program, kind, numbers])
    differ = compare.differing(*(compare.read(compare.newest(path)) for path in (workdir, by_hand)))
    differ = [name for name in differ if not name.endswith(("skipped", "in_a_row"))]  # counts of bad steps
    expect(not differ, f"{kind} in {numbers}: {len(differ)} arrays differ from {reference} by hand: {differ[:2]}")
    expect(compare.all_finite(workdir), "a checkpoint holds numbers that are not finite")
    told = {json.loads(line)["batch"] + 1 for line in (workdir / "bad_steps.jsonl").read_text().splitlines()}
    expect(told == set(batches), f"bad_steps.jsonl names the batches {sorted(told)}, planted were {numbers}")
    return f"in the batches {numbers}, killed after step {killed}"


FAULTS = [nan_planted, spike_planted, nans_in_a_row, rates_too_high]
