"""launch/bench_gpu.sh with a stand-in for Python that answers for the benchmarks: what is run, kept and reported."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from launch_fakes import LAUNCH

# The stand-in runs gpu_table.py in earnest; for a benchmark it writes the prepared JSON, or fails.
PYTHON = """#!{python}
import json, os, pathlib, sys
arguments = sys.argv[1:]
if arguments[0] == "launch/gpu_table.py":
    os.execv({python!r}, [{python!r}, *arguments])
output = pathlib.Path(next(a for a in arguments if a.startswith("--output=")).partition("=")[2])
with pathlib.Path({calls!r}).open("a") as file:
    file.write(" ".join([os.environ.get("JAX_PLATFORMS", "-"), *arguments[:-1]]) + "\\n")
if output.stem in {failing!r}:
    sys.exit("first line\\nno memory left")
found = {{"attention": {{"device": "NVIDIA X"}}, "memory": {{"memory": {{"total": 8 * 2**30}}}}}}
found["step"] = {{"device": "NVIDIA X", "peak_bytes": 10 * 2**30, "peak_is": "on the device"}}
output.write_text(json.dumps(found.get(output.stem, {{}})))
output.with_suffix(".png").write_bytes(b"picture")
print("| table of", output.stem, "|")
"""


def run(folder: pathlib.Path, *arguments, failing=(), **environment):
    """(process, calls of the stand-in)."""
    program, calls = folder / "python", folder / "calls"
    program.write_text(PYTHON.format(python=sys.executable, calls=str(calls), failing=tuple(failing)))
    program.chmod(0o755)
    given = {"PATH": os.environ["PATH"], "PYTHON": str(program), "TMPDIR": str(folder), **environment}
    command = ["bash", str(LAUNCH / "bench_gpu.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=given, cwd=folder)
    return done, calls.read_text().splitlines() if calls.exists() else []


def test_all_parts_are_measured_and_written_to_the_folder(tmp_path):
    done, calls = run(tmp_path, "--output", "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert [call.split()[1:3] for call in calls] == [
        ["-m", "fastvlm_jax.bench.attention"], *[["-m", "fastvlm_jax"]] * 3,
    ]  # fmt: skip
    assert "--lengths=512,1024,2048,4096" in calls[0]
    assert calls[1].startswith("cpu ") and "preflight" in calls[1] and "--topology=gpu:80GB" in calls[1]
    assert "bench step --config=configs/stage2_instruct.py:0.5b" in calls[2]
    assert "bench ttft" in calls[3] and "--against=transformers" in calls[3]
    found = json.loads((tmp_path / "out/gpu.json").read_text())
    assert [(name, part["status"]) for name, part in found["parts"].items()] == [
        ("attention", 0), ("memory", 0), ("step", 0), ("ttft", 0),
    ]  # fmt: skip
    assert found["memory"] == {"predicted": 8 * 2**30, "measured": 10 * 2**30, "predicted_over_measured": 0.8}
    told = (tmp_path / "out/gpu.md").read_text()
    assert told.startswith("# Measured on NVIDIA X\n") and "| table of ttft |" in told
    assert "8.00 GiB predicted by arithmetic, 10.00 GiB at its peak (on the device): 0.80 times" in told
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "gpu.json", "gpu.md", "log.txt", "attention.png", "memory.png", "step.png", "ttft.png",
    }  # fmt: skip


def test_a_failing_part_loses_nothing_of_the_others(tmp_path):
    done, calls = run(tmp_path, failing=("attention", "step"), OUT=str(tmp_path / "there"))
    assert done.returncode == 1 and len(calls) == 4
    assert "step failed with status 1: no memory left" in done.stderr
    found = json.loads((tmp_path / "there/gpu.json").read_text())
    assert [part["status"] for part in found["parts"].values()] == [1, 0, 1, 0]
    assert found["parts"]["step"]["error"] == "no memory left" and found["memory"] is None
    assert found["parts"]["memory"]["found"] == {"memory": {"total": 8 * 2**30}}
    told = (tmp_path / "there/gpu.md").read_text()
    assert told.count("**Failed with status 1: no memory left**") == 2 and "| table of ttft |" in told
    assert told.startswith("# Measured on a device that no part could name\n")


def test_a_part_that_outlasts_its_limit_is_told(tmp_path):
    (tmp_path / "ttft.status").write_text("124 160 160 python3 -m fastvlm_jax bench ttft\n")
    (tmp_path / "ttft.json").write_text('{"points": [1]}')
    (tmp_path / "ttft.out").write_text("")
    (tmp_path / "ttft.err").write_text("")
    command = [sys.executable, str(LAUNCH / "gpu_table.py"), str(tmp_path), str(tmp_path)]
    subprocess.run(command, check=True)
    assert "**Failed with status 124: outlasted 160 s**" in (tmp_path / "gpu.md").read_text()
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"]["ttft"]["found"] == {"points": [1]}


def test_tiny_sizes_take_the_same_path(tmp_path):
    done, calls = run(tmp_path, "--tiny", "--output=out")
    assert done.returncode == 0 and len(calls) == 4
    assert "--lengths=256,512" in calls[0] and ":tiny --config.data.image_size=64" in calls[2]


def test_all_limits_together_are_below_8_minutes():
    lines = (LAUNCH / "bench_gpu.sh").read_text().splitlines()
    limits = [int(line.split()[2]) for line in lines if line.startswith("part ")]
    assert len(limits) == 4 and sum(limits) < 8 * 60


@pytest.mark.parametrize("arguments", [("--outptu=x",), ("--output",), ("--output=",), ("again",)])
def test_wrong_usage_measures_nothing(tmp_path, arguments):
    done, calls = run(tmp_path, *arguments)
    assert (done.returncode, calls) == (2, []) and done.stderr.count("\n") == 1
