"""Tests what the runs in test_train.py do not reach: a checkpoint that one process sees late."""

import time
import types

import pytest

from fastvlm_jax import checkpoint, distributed


@pytest.mark.parametrize("late", [1, None])
def test_processes_wait_for_a_checkpoint_that_one_sees_late(monkeypatch, late):
    """Process 1 of 2, on a network file system, sees step 8 after `late` reloads, or never."""

    class Checkpointer:
        latest, looks = types.SimpleNamespace(step=4), 0

        def reload(self):
            self.looks += 1
            if self.looks == late:
                self.latest = types.SimpleNamespace(step=8)

    monkeypatch.setattr(distributed, "exchange", lambda name, own: [8, own])
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    if late:
        assert checkpoint.find_latest(Checkpointer()) == 8
    else:
        with pytest.raises(ValueError, match="process 1 does not see the checkpoint of step 8, which process 0 does"):
            checkpoint.find_latest(Checkpointer())
