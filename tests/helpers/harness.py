"""Asks other evaluation harnesses, in processes of their own: their pins do not join ours. launch/test.sh unpacks them.

score = "from lmms_eval.tasks.gqa.utils import *\\ndef main(value): return [...]"
ask("lmms-eval-0.7.3", score, [["yes.", "yes"]])
"""

import json
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(sys.prefix) / "harness"
LMMS_EVAL = ("lmms-eval-0.7.3", "lmms-eval-0.2.3", "lmms-eval-0.2.1")
LLAVA = "llava-torch-1.2.2.post1"


def folder(name: str) -> pathlib.Path:
    """Returns the folder of an unpacked harness; skips the test where it could not be fetched."""
    if not (FOLDER / name).is_dir():
        pytest.skip(f"{name} is not installed: launch/test.sh fetches it")
    return FOLDER / name


def ask(name: str, code: str, value, seconds: float = 120, before: tuple[str, ...] = ()):
    """Returns what `main(value)`, which `code` defines, returns beside the harness; values are JSON.

    Modules that the harness imports and that are not installed are stubs, which do nothing; so are some that take long
    to load. The modules `before` are imported before that, and are themselves.
    """
    request = {"path": str(folder(name)), "code": code, "value": value, "before": before}
    script = pathlib.Path(__file__).with_name("harness_process.py")
    done = subprocess.run(
        [sys.executable, str(script)], input=json.dumps(request), capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
