"""Tests how a process finds out which of how many it is: flags, environment, platform."""

import pytest

from fastvlm_jax import distributed
from fastvlm_jax.distributed.rendezvous import Settings

FLAGS = dict(coordinator_address="10.0.0.2:8476", num_processes=4, process_id=3)


def test_flags_come_before_variables_of_ours_and_those_before_variables_of_jax(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "jax:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "8")
    monkeypatch.setenv("FASTVLM_NUM_PROCESSES", "4")
    monkeypatch.setenv("FASTVLM_PROCESS_ID", "1")
    monkeypatch.setenv("FASTVLM_HEARTBEAT_SECONDS", "7.5")
    assert distributed.find_settings(process_id=3) == Settings("jax:1", 4, 3, 7.5, 300.0)
    assert distributed.find_settings(num_processes=1, process_id=0) is None


def test_one_host_without_flags_is_alone_and_slurm_tells_its_own():
    assert distributed.find_settings() is None
    variables = dict(
        SLURM_JOB_ID="1000", SLURM_STEP_NODELIST="node[07-09]", SLURM_NTASKS="3", SLURM_PROCID="2", SLURM_LOCALID="0"
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        assert distributed.find_settings(heartbeat_seconds=20) == Settings("node07:62440", 3, 2, 20)
        patch.setenv("SLURM_NTASKS", "1")
        assert distributed.find_settings() is None


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(process_id=None), "--process_id missing: --coordinator_address, --num_processes, --process_id"),
        (dict(coordinator_address=None, process_id=None), "--coordinator_address and --process_id missing"),
        (dict(process_id=4), "--process_id=4 must be from 0 to 3"),
        (dict(coordinator_address="10.0.0.2"), "--coordinator_address=10.0.0.2 must be HOST:PORT"),
        (dict(heartbeat_seconds=0.0), "--heartbeat_seconds=0 must be a positive number"),
        (dict(late_step_seconds=-1.0), "--late_step_seconds=-1 must be a positive number"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_partial_or_wrong_flags_are_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        distributed.find_settings(**{**FLAGS, **flags})


def test_a_variable_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("FASTVLM_PROCESS_ID", "one")
    with pytest.raises(ValueError, match="FASTVLM_PROCESS_ID='one' must be a number"):
        distributed.find_settings("10.0.0.2:8476", 4)
