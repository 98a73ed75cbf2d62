"""Several processes that train one model: how they start, agree and end. Everything here also works for one alone.

Give every process the same command. How many there are, and which this is, comes from flags, from the environment, or
from the platform (Cloud TPU slices, GKE, Slurm, Open MPI), in this order:

    fastvlm train --config ... --workdir DIR --coordinator_address=10.0.0.2:8476 --num_processes=4 --process_id=0..3
    FASTVLM_COORDINATOR_ADDRESS, FASTVLM_NUM_PROCESSES, FASTVLM_PROCESS_ID; JAX_COORDINATOR_ADDRESS and so on
    nothing, on a platform that JAX detects; on any other machine one process runs, and waits for nobody

--num_processes=1 is one process on any platform. Process 0 listens on the port of the address for `peers`, and on the
next, or a free one, for JAX. A process that dies stops the others at once, one that freezes or is cut off after
--heartbeat_seconds; each prints who it was, and ends with status 1. SIGINT or SIGTERM to one process stops all after
the same step, which is saved, with status 130. Either way, the same command on all goes on from the last checkpoint.
"""

from fastvlm_jax.distributed.detect import find_settings
from fastvlm_jax.distributed.process import START_SECONDS, Interrupted, StopRequest, check_same, exchange, started
from fastvlm_jax.distributed.rendezvous import Settings

__all__ = [
    "START_SECONDS", "Interrupted", "Settings", "StopRequest", "check_same", "exchange", "find_settings", "started",
]  # fmt: skip
