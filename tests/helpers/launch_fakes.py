"""Stand-ins on PATH for gcloud, kubectl and Slurm's programs: they record their calls and give prepared answers."""

import json
import os
import pathlib
import subprocess
import sys

from paths import ROOT

LAUNCH = ROOT / "launch"
STAGE1 = ("--config", "configs/stage1_align.py:0.5b")
IN_BUCKET = (*STAGE1, "--workdir", "gs://my-bucket/runs/stage1")
PROGRAM = """#!{python} -ES
import json, pathlib, sys
folder = pathlib.Path({folder!r})
call = " ".join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])
with (folder / "calls").open("a") as file:
    file.write(call + "\\n")
for number, (part, answers) in enumerate(json.loads((folder / "answers.json").read_text())):
    if part in call:
        count = folder / f"count{{number}}"
        turn = int(count.read_text()) if count.exists() else 0
        count.write_text(str(turn + 1))
        status, out, err = answers[min(turn, len(answers) - 1)]
        sys.stdout.write(out)
        sys.stderr.write(err)
        sys.exit(status)
"""
PROGRAMS = ("gcloud", "kubectl", "sbatch", "squeue", "sinfo", "sacctmgr", "scontrol", "scancel", "srun", "sleep")
# All else of the machine that launchers use: a real gcloud of it cannot be called.
SYSTEM = ["bash", "env", "cat", "sed", "grep", "awk", "tail", "head", "mkdir", "mv", "rm", "wc", "mktemp", "dirname"]


def make_fakes(
    folder: pathlib.Path, answers: list[tuple[str, list[tuple[int, str, str]]]], without=()
) -> dict[str, str]:
    """An environment with the stand-ins on PATH.

    Args:
      answers: (part of a call, its (exit status, stdout, stderr) in turn); the first part that occurs counts, the last
        answer is repeated, and a call that nothing is said about gives status 0 and no output.
      without: programs that are not installed.
    """
    (folder / "bin").mkdir()
    for name in set(PROGRAMS) - set(without):
        (folder / "bin" / name).write_text(PROGRAM.format(python=sys.executable, folder=str(folder)))
        (folder / "bin" / name).chmod(0o755)
    (folder / "answers.json").write_text(json.dumps(answers))
    system = folder / "system"
    system.mkdir()
    for name in SYSTEM:
        path = next(p for p in (pathlib.Path("/bin") / name, pathlib.Path("/usr/bin") / name) if p.exists())
        (system / name).symlink_to(path)
    return {"PATH": f"{folder / 'bin'}:{system}", "HOME": str(folder), "USER": "me", "TMPDIR": str(folder)}


def calls(folder: pathlib.Path) -> list[str]:
    """The calls of stand-ins so far."""
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def launch(name: str, *arguments: str, environment: dict[str, str] | None = None, cwd=ROOT):
    """(exit status, stdout, stderr) of `bash launch/NAME ARGUMENTS`."""
    done = subprocess.run(
        ["bash", str(pathlib.Path("launch") / name) if cwd == ROOT else str(ROOT / "launch" / name), *arguments],
        cwd=cwd, env=environment or dict(os.environ), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


# What a machine answers on which all is well.
READY = [
    ("auth list", [(0, "me@example.com\n", "")]),
    ("buckets describe", [(0, "True\n", "")]),
    ("clusters describe", [(0, "True\n", "")]),
    ("node-pools list", [(0, "slice-0\nslice-1\n", "")]),
]


def settings_of(folder, launcher, **changes):
    """A copy of launch/settings/LAUNCHER.env with other values; None leaves a key out."""
    lines = []
    for line in (LAUNCH / f"settings/{launcher}.env").read_text().splitlines():
        key = line.partition("=")[0]
        if key in changes:
            line = None if changes[key] is None else f"{key}={changes[key]}"
        if line is not None:
            lines.append(line)
    path = folder / f"{launcher}.env"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(folder, launcher, arguments, answers=(), changes=None, without=(), programs=None):
    """(exit status, stdout, stderr, calls) of a launcher on a machine of stand-ins."""
    environment = make_fakes(folder, [*answers, *READY], without)
    for name, path in (programs or {}).items():
        (folder / "bin" / name).write_text(path.read_text())
    settings = settings_of(folder, launcher, **{"POLL_SECONDS": "1", **(changes or {})})
    status, out, err = launch(f"{launcher}.sh", "--settings", str(settings), *arguments, environment=environment)
    return status, out, err, calls(folder)
