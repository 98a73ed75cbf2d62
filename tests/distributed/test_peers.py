"""Tests how processes meet, exchange values, stop after the same step, and notice a lost or late one."""

import concurrent.futures
import contextlib
import json
import socket
import threading
import time

import pytest
from command import fastvlm
from paths import HELPERS
from ports import free_port

from fastvlm_jax.distributed.peers import Peers
from fastvlm_jax.distributed.rendezvous import Settings, read_line


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
    """Returns the error message of a process that does not meet all others."""
    with pytest.raises(OSError) as caught:
        Peers(settings(process, count, port), {}, print)
    return str(caught.value)


def settings(process, count, port, heartbeat=5.0, late=300.0):
    return Settings(f"127.0.0.1:{port}", count, process, heartbeat, 1.5, late)


def meet(count, heartbeat=5.0, late=300.0):
    """Returns the Peers of `count` processes, all inside this one, and the lines that each received about a loss."""
    port, peers, lost = free_port(), [None] * count, [[] for _ in range(count)]

    def start(process):
        peers[process] = Peers(settings(process, count, port, heartbeat, late), {"from": process}, lost[process].append)

    threads = [threading.Thread(target=start, args=(process,)) for process in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return peers, lost


def in_all(peers, function):
    """Calls `function` on all peers at the same time and returns the results."""
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
        with pytest.raises(TimeoutError, match=r"process 1 on \S+ did not join 'here' within 1 s"):
            p.exchange("here", seconds=1)

    in_all([peers[0], peers[2]], come)
    in_all(peers, lambda p: p.end())


@pytest.mark.parametrize("asking", [0, 2])
def test_all_stop_after_the_same_step_however_far_each_is(asking):
    peers, _ = meet(3)
    reached = [5, 8, 6]
    for p, step in zip(peers, reached, strict=True):
        assert not p.stop_reached(step)
    peers[asking].ask_stop(75)
    peers[asking].ask_stop(130)  # too late to change the status
    time.sleep(0.5)

    def run(p):
        step = reached[p.settings.process_id] + 1
        while not p.stop_reached(step):
            step += 1
        return step

    assert in_all(peers, run) == [9, 9, 9]
    assert [p.stop_status for p in peers] == [75, 75, 75]
    in_all(peers, lambda p: p.end())


def test_no_process_runs_past_the_last_step_while_it_is_agreed_on():
    peers, _ = meet(3)

    def run(p):
        step = 0
        while not p.stop_reached(step):
            step += 1
            time.sleep(0.02 if p.settings.process_id == 2 else 0.001)  # far behind the others
            if p.settings.process_id == 2 and step == 20:
                p.ask_stop(130)
        return step

    steps = in_all(peers, run)
    assert steps[0] == steps[1] == steps[2] > 20
    in_all(peers, lambda p: p.end())


def test_an_error_in_one_process_is_told_by_all_others():
    peers, lost = meet(3)
    peers[2].fail("stopped: the disk is full")
    time.sleep(1)
    assert lost == [[f"process 2 on {socket.gethostname()} stopped: the disk is full"]] * 2 + [[]]


@pytest.mark.parametrize("late", [0, 1])
def test_a_process_that_lives_but_keeps_the_others_waiting_is_told_by_all_and_a_slow_one_is_not(late):
    peers, lost = meet(3, heartbeat=3.0, late=2.0)
    others = [p for p in peers if p.settings.process_id != late]
    for step in range(1, 4):  # the others are far ahead most of the time, and wait
        for p in others:
            p.mark(f"step {step}", 0.01)
        time.sleep(0.5)
        peers[late].mark(f"step {step}", 0.01)
    assert lost == [[], [], []]
    for p in others:
        p.mark("step 4", 0.01)
    begin = time.monotonic()
    while not all(lost) and time.monotonic() - begin < 20:
        time.sleep(0.05)
    line = (
        f"process {late} on {socket.gethostname()} came no further than step 3 in 2 s, while the others waited; "
        "start all processes again: they go on from what is saved"
    )
    assert lost == [[line]] * 3


def test_a_step_that_ends_nowhere_is_the_fault_of_no_process():
    peers, lost = meet(2, heartbeat=3.0, late=0.5)
    for p in peers:
        p.mark("a compilation", None)
    time.sleep(1.4)
    assert lost == [[], []] and peers[0].slowest() == "no process is behind the others"
    peers[0].mark("step 9", 0.01)
    time.sleep(1)
    assert peers[0].slowest() == f"process 1 on {socket.gethostname()} came no further than a compilation"
    peers[1].mark("step 9", 0.01)
    begin = time.monotonic()
    while not all(lost) and time.monotonic() - begin < 20:
        time.sleep(0.05)
    assert lost[0] == lost[1] == [
        "no process came further than step 9 in 0.5 s: the devices or the network between them hang; start all "
        "processes again: they go on from what is saved"
    ]  # fmt: skip


@pytest.mark.parametrize("goes", [0, 1])
@pytest.mark.parametrize("how", ["closes", "falls silent"])
def test_a_connection_that_closes_or_falls_silent_is_told_by_all_others(goes, how):
    """Process `goes` is a bare socket that sends hello, or welcome, and then nothing."""
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
    assert lost == [f"process {goes} on frozen {what}; start all processes again: they go on from what is saved"]
    assert time.monotonic() - begin < 8
    bare.close()


@pytest.mark.parametrize(
    "sent, words",
    [(b"{}", "the connection was closed"), (b"x" * 1_200_000, "longer than 1048576 bytes: another program")],
)
def test_a_line_without_an_end_and_one_that_is_too_long_are_told_apart(sent, words):
    ours, theirs = socket.socketpair()

    def send():
        with contextlib.suppress(OSError):
            theirs.sendall(sent)
        theirs.close()

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(ValueError, match=words):
        read_line(ours)
    ours.close()
    sender.join()
