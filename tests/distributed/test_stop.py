"""What stops a run decides the exit status that its launcher reads."""

import os
import signal
import time

import pytest

from fastvlm_jax.distributed import Interrupted, StopRequest


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_sigterm_asks_for_another_start_and_ctrl_c_does_not(number, status):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stopped, StopRequest() as stop:
        assert not stop.reached()
        os.kill(os.getpid(), number)
        while not stop.reached():
            time.sleep(0.01)
        raise Interrupted("saved")
    assert stopped.value.status == status and signal.getsignal(number) == before
