"""Slurm's batch script, local processes and the chain of stages, run with other programs in the place of fastvlm."""

import os
import signal
import subprocess
import sys
import time

import pytest
from launch_fakes import ROOT, STAGE1, calls, launch, make_fakes, run, settings_of


def slurm(folder, answers, changes=(), programs=None):
    (folder / "venv/bin").mkdir(parents=True)
    (folder / "venv/bin/fastvlm").write_text("#!/bin/sh\n")
    (folder / "venv/bin/fastvlm").chmod(0o755)
    changes = {"VENV": folder / "venv", "LOG_DIR": folder / "logs", **dict(changes)}
    answers = [*answers, ("sinfo", [(0, "gpu\n", "")])]
    return run(folder, "slurm", (*STAGE1, "--workdir", str(folder / "run")), answers, changes, programs=programs)


def test_a_slurm_job_is_submitted_and_its_status_is_the_launchers(tmp_path):
    status, _, err, called = slurm(tmp_path, [("squeue", [(0, "", ""), (0, "7\n", ""), (0, "", "")])])
    assert f"sbatch {tmp_path}/logs/fastvlm.sbatch" in called
    assert status == 1 and "the job ended with status none: it was cancelled or killed" in err


def test_a_slurm_job_that_ends_well_ends_the_launcher_so(tmp_path):
    # In the place of Slurm, which has removed the job before the launcher looks again.
    (tmp_path / "write").write_text('#!/bin/bash\necho 0 >"${1%.sbatch}.status"\n')
    (tmp_path / "write").chmod(0o755)
    answers = [("squeue", [(0, "", "")])]
    status, out, _, _ = slurm(tmp_path, answers, programs={"sbatch": tmp_path / "write"})
    assert status == 0 and out.endswith(f"slurm: trained: {tmp_path}/run\n")


def test_a_slurm_job_of_another_run_is_not_followed(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/fastvlm.sbatch").write_text("fastvlm train --workdir=/other\n")
    status, _, err, called = slurm(tmp_path, [("squeue", [(0, "7\n", "")])])
    assert status == 1 and "a job fastvlm is at work on another workdir" in err
    assert not any(call.startswith("sbatch") for call in called)


def batch(folder, srun, counted=None, saved=()):
    """The batch script of a dry run, run as Slurm would: (the process, its status file).

    Args:
      counted: step of a checkpoint and number of restarts from it, in the job's file.
      saved: checkpoints in the workdir.
    """
    environment = make_fakes(folder, [("scontrol show", [(0, "node-a\nnode-b\n", "")]), ("srun", [(srun, "", "")])])
    changes = {"LOG_DIR": folder / "logs", "VENV": "/venv", "MAX_RESTARTS": "3"}
    settings = settings_of(folder, "slurm", **changes)
    _, out, _ = launch("slurm.sh", "--settings", str(settings), "--dry_run", *STAGE1, "--workdir", f"{folder}/run")
    (folder / "logs").mkdir()
    if counted:
        (folder / "logs/fastvlm.restarts").write_text(counted)
    for name in saved:
        (folder / "run/checkpoints" / name).mkdir(parents=True)
    (folder / "batch").write_text("".join(line[4:] + "\n" for line in out.splitlines() if line.startswith("  | ")))
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[a-b]"}
    process = subprocess.Popen(["bash", "batch"], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    return process, folder / "logs/fastvlm.status"


@pytest.mark.parametrize(
    "srun, counted, saved, requeued, ended, counts",
    [
        (0, None, [], False, "0\n", None),
        (1, None, ["40"], True, None, "40 1\n"),
        (1, "40 2\n", ["40", "80.orbax-checkpoint-tmp"], True, None, "40 3\n"),
        (1, "40 3\n", ["20", "40"], False, "1\n", "40 3\n"),
        (1, "40 3\n", ["40", "80"], True, None, "80 1\n"),
        (75, None, [], True, None, "0 1\n"),
        (2, None, [], False, "2\n", None),
        (130, None, [], False, "130\n", None),
    ],
)
def test_a_slurm_job_goes_back_into_the_queue_after_a_failure_only(
    srun, counted, saved, requeued, ended, counts, tmp_path
):
    process, status = batch(tmp_path, srun, counted, saved)
    process.communicate()
    assert process.returncode == srun and ("scontrol requeue 7" in calls(tmp_path)) == requeued
    files = (status, status.with_suffix(".restarts"))
    assert [file.read_text() if file.exists() else None for file in files] == [ended, counts]


@pytest.mark.parametrize("told, requeued", [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_slurm_job_goes_back_into_the_queue_before_its_time_is_up_but_not_by_itself_after_scancel(
    told, requeued, tmp_path
):
    process, status = batch(tmp_path, 75)
    # In the place of srun: a program that ends with 75 when it is told to stop.
    waits = "#!/bin/bash\ntrap 'exit 75' TERM\necho started\nwhile :; do /bin/sleep 0.05; done\n"
    process.kill()
    process.communicate()
    (tmp_path / "bin/srun").write_text(waits)
    (tmp_path / "bin/scancel").write_text('#!/bin/bash\necho "scancel $*" >>calls\nkill -TERM "$(cat srun.pid)"\n')
    (tmp_path / "calls").write_text("")
    (tmp_path / "bin/srun").write_text(waits.replace("echo started", f"echo $$ >{tmp_path}/srun.pid"))
    script = (tmp_path / "batch").read_text().replace("cd " + str(ROOT), f"cd {tmp_path}")
    environment = {"PATH": f"{tmp_path}/bin:{tmp_path}/system", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x"}
    process = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not (tmp_path / "srun.pid").exists() or not (tmp_path / "srun.pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(told)
    if told == signal.SIGTERM:  # scancel tells all
        os.kill(int((tmp_path / "srun.pid").read_text()), told)
    assert process.wait(timeout=20) == 75 and status.exists() == (not requeued)
    asked = [call for call in calls(tmp_path) if call.startswith(("scancel", "scontrol requeue"))]
    assert asked == (["scancel --signal=TERM 7", "scontrol requeue 7"] if requeued else [])


def local(folder, program, changes=()):
    """The local launcher with another program in the place of fastvlm; a running process."""
    (folder / "venv/bin").mkdir(parents=True)
    (folder / "venv/bin/fastvlm").write_text(
        f"#!{sys.executable} -ES\nimport os, pathlib, signal, sys, time\n{program}"
    )
    (folder / "venv/bin/fastvlm").chmod(0o755)
    settings = settings_of(folder, "local", VENV=folder / "venv", WAIT_SECONDS="1", **dict(changes))
    command = ["bash", "launch/local.sh", "--settings", str(settings), *STAGE1, "--workdir", str(folder / "run")]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


# Notes each start in WORKDIR/starts.
NOTE = """
folder = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir=")).partition("=")[2])
with (folder / "starts").open("a") as file: file.write(" ".join(sys.argv[4:]) + "\\n")
starts = (folder / "starts").read_text().splitlines()
"""


def test_local_processes_find_each_other_and_all_are_restarted_when_one_fails(tmp_path):
    process = local(
        tmp_path, NOTE + "sys.exit(1 if len(starts) <= 2 and sys.argv[-1][-1] == '1' else 0)", {"NUM_PROCESSES": "2"}
    )
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "ended with status 1: restart 1 of 3" in out, err
    flags = "--coordinator_address=127.0.0.1:12355 --num_processes=2 --process_id="
    assert sorted((tmp_path / "run/starts").read_text().splitlines()) == [flags + i for i in "0011"]


@pytest.mark.parametrize(
    "status, starts, ends, message",
    [
        (1, 2, 1, "ended with status 1, after 1 restarts from the same checkpoint"),
        (75, 2, 1, "ended with status 75, after 1 restarts from the same checkpoint"),
        (2, 1, 1, "does not understand"),
        (130, 1, 130, ""),
    ],
)
def test_local_restarts_end(status, starts, ends, message, tmp_path):
    process = local(tmp_path, NOTE + f"sys.exit({status})", {"MAX_RESTARTS": "1"})
    _, err = process.communicate(timeout=30)
    assert process.returncode == ends and message in err
    assert (tmp_path / "run/starts").read_text() == "\n" * starts


def test_a_local_run_that_gets_on_is_started_again_as_often_as_it_takes(tmp_path):
    saves = "(folder / 'checkpoints' / str(10 * len(starts))).mkdir(parents=True)\n"
    process = local(tmp_path, NOTE + f"if len(starts) < 3: {saves}sys.exit(75)", {"MAX_RESTARTS": "1"})
    out, err = process.communicate(timeout=30)
    said = [line.rpartition(": ")[2] for line in out.splitlines() if "restart " in line]
    assert said == ["restart 1 of 1 from step 10", "restart 1 of 1 from step 20"]
    assert process.returncode == 1 and "after 1 restarts from the same checkpoint" in err


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_ctrl_c_and_sigterm_save_once_and_end_a_local_run(number, status, tmp_path):
    program = (
        NOTE
        + """
def stop(number, frame):
    (folder / "stops").open("a").write(f"{number}\\n")
    time.sleep(0.3)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop), signal.signal(signal.SIGINT, stop)
(folder / f"ready{sys.argv[-1][-1]}").touch()
time.sleep(30)
"""
    )
    process = local(tmp_path, program, {"NUM_PROCESSES": "2"})
    while not all((tmp_path / f"run/ready{i}").exists() for i in "01"):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, number)  # as a terminal does
    out, _ = process.communicate(timeout=20)
    assert process.returncode == status and "stopped; the same command goes on" in out
    assert (tmp_path / "run/stops").read_text() == "15\n15\n"


def test_a_local_run_whose_last_save_failed_does_not_ask_to_be_run_again(tmp_path):
    program = NOTE + "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n(folder / 'ready').touch()\ntime.sleep(30)"
    process = local(tmp_path, program)
    while not (tmp_path / "run/ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1 and "fastvlm train was told to stop and ended with status 1" in err


def test_finished_stages_are_left_out(tmp_path):
    program = NOTE + "print(*sys.argv[2:4])"
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/fastvlm").write_text(f"#!{sys.executable} -ES\nimport pathlib, sys\n{program}")
    (tmp_path / "venv/bin/fastvlm").chmod(0o755)
    settings = settings_of(tmp_path, "local", VENV=tmp_path / "venv")
    arguments = ("--size", "0.5b", "--parent", "/m", "--workdir", str(tmp_path / "w"), "--settings", str(settings))
    arguments += ("--stages", "stage1_align stage2_instruct", "--data_stage2", "665k")
    (tmp_path / "w/stage1_align").mkdir(parents=True)
    (tmp_path / "w/stage1_align/finished").touch()
    status, out, err = launch("run_stages.sh", *arguments)
    assert (
        (status, err) == (0, "") and "finished before: " in out and (tmp_path / "w/stage2_instruct/finished").exists()
    )
    assert f"--config=configs/stage2_instruct.py:0.5b/665k --workdir={tmp_path}/w/stage2_instruct" in out
    assert (tmp_path / "w/stage2_instruct/starts").read_text() == f"--config.parent={tmp_path}/w/stage1_align\n"


def test_run_stages_ends_at_a_stage_that_fails(tmp_path):
    settings = settings_of(tmp_path, "local", VENV=tmp_path / "none")
    arguments = ("--size", "0.5b", "--parent", "/m", "--workdir", str(tmp_path / "w"), "--settings", str(settings))
    status, out, err = launch("run_stages.sh", *arguments)
    assert status == 1 and out.count("== ") == 1 and "/none/bin/fastvlm" in err


WITH_STAGE_0 = ("--size", "0.5b", "--workdir", "/w", "--stage0", "s3")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--size", "0.5b"), "--parent is missing"),
        (("--stage", "x"), "unexpected --stage"),
        (("--launcher",), "needs a value"),
        ((*WITH_STAGE_0, "--parent", "vision=/a,llm=/b"), "leave vision=DIR out of --parent"),
        ((*WITH_STAGE_0, "--parent", "/a"), "--parent must be llm=DIR, not /a"),
        ((*WITH_STAGE_0, "--parent", "llm=/a", "--stage0", "s0/12m"), "than --size 0.5b asks for: --size 0.5b,mci0"),
        ((*WITH_STAGE_0, "--parent", "llm=/a", "--size", "0.5b,mci2"), "than --size 0.5b,mci2 asks for: --size 0.5b\n"),
    ],
)
def test_run_stages_refuses_wrong_usage(arguments, message):
    status, _, err = launch("run_stages.sh", *arguments)
    assert status == 2 and err.startswith("run_stages: ") and message in err and err.count("\n") == 1
