"""Runs several processes as one job: how they start, agree and end. All of it also works for a single process.

Give every process the same command. The number of processes, and which one this is, come from flags, environment
variables or the platform (Cloud TPU slices, GKE, Slurm, Open MPI), in this order:

    fastvlm train --config ... --workdir DIR --coordinator_address=10.0.0.2:8476 --num_processes=4 --process_id=0..3
    FASTVLM_COORDINATOR_ADDRESS, FASTVLM_NUM_PROCESSES, FASTVLM_PROCESS_ID; JAX_COORDINATOR_ADDRESS and so on
    nothing, on a platform that JAX detects; on any other machine a single process runs, and waits for nobody

--num_processes=1 means a single process on any platform. Process 0 listens on the port of the address for `peers`, and
on the next port, or a free one, for JAX. A process that dies stops the others at once; one that freezes or is cut off
stops them after --heartbeat_seconds; one that lives, but keeps the others waiting in a step, after --late_step_seconds.
Each of the others prints which process was lost or late and exits with status 1. SIGTERM to one process, or the
platform's notice that its machine will be taken away, stops all after the same step; that step is saved, and all exit
with status 75, which means "run me again". SIGINT does the same with status 130. In all cases the same command, given
to all processes, continues from what is saved: the last checkpoint, or the answers so far.
"""

from fastvlm_jax.distributed.detect import find_settings
from fastvlm_jax.distributed.process import (
    AGAIN,
    START_SECONDS,
    Interrupted,
    StopRequest,
    check_same,
    exchange,
    started,
)
from fastvlm_jax.distributed.rendezvous import Settings
from fastvlm_jax.distributed.watchdog import Watchdog

__all__ = [
    "AGAIN", "START_SECONDS", "Interrupted", "Settings", "StopRequest", "Watchdog", "check_same", "exchange",
    "find_settings", "started",
]  # fmt: skip
