"""Runs several processes as one job: how they start, agree and end. All of it also works for a single process.

Give every process the same command. The number of processes, and which one this is, come from flags, environment
variables or the platform (Cloud TPU slices, GKE, Slurm, Open MPI), in this order:

    fastvlm train --config ... --workdir DIR --coordinator_address=10.0.0.2:8476 --num_processes=4 --process_id=0..3
    FASTVLM_COORDINATOR_ADDRESS, FASTVLM_NUM_PROCESSES, FASTVLM_PROCESS_ID; JAX_COORDINATOR_ADDRESS and so on
    nothing, on a platform that JAX detects; on any other machine a single process runs, and waits for nobody

--num_processes=1 means a single process on any platform. Process 0 listens on the port of the address for `peers`, and
on the next port, or a free one, for JAX. A process that dies stops the others at once; one that freezes or is cut off
stops them after --heartbeat_seconds. Each of the others prints which process was lost and exits with status 1. SIGINT
or SIGTERM to one process stops all after the same step; that step is saved, and all exit with status 130. In both
cases the same command, given to all processes, continues from what is saved: the last checkpoint, or the answers so
far.
"""

from fastvlm_jax.distributed.detect import find_settings
from fastvlm_jax.distributed.process import START_SECONDS, Interrupted, StopRequest, check_same, exchange, started
from fastvlm_jax.distributed.rendezvous import Settings

__all__ = [
    "START_SECONDS", "Interrupted", "Settings", "StopRequest", "check_same", "exchange", "find_settings", "started",
]  # fmt: skip
