"""A sweep of two tiny points, killed at work and run again, has the answers of its commands in a row."""

import fcntl
import json
import os
import random
import subprocess
import sys
import time

import pytest
from command import fastvlm
from paths import ROOT
from tiny_sweep import get_config

from fastvlm_jax import lock
from fastvlm_jax.sweep import state
from fastvlm_jax.sweep.plan import make_plan

CONFIG = ROOT / "tests/helpers/tiny_sweep.py"
# Runs commands of `fastvlm`, as JSON, one after the other.
IN_A_ROW = """
import json, sys
from fastvlm_jax import cli
for words in json.loads(sys.argv[1]):
    sys.argv = ["fastvlm", *words]
    cli.main()
"""


def environment(folder):
    """With one device, and every small program in the cache of XLA."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests/helpers")))
    own = {"PYTHONPATH": path, "JAX_NUM_CPU_DEVICES": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | own


def start(folder, data, *more):
    command = [sys.executable, "-m", "fastvlm_jax", "sweep", f"--config={CONFIG}:{data}", f"--workdir={folder / 'w'}"]
    return subprocess.Popen(
        [*command, *more], env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def rows(folder):
    """Logged steps of the first run so far."""
    return sum(len(path.read_text().splitlines()) for path in (folder / "w/runs").glob("small-*-8-*/metrics.jsonl"))


def straight(folder, names, data):
    """The commands of these points in a row, in one process: point -> the lines of its predictions."""
    tasks = make_plan(get_config(str(data)), str(folder / "straight")).tasks
    commands = [task.arguments for task in tasks if task.kind != "ttft" and set(names) & set(task.points)]
    done = subprocess.run(
        [sys.executable, "-c", IN_A_ROW, json.dumps(commands)], env=environment(folder), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return predictions(folder / "straight", names)


def predictions(folder, names):
    return {name: (folder / f"points/{name}/evaluation/easy-vqa-own.predictions.jsonl").read_text() for name in names}


def at_work(folder):
    """Whether a sweep or a command of it holds the lock."""
    with (folder / "w/lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def check(folder, names, data):
    """The sweep of a folder has the answers of its commands in a row, and the points their states and numbers."""
    assert predictions(folder / "w", names) == straight(folder, names, data)
    points = json.loads((folder / "w/results.json").read_text())["points"]
    assert [point["state"] for point in points] == ["done", "done"]
    assert [point["accuracy"]["easy-vqa"]["n"] for point in points] == [24, 24]
    assert points[0]["runs"] == points[1]["runs"][:1]
    return points


def test_a_sweep_that_is_killed_goes_on_to_the_same_answers(tmp_path, easy_vqa, monkeypatch, capsys):
    process, end = start(tmp_path, easy_vqa), time.monotonic() + 120
    while rows(tmp_path) < 3:  # behind the first checkpoint, before the last step
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    end = time.monotonic() + 10
    while at_work(tmp_path):  # the command that it had started ends with it
        assert time.monotonic() < end
        time.sleep(0.02)
    assert rows(tmp_path) < 8
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    command = ("sweep", f"--config={CONFIG}:{easy_vqa}", f"--workdir={tmp_path / 'w'}")
    with monkeypatch.context() as patch, state.locked(tmp_path / "w"):
        patch.setattr(lock, "WAIT_SECONDS", 0)
        assert "which has ended: taken over" in capsys.readouterr().err
        status, _, err = fastvlm(monkeypatch, capsys, *command)
    assert status == 1 and err.count("\n") == 1 and f"another sweep is at work in {tmp_path}/w" in err
    status, out, err = fastvlm(monkeypatch, capsys, *command)
    assert (status, out) == (0, f"{tmp_path}/w/results.json\n"), err
    check(tmp_path, ["small-8"], easy_vqa)  # of the run that was killed


@pytest.mark.full
def test_ten_kills_at_random_moments_change_no_accuracy(tmp_path, easy_vqa):
    rng = random.Random(0)
    for _ in range(10):
        process = start(tmp_path, easy_vqa, "--config.ttft=True")
        time.sleep(rng.uniform(4, 25))
        process.kill()
        process.communicate()
    last = start(tmp_path, easy_vqa, "--config.ttft=True")
    _, err = last.communicate(timeout=600)
    assert last.returncode == 0, err
    points = check(tmp_path, ["small-8", "small-16"], easy_vqa)
    assert [point["ttft"]["image_tokens"] for point in points] == [4, 16]
    assert all(point["ttft"]["measured"] and point["ttft"]["paper_ttft"] > 0 for point in points)
