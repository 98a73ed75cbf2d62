"""The launchers' dry runs, as committed in expected/, the files they write, settings and flags that are refused."""

import fnmatch
import pathlib
import re
import subprocess
import sys

import pytest
import yaml
from command import fastvlm
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet
from launch_fakes import IN_BUCKET, LAUNCH, ROOT, STAGE1, calls, launch, make_fakes, run, settings_of

MODELS = "--config.parent=vision=gs://my-bucket/models/mobileclip,llm=gs://my-bucket/models/qwen"
DRY_RUNS = {
    "tpu": ("tpu.sh", *IN_BUCKET, MODELS, "--config.data.root=gs://my-bucket/data", "--config.mesh=(1, 1, -1, 1)"),
    "tpu_multislice": ("tpu.sh", *IN_BUCKET),
    "gke": ("gke.sh", *IN_BUCKET, MODELS, "--config.mesh=(2, 1, -1, 1)"),
    "slurm": ("slurm.sh", *STAGE1, "--workdir", "/shared/runs/stage1", "--config.mesh=(1, 1, -1, 1)"),
    "local": ("local.sh", *STAGE1, "--workdir", "runs/stage1"),
}
SETTINGS = {  # in the place of lines of launch/settings
    "tpu_multislice": {
        "NUM_SLICES": "2",
        "SPOT": "no",
        "QUOTA": "v5e-chips",
        "SERVICE_ACCOUNT": "me@my",
        "NETWORK": "net",
    },
    "local": {"NUM_PROCESSES": "2", "DEVICES_PER_PROCESS": "4"},
}


def test_scripts_pass_shellcheck():
    scripts = [*sorted(LAUNCH.glob("*.sh")), ROOT / ".ci/run"]
    done = subprocess.run(
        [pathlib.Path(sys.executable).parent / "shellcheck", *scripts], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_dockerfile_passes_hadolint():
    done = subprocess.run(
        [pathlib.Path(sys.executable).parent / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_image_gets_what_it_is_built_from_and_runs():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    wanted = ("requirements.txt", "pyproject.toml", "README.md", "LICENSE", "configs", "launch", "fastvlm_jax")
    for name in wanted:
        assert (ROOT / name).exists() and not any(fnmatch.fnmatch(name, pattern) for pattern in ignored), name
    assert {".git", ".venv", "runs", "data"} <= set(ignored) and "fastvlm_jax/data" not in ignored
    assert "**/data" not in ignored


@pytest.mark.parametrize("name", DRY_RUNS)
def test_dry_run_shows_every_command_and_file_and_does_nothing(name, tmp_path):
    script, *arguments = DRY_RUNS[name]
    environment = make_fakes(tmp_path, [])
    settings = settings_of(tmp_path, script.removesuffix(".sh"), **SETTINGS.get(name, {}))
    before = sorted(tmp_path.rglob("*"))
    status, out, err = launch(script, "--settings", str(settings), "--dry_run", *arguments, environment=environment)
    assert (status, err) == (0, "")
    assert out.replace(str(ROOT), "/repository") == (ROOT / f"tests/launch/expected/{name}.txt").read_text()
    assert sorted(tmp_path.rglob("*")) == before and not calls(tmp_path)


def test_dry_run_of_all_stages_chains_them(tmp_path):
    status, out, err = launch(
        "run_stages.sh", "--dry_run", "--size", "0.5b", "--parent", "vision=/m/clip,llm=/m/qwen",
        "--workdir", "/w/mine", "--config.data.root=gs://my-bucket/data", environment=make_fakes(tmp_path, []),
    )  # fmt: skip
    assert (status, err) == (0, "") and not calls(tmp_path)
    assert out == (ROOT / "tests/launch/expected/run_stages.txt").read_text()


def test_stage_0_gives_the_encoder_to_the_next_stage(tmp_path):
    status, out, err = launch(
        "run_stages.sh", "--dry_run", "--size", "0.5b", "--stage0", "s3/12m", "--tokenizer0", "/m/bpe.txt.gz",
        "--parent", "llm=/m/qwen",
        "--workdir", "/w", "--stages", "stage1_align", environment=make_fakes(tmp_path, []),
    )  # fmt: skip
    assert (status, err) == (0, "")
    runs = [line.partition("fastvlm train ")[2] for line in out.splitlines() if "fastvlm train" in line]
    assert runs == [
        "--config=configs/stage0_clip.py:s3/12m --workdir=/w/stage0_clip --config.parent= "
        "--config.data.tokenizer=/m/bpe.txt.gz",
        "--config=configs/stage1_align.py:0.5b --workdir=/w/stage1_align "
        "--config.parent=vision=/w/stage0_clip,llm=/m/qwen",
    ]


def jobset(folder, *arguments, **changes):
    """The JobSet of a dry run, parsed."""
    settings = settings_of(folder, "gke", **changes)
    status, out, err = launch("gke.sh", "--settings", str(settings), "--dry_run", *arguments)
    assert (status, err) == (0, "")
    return yaml.safe_load("".join(line[4:] + "\n" for line in out.splitlines() if line.startswith("  | ")))


def missing(ours, theirs, path="jobset"):
    """Paths of what `ours` has and `theirs` lacks or has otherwise."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [p for key, value in ours.items() for p in missing(value, theirs.get(key), f"{path}.{key}")]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [p for i, (x, y) in pairs for p in missing(x, y, f"{path}[{i}]")]
    return [] if ours == theirs else [path]


def test_the_jobset_fits_the_published_api(tmp_path):
    # Kubeflow's models of the JobSet and pod API: a wrong type is an error, an unknown key does not come back.
    made = jobset(tmp_path, *IN_BUCKET, SPOT="yes")
    assert missing(made, JobsetV1alpha2JobSet.from_dict(made).to_dict()) == []
    wrong = jobset(tmp_path, *IN_BUCKET)
    wrong["spec"]["failurePolicy"]["maxRestart"] = 3
    assert missing(wrong, JobsetV1alpha2JobSet.from_dict(wrong).to_dict()) == ["jobset.spec.failurePolicy.maxRestart"]


def test_a_jobset_has_a_job_a_slice_and_a_pod_a_machine(tmp_path):
    made = jobset(
        tmp_path, *IN_BUCKET, '--config.data.template="a \\ b"', NUM_SLICES="3", TOPOLOGY="2x2x4",
        MACHINE_TYPE="ct5p-hightpu-4t", ACCELERATOR="tpu-v5p-slice",
    )  # fmt: skip
    (job,) = made["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (3, 4, 4, 0)
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"][-1] == '--config.data.template="a \\ b"'
    assert "--workdir=/gcs/my-bucket/runs/stage1" in container["command"]
    assert container["volumeMounts"][0]["mountPath"] == "/gcs/my-bucket"


REFUSED = [
    ("tpu", {"PROJECT": None}, "PROJECT is missing"),
    ("tpu", {"BUCKET": ""}, "BUCKET is missing"),
    ("tpu", {"PROJECT": "'my-project'"}, "PROJECT: write the value alone"),
    ("tpu", {"PROJECT": "$(touch x)"}, "PROJECT: write the value alone"),
    ("tpu", {"IMAGE": "image;reboot"}, "IMAGE: write the value alone"),
    ("tpu", {"PROJECT": "my # comment"}, "PROJECT: write the value alone"),
    ("tpu", {"PROJECT": "my\nprojekt=x"}, "'projekt=x' is not KEY=value"),
    ("tpu", {"PROJECT": "my\nZONES=x"}, "unknown key ZONES; the keys are PROJECT ZONE"),
    ("tpu", {"PROJECT": "my\nPROJECT=your"}, "PROJECT is set twice"),
    ("tpu", {"NUM_SLICES": "0"}, "NUM_SLICES=0 must be at least 1"),
    ("tpu", {"NUM_SLICES": "two"}, "NUM_SLICES=two must be a whole number"),
    ("tpu", {"SPOT": "true"}, "SPOT=true must be one of: yes no"),
    ("tpu", {"ACCELERATOR_TYPE": "v5e:4x4"}, "ACCELERATOR_TYPE=v5e:4x4 must be like v5litepod-16"),
    ("tpu", {"BUCKET": "other"}, "gs://my-bucket/runs/stage1 is not in the bucket"),
    ("gke", {"NAME": "Stage_1"}, "NAME=Stage_1 must be lower-case letters"),
    ("gke", {"TOPOLOGY": "16"}, "TOPOLOGY=16 must be like 4x4"),
    ("gke", {"TOPOLOGY": "1x3"}, "TOPOLOGY=1x3 has 3 chips"),
    ("gke", {"MACHINE_TYPE": "n2-standard-4"}, "MACHINE_TYPE=n2-standard-4 must end in its number of chips"),
    ("slurm", {"TIME": "a day"}, "TIME: write the value alone"),
    ("slurm", {"TIME": "1d"}, "TIME=1d must be like 24:00:00"),
    ("slurm", {"BUCKET": "my-bucket"}, "MOUNT is missing"),
    ("local", {"PLATFORM": "cuda"}, "PLATFORM=cuda must be one of: cpu gpu tpu"),
    ("local", {"PLATFORM": "tpu", "NUM_PROCESSES": "4"}, "NUM_PROCESSES=1"),
    ("local", {"BUCKET": "", "MOUNT": ""}, "gs://my-bucket/runs/stage1 is not in the bucket"),
]


@pytest.mark.parametrize("launcher, changes, message", REFUSED, ids=lambda x: str(x)[:40])
def test_wrong_settings_are_refused_in_one_line(launcher, changes, message, tmp_path):
    status, out, err, called = run(tmp_path, launcher, IN_BUCKET, changes=changes)
    assert (status, out, called) == (1, "", []) and err.count("\n") == 1
    assert err.startswith(f"{launcher}: ") and message in err and f"{launcher}.env" in err


@pytest.mark.parametrize("launcher", ["tpu", "gke"])
@pytest.mark.parametrize("workdir", ["runs/stage1", "/runs/stage1", "gs://my-bucket/a b", "gs://my-bucket/$(reboot)"])
def test_a_workdir_that_the_machines_would_lose_is_refused(launcher, workdir, tmp_path):
    status, out, err, called = run(tmp_path, launcher, (*STAGE1, "--workdir", workdir))
    assert (status, out, called) == (1, "", []) and err.count("\n") == 1
    assert f"--workdir {workdir} must be gs://my-bucket/FOLDER" in err


@pytest.mark.parametrize("launcher", ["tpu", "gke", "slurm", "local"])
def test_example_settings_name_every_key_and_no_other(launcher, tmp_path):
    lines = (LAUNCH / f"settings/{launcher}.env").read_text().splitlines()
    named = [line.partition("=")[0] for line in lines if line and line[0] != "#"]
    (tmp_path / "settings").write_text("NO_SUCH_KEY=1\n")
    _, _, err = launch(f"{launcher}.sh", "--settings", str(tmp_path / "settings"), *IN_BUCKET)
    assert sorted(named) == sorted(err.partition("the keys are")[2].split())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "--settings is missing"),
        (("--settings", "x", *STAGE1), "--workdir is missing"),
        (("--settings", "x", *STAGE1, "--workdir"), "--workdir needs a value"),
        (("--settings", "x", *IN_BUCKET, "--fast"), "unexpected --fast"),
        (("--settings", "x", *IN_BUCKET, "now"), "unexpected now"),
    ],
    ids=lambda x: str(x)[-20:],
)
def test_wrong_usage_has_status_2(arguments, message):
    status, out, err = launch("tpu.sh", *arguments)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1


def test_a_settings_file_that_is_not_there(tmp_path):
    status, _, err = launch("tpu.sh", "--settings", str(tmp_path / "my.env"), *IN_BUCKET)
    assert (
        status == 1
        and err == f"tpu: there is no settings file {tmp_path}/my.env; copy launch/settings/tpu.env and fill it in\n"
    )


def test_commands_of_the_guide_exist():
    text = (ROOT / "docs/tpu.md").read_text().replace("\\\n", " ")
    source = "".join(file.read_text() for file in (ROOT / "fastvlm_jax/cli").glob("*.py"))
    source = " ".join(source.split()).replace("( ", "(")  # a call may stand on one line or on several
    seen = set()
    for line in (line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()):
        if found := re.match(r"fastvlm (data )?(\w+)", line):
            flags = [flag for flag in re.findall(r" --(\w+)[ =]", line) if flag != "config"]
            assert all(f'("{flag}", ' in source for flag in flags) and f'"{found[2]}": ' in source, line
            seen.add(found[2])
        if found := re.search(r"launch/[\w./]+", line):
            assert (ROOT / found[0]).exists(), line
            seen.add(found[0])
    assert {"preflight", "write", "launch/tpu.sh", "launch/run_stages.sh", "launch/settings/tpu.env"} <= seen


def test_a_workdir_in_a_bucket_is_refused_by_the_trainer(monkeypatch, capsys):
    config = ROOT / "configs/quickstart.py:stage1_align"
    status, _, err = fastvlm(monkeypatch, capsys, "train", f"--config={config}", "--workdir=gs://my-bucket/run")
    assert (status, err) == (
        1,
        "fastvlm train: --workdir gs://my-bucket/run must be a folder: mount the bucket, see docs/tpu.md\n",
    )
