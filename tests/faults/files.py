"""Reads files as strangers write them: mutations of small whole files, over all readers.

What is promised: a file is read, or refused in one line that names it; no traceback, no crash, no hang. Nothing outside
the target is written, nothing outside the named folder is read, no program is started. Memory and time stay within
MEMORY and SECONDS a case.

The cases run one after the other in a child process, which tells of each before it begins: if the child dies, the last
one is to blame, and another child goes on behind it. `python -m tests.faults.files KINDS SEED FIRST END FOLDER` is that
child, and runs one case again.
"""

import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from tests.faults.compare import Broken
from tests.faults.runs import TESTS

CASES = 200  # mutations of a trial
MEMORY = 2_500  # MB that a case may add to the process
SECONDS = 30  # seconds of processor time that a case may take
APART = 5  # seconds of processor time for a page of a PDF or rows of a Parquet file; readers allow more, see apart.py
HUNG = 300  # seconds after which a child that says nothing is killed


def strange_pictures(base, folder, rng):
    """Decodes mutated pictures of every format."""
    return campaign(["pictures"], folder, rng)


def strange_sources(base, folder, rng):
    """Writes shards from mutated lists, tars, Parquet files, PDFs, TFDS sets and shards."""
    return campaign(["lists", "tars", "parquet", "pdf", "tfds", "shards"], folder, rng)


def strange_models(base, folder, rng):
    """Loads, asks and converts mutated tokenizers, model directories and GGUF files."""
    return campaign(["tokenizers", "models"], folder, rng)


def strange_checkpoints(base, folder, rng):
    """Verifies, loads and converts mutated workdirs."""
    return campaign(["checkpoints"], folder, rng)


def strange_benchmarks(base, folder, rng):
    """Reads mutated files of benchmarks."""
    return campaign(["benchmarks"], folder, rng)


FAULTS = [strange_pictures, strange_sources, strange_models, strange_checkpoints, strange_benchmarks]


def campaign(kinds: Sequence[str], folder: pathlib.Path, rng: random.Random, count: int = CASES) -> str:
    """Runs `count` cases, the kinds in turn; returns in words what came of them.

    Raises:
      Broken: a promise was broken; the message names the cases, each with the arguments that run it again.
    """
    told = run(kinds, folder, rng.randrange(2**31), count)
    if bad := [case for case in told if case["bad"]]:
        first = "; ".join(f"{case['case']} {case['what']}: {case['bad']}" for case in bad[:5])
        raise Broken(f"{len(bad)} of {len(told)}: {first}")
    refused = sum(case["refused"] for case in told)
    mb, seconds = (max(case[name] for case in told) for name in ("mb", "seconds"))
    return f"{len(told)} mutations, {refused} refused, at most {mb} MB and {seconds:.1f} s each"


def run(kinds: Sequence[str], folder: pathlib.Path, seed: int, count: int) -> list[dict[str, Any]]:
    """Runs the cases, and returns what the children tell of each."""
    told: list[dict[str, Any]] = []
    folder.mkdir(parents=True, exist_ok=True)
    while len(told) < count:
        first = len(told)
        words = [sys.executable, "-m", "tests.faults.files", ",".join(kinds), seed, first, count, folder]
        with (folder / "stderr").open("w") as errors:
            child = subprocess.Popen(
                [*map(str, words)], cwd=TESTS.parent, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        signal.signal(signal.SIGALRM, lambda *_, child=child: child.kill())
        begun = None
        for line in child.stdout:
            signal.alarm(HUNG)
            case = json.loads(line)
            begun = case if "bad" not in case else None
            if begun is None:
                told.append(case)
        signal.alarm(0)
        status, text = child.wait(), (folder / "stderr").read_text(errors="replace")
        if begun:
            dead = {"bad": f"ended with {status}: {text[-400:]}", "refused": False, "mb": 0, "seconds": 0}
            told.append({**begun, **dead})
        elif status:
            raise Broken(f"the child of {kinds} ended with {status}: {text[-1500:]}")
    return told


# The child


def main(kinds: str, seed: str, first: str, end: str, folder: str) -> None:
    """Runs the cases [first, end), and prints a line of JSON before and behind each."""
    root = pathlib.Path(folder).absolute()
    os.environ |= {"FASTVLM_CACHE": str(root / "case/cache"), "TMPDIR": str(root / "case"), "JAX_PLATFORMS": "cpu"}
    for name in ("outside", "made"):
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).mkdir()
    os.chdir(root / "made")
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what readers print is not told
    from fastvlm_jax.data.readers import apart
    from tests.faults.mutations import mutate
    from tests.faults.originals import KINDS, PNG
    from tests.faults.watched import Watch

    (root / "outside/secret.png").write_bytes(PNG)
    watch, chosen, apart.SECONDS = Watch(root / "case"), kinds.split(","), APART
    originals = {}
    for number in range(int(first), int(end)):
        kind = chosen[number % len(chosen)]
        use = KINDS[kind].use
        if kind not in originals:
            originals[kind] = KINDS[kind].make()
            for files in originals[kind]:  # so that no case pays for what is imported and compiled
                assert not (judged := judge(root, files, use, watch))["refused"], (kind, judged)
            limit_memory()
        rng = random.Random(f"{kind} {seed} {number}")
        files = dict(rng.choice(originals[kind]))
        what = mutate(rng, files, [data for other in originals[kind] for data in other.values()])
        case = {"case": f"{kinds} {seed} {number} {number + 1}", "kind": kind, "what": what}
        print(json.dumps(case), file=told)
        print(json.dumps({**case, **judge(root, files, use, watch)}), file=told)


def judge(root: pathlib.Path, files: dict[str, bytes], use, watch) -> dict[str, Any]:
    """Writes the files, reads them, and tells what was wrong, "" for nothing, and what it cost."""
    case = root / "case"
    shutil.rmtree(case, ignore_errors=True)
    for name, data in files.items():
        (case / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (case / "in" / name).write_bytes(data)
    bad, refused, lines = "", False, []
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, began = memory("VmRSS"), time.process_time()
    signal.signal(signal.SIGALRM, late)
    signal.alarm(HUNG - 30)
    try:
        with watch:
            lines = use(case / "in", case / "out")
    except (ValueError, OSError) as error:
        refused, text = True, str(error).strip()
        bad = "" if text and "\n" not in text and str(case) in text else f"not one line with the file: {text!r}"
    except BaseException as error:
        bad = f"{type(error).__name__}: {error}"[:600]
    signal.alarm(0)
    seconds, mb = time.process_time() - began, memory("VmHWM") - before
    bad = bad or next((f"not one line: {line!r}" for line in lines if "\n" in line.strip()), "")
    bad = bad or (f"{seconds:.0f} s" if seconds > SECONDS else f"{mb} MB" if mb > MEMORY else "")
    bad = bad or (f"done outside: {watch.found}" if watch.found else "")
    watch.found.clear()
    return {"bad": bad, "refused": refused or bool(lines), "seconds": round(seconds, 2), "mb": mb}


def late(*_):
    raise TimeoutError("it does not end")


def memory(name: str) -> int:
    """Returns a size in /proc/self/status, MB."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) >> 10


def limit_memory() -> None:
    """Makes an allocation fail before the machine does."""
    limit = (memory("VmSize") << 20) + (2 * MEMORY << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
