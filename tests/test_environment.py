"""The environment of the tests keeps programs of several devices out of JAX's compilation cache."""

import os
import subprocess
import sys

from paths import HELPERS

SCRIPT = """
import environment, jax, os, pathlib
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
def kept(devices, function):
    mesh = jax.make_mesh((devices,), ("x",), devices=jax.devices()[:devices])
    x = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec("x")))
    before = set(pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*function*"))
    jax.jit(function)(x).block_until_ready()
    return len(set(pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*function*")) - before) > 0
def function(x):
    return jnp.sum(x)
print(kept(1, function), kept(2, function))
"""


def test_only_programs_of_one_device_are_kept(tmp_path):
    own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    own |= {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "PYTHONPATH": str(HELPERS)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=os.environ | own)
    assert done.stdout == "True False\n", done.stderr[-2000:]
