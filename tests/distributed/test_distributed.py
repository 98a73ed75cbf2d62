"""Several real processes on this machine: they train as one, stop together, and tell who is gone."""

import concurrent.futures
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
from command import fastvlm
from paths import HELPERS, ROOT
from small import small_config

from fastvlm_jax import checkpoint, distributed
from fastvlm_jax.distributed.peers import Peers
from fastvlm_jax.distributed.rendezvous import Settings
from fastvlm_jax.metrics.writer import read_metrics
from fastvlm_jax.train import train

CONFIG = dict(mesh=(1, 2, 2, 1), data__groups=4, steps=12, eval_batches=1, eval_questions=3)
CONFIG |= dict(model__vision__form="folded", model__vision__batch_norm="frozen", data__image_size=8)
CONFIG |= dict(model__vision__layers=(1,), model__vision__embed_dims=(8,), model__vision__mixers=("repmixer",))
DEVICES = 4


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Run:
    """`fastvlm train` in several processes with DEVICES in all."""

    def __init__(self, count, data, workdir, *flags, each=()):
        self.folder = workdir.parent / f"{workdir.name}-{count}-processes"
        self.folder.mkdir(parents=True)
        address = f"127.0.0.1:{free_port()}"
        config = [f"--config.{key.replace('__', '.')}={value}" for key, value in CONFIG.items()]
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, HELPERS / "train_process.py", str(DEVICES // count), "train"),
                    *("--config", f"{HELPERS / 'small.py'}:{data}", "--workdir", workdir, *config),
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
        """The exit statuses, waited for; of all but one process."""
        waited = [process for i, process in enumerate(self.processes) if i != leave_out]
        try:
            return [process.wait(seconds) for process in waited]
        finally:
            for process in self.processes:
                process.kill()

    def errors(self, process):
        """The lines that a process printed, without progress and what Gloo and loggers say."""
        lines = (self.folder / str(process)).read_text().splitlines()
        return [line for line in lines if not re.match(r"\[Gloo\]|small step|WARNING|[IWE]\d{4} ", line)]


def wait_for_step(step, workdir, run):
    while not any(row["step"] >= step for row in read_metrics(workdir)):
        assert all(process.poll() is None for process in run.processes), [run.errors(i) for i in range(2)]
        time.sleep(0.05)


def losses(workdir):
    return [row["loss"] for row in read_metrics(workdir) if "loss" in row]


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def straight(easy_vqa, tmp_path_factory):
    """The run that all others must equal: one process, never stopped."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    train(small_config(easy_vqa, **CONFIG), workdir, jax.devices()[:DEVICES])
    return workdir


def test_four_processes_stopped_by_sigterm_of_one_go_on_as_two_and_as_one(easy_vqa, straight, tmp_path):
    four = Run(4, easy_vqa, tmp_path / "run")
    wait_for_step(2, tmp_path / "run", four)
    four.processes[2].send_signal(signal.SIGTERM)
    assert four.statuses() == [130] * 4
    (step,) = saved_steps(tmp_path / "run")
    said = f"fastvlm train: stopped at step {step} of 12, which is saved; the same command goes on from there"
    assert [four.errors(process) for process in range(4)] == [[said]] * 4
    assert 2 <= step < 12 and len(losses(tmp_path / "run")) == step
    shutil.copytree(tmp_path / "run", tmp_path / "one")

    two = Run(2, easy_vqa, tmp_path / "run")
    assert two.statuses() == [0, 0]
    train(small_config(easy_vqa, **CONFIG), tmp_path / "one", jax.devices()[:DEVICES])
    for workdir in ("run", "one"):
        np.testing.assert_allclose(losses(tmp_path / workdir), losses(straight), rtol=1e-5)
        assert [row["step"] for row in read_metrics(tmp_path / workdir)] == [*range(1, 13), 12]
        last, expected = (read_metrics(folder)[-1] for folder in (tmp_path / workdir, straight))
        np.testing.assert_allclose(last["validation/loss"], expected["validation/loss"], rtol=1e-5)
        assert last["validation/accuracy"] == expected["validation/accuracy"]


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
    again = "start all processes again: they go on from the last checkpoint"
    assert run.errors(1 - victim) == [f"fastvlm: process {victim} on {socket.gethostname()} {what}; {again}"]


def test_processes_of_other_settings_are_refused_with_the_key(easy_vqa, tmp_path):
    each = [["--config.seed=1"], ["--config.seed=2", "--config.data.prefetch=9"]]
    run = Run(2, easy_vqa, tmp_path / "run", each=each)
    assert run.statuses() == [1, 1]
    said = "process 1 on .* differs from process 0 on .*: config.seed is 2 there and 1 in process 0 "
    for process in range(2):
        assert re.search(said, run.errors(process)[0]) and len(run.errors(process)) == 1
    assert not (tmp_path / "run").exists()


FLAGS = dict(coordinator_address="10.0.0.2:8476", num_processes=4, process_id=3)


def test_flags_come_before_variables_of_ours_and_those_before_variables_of_jax(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "jax:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "8")
    monkeypatch.setenv("FASTVLM_NUM_PROCESSES", "4")
    monkeypatch.setenv("FASTVLM_PROCESS_ID", "1")
    monkeypatch.setenv("FASTVLM_HEARTBEAT_SECONDS", "7.5")
    assert distributed.find_settings(process_id=3) == Settings("jax:1", 4, 3, 7.5, 300.0)
    assert distributed.find_settings(num_processes=1, process_id=0) is None


def test_one_host_without_flags_is_alone_and_slurm_tells_its_own():
    assert distributed.find_settings() is None
    variables = dict(
        SLURM_JOB_ID="1000", SLURM_STEP_NODELIST="node[07-09]", SLURM_NTASKS="3", SLURM_PROCID="2", SLURM_LOCALID="0"
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        assert distributed.find_settings(heartbeat_seconds=20) == Settings("node07:62440", 3, 2, 20)
        patch.setenv("SLURM_NTASKS", "1")
        assert distributed.find_settings() is None


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(process_id=None), "--process_id missing: --coordinator_address, --num_processes, --process_id"),
        (dict(coordinator_address=None, process_id=None), "--coordinator_address and --process_id missing"),
        (dict(process_id=4), "--process_id=4 must be from 0 to 3"),
        (dict(coordinator_address="10.0.0.2"), "--coordinator_address=10.0.0.2 must be HOST:PORT"),
        (dict(heartbeat_seconds=0.0), "--heartbeat_seconds=0 must be a positive number"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_partial_or_wrong_flags_are_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        distributed.find_settings(**{**FLAGS, **flags})


def test_a_variable_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("FASTVLM_PROCESS_ID", "one")
    with pytest.raises(ValueError, match="FASTVLM_PROCESS_ID='one' must be a number"):
        distributed.find_settings("10.0.0.2:8476", 4)


def command(process, port):
    return [
        *("train", "--config", f"{HELPERS / 'small.py'}:nowhere", "--workdir", "nowhere", "--initialization_seconds=1"),
        *(f"--coordinator_address=127.0.0.1:{port}", "--num_processes=3", f"--process_id={process}"),
    ]


def test_processes_that_never_start_are_named(monkeypatch, capsys):
    port = free_port()
    other = threading.Thread(target=refusal, args=(1, 3, port))
    other.start()
    status, _, error = fastvlm(monkeypatch, capsys, *command(0, port))
    other.join()
    assert status == 1 and error == (
        f"fastvlm train: process 2 of 3 did not connect to 127.0.0.1:{port} within 1 s: is it running, with the same "
        "--coordinator_address?\n"
    )
    status, _, error = fastvlm(monkeypatch, capsys, *command(2, port))
    assert status == 1 and error == (
        f"fastvlm train: process 0 did not answer at 127.0.0.1:{port} within 1 s (Connection refused): is it running, "
        "and is the port open?\n"
    )


def test_a_port_in_use_and_a_second_process_of_a_number_are_refused(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        status, _, error = fastvlm(monkeypatch, capsys, *command(0, port))
        assert status == 1 and f"process 0 cannot listen on port {port}" in error and error.count("\n") == 1
    waiting = [threading.Thread(target=refusal, args=(process, 3, port)) for process in (0, 1)]
    for thread in waiting:
        thread.start()
    time.sleep(0.5)
    assert "process_id=1 is taken by another process" in refusal(1, 3, port)
    assert "num_processes is 2 here and 3 in process 0" in refusal(1, 2, port)
    for thread in waiting:
        thread.join()


def refusal(process, count, port):
    """What a process that is not met by all others is told."""
    with pytest.raises(OSError) as caught:
        Peers(settings(process, count, port), {}, print)
    return str(caught.value)


def settings(process, count, port, heartbeat=5.0):
    return Settings(f"127.0.0.1:{port}", count, process, heartbeat, 1.5)


def meet(count, heartbeat=5.0):
    """Peers of `count` processes, all in this one, and the lines that each got about a loss."""
    port, peers, lost = free_port(), [None] * count, [[] for _ in range(count)]

    def start(process):
        peers[process] = Peers(settings(process, count, port, heartbeat), {"from": process}, lost[process].append)

    threads = [threading.Thread(target=start, args=(process,)) for process in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return peers, lost


def in_all(peers, function):
    """What `function` gives for each of the peers, called at the same time."""
    with concurrent.futures.ThreadPoolExecutor(len(peers)) as pool:
        return list(pool.map(function, peers))


def test_an_exchange_gives_all_values_in_order_to_all():
    peers, lost = meet(3)
    assert [p.greeting for p in peers] == [{"from": 0}] * 3
    values = in_all(peers, lambda p: p.exchange("squares", p.settings.process_id**2))
    assert values == [[0, 1, 4]] * 3
    in_all(peers, lambda p: p.end())
    assert lost == [[], [], []]


def test_an_exchange_names_those_that_come_too_late():
    peers, _ = meet(3)

    def come(p):
        with pytest.raises(TimeoutError, match=r"process 1 on \S+ did not come to 'here' within 1 s"):
            p.exchange("here", seconds=1)

    in_all([peers[0], peers[2]], come)
    in_all(peers, lambda p: p.end())


@pytest.mark.parametrize("asking", [0, 2])
def test_all_stop_after_the_same_step_however_far_each_is(asking):
    peers, _ = meet(3)
    reached = [5, 8, 6]
    for p, step in zip(peers, reached, strict=True):
        assert not p.stop_reached(step)
    peers[asking].ask_stop()
    peers[asking].ask_stop()
    time.sleep(0.5)

    def run(p):
        step = reached[p.settings.process_id] + 1
        while not p.stop_reached(step):
            step += 1
        return step

    assert in_all(peers, run) == [9, 9, 9]
    in_all(peers, lambda p: p.end())


def test_no_process_runs_past_the_last_step_while_it_is_agreed_on():
    peers, _ = meet(3)

    def run(p):
        step = 0
        while not p.stop_reached(step):
            step += 1
            time.sleep(0.02 if p.settings.process_id == 2 else 0.001)  # far behind the others
            if p.settings.process_id == 2 and step == 20:
                p.ask_stop()
        return step

    steps = in_all(peers, run)
    assert steps[0] == steps[1] == steps[2] > 20
    in_all(peers, lambda p: p.end())


def test_an_error_in_one_process_is_told_by_all_others():
    peers, lost = meet(3)
    peers[2].fail("stopped: the disk is full")
    time.sleep(1)
    assert lost == [[f"process 2 on {socket.gethostname()} stopped: the disk is full"]] * 2 + [[]]


@pytest.mark.parametrize("goes", [0, 1])
@pytest.mark.parametrize("how", ["closes", "falls silent"])
def test_a_connection_that_closes_or_falls_silent_is_told_by_all_others(goes, how):
    """Process `goes` is a bare socket that says hello, or welcome, and then nothing."""
    port, lost = free_port(), []
    hello = {"process": 1, "of": 2, "host": "frozen"}
    welcome = {"kind": "welcome", "hosts": {"0": "frozen", "1": "b"}, "greeting": {}}
    made = threading.Thread(target=lambda: Peers(settings(1 - goes, 2, port, 1.0), {}, lost.append))
    if goes == 0:
        with socket.create_server(("127.0.0.1", port)) as server:
            made.start()
            bare = server.accept()[0]
            bare.sendall(json.dumps(welcome).encode() + b"\n")
    else:
        made.start()
        time.sleep(0.5)
        bare = socket.create_connection(("127.0.0.1", port))
        bare.sendall(json.dumps(hello).encode() + b"\n")
    made.join()
    if how == "closes":
        bare.close()
    begin = time.monotonic()
    while not lost and time.monotonic() - begin < 10:
        time.sleep(0.05)
    what = "died" if how == "closes" else "is frozen or cut off, silent for 1 s"
    assert lost == [f"process {goes} on frozen {what}; start all processes again: they go on from the last checkpoint"]
    assert time.monotonic() - begin < 8
    bare.close()


@pytest.mark.parametrize("late", [1, None])
def test_processes_wait_for_a_checkpoint_that_one_sees_late(monkeypatch, late):
    """Process 1 of 2, on a network file system: it sees step 8 after `late` looks more, or never."""

    class Checkpointer:
        latest, looks = types.SimpleNamespace(step=4), 0

        def reload(self):
            self.looks += 1
            if self.looks == late:
                self.latest = types.SimpleNamespace(step=8)

    monkeypatch.setattr(distributed, "exchange", lambda name, own: [8, own])
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    if late:
        assert checkpoint.find_latest(Checkpointer()) == 8
    else:
        with pytest.raises(ValueError, match="process 1 does not see the checkpoint of step 8, which process 0 does"):
            checkpoint.find_latest(Checkpointer())
