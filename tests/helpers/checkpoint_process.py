"""One process of several, each with one device: saves the states of steps 4 and 8, or restores and prints what it got.

python checkpoint_process.py PORT PROCESS PROCESSES WORKDIR save|restore
"""

import pathlib
import sys

import jax
import numpy as np
from small_state import abstract, small_mesh, small_state

from fastvlm_jax import checkpoint, distributed

port, process, processes = map(int, sys.argv[1:4])
with distributed.started(distributed.Settings(f"127.0.0.1:{port}", processes, process)):
    checkpointer = checkpoint.open_checkpointer(pathlib.Path(sys.argv[4]), checkpoint.Retention(2))
    mesh = small_mesh(jax.devices())
    if sys.argv[5] == "save":
        for step in (4, 8):
            checkpoint.save(checkpointer, small_state(mesh, step), step, lineage={})
    else:
        state, position, _ = checkpoint.restore(checkpointer, abstract(small_state(mesh, 0)))
        expected = small_state(mesh, position)
        same = jax.tree.map(lambda x, y: np.array_equal(x.addressable_data(0), y.addressable_data(0)), state, expected)
        print(position, int(state.step), checkpointer.steps, all(jax.tree.leaves(same)))
    checkpointer.close()
