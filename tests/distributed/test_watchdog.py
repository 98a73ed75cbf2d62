"""A step that takes far longer than usual is told with the stacks; what may take long is not. Real arrays of jax."""

import json
import time

import jax.numpy as jnp
import pytest

from fastvlm_jax.distributed import Watchdog, watchdog


@pytest.fixture
def dog(tmp_path, monkeypatch):
    """Yields a watchdog of 100 steps that finds steps of more than 0.3 seconds slow, behind six fast ones."""
    for name, value in dict(AT_LEAST=0.3, SLOW=0, LOOK_SECONDS=0.05).items():
        monkeypatch.setattr(watchdog, name, value)
    with Watchdog(tmp_path, "small", 100) as dog:
        for step in range(1, 7):
            dog.begin(step, (8, 8), jnp.float32(step))
        while dog.state()["step"] != 6:
            time.sleep(0.01)
        yield dog


def wait_for(path, words):
    while not path.exists() or words not in path.read_text():
        time.sleep(0.01)
    return path.read_text()


def in_a_stalled_input(path):
    return wait_for(path, "in in_a_stalled_input")


def test_a_slow_step_is_told_once_with_the_stacks_and_its_end(dog, tmp_path, capsys):
    stacks = in_a_stalled_input(tmp_path / "stacks/process_0.txt")
    assert ": step 7 has taken " in stacks
    time.sleep(0.5)
    dog.begin(7, (8, 8), jnp.float32(7))
    while dog.state()["step"] != 7:
        time.sleep(0.01)
    dog.__exit__()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("small: step 7 has taken ")
    assert lines[0].endswith(f"; stacks of all threads: {tmp_path / 'stacks'}")
    assert lines[1].startswith("small: step 7 has ended, after ")
    assert (tmp_path / "stacks/process_0.txt").read_text().count("has taken") == 1


def test_what_may_take_long_and_the_first_steps_of_a_size_are_not_slow(dog, tmp_path, capsys):
    with dog.doing("an evaluation"):
        time.sleep(0.6)
        assert dog.state()["doing"] == "an evaluation"
    dog.doing("a save")(time.sleep)(0.6)
    dog.begin(7, (64, 64), jnp.float32(7))
    time.sleep(0.6)
    assert capsys.readouterr().err == "" and not (tmp_path / "stacks").exists()


def test_what_lies_before_the_first_step_behind_a_roll_back_may_take_long(dog, tmp_path, capsys):
    dog.restart()
    with dog.doing("the restore"):
        time.sleep(0.1)
    time.sleep(0.6)
    assert dog.state()["doing"] == "the start"
    assert capsys.readouterr().err == "" and not (tmp_path / "stacks").exists()
    dog.begin(4, (8, 8), jnp.float32(4))
    while dog.state()["step"] != 4:
        time.sleep(0.01)


def test_the_start_may_take_long(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watchdog, "AT_LEAST", 0.0)
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.05)
    with Watchdog(tmp_path, "small", 100) as dog:
        time.sleep(0.3)
        assert dog.state()["doing"] == "the start" and dog.state()["step"] is None
    assert capsys.readouterr().err == ""


def test_time_in_which_the_devices_wait_for_this_process_is_counted(dog):
    dog.held()
    with dog.doing("a save"):
        time.sleep(0.2)
        begin = time.monotonic()
    time.sleep(0.2)
    dog.begin(7, (8, 8), jnp.float32(7))
    assert 0.2 <= dog.held() <= time.monotonic() - begin
    assert dog.held() == 0


def test_the_heartbeat_says_how_far_the_run_is_until_it_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "BEAT_SECONDS", 0.05)
    with Watchdog(tmp_path, "small", 100) as dog:
        dog.begin(41, (8, 8), jnp.float32(1))
        beat = json.loads(wait_for(tmp_path / "heartbeat.json", '"step 42"'))
        assert abs(beat.pop("time") - time.time()) < 60 and 0 <= beat.pop("seconds") < 60 and beat.pop("pid")
        assert beat.pop("host") and beat == {"step": 41, "steps": 100, "doing": "step 42"}
    assert json.loads((tmp_path / "heartbeat.json").read_text())["doing"] == "nothing: it has ended"
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat.json"]


def test_a_heartbeat_that_cannot_be_written_is_told_once_and_ends_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watchdog, "BEAT_SECONDS", 0.05)
    with Watchdog(tmp_path / "gone", "small", 100):
        time.sleep(0.3)
    path = tmp_path / "gone/heartbeat.json"
    assert capsys.readouterr().err == (
        f"small: {path} cannot be written, supervisors see no heartbeat: No such file or directory\n"
    )
