"""A sweep of two tiny points, killed and stopped at work and run again, has the answers of its commands in a row."""

import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from command import fastvlm
from paths import ROOT
from tiny_sweep import get_config

from fastvlm_jax.sweep.plan import make_plan

CONFIG = ROOT / "tests/helpers/tiny_sweep.py"


def environment(folder):
    """Without PyTorch, which tensorboardX would load, and with every small program in the compilation cache."""
    (folder / "stub").mkdir(exist_ok=True)
    (folder / "stub/torch.py").write_text("raise ImportError\n")
    path = os.pathsep.join(map(str, (folder / "stub", ROOT, ROOT / "tests/helpers")))
    return {**os.environ, "PYTHONPATH": path, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def start(folder, data, *more):
    command = [sys.executable, "-m", "fastvlm_jax", "sweep", f"--config={CONFIG}:{data}", f"--workdir={folder / 'w'}"]
    return subprocess.Popen(
        [*command, *more], env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def rows(folder):
    """Logged steps of the first run so far."""
    return sum(len(path.read_text().splitlines()) for path in (folder / "w/runs").glob("small-*-8-*/metrics.jsonl"))


def wait(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)


def straight(folder, data, monkeypatch, capsys):
    """The commands of the plan in a row, in this process: point -> the lines of its predictions."""
    made = make_plan(get_config(str(data)), str(folder))
    for task in made.tasks:
        if task.kind != "ttft":
            assert fastvlm(monkeypatch, capsys, *task.arguments)[0] == 0
    return predictions(folder)


def predictions(folder):
    files = sorted(folder.glob("points/*/evaluation/easy-vqa-own.predictions.jsonl"))
    return {path.parent.parent.name: path.read_text() for path in files}


def at_work(folder):
    """Whether a sweep or a command of it holds the lock."""
    with (folder / "w/lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_sweep_that_is_killed_and_stopped_goes_on_to_the_same_answers(tmp_path, easy_vqa, monkeypatch, capsys):
    first = start(tmp_path, easy_vqa)
    wait(lambda: rows(tmp_path) >= 3, first)
    first.kill()
    first.communicate()
    deadline = time.monotonic() + 10
    while at_work(tmp_path):  # the command that it had started ends with it
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second = start(tmp_path, easy_vqa)
    wait(lambda: rows(tmp_path) >= 5, second)
    command = ("sweep", f"--config={CONFIG}:{easy_vqa}", f"--workdir={tmp_path / 'w'}")
    status, _, err = fastvlm(monkeypatch, capsys, *command)
    assert status == 1 and err.count("\n") == 1 and f"another sweep is at work in {tmp_path}/w" in err
    second.send_signal(signal.SIGTERM)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 130 and re.search(
        "^fastvlm sweep: stopped (in|before) .*; the same command goes on from there$", err.splitlines()[-1]
    )
    last = start(tmp_path, easy_vqa, "--config.ttft=True")
    out, err = last.communicate(timeout=120)
    assert last.returncode == 0 and out == f"{tmp_path}/w/results.json\n", err
    assert predictions(tmp_path / "w") == straight(tmp_path / "straight", easy_vqa, monkeypatch, capsys)
    results = json.loads((tmp_path / "w/results.json").read_text())
    assert [point["state"] for point in results["points"]] == ["done", "done"]
    assert [point["accuracy"]["easy-vqa"]["n"] for point in results["points"]] == [24, 24]
    assert [point["ttft"]["image_tokens"] for point in results["points"]] == [4, 16]
    assert all(point["ttft"]["measured"] and point["ttft"]["paper_ttft"] > 0 for point in results["points"])
    assert results["points"][0]["runs"] == results["points"][1]["runs"][:1]


@pytest.mark.full
def test_ten_kills_at_random_moments_change_no_accuracy(tmp_path, easy_vqa, monkeypatch, capsys):
    rng = random.Random(0)
    for _ in range(10):
        process = start(tmp_path, easy_vqa)
        time.sleep(rng.uniform(1, 20))
        process.kill()
        process.communicate()
    last = start(tmp_path, easy_vqa)
    _, err = last.communicate(timeout=300)
    assert last.returncode == 0, err
    assert predictions(tmp_path / "w") == straight(tmp_path / "straight", easy_vqa, monkeypatch, capsys)
