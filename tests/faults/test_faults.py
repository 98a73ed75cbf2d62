"""A few faults of most kinds, with fixed seeds; `python -m tests.faults --minutes N` tries all of them, for long.

Those of several processes take a minute each and are not among them: see tests/distributed/test_processes.py.
"""

import pytest

from tests.faults import bad_numbers, damage, disks, kills, runs
from tests.faults.preload import Skipped

SHORT = [
    kills.killed_in_a_save, kills.killed_in_a_restore, kills.terminated, disks.full_disk_for_good,
    damage.damaged_checkpoint, bad_numbers.nan_planted,
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize("fault", SHORT, ids=lambda fault: fault.__name__)
def test_run_survives(fault, base, tmp_path):
    try:
        fault(base, tmp_path, runs.rng_of(fault, 0))
    except Skipped as why:
        pytest.skip(str(why))
