"""Tests several real processes on this machine: they train as one, stop together, and name a lost process."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import digests
import jax
import numpy as np
import pytest
from paths import HELPERS, ROOT
from poison import first_batches, poisoned
from ports import free_port
from small import ONE_STAGE, small_config
from small_pairs import get_config, write_pairs

from fastvlm_jax import checkpoint, pair_loss
from fastvlm_jax import losses as losses_lib
from fastvlm_jax.metrics.rows import read_metrics, read_rows
from fastvlm_jax.train import train

CONFIG = dict(mesh=(1, 2, 2, 1), data__groups=4, steps=12, eval_batches=1, evaluate=(("qa", "", 3),))
CONFIG |= dict(predictions_every=12, num_predictions=3)
CONFIG |= dict(model__vision__form="folded", model__vision__batch_norm="frozen", **ONE_STAGE)
DEVICES = 4


class Run:
    """Runs `fastvlm train` in several processes with DEVICES devices in all."""

    def __init__(self, count, data, workdir, *flags, each=(), program="train_process.py", file="small.py", keys=CONFIG):
        self.folder = workdir.parent / f"{workdir.name}-{count}-processes"
        self.folder.mkdir(parents=True)
        address = f"127.0.0.1:{free_port()}"
        config = [f"--config.{key.replace('__', '.')}={value}" for key, value in keys.items()]
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, HELPERS / program, str(DEVICES // count), "train"),
                    *("--config", f"{HELPERS / file}:{data}", "--workdir", workdir, *config),
                    *(f"--coordinator_address={address}", f"--num_processes={count}", f"--process_id={process}"),
                    *(*flags, *(each[process] if each else ())),
                ],
                stdout=subprocess.DEVNULL,
                stderr=(self.folder / str(process)).open("w"),
                cwd=ROOT,
            )
            for process in range(count)
        ]

    def statuses(self, seconds=300, leave_out=None):
        """Waits for the processes, all but `leave_out`, and returns their exit statuses."""
        waited = [process for i, process in enumerate(self.processes) if i != leave_out]
        try:
            return [process.wait(seconds) for process in waited]
        finally:
            for process in self.processes:
                process.kill()

    def errors(self, process):
        """Returns the lines that a process printed, but for those about the run and those of Gloo and loggers."""
        lines = (self.folder / str(process)).read_text().splitlines()
        told = r"\[Gloo\]|(small|pairs) step|(small|pairs): |WARNING|[IWE]\d{4} "
        return [line for line in lines if not re.match(told, line)]


def wait_for_step(step, workdir, run):
    while not any(row["step"] >= step for row in read_metrics(workdir)):
        assert all(process.poll() is None for process in run.processes), [run.errors(i) for i in range(2)]
        time.sleep(0.05)


def losses(workdir):
    return [row["loss"] for row in read_metrics(workdir) if "loss" in row]


def asked_about(workdir):
    """Returns what the last step's three lines of sample answers tell, but for the answers themselves."""
    rows = read_rows(workdir / "predictions.jsonl")
    assert [row["step"] for row in rows] == [12] * 3
    return [(row["id"], row["question"], row["references"], row["images"]) for row in rows]


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def straight(easy_vqa, tmp_path_factory):
    """Returns the workdir of the run that all others must equal: one process, never stopped."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    train(small_config(easy_vqa, **CONFIG), workdir, jax.devices()[:DEVICES])
    return workdir


def test_four_processes_stopped_by_sigterm_of_one_go_on_as_two_and_as_one(easy_vqa, straight, tmp_path):
    four = Run(4, easy_vqa, tmp_path / "run")
    wait_for_step(2, tmp_path / "run", four)
    four.processes[2].send_signal(signal.SIGTERM)
    assert four.statuses() == [75] * 4
    (step,) = saved_steps(tmp_path / "run")
    said = f"fastvlm train: stopped at step {step} of 12, which is saved; the same command goes on from there"
    assert [four.errors(process) for process in range(4)] == [[said]] * 4
    opening = ["small: " in (four.folder / str(process)).read_text() for process in range(4)]
    assert opening == [True, False, False, False]
    assert 2 <= step < 12 and len(losses(tmp_path / "run")) == step
    assert all(
        row["skew_seconds"] >= 0 and row["slowest_process"] in range(4) for row in read_metrics(tmp_path / "run")
    )
    shutil.copytree(tmp_path / "run", tmp_path / "one")

    two = Run(2, easy_vqa, tmp_path / "run")
    assert two.statuses() == [0, 0]
    train(small_config(easy_vqa, **CONFIG), tmp_path / "one", jax.devices()[:DEVICES])
    for workdir in ("run", "one"):
        np.testing.assert_allclose(losses(tmp_path / workdir), losses(straight), rtol=1e-5)
        assert [row["step"] for row in read_metrics(tmp_path / workdir)] == [*range(1, 13), 12]
        last, expected = (read_metrics(folder)[-1] for folder in (tmp_path / workdir, straight))
        np.testing.assert_allclose(last["validation/loss"], expected["validation/loss"], rtol=1e-5)
        assert last["evaluate/qa"] == expected["evaluate/qa"]
        assert asked_about(tmp_path / workdir) == asked_about(straight)


PAIRS = dict(mesh=(1, 2, 2, 1), steps=10)


@pytest.mark.full
def test_stage_0_goes_on_as_fewer_processes_with_the_same_batches_and_losses(tmp_path, monkeypatch):
    """Four processes and then two are stopped by SIGTERM of one; the last is this process."""
    write_pairs(tmp_path / "data")
    monkeypatch.setenv("DIGESTS", "1")
    monkeypatch.setattr(pair_loss, "pairs", digests.told)
    config = get_config(tmp_path / "data")
    config.update(PAIRS)
    train(config, tmp_path / "straight", jax.devices()[:DEVICES])
    for turn, count in enumerate((4, 2)):
        processes = Run(count, tmp_path / "data", tmp_path / "run", file="small_pairs.py", keys=PAIRS)
        wait_for_step(2 + 3 * turn, tmp_path / "run", processes)
        processes.processes[-1].send_signal(signal.SIGTERM)
        assert processes.statuses() == [75] * count, processes.errors(0)
        assert 2 + 3 * turn <= saved_steps(tmp_path / "run")[-1] < 10
        shutil.rmtree(processes.folder)
    train(config, tmp_path / "run", jax.devices()[:DEVICES])
    found, expected = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "straight")
    assert (
        [row["step"] for row in found]
        == [row["step"] for row in expected]
        == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 10]
    )
    for name in digests.NAMES:
        assert len({row[name] for row in expected if name in row}) == 10
        assert [row.get(name) for row in found] == [row.get(name) for row in expected]
    for name in ("loss", "validation/loss", "top1_images", "top1_texts", "logit_scale"):
        for row, other in zip(found, expected, strict=True):
            assert row.keys() & {name} == other.keys() & {name}
            np.testing.assert_allclose(row.get(name, 0), other.get(name, 0), rtol=1e-5, err_msg=f"{name} {row['step']}")


@pytest.mark.parametrize(
    "number, victim",
    [
        (signal.SIGKILL, 0),
        (signal.SIGSTOP, 0),
        pytest.param(signal.SIGKILL, 1, marks=pytest.mark.full),
        pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.full),
    ],
)
def test_a_process_that_dies_or_freezes_stops_the_other_with_a_line_that_names_it(easy_vqa, tmp_path, number, victim):
    run = Run(2, easy_vqa, tmp_path / "run", "--config.steps=100000", "--heartbeat_seconds=10")
    wait_for_step(2, tmp_path / "run", run)
    run.processes[victim].send_signal(number)
    begin = time.monotonic()
    assert run.statuses(60, leave_out=victim) == [1]
    assert time.monotonic() - begin < (30 if number == signal.SIGSTOP else 15)
    what = "is frozen or cut off, silent for 10 s" if number == signal.SIGSTOP else "died"
    again = "start all processes again: they go on from what is saved"
    assert run.errors(1 - victim) == [f"fastvlm: process {victim} on {socket.gethostname()} {what}; {again}"]


def test_a_process_that_is_slow_once_is_named_and_one_that_waits_for_ever_ends_the_run(easy_vqa, tmp_path):
    flags = ("--config.steps=100000", "--late_step_seconds=12")
    run = Run(2, easy_vqa, tmp_path / "run", *flags, program="stalled_process.py")
    assert run.statuses(120) == [1, 1]
    said = [(run.folder / str(process)).read_text().splitlines() for process in range(2)]
    first, *rest = [line for lines in said for line in lines if line.startswith("small: step ")]
    host, stacks = socket.gethostname(), tmp_path / "run/stacks"
    assert re.fullmatch(
        rf"small: step 9 has taken \d+ s, where [\d.e+-]+ s are usual; process 1 on {host} came no further than step "
        rf"8; stacks of all threads: {stacks}",
        first,
    )
    assert [line.partition(",")[0][:23] for line in rest] == ["small: step 9 has ended", "small: step 12 has take"]
    again = "start all processes again: they go on from what is saved"
    late = f"process 1 on {host} came no further than step 11 in 12 s, while the others waited; {again}"
    assert run.errors(0) == run.errors(1) == [f"fastvlm: {late}"]
    assert "in stall" in (stacks / "process_1.txt").read_text() and (stacks / "process_0.txt").exists()
    assert json.loads((tmp_path / "run/heartbeat.json").read_text())["doing"] == "step 12"


def test_two_processes_leave_out_the_same_steps_and_go_back_together(easy_vqa, tmp_path, monkeypatch):
    """One process alone over the same poisoned batches does the same."""
    changes = {"steps": 8, "checkpoint_every": 3, "keep_checkpoints": 9, "bad_steps__in_a_row": 2}
    config = small_config(easy_vqa, **CONFIG | changes)
    _, sums, _ = first_batches(config, 8)
    bad = [sums[k] for k in (1, 4, 5)]
    monkeypatch.setenv("POISON", ",".join(map(str, bad)))
    two = Run(2, easy_vqa, tmp_path / "two", *(f"--config.{k.replace('__', '.')}={v}" for k, v in changes.items()))
    assert two.statuses() == [0, 0], two.errors(0)
    monkeypatch.setattr(losses_lib, "next_token", poisoned(bad))
    train(config, tmp_path / "one", jax.devices()[:DEVICES])
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    failed = [(2, 1), (5, 4), (6, 5)]
    for workdir in (tmp_path / "two", tmp_path / "one"):
        lines = [json.loads(line) for line in (workdir / "bad_steps.jsonl").read_text().splitlines()]
        assert [(line["step"], line["batch"]) for line in lines] == [place for place in failed for _ in range(4)]
        notes = checkpoint.read_notes(workdir / "checkpoints/8")
        assert (notes["position"], notes["passed_over"]) == (10, [4, 5])


def test_processes_of_other_settings_are_refused_with_the_key(easy_vqa, tmp_path):
    each = [["--config.seed=1"], ["--config.seed=2", "--config.data.prefetch=9"]]
    run = Run(2, easy_vqa, tmp_path / "run", each=each)
    assert run.statuses() == [1, 1]
    said = "process 1 on .* differs from process 0 on .*: config.seed is 2 there and 1 in process 0 "
    for process in range(2):
        assert re.search(said, run.errors(process)[0]) and len(run.errors(process)) == 1
    assert not (tmp_path / "run").exists()
