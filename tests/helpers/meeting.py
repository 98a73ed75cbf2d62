"""Reads what configs adopt as a process of a larger run does: before it has met the others and knows its devices."""

import subprocess
import sys

from paths import ROOT
from ports import free_port

CODE = """
import sys
import jax
from fastvlm_jax.parent import open_base
for argument in sys.argv[2:]:
    open_base(argument)
jax.distributed.initialize("127.0.0.1:" + sys.argv[1], num_processes=1, process_id=0)
"""


def adopt_and_meet(*arguments) -> None:
    """Opens the bases of these arguments, then lets processes meet, which JAX refuses once devices were asked for."""
    command = [sys.executable, "-c", CODE, str(free_port()), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
