"""`fastvlm ...` as one process of several, with fake devices and the settings of the other tests.

python train_process.py DEVICES train --config tests/helpers/small.py:DATA --workdir DIR --coordinator_address=... ...
"""

import os
import sys

import environment  # noqa: F401  sets the environment of jax

os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={sys.argv.pop(1)}")

from fastvlm_jax.cli import program

if "POISON" in os.environ:  # sums of the pixels of batches whose loss is to be NaN
    from poison import poisoned

    from fastvlm_jax import losses

    losses.next_token = poisoned([int(number) for number in os.environ["POISON"].split(",")])

if "DIGESTS" in os.environ:  # the metrics of stage 0 tell digests of the batches
    from digests import told

    from fastvlm_jax import pair_loss

    pair_loss.pairs = told

program()
