"""Files of checkpoints are damaged: whoever reads them names the damage, or reads what was saved."""

import json
import pathlib
import random
import re
import shutil

import jax
import numpy as np
import pytest
from small_state import abstract, small_mesh, small_state

from fastvlm_jax import checkpoint, distributed
from fastvlm_jax.checkpoint.arrays import load_variables
from fastvlm_jax.checkpoint.folder import METADATA

STEPS = (4, 8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns a workdir with checkpoints of steps 4 and 8, written by four devices."""
    workdir = tmp_path_factory.mktemp("runs") / "saved run"
    workdir.mkdir()
    checkpointer = checkpoint.open_checkpointer(workdir, checkpoint.Retention(2))
    for step in STEPS:
        state = small_state(small_mesh(jax.devices()[:4]), step)
        checkpoint.save(checkpointer, state, step, passed_over=(2, 3), lineage={"stage": "small"})
    checkpointer.close()
    (workdir / "config.json").write_text('{"format": "fastvlm_jax workdir", "config": {}, "lineage": {}}')
    return workdir


def files_of(workdir, step=8):
    """Returns all files of a checkpoint that hold something."""
    files = (workdir / "checkpoints" / str(step)).rglob("*")
    return sorted(path for path in files if path.is_file() and path.stat().st_size)


def damage(path, kind, rng):
    if kind == "deleted":
        return path.unlink()
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        content = content[: rng.randrange(len(content))]
    elif kind == "emptied":
        content.clear()
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def assert_same(state, step):
    expected = small_state(small_mesh(jax.devices()[:1]), step)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, expected)


def restored(workdir, devices=2):
    """The result of a fresh process that goes on with the run on another mesh."""
    checkpointer = checkpoint.open_checkpointer(workdir, checkpoint.Retention(2))
    target = abstract(small_state(small_mesh(jax.devices()[:devices]), 0))
    return checkpointer, checkpoint.restore(checkpointer, target)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_checkpoint_is_read_on_every_mesh(saved, devices):
    checkpointer, (state, position, passed_over) = restored(saved, devices)
    assert_same(state, 8)
    assert (position, passed_over, checkpointer.steps) == (8, (2, 3), [4, 8])
    assert len(state.params["llm"]["wide"].sharding.device_set) == devices


def try_damage(saved, folder, name, kind, rng, capfd):
    """Damages a file of the latest checkpoint; whoever reads it tells so, or gets what was saved."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    newest = folder / "checkpoints" / "8"
    damage(newest / name, kind, rng)

    try:
        target = abstract(small_state(small_mesh(jax.devices()[:1]), 0))
        found = load_variables(newest, {"params": target.params, "batch_stats": target.batch_stats})
        found = jax.tree.map(np.asarray, found)
    except checkpoint.Damaged as error:
        assert str(newest) in str(error) and "\n" not in str(error)
    else:
        expected = small_state(small_mesh(jax.devices()[:1]), 8)
        expected = {"params": expected.params, "batch_stats": expected.batch_stats}
        jax.tree.map(np.testing.assert_array_equal, found, expected)

    try:
        checkpoint.verify(newest)
    except checkpoint.Damaged:
        whole = False
    else:
        whole = True
    checkpointer, (state, position, _) = restored(folder)
    told = capfd.readouterr().err
    assert_same(state, 8 if whole else 4)
    assert position == (8 if whole else 4) and "Traceback" not in told
    assert (folder / "checkpoints" / "8.damaged").exists() == (not whole)
    if not whole:
        said = f"WARNING: {newest} is damaged, it is kept as {newest}.damaged: .+; the run goes on behind step 4\n"
        assert re.fullmatch(said, told) and checkpointer.steps == [4]
    return whole


def cases_of(saved):
    """Each file of a checkpoint, damaged in each way."""
    names = [path.relative_to(saved / "checkpoints" / "8") for path in files_of(saved)]
    return [(name, kind) for name in names for kind in ("flipped", "truncated", "emptied", "deleted")]


def campaign(saved, folder, cases, capfd):
    """Returns how often damage was noticed."""
    rng = random.Random(0)
    return [try_damage(saved, folder, name, kind, rng, capfd) for name, kind in cases].count(False)


def test_damaged_files_are_noticed_or_hold_nothing(saved, tmp_path, capfd):
    cases = cases_of(saved)[::3]  # every file in one or two ways
    assert {name for name, _ in cases} == {name for name, _ in cases_of(saved)}
    assert campaign(saved, tmp_path / "run", cases, capfd) > len(cases) / 4


@pytest.mark.full
def test_three_hundred_damaged_files_are_noticed_or_hold_nothing(saved, tmp_path, capfd):
    cases = cases_of(saved)
    names = random.Random(1).choices([name for name, _ in cases], k=300 - len(cases))
    assert campaign(saved, tmp_path / "run", cases + [(name, "flipped") for name in names], capfd) > 60


@pytest.mark.parametrize("bit", range(0, 8 * 300, 151))
def test_notes_with_a_flipped_bit_are_never_believed(saved, tmp_path, bit):
    """The data position decides which batch comes next; only Orbax's own entries may differ unnoticed."""
    folder = tmp_path / "8"
    folder.mkdir()
    content = bytearray((saved / "checkpoints" / "8" / METADATA).read_bytes())
    at = 8 * content.index(b'"custom_metadata"') + bit
    content[at // 8] ^= 1 << at % 8
    (folder / METADATA).write_bytes(content)
    with pytest.raises(checkpoint.Damaged, match=METADATA):
        checkpoint.read_notes(folder)


def test_swapped_arrays_are_noticed(saved, tmp_path):
    """Each file is whole, but one part is of another checkpoint."""
    shutil.copytree(saved, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/8/training")
    shutil.copytree(saved / "checkpoints/4/training", tmp_path / "run/checkpoints/8/training")
    assert_same(restored(tmp_path / "run")[1].state, 4)


def test_damage_that_only_another_process_sees_sets_a_checkpoint_aside_here_too(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "run")
    theirs = {"checkpoint 8 compared": "model array params.llm.wide is not what was saved"}
    monkeypatch.setattr(distributed, "exchange", lambda name, own=None, seconds=0: [own, theirs.get(name, own)])
    checkpointer, (state, *_) = restored(tmp_path / "run")
    assert_same(state, 4)
    assert checkpointer.steps == [4] and (tmp_path / "run/checkpoints/8.damaged").is_dir()


def test_a_checkpoint_that_vanishes_under_a_run_is_named(saved, tmp_path, capfd):
    shutil.copytree(saved, tmp_path / "run")
    checkpointer = checkpoint.open_checkpointer(tmp_path / "run", checkpoint.Retention(2))
    shutil.rmtree(tmp_path / "run/checkpoints/8")
    state, *_ = checkpoint.restore(checkpointer, abstract(small_state(small_mesh(jax.devices()[:2]), 0)))
    assert_same(state, 4)
    assert "8 is damaged, it is gone: the folder is missing; the run goes on behind step 4" in capfd.readouterr().err


def test_a_run_without_a_whole_checkpoint_is_refused_and_nothing_is_renamed(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    for step in STEPS:
        (tmp_path / "run/checkpoints" / str(step) / METADATA).unlink()
    with pytest.raises(ValueError, match=rf"is whole \(8: {METADATA} is missing; 4: {METADATA} is missing\): copy"):
        restored(tmp_path / "run")
    assert checkpoint.steps_of(tmp_path / "run") == [4, 8]


def test_a_damaged_checkpoint_is_set_aside_beside_an_earlier_one_of_its_step(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    shutil.copytree(saved / "checkpoints/8", tmp_path / "run/checkpoints/8.damaged")
    (tmp_path / "run/checkpoints/8" / METADATA).unlink()
    restored(tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["4", "8.damaged", "8.damaged2"]


def without_digests(workdir):
    """Makes the notes of all checkpoints those of versions that stored no digests."""
    for step in STEPS:
        path = workdir / "checkpoints" / str(step) / METADATA
        content = json.loads(path.read_text())
        content["custom_metadata"] = {"position": step, "lineage": {"stage": "small"}}
        path.write_text(json.dumps(content))


def test_a_checkpoint_of_a_version_without_digests_is_read(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    without_digests(tmp_path / "run")
    _, (state, position, passed_over) = restored(tmp_path / "run")
    assert_same(state, 8)
    assert (position, passed_over) == (8, ())
    assert checkpoint.verify(tmp_path / "run/checkpoints/8") == (10, False)


def test_commands_tell_which_checkpoints_are_whole(saved, tmp_path, capsys):
    from fastvlm_jax.cli.checkpoint import checkpoint as command

    run = tmp_path / "run"
    shutil.copytree(saved, run)
    command(["checkpoint", "verify", str(run)])
    assert capsys.readouterr().out == f"{run}/checkpoints/4  whole: 10 arrays\n{run}/checkpoints/8  whole: 10 arrays\n"
    data = max(files_of(run), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(ValueError, match="1 of 2 checkpoints damaged"):
        command(["checkpoint", "verify", str(run)])
    assert re.search(rf"{run}/checkpoints/8  DAMAGED: (model|training) array \S+ ", capsys.readouterr().out)
    (run / "checkpoints/8" / METADATA).unlink()
    command(["checkpoint", "list", str(run)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(run) and lines[1].split()[:3] == ["step", "next", "batch"]
    assert re.fullmatch(r" +4 +4 +2 +0\.\d  \d{4}-\d\d-\d\d \d\d:\d\d  yes", lines[2])
    assert lines[3:] == [f"{'8':>10} DAMAGED: {METADATA} is missing"]
    with pytest.raises(ValueError, match="is no training workdir and no checkpoint in one"):
        command(["checkpoint", "list", str(tmp_path)])


def test_the_notes_are_digests_of_the_arrays_by_name(saved):
    notes = checkpoint.read_notes(saved / "checkpoints/8")
    assert {part: sorted(names) for part, names in notes["digests"].items()} == {
        "model": ["batch_stats.vision.mean", "params.llm.bias", "params.llm.wide", "params.vision.tall"],
        "training": [
            "guard.in_a_row",
            "guard.norms",
            "guard.skipped",
            "opt_state.0.count",
            "opt_state.0.mu.llm/half",
            "step",
        ],
    }
    assert notes["lineage"] == {"stage": "small"} and pathlib.Path(saved).is_dir()
