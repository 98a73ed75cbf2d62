"""The commands that a sweep issues: by the launchers, whose programs are replaced, and what it makes of their end."""

import json
import os
import re
import signal
import sys
import threading
import time

import pytest
from command import fastvlm
from launch_fakes import READY, calls, launch, make_fakes, settings_of

from fastvlm_jax.distributed import StopRequest
from fastvlm_jax.sweep import plan, run
from fastvlm_jax.sweep.grid import Point, Stage, sweep_config
from fastvlm_jax.sweep.launcher import Launcher

OWN = "configs/own_data.py:tiny"
# In the place of fastvlm: notes its words, fails where FAIL stands in them, and writes what evaluate and bench write.
PROGRAM = """
import json, pathlib, signal, sys, time
folder, words = pathlib.Path(__file__).parent.parent.parent, sys.argv[1:]
with (folder / "calls").open("a") as file: file.write(" ".join(words) + "\\n")
if (folder / "slow").exists():  # saves when it is told to stop, as the trainer
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("saved"))
    (folder / "started").touch()
    time.sleep(60)
fail = (folder / "fail").read_text() if (folder / "fail").exists() else ""
if fail and fail in " ".join(words):
    print("some output"); sys.exit("ValueError: it broke")
output = pathlib.Path(words[-1].partition("=")[2])
if words[0] == "evaluate":
    output.mkdir(parents=True, exist_ok=True)
    (output / "easy-vqa-own.json").write_text(json.dumps({"score": 60.0, "standard_error": 3.0, "n": 9}))
if words[0] == "bench":
    output.write_text(json.dumps({"points": [{"paper_ttft": 0.25}], "against": []}))
"""


@pytest.fixture
def grid(tmp_path, easy_vqa):
    """Two points that share their first stage, as a config file, and a launcher whose fastvlm is PROGRAM."""
    data = f'"data.path": "{easy_vqa}", "data.tokenizer": "{easy_vqa}"'
    first = f'Stage("{OWN}", {{"data.image_size": 64, {data}}})'
    (tmp_path / "grid.py").write_text(
        "from fastvlm_jax.sweep.grid import Point, Stage, sweep_config\n"
        "def get_config():\n"
        f'    a = Point("a", "hd", "tiny", 64, ({first},))\n'
        f'    b = Point("b", "hd", "tiny", 128, ({first}, Stage("{OWN}", {{"data.image_size": 128, {data}}})))\n'
        '    c = sweep_config("mine", "Mine", [a, b], ["easy-vqa"])\n'
        f'    c.benchmark_data = "{easy_vqa}"\n'
        "    return c\n"
    )
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/fastvlm").write_text(f"#!{sys.executable} -ES\n{PROGRAM}")
    (tmp_path / "venv/bin/fastvlm").chmod(0o755)
    settings_of(tmp_path, "local", VENV=tmp_path / "venv", MAX_RESTARTS="0")
    return tmp_path


def sweep(grid, monkeypatch, capsys, *more):
    settings = grid / "local.env"
    status, _, err = fastvlm(
        monkeypatch, capsys, "sweep", f"--config={grid / 'grid.py'}", f"--workdir={grid / 'w'}", "--launcher=local",
        f"--settings={settings}", f"--ttft_settings={settings}", *more,
    )  # fmt: skip
    results = json.loads((grid / "w/results.json").read_text()) if (grid / "w/results.json").exists() else None
    made = [line.split() for line in (grid / "calls").read_text().splitlines()] if (grid / "calls").exists() else []
    (grid / "calls").unlink(missing_ok=True)
    return status, err.splitlines(), results, [words[:2] if words[0] == "bench" else words[:1] for words in made]


def states(results):
    return {point["name"]: point["state"] for point in results["points"]}


def test_tasks_run_in_order_and_only_changed_ones_again(grid, monkeypatch, capsys):
    status, lines, results, made = sweep(grid, monkeypatch, capsys)
    assert status == 0
    assert made == [["train"], ["evaluate"], ["train"], ["evaluate"], ["bench", "ttft"], ["bench", "ttft"]]
    assert [line.split("]")[0] for line in lines] == [f"sweep: [{k} of 6" for k in range(1, 7)]
    assert states(results) == {"a": "done", "b": "done"}
    first = results["points"][0]
    assert first["accuracy"]["easy-vqa"] == {"value": 60.0, "standard_error": 3.0, "n": 9, "blind": None}
    assert first["mean"] == 60.0 and first["mean_standard_error"] == 3.0
    assert first["ttft"] == {"paper_ttft": 0.25} and first["image_tokens"] == 1
    status, lines, results, made = sweep(grid, monkeypatch, capsys)
    assert (status, made, lines) == (0, [], ["sweep: 6 of 6 tasks were finished before"])
    # A changed point is made anew, and what it was is kept.
    text = (grid / "grid.py").read_text()
    (grid / "grid.py").write_text(text.replace('"data.image_size": 128', '"data.image_size": 128, "seed": 5'))
    status, lines, results, made = sweep(grid, monkeypatch, capsys)
    assert status == 0 and made == [["train"], ["evaluate"], ["bench", "ttft"]]
    assert lines[0].startswith(f"sweep: point b has changed: what it was is kept in {grid}/w/points/b-")
    assert len(list((grid / "w/points").glob("b-*/evaluation/easy-vqa-own.json"))) == 1
    # The point as it was finds its files again.
    (grid / "grid.py").write_text(text)
    assert sweep(grid, monkeypatch, capsys)[3] == []
    # Other questions are asked without training or timing again.
    status, _, results, made = sweep(grid, monkeypatch, capsys, "--config.limit=5")
    assert (status, made) == (0, [["evaluate"]] * 2) and results["points"][1]["mean"] == 60.0
    # Of answers that others began to replace there is no score any more.
    (grid / "fail").write_text("evaluate")
    assert sweep(grid, monkeypatch, capsys, "--config.limit=7")[0] == 1
    (grid / "fail").unlink()
    assert sweep(grid, monkeypatch, capsys, "--config.limit=5")[3] == [["evaluate"]] * 2
    # A kill just after the point was set aside loses nothing.
    point = grid / "w/points/b"
    point.rename(point.with_name(f"b-{json.loads((point / 'point.json').read_text())['run'][:10]}"))
    assert sweep(grid, monkeypatch, capsys, "--config.limit=5")[3] == []


def test_in_a_bucket_a_changed_point_is_scored_and_timed_anew_each_time(grid, monkeypatch, capsys):
    """The same files get its answers, so what was found before says nothing about them."""
    remote = f"--remote={grid / 'bucket'}"
    assert sweep(grid, monkeypatch, capsys, remote)[0] == 0
    text = (grid / "grid.py").read_text()
    (grid / "grid.py").write_text(text.replace('"data.image_size": 128', '"data.image_size": 128, "seed": 5'))
    assert sweep(grid, monkeypatch, capsys, remote)[3] == [["train"], ["evaluate"], ["bench", "ttft"]]
    (grid / "grid.py").write_text(text)
    status, _, results, made = sweep(grid, monkeypatch, capsys, remote)
    assert (status, made) == (0, [["evaluate"], ["bench", "ttft"]]) and states(results) == {"a": "done", "b": "done"}
    assert {path.name for path in (grid / "bucket/points").iterdir()} == {"a", "b"}


def test_a_failed_point_is_named_and_the_others_go_on(grid, monkeypatch, capsys):
    (grid / "fail").write_text("--config.data.image_size=128")
    status, lines, results, made = sweep(grid, monkeypatch, capsys)
    assert status == 1 and states(results) == {"a": "done", "b": "failed"}
    assert made == [["train"], ["evaluate"], ["train"], ["bench", "ttft"]]
    broken = results["points"][1]
    assert broken["error"].startswith("train-own_data-hd-tiny-128-") and "exit status 1" in broken["error"]
    assert "is left out: train-own_data-hd-tiny-128-" in "\n".join(lines)
    log = next((grid / "w/logs").glob("train-own_data-hd-tiny-128-*.log")).read_text()
    assert "ValueError: it broke" in log and f"(see {grid}/w/logs/train-own_data" in "\n".join(lines)
    assert lines[-1].startswith("fastvlm sweep: 1 of 2 points failed: b;")
    (grid / "fail").unlink()
    status, lines, results, made = sweep(grid, monkeypatch, capsys)
    assert (status, states(results)) == (0, {"a": "done", "b": "done"})
    assert made == [["train"], ["evaluate"], ["bench", "ttft"]]


def test_a_shared_stage_that_fails_fails_all_its_points(grid, monkeypatch, capsys):
    (grid / "fail").write_text("--config.data.image_size=64")
    status, lines, results, made = sweep(grid, monkeypatch, capsys)
    assert status == 1 and states(results) == {"a": "failed", "b": "failed"} and made == [["train"]]
    assert "2 of 2 points failed: a, b;" in lines[-1]


def test_a_folder_of_something_else_is_refused(grid, monkeypatch, capsys):
    (grid / "w").mkdir()
    (grid / "w/notes.txt").write_text("mine")
    status, lines, _, made = sweep(grid, monkeypatch, capsys)
    assert (status, made) == (1, []) and len(lines) == 1
    assert lines[0].endswith(f"--workdir {grid}/w is not empty and no folder of a sweep: choose another")


@pytest.mark.parametrize(
    "more, message",
    [
        (("--launcher=tpu",), "--launcher tpu needs --remote gs://BUCKET/DIR"),
        (("--launcher=slurm", "--settings="), "--launcher slurm needs --settings FILE: copy launch/settings/slurm.env"),
        (("--settings=none.env",), "there is no settings file none.env"),
    ],
)
def test_a_launcher_that_cannot_work_is_refused(more, message, grid, monkeypatch, capsys):
    status, lines, _, made = sweep(grid, monkeypatch, capsys, *more)
    assert (status, made) == (1, []) and len(lines) == 1 and message in lines[0]
    assert not (grid / "w").exists()


def tasks():
    first = Stage(OWN, {"data.image_size": 64, "parent": "vision={enc}"})
    c = sweep_config("mine", "Mine", [Point("a", "hd", "tiny", 64, (first,))], ["textvqa"], ["enc"])
    c.weights.enc, c.benchmark_data = "gs://my-bucket/enc", "gs://my-bucket/data"
    return plan.make_plan(c, "gs://my-bucket/s").tasks


@pytest.mark.parametrize("name", ["tpu", "gke", "slurm"])
def test_launchers_send_the_exact_commands(name, tmp_path):
    """Their dry runs hold the command of every kind of task, with the bucket's names as the machines see them."""
    train, evaluate, ttft = tasks()
    mount = "/gcs/my-bucket" if name != "slurm" else "/mnt/b"
    changes = {"BUCKET": "my-bucket", "MOUNT": mount} if name == "slurm" else {}
    settings = str(settings_of(tmp_path, name, **changes))
    (tmp_path / "fakes").mkdir()
    environment = make_fakes(tmp_path / "fakes", READY)
    model = f"--model={mount}/s/{train.output}"
    stage = f"train --config={OWN} --workdir={mount}/s/{train.output} --config.data.image_size=64"
    scored = f"evaluate {model} --benchmark=textvqa --data=gs://my-bucket/data"
    expected = [
        (train, f"{stage} --config.parent=vision={mount}/enc"),
        (evaluate, f"{scored} --output={mount}/s/points/a/evaluation"),
        (ttft, f"bench ttft {model} --image_size=64 --output={mount}/s/points/a/ttft.json"),
    ]
    for task, words in expected:
        bash, script, *arguments = Launcher(name, settings, settings).command(task)
        assert (bash, script) == ("bash", f"launch/{name}.sh")
        status, out, err = launch(f"{name}.sh", *arguments, "--dry_run", environment=environment)
        assert (status, err) == (0, ""), err
        text = " ".join(re.findall(r' - "(.*)"$', out, re.M)) if name == "gke" else " ".join(out.split())
        assert f"fastvlm {words}" in text
        # One process alone takes the time, so it needs nobody to meet.
        assert ("--process_id=" in out) == (name == "slurm" and task is not ttft)
    assert not calls(tmp_path / "fakes")


def test_an_unknown_command_of_a_launcher_is_refused(tmp_path):
    settings = str(settings_of(tmp_path, "tpu"))
    status, out, err = launch("tpu.sh", "--settings", settings, "--command=data", "--workdir=gs://my-bucket/x")
    assert (status, out) == (2, "") and "unknown --command=data: train, evaluate or bench ttft" in err


def test_time_left_is_by_the_pace_of_what_was_measured():
    train, _, ttft = tasks()
    measured = [{"pace": train.pace, "seconds": 60.0, "work": train.work / 10}]
    assert run.time_left([train], []) == ""
    assert run.time_left([train], measured) == ", about 10 minutes left"
    assert run.time_left([train, ttft], measured) == ", at least 10 minutes left"


def test_data_that_are_not_there_are_named_before_anything_runs(grid, monkeypatch, capsys):
    (grid / "grid.py").write_text((grid / "grid.py").read_text().replace('"data.path": "', '"data.path": "/none'))
    status, lines, _, made = sweep(grid, monkeypatch, capsys)
    assert (status, made) == (1, []) and len(lines) == 1 and not (grid / "w").exists()
    assert lines[0].startswith("fastvlm sweep: point a, own_data: there is no dataset folder /none")
    status, lines, _, made = sweep(grid, monkeypatch, capsys, "--config.overrides=(('data.path', '/nowhere'),)")
    assert status == 1 and "there is no dataset folder /nowhere" in lines[0]


def test_files_of_a_benchmark_that_are_not_there_are_named_before_anything_runs(grid, monkeypatch, capsys):
    status, lines, _, made = sweep(grid, monkeypatch, capsys, "--config.benchmark_data=/none")
    assert (status, made) == (1, []) and len(lines) == 1 and "/none" in lines[0]
    status, lines, _, made = sweep(grid, monkeypatch, capsys, "--config.protocol=llava")
    assert (status, made) == (1, []) and "--protocol llava" in lines[0] and not (grid / "w").exists()


def test_a_signal_stops_the_command_at_work_and_says_how_to_go_on(grid, monkeypatch, capsys):
    def stop():
        while not (grid / "started").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    (grid / "slow").touch()
    threading.Thread(target=stop, daemon=True).start()
    status, lines, results, _ = sweep(grid, monkeypatch, capsys)
    assert states(results) == {"a": "pending", "b": "pending"}  # `fastvlm report` can show it from the start
    assert status == 75 and re.fullmatch(
        "fastvlm sweep: stopped in train-own_data-hd-tiny-64-.*; the same command goes on from there", lines[-1]
    )
    assert "saved" in next((grid / "w/logs").iterdir()).read_text()
    (grid / "slow").unlink()
    assert sweep(grid, monkeypatch, capsys)[0] == 0


def test_a_command_that_asks_for_another_start_gets_it(tmp_path, monkeypatch):
    for name in ("launch", "w"):
        (tmp_path / name).mkdir()
    (tmp_path / "launch/local.sh").write_text("echo start >>starts; [ $(wc -l <starts) = 3 ] || exit 75\n")
    task = tasks()[0]
    monkeypatch.chdir(tmp_path)
    with open("lock", "w") as lock, StopRequest() as stop:
        assert run.start(task, tmp_path / "w", Launcher("local", "x"), lock.fileno(), stop) is None
    assert (tmp_path / "starts").read_text() == "start\n" * 3
