"""Tests two real processes that save and restore together."""

import os
import re
import subprocess
import sys

from paths import HELPERS
from ports import free_port

from fastvlm_jax import checkpoint


def run(workdir, what, processes=2):
    """Runs processes of one device each, and returns the last line that each printed, and its errors."""
    port = free_port()
    flags = "--xla_force_host_platform_device_count=1 --xla_cpu_collective_call_terminate_timeout_seconds=600"
    started = [
        subprocess.Popen(
            [sys.executable, HELPERS / "checkpoint_process.py", *map(str, (port, process, processes, workdir, what))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        )
        for process in range(processes)
    ]
    try:
        printed = [process.communicate(timeout=200) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, printed
    return [(out.splitlines()[-1:], err) for out, err in printed]


def test_damage_in_the_shards_of_one_process_makes_all_use_the_checkpoint_before(tmp_path):
    run(tmp_path, "save")
    assert [out for out, _ in run(tmp_path, "restore")] == [["8 8 [4, 8] True"]] * 2
    (data,) = (tmp_path / "checkpoints/8/model/ocdbt.process_1/d").iterdir()  # what process 1 wrote, and alone reads
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 16
    data.write_bytes(content)
    (first, told), (second, silent) = run(tmp_path, "restore")
    assert first == second == ["4 4 [4] True"]
    assert re.search(r"8 is damaged, it is kept as .*8\.damaged: model array .*; the run goes on behind step 4", told)
    assert "damaged" not in silent and checkpoint.steps_of(tmp_path) == [4]
