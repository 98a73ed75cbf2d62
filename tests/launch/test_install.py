"""Installing says what it does, how far it is and how long it took; with a stand-in for Python and pip."""

import os
import subprocess

import pytest
from launch_fakes import LAUNCH

# Answers as python3: the version is new enough, `-m venv` makes a copy of itself, `-m pip` prints what pip prints.
PYTHON = """#!/bin/bash
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *"-r requirements.txt") cat pip.txt; exit $(cat status) ;;
  *"-e .[demo]") echo "Collecting torch==2.0 (from fastvlm_jax)"; echo "Installing collected packages: torch" ;;
esac
"""
PIP = "".join(
    f"Collecting package{i}=={i}.0 (from -r requirements.txt (line {i}))\n  Downloading package{i}.whl (3.1 MB)\n"
    for i in range(1, 24)
)
PIP += "Installing collected packages: " + ", ".join(f"package{i}" for i in range(1, 24)) + "\nSuccessfully installed\n"


@pytest.fixture
def install(tmp_path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/install.sh").write_text((LAUNCH / "install.sh").read_text())
    (tmp_path / "requirements.txt").write_text("# pins\njax==1\nflax==2\noptax==3\n")
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "pip.txt").write_text(PIP)
    (tmp_path / "status").write_text("0")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)

    def run():
        done = subprocess.run(
            ["bash", "-c", "set -euo pipefail; source launch/install.sh; install demo"],
            cwd=tmp_path, env={**os.environ, "PYTHON": str(tmp_path / "python")}, capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, done.stdout.splitlines(), done.stderr

    return run


def test_it_says_what_is_installed_how_far_it_is_and_how_long_it_took(install, tmp_path):
    status, lines, err = install()
    assert (status, err) == (0, "")
    assert lines[:-1] == [
        'launch: installing jax, flax and 1 other packages, then the extra "demo", into .venv (once, 2 to 5 minutes)',
        "launch: package 10: package10==10.0",
        "launch: package 20: package20==20.0",
        "launch: unpacking 23 packages",
        "launch: unpacking 1 packages",
    ]
    assert lines[-1].startswith("launch: installed in ") and lines[-1].endswith(" s")
    log = (tmp_path / ".venv/install.log").read_text()
    assert log.startswith(PIP) and "Collecting torch==2.0" in log
    # The second time there is nothing to do, and nothing to say.
    assert install() == (0, [], "")


def test_a_failure_of_pip_shows_the_end_of_its_log(install, tmp_path):
    (tmp_path / "status").write_text("1")
    (tmp_path / "pip.txt").write_text(PIP + "ERROR: No space left on device\n")
    status, _, err = install()
    assert status != 0 and "ERROR: No space left on device\n" in err
    assert err.endswith("launch: the installation failed; the whole log is in .venv/install.log\n")
    (tmp_path / "status").write_text("0")
    assert install()[0] == 0
