"""`fastvlm ...` as train_process.py; the input of process 1 stands still before step 9, and for ever before step 12.

The watchdog finds a step slow after 3.5 seconds here, and a process late after --late_step_seconds alone.
"""

import runpy
import time

import environment  # noqa: F401  sets the environment of jax
from paths import HELPERS

from fastvlm_jax.data.load.loader import Loader
from fastvlm_jax.distributed import marks, watchdog

watchdog.AT_LEAST, watchdog.SLOW, marks.LATE = 3.5, 1, 1
next_batch = Loader.__next__


def stall(loader):
    import jax

    if jax.process_index() == 1 and loader.position in (8, 11):
        time.sleep(6 if loader.position == 8 else 1e6)
    return next_batch(loader)


Loader.__next__ = stall
runpy.run_path(str(HELPERS / "train_process.py"), run_name="__main__")
