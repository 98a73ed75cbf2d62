"""Damages files of checkpoints and of the data, and continues the run.

What is promised: damage is named and the checkpoint before is used, or the byte held nothing; never a wrong weight
without a word, never a traceback.
"""

import pathlib
import random
import re
import shutil

from tests.faults import compare, runs
from tests.faults.compare import expect


def damaged_checkpoint(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Damages one file of the newest checkpoint, each kind of file as likely as the others."""
    return _damage_newest(base, folder, rng, 1)


def damaged_checkpoints(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Damages a file in each of the two newest checkpoints."""
    return _damage_newest(base, folder, rng, 2)


def vanished_checkpoint(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Deletes the newest checkpoint, or all of it but its folders."""
    workdir = folder / "run"
    shutil.copytree(runs.straight(base), workdir)
    newest, whole = compare.newest(workdir), rng.random() < 0.5
    if whole:
        shutil.rmtree(newest)
    else:
        for path in newest.rglob("*"):
            if path.is_file():
                path.unlink()
    runs.go_on(base, workdir)
    compare.check_same(workdir, runs.straight(base))
    return "deleted" if whole else "all files deleted"


def damaged_data(base: pathlib.Path, folder: pathlib.Path, rng: random.Random) -> str:
    """Damages a file of the data set that a stopped run reads: it is named, or the run ends as if it were whole."""
    data, workdir = folder / "data", folder / "run"
    shutil.copytree(runs.data_set(base), data)
    runs.half_done(base, workdir)
    path = rng.choice(sorted(path for path in data.rglob("*") if path.is_file()))
    whole, what = path.read_bytes(), f"{path.relative_to(data)} {damage(path, rng)}"
    flag = f"--config.data.path={data}"
    (ended,) = runs.train(base, workdir, flag).end()
    if ended.status == 0:
        expect("Traceback" not in ended.text, f"{what}: a traceback: {ended.text[-1500:]}")
        if re.search("substitute|replaced|cannot be used", ended.text):
            return f"{what}: a record was replaced, and named"
    else:
        ended.refusal(re.escape(str(data)))
        path.write_bytes(whole)
        runs.go_on(base, workdir, flag)
    compare.check_same(workdir, runs.straight(base))
    return f"{what}: {'refused' if ended.status else 'nothing was lost'}"


def _damage_newest(base: pathlib.Path, folder: pathlib.Path, rng: random.Random, count: int) -> str:
    workdir = folder / "run"
    shutil.copytree(runs.straight(base), workdir)
    told = []
    for step in compare.saved(workdir)[-count:]:
        checkpoint = workdir / "checkpoints" / str(step)
        path = any_file(checkpoint, rng)
        told.append(f"{step}/{path.relative_to(checkpoint)} {damage(path, rng)}")
    what = ", ".join(told)
    ended = runs.go_on(base, workdir)
    compare.check_same(workdir, runs.straight(base))
    if runs.resumed_at(ended) == runs.STEPS:
        return f"{what}: nothing was lost"
    expect(f"checkpoints/{runs.STEPS}" in ended.text, f"{what}: another checkpoint was used without a word")
    aside = list((workdir / "checkpoints").glob(f"{runs.STEPS}.*"))
    expect(aside, f"{what}: the damaged checkpoint was not kept aside")
    return f"{what}: named"


def any_file(checkpoint: pathlib.Path, rng: random.Random) -> pathlib.Path:
    """Chooses a file of a checkpoint: first a kind, which is its path with the digits of hashes left out, then one."""
    kinds: dict[str, list[pathlib.Path]] = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        kinds.setdefault(re.sub(r"[0-9a-f]{8,}", "*", str(path.relative_to(checkpoint))), []).append(path)
    return rng.choice(kinds[rng.choice(sorted(kinds))])


def damage(path: pathlib.Path, rng: random.Random) -> str:
    """Flips a bit of a file, zeroes a part, cuts it, empties it or deletes it; returns what was done, in words."""
    data, what = bytearray(path.read_bytes()), rng.choice(["flip", "flip", "flip", "zero", "cut", "empty", "delete"])
    if what == "delete":
        path.unlink()
        return "deleted"
    if what == "empty" or not data:
        path.write_bytes(b"")
        return "emptied"
    at = rng.randrange(len(data))
    if what == "cut":
        path.write_bytes(data[:at])
        return f"cut at byte {at} of {len(data)}"
    if what == "flip":
        bit = rng.randrange(8)
        data[at] ^= 1 << bit
        path.write_bytes(data)
        return f"bit {bit} of byte {at} of {len(data)} flipped"
    size = min(512, len(data) - at)
    data[at : at + size] = bytes(size)
    path.write_bytes(data)
    return f"{size} bytes from {at} of {len(data)} on zeroed"


FAULTS = [damaged_checkpoint, damaged_checkpoints, vanished_checkpoint, damaged_data]
