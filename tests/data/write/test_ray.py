"""Tests `data write --runner=ray` on a local cluster of two workers: the bytes of one machine, whoever dies."""

import hashlib
import io
import os
import pathlib
import pickle
import platform
import re
import shutil
import subprocess
import sys
import threading
import time

import cluster_jobs
import numpy as np
import PIL.Image
import psutil
import pytest
from cluster_jobs import Job
from command import fastvlm
from paths import HELPERS, ROOT

from fastvlm_jax import lock
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.write import Settings, ray_runner, write, write_shards
from fastvlm_jax.files import write_json

ray = pytest.importorskip("ray", reason="pip install 'fastvlm_jax[ray]'")

NODE = platform.node()
JOBS, EACH = 6, 8
SETTINGS = Settings(validation_share=0.2, max_side=400, verify=True)
FLAGS = ("--validation_share=0.2", "--max_side=400", "--verify")


@pytest.fixture(scope="module")
def cluster():
    """Starts a cluster of two workers that this process is connected to, and returns its address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(HELPERS), os.environ.get("PYTHONPATH", "")]))
        options = {"include_dashboard": False, "object_store_memory": 80 << 20, "log_to_driver": False}
        for attempt in range(3):  # on an overloaded machine Ray may give up after its 30 s
            try:
                context = ray.init("local", num_cpus=2, logging_level="ERROR", **options)
                break
            except Exception:
                ray.shutdown()
                if attempt == 2:
                    raise
        yield context.address_info["address"]
        ray.shutdown()


def photo(i):
    pixels = np.random.default_rng(i).integers(0, 256, (125, 150, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).resize((600, 500)).save(file, "JPEG", quality=98)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes a source of six files, a job each, and what one machine makes of it; returns the folder of both."""
    folder = tmp_path_factory.mktemp("ray")
    talk = (("user", (0,)), ("assistant", ("a photo",)))
    records = (Record(str(i), (photo(i),), talk) for i in range(JOBS * EACH))
    write_shards(folder / "set", "train", records, JOBS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write("set", "one", settings=SETTINGS, workers=1)
    return folder


def tree(folder):
    paths = sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def start(source, address, out, cwd, **environment):
    argv = [sys.executable, "-m", "fastvlm_jax", "data", "write", f"--source={source}", f"--output={out}", *FLAGS]
    argv += ["--runner=ray", f"--address={address}"]
    return subprocess.Popen(
        argv, cwd=cwd, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_until(condition):
    end = time.monotonic() + 60
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.003)
    return found


def writers(staged):
    """Returns the processes that have a shard in this folder open."""
    found = []
    for process in psutil.process_iter():
        try:
            found += [process for file in process.open_files() if file.path.startswith(f"{staged}/job-")]
        except psutil.Error:
            continue
    return found


def share_out(jobs, folder, on_report=lambda *_: None, workers=0, sees=()):
    ray_runner.share_out(
        cluster_jobs.work, jobs, on_report, workers=workers, address=None, folder=folder, sees=[str(folder), *sees]
    )


def test_a_cluster_writes_the_bytes_of_one_machine_and_paths_begin_where_the_command_runs(
    cluster, folder, monkeypatch, capfd
):
    monkeypatch.chdir(folder)
    reports = []
    write("set", "out", settings=SETTINGS, runner="ray", progress=reports.append)
    assert tree("out") == tree("one")
    assert (reports[0].done, reports[0].jobs) == (0, JOBS)
    assert (reports[-1].done, reports[-1].records, reports[-1].rejected) == (JOBS, JOBS * EACH, 0)
    assert reports[-1].bytes > 1e6
    assert capfd.readouterr() == ("", "")


def test_the_job_of_a_killed_worker_runs_again_and_counts_once(cluster, folder, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(folder)
    staged, killed, reports = tmp_path / "out/.train.writing", [], []

    def kill():
        process = wait_until(lambda: writers(staged))[0]
        process.kill()
        killed.append(process.pid)

    thread = threading.Thread(target=kill)
    thread.start()
    write("set", tmp_path / "out", settings=SETTINGS, runner="ray", progress=reports.append)
    thread.join()
    assert len(killed) == 1 and tree(tmp_path / "out") == tree("one")
    assert (reports[-1].done, reports[-1].records) == (JOBS, JOBS * EACH)
    assert not capsys.readouterr().out  # Ray tells of the death on stderr


def test_ctrl_c_cancels_the_jobs_at_work_and_the_next_run_goes_on(cluster, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)

    def stop(state):
        if state.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"^stopped; the same command goes on from here$") as raised:
        write("set", tmp_path / "out", settings=SETTINGS, runner="ray", progress=stop)
    assert raised.value.status == 130
    staged = tmp_path / "out/.train.writing"
    assert wait_until(lambda: not writers(staged))
    done = list(staged.glob("job-*.json"))
    time.sleep(0.3)
    assert 1 <= len(done) < JOBS and not writers(staged) and list(staged.glob("job-*.json")) == done
    whole = [path for job in done for path in staged.glob(f"{job.stem}-*.array_record")]
    finished = {path.stat().st_mtime_ns for path in whole}
    write("set", tmp_path / "out", settings=SETTINGS, runner="ray")
    assert tree(tmp_path / "out") == tree("one")
    assert finished and finished <= {path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.array_record")}


def test_terminated_and_killed_the_same_command_ends_in_the_same_bytes(cluster, folder, tmp_path):
    out, staged = tmp_path / "out", tmp_path / "out/.train.writing"
    first = start("set", cluster, out, folder)
    wait_until(lambda: list(staged.glob("job-*.partial")))
    first.terminate()
    assert first.communicate() == ("", "fastvlm data: stopped; the same command goes on from here\n")
    assert first.returncode == 75
    second = start("set", cluster, out, folder)
    # What the first one left does not count.
    wait_until(lambda: f'"pid": {second.pid},' in (out / "lock").read_text())
    wait_until(lambda: list(staged.glob("job-*.json")) and list(staged.glob("job-*.partial")))
    second.kill()
    second.communicate()
    finished = {path.stat().st_mtime_ns for path in staged.glob("job-*.array_record")}
    assert finished and not (out / "manifest.json").exists()
    third = start("set", cluster, out, folder)
    output, error = third.communicate()
    assert third.returncode == 0 and output.startswith(f"{out} train: ")
    assert f"of process {second.pid} on {NODE}" in error and error.endswith("which has ended: taken over\n")
    assert tree(out) == tree(folder / "one")
    assert finished <= {path.stat().st_mtime_ns for path in out.glob("*.array_record")}


def test_a_job_reports_once_when_it_is_done(cluster, tmp_path):
    reports = []
    share_out([Job("a", str(tmp_path)), Job("b", str(tmp_path))], tmp_path, lambda job, *s: reports.append((job[0], s)))
    assert sorted(reports) == [("a", ()), ("a", (3, 10, 1)), ("b", ()), ("b", (3, 10, 1))]
    assert cluster_jobs.attempts(tmp_path) == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    "ends, message",
    [
        ("ValueError", "set.parquet cannot be read"),
        ("OSError", "/full/train-00000: No space left on device: make space on that disk, then run the same command "),
        ("KeyError", "KeyError: 'image'"),
    ],
)
def test_an_error_of_a_job_ends_the_write_in_a_line_and_is_not_tried_again(ends, message, cluster, tmp_path):
    with pytest.raises(ValueError) as raised:
        share_out([Job("a", str(tmp_path), ends)], tmp_path)
    line = str(raised.value)
    assert line.startswith(message) and line.endswith(f" (on node {NODE})") and "\n" not in line
    assert cluster_jobs.attempts(tmp_path)["a"] == 1


def test_a_job_that_kills_every_worker_is_told(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_runner, "RETRIES", 1)
    with pytest.raises(ValueError, match=r"^a lost its worker 2 times .*run the same command again to go on") as raised:
        share_out([Job("a", str(tmp_path), "killed")], tmp_path)
    assert "\n" not in str(raised.value) and cluster_jobs.attempts(tmp_path)["a"] == 2


@pytest.mark.parametrize("workers, most", [(3, 3), (0, 64)])
def test_jobs_are_submitted_a_few_ahead(workers, most, cluster, tmp_path):
    submitted, done, ahead = 0, 0, []

    def jobs():
        nonlocal submitted
        for i in range(70):
            submitted += 1
            ahead.append(submitted - done)
            yield Job(f"{i}", str(tmp_path))

    def on_report(job, *counts):
        nonlocal done
        done += not counts

    share_out(jobs(), tmp_path, on_report, workers)
    assert (done, max(ahead)) == (70, most)


def test_a_source_that_a_node_does_not_see_is_named_before_the_first_job(cluster, tmp_path):
    jobs = iter([Job("a", str(tmp_path))])
    with pytest.raises(ValueError, match=rf"^node {NODE} does not see /nowhere/photos: all nodes need it under the "):
        share_out(jobs, tmp_path, sees=["", "/nowhere/photos"])
    assert len(list(jobs)) == 1


def test_a_node_that_joins_late_asks_itself_before_its_first_job(tmp_path):
    (tmp_path / "token").touch()
    job = Job("a", str(tmp_path))

    def asked(token, *sees):
        view = ray_runner.View(os.getcwd(), token, sees)
        return ray_runner.serve(pickle.dumps((view, cluster_jobs.work, job)))

    mend = "all nodes need it under the same path, on a file system that they share"
    folder = tmp_path / "other"
    assert asked(str(folder / "token")) == (f"node {NODE} does not see what this machine wrote to {folder}: {mend}", ())
    assert asked("/proc/self/status")[0].startswith(f"node {NODE} cannot write to /proc/self (")
    assert asked(str(tmp_path / "token"), "/nowhere") == (f"node {NODE} does not see /nowhere: {mend}", ())
    assert asked(str(tmp_path / "token"), "s3://b/x")[0].startswith(f"node {NODE} cannot read s3://b/x: ImportError ")
    assert cluster_jobs.attempts(tmp_path) == {"": 1}  # the token
    assert asked(str(tmp_path / "token"), str(tmp_path)) == ("", [3, 10, 1])


@pytest.mark.parametrize(
    "code, found", [("other", r"of code \w{12}"), ("no", r"none that can be used \(there is none\)")]
)
def test_nodes_with_other_code_or_none_are_refused(code, found, cluster, folder, tmp_path):
    package = (
        tmp_path / "fastvlm_jax"
    )  # workers look first where the command runs; PYTHONSAFEPATH keeps the driver from it
    if code == "other":
        shutil.copytree(ROOT / "fastvlm_jax", package, ignore=shutil.ignore_patterns("__pycache__"))
        with (package / "data/write/job.py").open("a") as file:
            file.write("# another version\n")
    else:
        package.mkdir()
        (package / "__init__.py").write_text("raise ImportError('there is none')")
    output, error = start(folder / "set", cluster, "out", tmp_path, PYTHONSAFEPATH="1").communicate()
    line = (
        rf"fastvlm data: node {NODE} has fastvlm_jax {found} \(here of code \w{{12}}\): install the same on all nodes\n"
    )
    assert re.fullmatch(line, error) and not output


def test_versions_are_those_of_what_decides_the_bytes():
    versions = ray_runner.versions()
    assert versions["numpy"] == np.__version__ and versions["pillow"] == PIL.__version__
    assert {"array_record", "msgpack", "simplejpeg", "opencv-python-headless"} <= versions.keys()


def test_another_host_at_work_is_refused_and_one_that_takes_over_is_noticed(cluster, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    out = tmp_path / "out"
    with lock.locked(out, ""), pytest.raises(ValueError, match=r"another process is writing in .*out: process \d+ on "):
        write("set", out, settings=SETTINGS, runner="ray")

    def take(state):
        if state.done == state.jobs:
            # At once: the owner, which looks all the time, must not see it half written.
            write_json(out / "lock", {"host": "other", "pid": 7})
            time.sleep(0.2)

    with pytest.raises(OSError, match="out was taken by process 7 on other"):
        write("set", out, settings=SETTINGS, runner="ray", progress=take)
    assert not (out / "manifest.json").exists()


def test_a_missing_package_or_cluster_is_one_line(folder, monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    argv = ("data", "write", f"--source={folder / 'set'}", f"--output={out}")
    assert fastvlm(monkeypatch, capsys, *argv, "--address=auto") == (
        1, "", "fastvlm data: --address auto names a Ray cluster: add --runner=ray\n"
    )  # fmt: skip
    for address, words in (
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1 ("),
        ("ray://head:10001", "ray://head:10001 is for programs elsewhere: run this on a node of the cluster"),
        ("head", "the Ray cluster head cannot be joined: Invalid address format: head"),
    ):
        with pytest.raises(ValueError) as raised:
            ray_runner._join(ray, address)
        assert str(raised.value).startswith(words) and "\n" not in str(raised.value)
    monkeypatch.setitem(sys.modules, "ray", None)
    status, output, error = fastvlm(monkeypatch, capsys, *argv, "--runner=ray")
    assert (status, output, error.count("\n")) == (1, "", 1)
    assert error.startswith("fastvlm data: --runner=ray needs Ray: pip install 'fastvlm_jax[ray]'") and not out.exists()


@pytest.fixture
def second_node(cluster):
    """Returns a function that starts a node more, behind a command such as `unshare`; they end with the test."""
    nodes = []

    def start_node(*before, num_cpus=2):
        argv = [*before, sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={cluster}", "--block"]
        argv += [f"--num-cpus={num_cpus}", "--object-store-memory=80000000"]
        known = len(ray.nodes())
        nodes.append(subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        assert wait_until(lambda: len(ray.nodes()) > known)
        return nodes[-1]

    yield start_node
    for node in nodes:
        for process in [*psutil.Process(node.pid).children(recursive=True), node]:
            process.kill()
        node.wait()


@pytest.mark.full
def test_the_jobs_of_a_killed_node_run_again(second_node, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(ray_runner, "_AHEAD", 1)  # fewer than were submitted, once the node is lost
    node, staged, killed = second_node(num_cpus=4), tmp_path / "out/.train.writing", []

    def kill():
        of_node = {process.pid for process in psutil.Process(node.pid).children(recursive=True)}
        wait_until(lambda: of_node & {process.pid for process in writers(staged)})
        for process in psutil.Process(node.pid).children():
            killed.append(process.name())
            process.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    write("set", tmp_path / "out", settings=SETTINGS, runner="ray")
    thread.join()
    assert "raylet" in killed and tree(tmp_path / "out") == tree("one")


@pytest.mark.full
def test_a_node_with_another_file_system_is_refused(second_node, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    hidden = ["unshare", "--mount", "bash", "-c", f'mount -t tmpfs none {tmp_path} && exec "$@"', "-"]
    if subprocess.run([*hidden, "true"], capture_output=True).returncode:
        pytest.skip("this machine forbids mounts")
    second_node(*hidden)
    with pytest.raises(
        ValueError, match=rf"^node {NODE} does not see what this machine wrote to {tmp_path}/out/.train"
    ):
        write("set", tmp_path / "out", settings=SETTINGS, runner="ray")
