"""`fastvlm evaluate` as real processes: what is stopped or killed goes on, one process or two, to the same files."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from command import fastvlm
from paths import HELPERS, ROOT
from ports import free_port
from random_model import random_variables
from small import ONE_STAGE, small_config

from fastvlm_jax import convert
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.tokenizer import load_tokenizer

LIMIT, BATCH = 240, 8
FILES = ("easy-vqa-own.json", "easy-vqa-own.predictions.jsonl", "predictions.html")


@pytest.fixture(scope="module")
def command(easy_vqa, tmp_path_factory):
    """Returns the command that scores a model of random weights, without its folder."""
    run = tmp_path_factory.mktemp("evaluated") / "model"
    config = small_config(easy_vqa, **ONE_STAGE).model.to_dict()
    model, variables = random_variables(config)
    processor = Processor(load_tokenizer(easy_vqa), "chatml", 8, model.tokens_per_image(8))
    convert.write(run, "native", variables, config, processor, {})
    return [
        "evaluate", f"--model={run}", "--benchmark=easy-vqa", f"--data={easy_vqa}", f"--limit={LIMIT}",
        f"--batch_size={BATCH}",
    ]  # fmt: skip


@pytest.fixture
def score(command, monkeypatch, capsys):
    """Returns a function that runs the command to its end here, on eight devices, and returns its files by name."""

    def run(folder, *more):
        status, _, error = fastvlm(monkeypatch, capsys, *command, *more, f"--output={folder}")
        assert status == 0, error
        return {name: (folder / name).read_bytes() for name in FILES}

    return run


class Processes:
    """Runs the command in several processes with two devices in all."""

    def __init__(self, count, command, folder):
        self.folder = folder
        address = f"127.0.0.1:{free_port()}"
        together = [[f"--coordinator_address={address}", f"--num_processes={count}", f"--process_id={process}"]
                    for process in range(count)] if count > 1 else [[]]  # fmt: skip
        self.all = [
            subprocess.Popen(
                [sys.executable, HELPERS / "train_process.py", str(2 // count), *command, f"--output={folder}", *flags],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            )
            for flags in together
        ]  # fmt: skip

    def wait_for(self, answers):
        """Waits until the journals hold so many lines, and returns how many they hold; 0 if the process ended."""
        while all(process.poll() is None for process in self.all):
            if (held := held_in(self.folder)) >= answers:
                return held
            time.sleep(0.002)
        return 0


def held_in(folder):
    """Returns the number of lines in the journals of a folder."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.journal-*.jsonl"))


def finish(processes):
    """Returns the exit statuses, the lines on stderr of process 0 without those of Gloo, and the number it answered."""
    errors = [process.communicate(timeout=300)[1] for process in processes.all]
    lines = [line for line in errors[0].splitlines() if not re.match(r"\[Gloo\]|WARNING|[IWE]\d{4} ", line)]
    return [process.returncode for process in processes.all], lines, answered_by(processes.folder)


def answered_by(folder):
    """Returns the number of questions that the last start answered; None if it was not the last."""
    path = folder / "easy-vqa-own.speed.json"
    return json.loads(path.read_text())["questions_answered"] if path.exists() else None


def send_signal_after(folder, answers):
    """Sends SIGTERM to this process once the journals hold so many lines."""
    while held_in(folder) < answers:
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGTERM)


def test_what_is_killed_or_stopped_goes_on_with_other_devices_to_the_same_files(
    command, score, tmp_path, monkeypatch, capsys
):
    straight, folder, moments = score(tmp_path / "straight"), tmp_path / "stopped", random.Random(1)
    held = 0
    for _ in range(2):
        one = Processes(1, command, folder)
        held = one.wait_for(held + moments.randrange(1, 50))
        one.all[0].kill()
        assert finish(one)[0] == [-signal.SIGKILL] and held
        with (folder / "easy-vqa-own.journal-0.jsonl").open("ab") as journal:
            journal.write(b'{"key": "torn')  # as if it had been killed while it wrote

    stop = threading.Thread(target=send_signal_after, args=(folder, held_in(folder) + 1))
    stop.start()
    status, _, error = fastvlm(monkeypatch, capsys, *command, "--batch_size=1", f"--output={folder}")
    stop.join()
    found = re.fullmatch(
        rf"fastvlm evaluate: stopped at (\d+) of {LIMIT} questions of easy-vqa-own, whose answers are in "
        rf"{re.escape(str(folder))}; the same command goes on from there",
        error.splitlines()[-1],
    )
    assert status == 75 and found and answered_by(folder) is None and held < int(found[1]) < LIMIT, error

    assert score(folder) == straight
    assert answered_by(folder) == LIMIT - int(found[1])


@pytest.mark.full
def test_one_goes_on_where_two_stopped_of_which_one_was_killed(command, score, tmp_path):
    straight, folder = score(tmp_path / "straight"), tmp_path / "stopped"
    for stop, expected in ((signal.SIGKILL, [1, -signal.SIGKILL]), (signal.SIGTERM, [75, 75])):
        two = Processes(2, command, folder)
        held = two.wait_for(held_in(folder) + 30)
        two.all[1].send_signal(stop)
        status, errors, answered = finish(two)
        assert status == expected and held and answered is None, errors
    assert all((folder / f"easy-vqa-own.journal-{process}.jsonl").exists() for process in range(2))
    held = held_in(folder)
    assert score(folder) == straight
    assert answered_by(folder) == LIMIT - held


@pytest.mark.full
def test_two_processes_and_other_meshes_write_the_same_files(command, score, tmp_path):
    straight = score(tmp_path / "straight")
    status, errors, answered = finish(Processes(2, command, tmp_path / "two"))
    assert (status, answered) == ([0, 0], LIMIT), errors
    assert {name: (tmp_path / "two" / name).read_bytes() for name in FILES} == straight
    for number, sizes in enumerate(("1,2,2,2", "2,1,2,2", "1,1,8,1")):
        assert score(tmp_path / str(number), f"--mesh={sizes}") == straight


@pytest.mark.full
def test_an_evaluation_killed_at_twenty_random_moments_ends_with_the_same_files(command, score, tmp_path):
    straight, folder, moments = score(tmp_path / "straight"), tmp_path / "killed", random.Random(7)
    held = 0
    for _ in range(20):
        running = Processes(1, [*command, "--batch_size=1"], folder)
        held = running.wait_for(held + moments.randrange(1, 9))
        assert held
        time.sleep(moments.uniform(0, 0.02))
        running.all[0].kill()
        running.all[0].communicate()
    assert score(folder) == straight
    assert 0 < answered_by(folder) < LIMIT
