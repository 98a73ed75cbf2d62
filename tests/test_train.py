import json
import logging
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from paths import ROOT
from small import small_config

from fastvlm_jax import checkpoint, lock, model_io, sharding
from fastvlm_jax import workdir as workdir_lib
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.metrics.rows import read_metrics
from fastvlm_jax.train import Interrupted, train
from fastvlm_jax.train_state import TrainState

ONE = dict(mesh=(1, 1, 1, 1))


def run(config, workdir, devices=1):
    return jax.tree.map(np.asarray, train(config, pathlib.Path(workdir), jax.devices()[:devices]))


def losses(workdir):
    return [row["loss"] for row in read_metrics(workdir) if "loss" in row]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


STRAIGHT = dict(steps=8, checkpoint_every=4, keep_checkpoints=5, eval_every=3, eval_batches=1)


class Straight(NamedTuple):
    """A run from start to end: its workdir, its last state, and the names of the functions it compiled."""

    workdir: pathlib.Path
    state: TrainState
    compiled: list[str]


@pytest.fixture(scope="module")
def straight(easy_vqa, tmp_path_factory):
    workdir, messages = tmp_path_factory.mktemp("runs") / "straight", []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("jax").addHandler(handler)
    with jax.log_compiles():
        state = run(small_config(easy_vqa, **STRAIGHT, **ONE), workdir)
    logging.getLogger("jax").removeHandler(handler)
    # "Compiling jit(train_step) with global shapes and types ..."
    return Straight(workdir, state, [m.split()[1] for m in messages if m.startswith("Compiling ")])


def test_step_and_validation_are_compiled_once(straight):
    assert sum("train_step" in name for name in straight.compiled) == 1, straight.compiled
    assert sum("held_out" in name for name in straight.compiled) == 1, straight.compiled


def test_run_stopped_by_sigterm_goes_on_bit_for_bit(easy_vqa, straight, tmp_path):
    config = small_config(easy_vqa, steps=8, **ONE)

    def stop_after_the_first_step():
        while not read_metrics(tmp_path / "run"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_after_the_first_step, daemon=True).start()
    with pytest.raises(Interrupted, match="of 8, which is saved") as stopped:
        run(config, tmp_path / "run")
    assert stopped.value.status == 75
    stopped_at = max(int(p.name) for p in (tmp_path / "run/checkpoints").iterdir())
    assert 1 <= stopped_at < 8
    assert_same(run(config, tmp_path / "run"), straight.state)
    assert losses(tmp_path / "run") == losses(straight.workdir)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, 9))


KEPT = dict(steps=8, checkpoint_every=2, keep_checkpoints=1, eval_every=3, eval_batches=1, keep_best="validation/loss")


def test_killed_process_goes_on_bit_for_bit(easy_vqa, straight, tmp_path):
    """SIGKILL in the middle of the run; a fresh process resumes from the last checkpoint and knows the best score."""
    script = (
        "import pathlib, sys; sys.path.insert(0, 'tests/helpers'); sys.modules['torch'] = None\n"
        "import environment, jax\n"
        "from small import small_config\n"
        "from fastvlm_jax.train import train\n"
        f"c = small_config(sys.argv[1], **{KEPT}, mesh=(1, 1, 1, 1))\n"
        "train(c, pathlib.Path(sys.argv[2]), jax.devices()[:1])\n"
    )
    command = [sys.executable, "-c", script, str(easy_vqa), str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "run").glob("checkpoints/2")):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL and 2 <= len(losses(tmp_path / "run")) < 8, "it was not killed in time"
    state = run(small_config(easy_vqa, **KEPT, **ONE), tmp_path / "run")
    assert_same(state, straight.state)
    assert losses(tmp_path / "run") == losses(straight.workdir)
    scores = {row["validation/loss"]: row["step"] for row in read_metrics(tmp_path / "run") if "validation/loss" in row}
    kept = {int(path.name) for path in (tmp_path / "run/checkpoints").iterdir()}
    assert sorted(scores.values()) == [3, 6, 8] and {scores[min(scores)], 8} <= kept and len(kept) < 3


def test_finished_run_trains_no_further(easy_vqa, straight):
    before = (straight.workdir / "metrics.jsonl").read_text()
    assert_same(run(small_config(easy_vqa, **STRAIGHT, **ONE), straight.workdir), straight.state)
    assert (straight.workdir / "metrics.jsonl").read_text() == before


def test_more_steps_on_a_finished_run_are_told_and_stand_in_the_lineage(easy_vqa, straight, tmp_path, capsys):
    shutil.copytree(straight.workdir, tmp_path / "run")
    longer = small_config(easy_vqa, **{**STRAIGHT, "steps": 16, "log_every": 2}, **ONE)
    words = r"steps is 8 there and 16 here; free to change: log_every is 1 there and 2 here; --allow_changes=steps goes"
    with pytest.raises(ValueError, match=words):
        run(longer, tmp_path / "run")
    state = train(longer, tmp_path / "run", jax.devices()[:1], allow_changes=["steps"])
    assert int(state.step) == 16
    # A cosine over 16 steps, behind one of warm-up: 16 * 0.03 rounded up.
    rates = {step: 1e-3 * (1 + math.cos(math.pi * (step - 1) / 15)) / 2 for step in (9, 10, 12, 14, 16)}
    told = capsys.readouterr().err
    assert (
        "small: changed since it was last at work: log_every is 1 there and 2 here, steps is 8 there and 16 here"
        in told
    )
    was = read_metrics(straight.workdir)[-1 if "lr" in read_metrics(straight.workdir)[-1] else -2]["lr"]
    assert (
        f"the learning rate was {was:.3g} in the last row of its metrics, is {rates[9]:.3g} at step 9 and ends" in told
    )
    rows = {row["step"]: row["lr"] for row in read_metrics(tmp_path / "run") if "lr" in row}
    assert list(rows) == [*range(1, 9), 10, 12, 14, 16]
    assert [rows[step] for step in (10, 12, 14, 16)] == pytest.approx([rates[s] for s in (10, 12, 14, 16)], abs=1e-9)
    changes = [{"step": 8, "key": "steps", "before": 8, "now": 16}]
    assert json.loads((tmp_path / "run/config.json").read_text())["lineage"]["changes"] == changes
    kept = checkpoint.read_notes(tmp_path / "run" / "checkpoints" / "16")
    assert kept["lineage"]["changes"] == changes
    assert model_io.read(tmp_path / "run").lineage["changes"] == changes
    assert "changes" not in model_io.read(tmp_path / "run/checkpoints/8").lineage
    with pytest.raises(ValueError, match="is at step 16, beyond the 8 steps of this config: raise them"):
        train(small_config(easy_vqa, **STRAIGHT, **ONE), tmp_path / "run", jax.devices()[:1], allow_changes=["steps"])
    assert_same(run(longer, tmp_path / "run"), jax.tree.map(np.asarray, state))


def test_a_run_whose_workdir_vanishes_ends(easy_vqa, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)

    def move_after_the_first_step():
        while not read_metrics(tmp_path / "run"):
            time.sleep(0.01)
        os.rename(tmp_path / "run", tmp_path / "elsewhere")

    threading.Thread(target=move_after_the_first_step, daemon=True).start()
    with pytest.raises(OSError, match=f"^{tmp_path}/run/lock has vanished: nothing more can be saved in its folder"):
        run(small_config(easy_vqa, steps=10_000, **ONE), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_losses_and_validation_are_the_same_on_a_mesh(easy_vqa, straight, tmp_path, monkeypatch):
    """With the kernels of the encoder split as the large ones are; test_train_step.py has more meshes."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_ELEMENTS", 64)
    config = small_config(easy_vqa, steps=8, mesh=(1, 2, 2, 2), eval_batches=1, evaluate=(("qa", "", 20),))
    run(config, tmp_path / "run", devices=8)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(straight.workdir), rtol=1e-4)
    last, alone = (read_metrics(workdir)[-1] for workdir in (tmp_path / "run", straight.workdir))
    assert 3 < last["validation/loss"] < 8 and 0 <= last["evaluate/qa"] <= 100
    np.testing.assert_allclose(last["validation/loss"], alone["validation/loss"], rtol=1e-4)


def test_checkpoint_holds_position_and_lineage(straight):
    notes = checkpoint.read_notes(straight.workdir / "checkpoints" / "4")
    assert notes["position"] == 4
    assert notes["lineage"]["stage"] == "small"
    assert len(notes["lineage"]["data_fingerprint"]) == 64


def test_frozen_leaves_are_unchanged_and_all_others_change(easy_vqa, straight, tmp_path):
    groups = (("vision/.*", 0.0, 0.5), ("llm/embedding", 0.0, 0.5), (".*", 1e-2, 0.5))
    config = small_config(
        easy_vqa, steps=3, parent=str(straight.workdir), groups=groups, model__vision__batch_norm="frozen", **ONE
    )
    state = run(config, tmp_path / "run")
    before = model_io.read(straight.workdir).variables
    assert_same(state.batch_stats, before["batch_stats"])
    before, after = flatten_dict(before["params"], sep="/"), flatten_dict(state.params, sep="/")
    frozen = {path for path in before if path.startswith("vision/") or path == "llm/embedding"}
    for path in before:
        assert np.array_equal(before[path], after[path]) == (path in frozen), path
    slots = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)}
    assert not any(path in slot for path in frozen for slot in slots)
    assert any("projector/fc1/kernel" in slot for slot in slots)


def test_the_last_state_is_saved_before_a_validation_that_fails(easy_vqa, tmp_path):
    records = [read_shards(easy_vqa, "train")[i] for i in range(8)]
    write_shards(tmp_path / "data", "train", records)
    talk = (("user", (0, "what is the color of the shape that is in the image?")), ("assistant", ("red",)))
    write_shards(tmp_path / "data", "validation", [Record("cut", (records[0].images[0][:200],), talk), *records])
    config = small_config(tmp_path / "data", steps=1, eval_batches=1, data__tokenizer=str(easy_vqa), **ONE)
    config.data.max_substituted = 0.0
    with pytest.raises(ValueError, match="cut"):
        run(config, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["1"]


def test_branched_parent_is_folded_for_a_folded_stage(easy_vqa, straight, tmp_path):
    config = small_config(
        easy_vqa,
        steps=1,
        parent=str(straight.workdir),
        model__vision__form="folded",
        model__vision__batch_norm="frozen",
        **ONE,
    )
    state = run(config, tmp_path / "run")
    assert "folded" in state.params["vision"]["stem_0"]
    lineage = json.loads((tmp_path / "run/config.json").read_text())["lineage"]
    assert lineage["parent"]["stage"] == "small" and lineage["parent_step"] == 8


def test_a_run_goes_on_where_its_folders_are_mounted_elsewhere(tmp_path):
    settings = {"parent": "vision=/gcs/b/clip,llm=/gcs/b/qwen", "data": {"root": "/gcs/b/data"}, "steps": 8}
    workdir_lib._claim(tmp_path / "run", settings, {"parent_step": 3})
    moved = {**settings, "parent": "vision=/mnt/b/clip,llm=/mnt/b/qwen", "data": {"root": "/mnt/b/data"}}
    workdir_lib._claim(tmp_path / "run", moved, {"parent_step": 3})
    with pytest.raises(ValueError, match="parent is 'vision=/gcs/b/clip,llm=/gcs/b/qwen' there"):
        workdir_lib._claim(
            tmp_path / "run", {**moved, "parent": "vision=/mnt/b/clip,llm=/mnt/b/other"}, {"parent_step": 3}
        )
    with pytest.raises(ValueError, match="parent_step is 3 there and 4 here"):
        workdir_lib._claim(tmp_path / "run", moved, {"parent_step": 4})


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(steps=9), "is in use by a run with other settings: steps is 8 there and 9 here"),
        (
            dict(model__llm__width=64, model__llm__mlp_dim=32, model__vision__layers=(2, 1), parent="STRAIGHT"),
            r"straight does not fit this config \(key: config, parent\): model.vision.layers: \[2, 1\], \[1, 1\]; "
            r"model.llm.width: 64, 32; model.llm.mlp_dim: 32, 64; model.llm.head_dim: 16, 8. "
            r"--config FILE.py:parent=\S+straight takes the parent's",
        ),
        (dict(parent="/nowhere"), "there is no model at /nowhere"),
        (dict(data__path="/nowhere"), "there is no dataset folder /nowhere"),
        (dict(data__path=""), "data.path is empty"),
        (dict(data__image_size=20), "data.image_size=20: image size 20x20 must be a multiple of 8"),
        (dict(groups=(("llm/.*", 1e-3, 0.0),)), "no pattern matches parameter"),
        (dict(groups=((".*", 1e-3, 0.0), ("lmm/.*", 1e-3, 0.0))), "'lmm/.*' matches no parameter"),
        (
            dict(groups=(("vision/.*", 0.0, 0.0), (".*", 1e-3, 0.0))),
            "groups freeze the encoder, but its statistics move",
        ),
        (dict(mesh=(1, 3, 1, 1)), "needs 3 devices"),
        (dict(data__groups=3, mesh=(1, 8, 1, 1)), "data.groups=3 does not divide over 8"),
        (dict(model__llm__vocab_size=100), "the tokenizer has 512 ids"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_settings_that_do_not_fit_are_refused_and_nothing_is_written(easy_vqa, straight, tmp_path, changes, words):
    changes = {key: str(straight.workdir) if value == "STRAIGHT" else value for key, value in changes.items()}
    steps = changes.pop("steps", 8)
    workdir = straight.workdir if steps == 9 else tmp_path / "run"
    before = sorted(workdir.rglob("*"))
    config = small_config(easy_vqa, steps=steps, **{"mesh": (1, 1, 1, 1), **changes})
    with pytest.raises((ValueError, FileNotFoundError), match=words.replace(".*", r"\.\*")):
        train(config, workdir, jax.devices()[: 8 if 8 in config.mesh else 1])
    assert sorted(workdir.rglob("*")) == before


def test_a_mixture_tells_loss_and_records_of_each_data_set(easy_vqa, tmp_path):
    config = small_config(
        easy_vqa, steps=3, data__path="", data__root=str(easy_vqa), data__mixture=((".", 1.0), ("captions", 3.0)), **ONE
    )
    run(config, tmp_path / "run")
    name = easy_vqa.name
    for row in read_metrics(tmp_path / "run"):
        assert abs(row[f"loss/{name}"] - row["loss"]) < 1 and abs(row["loss/captions"] - row["loss"]) < 1
        assert row[f"loss/{name}"] != row["loss/captions"]
        # 8 groups of one image slot: one record each
        assert row[f"records/{name}"] + row["records/captions"] == 8
        assert 0 <= row["input_bound"] <= 1 and row["substituted"] == 0 and row["images/s"] > 0
    drawn = sum(row["records/captions"] for row in read_metrics(tmp_path / "run"))
    assert 12 <= drawn <= 24
