"""The launchers with stand-ins for gcloud, kubectl and docker: what they call, and what they make of faults."""

import subprocess

import pytest
from launch_fakes import IN_BUCKET, ROOT, STAGE1, calls, make_fakes, run

FAULTS = [
    ("tpu", "auth list", (0, "", ""), "gcloud is not logged in: run gcloud auth login"),
    ("tpu", "projects describe", (1, "", "denied\n"), "PROJECT=my-project cannot be seen: correct"),
    ("tpu", "buckets describe", (1, "", "a\n404\n"),
     "cannot be seen: create it, see docs/tpu.md, step 4 (gcloud: 404)"),
    ("tpu", "buckets describe", (0, "\n", ""), "bucket gs://my-bucket has no hierarchical namespace"),
    ("tpu", "storage cp", (1, "", "403\n"), "gs://my-bucket cannot be written: ask for the role"),
    ("tpu", "images describe", (1, "", "no\n"), "there is no image us-west4-docker.pkg.dev/my-project"),
    ("tpu", "accelerator-types describe", (1, "", "no\n"), "v5litepod-16 is not offered in ZONE=us-west4-a"),
    ("tpu", "versions describe", (1, "", "no\n"), "RUNTIME_VERSION=v2-alpha-tpuv5-lite is not offered"),
    ("tpu", "quotas info", (0, "us-west4-a,8\n,64\n", ""), "in us-west4-a is 8 and 1 x v5litepod-16 needs 16"),
    ("tpu", "quotas info", (0, "us-east1-c,64\n", ""), "quota v5e in us-west4-a is 0"),
    ("tpu", "quotas info", (1, "", "no\n"), "QUOTA=v5e cannot be read: gcloud beta quotas info list"),
    ("tpu", "queued-resources create", (1, "", "no capacity\n"), "cannot be requested (gcloud: no capacity)"),
    ("gke", "clusters describe", (0, "\n", ""), "cannot mount buckets: gcloud container clusters update"),
    ("gke", "node-pools list", (0, "one\n", ""), "has 1 node pools of ct5lp-hightpu-4t and NUM_SLICES=2"),
    ("gke", "get namespace", (1, "", "no context\n"), "gcloud container clusters get-credentials my-cluster"),
    ("gke", "get crd", (1, "", "NotFound\n"), "has no JobSets: install them, see docs/tpu.md, GKE"),
    ("gke", "get serviceaccount", (1, "", "NotFound\n"), "there is no SERVICE_ACCOUNT=fastvlm in NAMESPACE=default"),
    ("slurm", "sinfo", (0, "", ""), "there is no PARTITION=gpu"),
    ("slurm", "sacctmgr", (0, "", ""), "me may not use ACCOUNT=lab"),
]  # fmt: skip


@pytest.mark.parametrize("launcher, call, answer, message", FAULTS, ids=lambda x: str(x)[:30])
def test_what_is_missing_is_told_with_the_mend(launcher, call, answer, message, tmp_path):
    changes = {"tpu": {"QUOTA": "v5e"}, "slurm": {"ACCOUNT": "lab"}}.get(launcher)
    workdir = IN_BUCKET if launcher != "slurm" else (*STAGE1, "--workdir", str(tmp_path / "run"))
    answers = [(call, [answer]), ("quotas info", [(0, ",64\n", "")]), ("sinfo", [(0, "gpu\n", "")])]
    answers += [("queued-resources describe", [(1, "", "NOT_FOUND\n")])]
    status, _, err, called = run(tmp_path, launcher, workdir, answers, changes)
    assert status == 1 and err.count("\n") == 1 and err.startswith(f"{launcher}: ") and message in err
    started = [line for line in called if " apply " in line or line.startswith("sbatch") or "tpu-vm ssh" in line]
    assert not started and call in called[-1]


@pytest.mark.parametrize("launcher, program", [("tpu", "gcloud"), ("gke", "kubectl"), ("slurm", "sbatch")])
def test_a_program_that_is_not_installed(launcher, program, tmp_path):
    status, _, err, _ = run(
        tmp_path, launcher, IN_BUCKET if launcher != "slurm" else (*STAGE1, "--workdir", "/x"), without=(program,)
    )
    assert status == 1 and err.startswith(f"{launcher}: {program} is not installed: ") and err.count("\n") == 1


QUEUE = "queued-resources describe"
NOT_FOUND = (1, "", "ERROR: NOT_FOUND: Resource 'fastvlm' was not found\n")


def after_checks(called):
    """The calls behind the checks, without what they have in common and without waiting."""
    first = next(i for i, call in enumerate(called) if QUEUE in call)
    calls = [call for call in called[first:] if not call.startswith("sleep")]
    for common in ("gcloud compute tpus ", " --zone=us-west4-a --project=my-project", " --format=value(state.state)"):
        calls = [call.replace(common, "") for call in calls]
    return [call.partition("/fastvlm_start.sh")[0] if "scp" in call else call for call in calls]


STARTED = [
    "tpu-vm ssh fastvlm --worker=all --command=bash fastvlm_start.sh",
    "tpu-vm ssh fastvlm --worker=0 --command=sudo docker logs --follow --tail=20 fastvlm",
    "tpu-vm ssh fastvlm --worker=0 --command=sudo docker wait fastvlm",
]
CREATE = (
    "queued-resources create fastvlm --node-id=fastvlm --accelerator-type=v5litepod-16 "
    "--runtime-version=v2-alpha-tpuv5-lite --spot"
)
LIST = "gcloud storage ls gs://my-bucket/runs/stage1/checkpoints/"  # is there a new checkpoint?
DESCRIBE, DELETE = "queued-resources describe fastvlm", "queued-resources delete fastvlm --force --quiet"


def without_scp(called):
    return [call for call in after_checks(called) if "scp" not in call]


def test_slices_are_asked_for_waited_for_used_and_given_back(tmp_path):
    answers = [
        (QUEUE, [NOT_FOUND, (0, "WAITING_FOR_RESOURCES\n", ""), (0, "ACTIVE\n", "")]),
        ("docker wait", [(0, "0\n", "")]),
    ]
    status, out, err, called = run(tmp_path, "tpu", IN_BUCKET, answers)
    assert (status, err) == (0, "") and out.endswith("tpu: trained: gs://my-bucket/runs/stage1\n")
    assert without_scp(called) == [DESCRIBE, CREATE, DESCRIBE, DESCRIBE, *STARTED, DELETE]


def test_slices_that_are_there_are_used_and_kept_where_that_is_asked_for(tmp_path):
    answers = [(QUEUE, [(0, "ACTIVE\n", "")]), ("docker wait", [(0, "0\n", "")])]
    status, _, _, called = run(tmp_path, "tpu", IN_BUCKET, answers, {"KEEP": "yes"})
    assert status == 0 and without_scp(called) == [DESCRIBE, *STARTED]


def test_preempted_slices_are_replaced_and_the_run_goes_on(tmp_path):
    answers = [
        (QUEUE, [(0, "ACTIVE\n", ""), (0, "SUSPENDED\n", ""), NOT_FOUND, (0, "ACTIVE\n", "")]),
        ("docker wait", [(255, "", "Connection closed\n"), (0, "0\n", "")]),
    ]
    status, out, _, called = run(tmp_path, "tpu", IN_BUCKET, answers)
    assert status == 0 and "the slices are SUSPENDED: restart 1 of 20" in out
    again = [DESCRIBE, LIST, DELETE, DESCRIBE, CREATE, DESCRIBE]
    assert without_scp(called) == [DESCRIBE, *STARTED, *again, *STARTED, DELETE]


def test_a_lost_connection_is_taken_up_again(tmp_path):
    answers = [(QUEUE, [(0, "ACTIVE\n", "")]), ("docker wait", [(255, "", ""), (0, "0\n", "")])]
    status, _, _, called = run(tmp_path, "tpu", IN_BUCKET, answers)
    assert status == 0 and without_scp(called) == [DESCRIBE, *STARTED, DESCRIBE, *STARTED, DELETE]


def test_a_run_that_fails_is_restarted_on_all_machines_as_often_as_allowed(tmp_path):
    answers = [(QUEUE, [(0, "ACTIVE\n", "")]), ("docker wait", [(0, "1\n", "")])]
    status, _, err, called = run(tmp_path, "tpu", IN_BUCKET, answers, {"MAX_RESTARTS": "1"})
    assert status == 1 and "slices that still exist cost" in err
    assert "ended with status 1, after 1 restarts from the same checkpoint (MAX_RESTARTS)" in err
    stop = "tpu-vm ssh fastvlm --worker=all --command=sudo docker rm --force fastvlm"
    assert without_scp(called) == [DESCRIBE, *STARTED, LIST, stop, DESCRIBE, *STARTED, LIST]


def test_only_restarts_from_the_same_checkpoint_count(tmp_path):
    """Two restarts at a time bring no checkpoint; then one does, and another comes beside the rest of a killed save."""
    folder = "gs://my-bucket/runs/stage1/checkpoints/"
    listed = [
        "",
        "",
        f"{folder}50/\n",
        f"{folder}50/\n{folder}900.orbax-checkpoint-tmp/\n",
        f"{folder}50/\n{folder}100/\n",
    ]
    answers = [
        (QUEUE, [(0, "ACTIVE\n", "")]),
        ("docker wait", [(0, "75\n", "")] * 5 + [(0, "0\n", "")]),
        ("storage ls", [(0, out, "") for out in listed]),
    ]
    status, out, _, _ = run(tmp_path, "tpu", IN_BUCKET, answers, {"MAX_RESTARTS": "2"})
    said = [line.partition(": ")[2] for line in out.splitlines() if "restart " in line]
    counts = [
        "1 of 2 from step 0",
        "2 of 2 from step 0",
        "1 of 2 from step 50",
        "2 of 2 from step 50",
        "1 of 2 from step 100",
    ]
    assert status == 0 and said == [f"fastvlm train ended with status 75: restart {count}" for count in counts]


@pytest.mark.parametrize("ended, words", [(2, "does not understand its flags"), (130, "got Ctrl-C and has saved")])
def test_wrong_flags_and_ctrl_c_are_not_tried_again(ended, words, tmp_path):
    answers = [(QUEUE, [(0, "ACTIVE\n", "")]), ("docker wait", [(0, f"{ended}\n", "")])]
    status, _, err, called = run(tmp_path, "tpu", IN_BUCKET, answers)
    assert status == 1 and words in err
    assert sum("fastvlm_start.sh" in call for call in called) == 2  # scp and ssh, once


def test_every_slice_gets_the_script_which_starts_the_run_once(tmp_path):
    answers = [(QUEUE, [(0, "ACTIVE\n", "")]), ("docker wait", [(0, "0\n", "")])]
    status, _, _, called = run(tmp_path, "tpu", IN_BUCKET, answers, {"NUM_SLICES": "2"})
    assert status == 0
    assert [call.split()[2] for call in after_checks(called) if "command=bash" in call] == ["fastvlm-0", "fastvlm-1"]


def machine_of(folder, running):
    """A TPU VM of stand-ins, and the script that a dry run shows for it."""
    script = (ROOT / "tests/launch/expected/tpu.txt").read_text()
    (folder / "start.sh").write_text(
        "".join(line[4:] + "\n" for line in script.splitlines() if line.startswith("  | "))
    )
    environment = make_fakes(folder, [("docker inspect", [running])])
    for name in ("sudo", "docker"):
        (folder / "bin" / name).write_text((folder / "bin/gcloud").read_text())
        (folder / "bin" / name).chmod(0o755)
    done = subprocess.run(["bash", "start.sh"], cwd=folder, env=environment, capture_output=True, text=True)
    return done, [call.split()[2] for call in calls(folder)]


def test_a_machine_at_work_is_left_alone_and_another_run_is_not_disturbed(tmp_path):
    for name in ("idle", "same", "other"):
        (tmp_path / name).mkdir()
    done, called = machine_of(tmp_path / "idle", (1, "", "no such object\n"))
    assert done.returncode == 0 and called == ["inspect", "rm", "auth", "pull", "run"]
    done, called = machine_of(tmp_path / "same", (0, "true /gcs/my-bucket/runs/stage1\n", ""))
    assert done.returncode == 0 and called == ["inspect"]
    done, called = machine_of(tmp_path / "other", (0, "true /gcs/my-bucket/runs/other\n", ""))
    assert done.returncode == 1 and called == ["inspect"] and "another run is at work here" in done.stderr


def test_a_bucket_is_mounted_without_caches_before_the_command(tmp_path):
    environment = make_fakes(tmp_path, [])
    for name in ("gcsfuse", "mkdir", "fastvlm"):
        (tmp_path / "bin" / name).write_text((tmp_path / "bin/gcloud").read_text())
        (tmp_path / "bin" / name).chmod(0o755)
    command = ["bash", "launch/with_bucket.sh", "my-bucket", "bash", "-c", "fastvlm; echo $$; exit 3"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    out, _ = process.communicate()
    assert (process.returncode, out) == (3, f"{process.pid}\n")  # in the place of the script: it gets the signals
    assert calls(tmp_path) == [
        "mkdir -p /gcs/my-bucket",
        "gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "
        "my-bucket /gcs/my-bucket",
        "fastvlm",
    ]


STATE, OWNER = "jsonpath={.status.terminalState}", "jsonpath={.metadata.annotations.fastvlm/workdir}"


def verbs(called):
    """What kubectl was asked to do to JobSets."""
    words = [
        call.split()[3]
        for call in called
        if (call.startswith("kubectl") and "--filename" in call) or " jobset " in call
    ]
    return [word for word in words if word != "get"]


def test_a_jobset_is_applied_and_followed_to_its_end(tmp_path):
    answers = [
        (STATE, [(0, "", ""), (0, "", ""), (1, "", "timeout\n"), (0, "Completed", "")]),
        (".restarts", [(0, "2", "")]),
    ]
    status, out, _, called = run(tmp_path, "gke", IN_BUCKET, answers)
    assert status == 0 and "restarts: 2 of 20" in out and out.endswith("trained: gs://my-bucket/runs/stage1\n")
    assert verbs(called) == ["apply"]


@pytest.mark.parametrize(
    "owner, state, made",
    [("gs://my-bucket/runs/stage1", "", []), ("gs://my-bucket/runs/old", "Failed", ["delete", "apply"])],
)
def test_a_jobset_at_work_is_followed_and_an_ended_one_replaced(owner, state, made, tmp_path):
    answers = [(OWNER, [(0, owner, "")]), (STATE, [(0, state, ""), (0, "Completed", "")])]
    status, _, _, called = run(tmp_path, "gke", IN_BUCKET, answers)
    assert status == 0 and verbs(called) == made


def test_a_jobset_of_another_run_is_not_touched(tmp_path):
    status, _, err, called = run(tmp_path, "gke", IN_BUCKET, [(OWNER, [(0, "gs://my-bucket/runs/other", "")])])
    assert status == 1 and "the JobSet fastvlm is at work on gs://my-bucket/runs/other" in err and verbs(called) == []


def test_a_jobset_without_restarts_is_applied_anew_only_if_the_run_came_further(tmp_path):
    listed = "gs://my-bucket/runs/stage1/checkpoints/40/\n"
    answers = [
        (STATE, [(0, state, "") for state in ("", "Failed", "Failed", "", "Failed")]),
        (OWNER, [(0, "", ""), (0, "gs://my-bucket/runs/stage1", "")]),
        (".restarts", [(0, "20", "")]),
        ("storage ls", [(0, out, "") for out in ("", listed)]),
    ]
    status, out, err, called = run(tmp_path, "gke", IN_BUCKET, answers)
    assert "all 20 restarts are used up, but the run has come to step 40: the JobSet is applied anew" in out
    assert verbs(called) == ["apply", "delete", "apply"]
    assert status == 1 and "the JobSet fastvlm failed" in err


def test_a_jobset_that_fails_names_the_command_for_its_logs(tmp_path):
    status, _, err, _ = run(tmp_path, "gke", IN_BUCKET, [(STATE, [(0, "", ""), (0, "Failed", "")])])
    assert status == 1 and "the JobSet fastvlm failed: kubectl --context=gke_my-project_us-west4_my-cluster" in err
