"""Whole runs over poisoned batches, held against loops that leave them out; what is told, listed and passed over."""

import itertools
import json
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from poison import first_batches, poisoned
from small import ONE_STAGE, small_config

from fastvlm_jax import checkpoint, faults, guard, losses, sharding, stage
from fastvlm_jax import train as train_lib
from fastvlm_jax.data.inspect.listed import read_keys, take_listed
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.distributed import Interrupted, StopRequest
from fastvlm_jax.files import write_json
from fastvlm_jax.metrics.rows import read_metrics
from fastvlm_jax.train import train


def settings(data, **changes):
    """The config of a run of a few seconds; the keys of `bad_steps` are given without that name."""
    own = ("mode", "factor", "in_a_row", "roll_backs")
    changes = {f"bad_steps__{key}" if key in own else key: value for key, value in changes.items()}
    return small_config(data, **{"steps": 8, "keep_checkpoints": 9, "mesh": (1, 1, 1, 1), **ONE_STAGE, **changes})


@pytest.fixture(scope="module")
def loaded(easy_vqa):
    return first_batches(settings(easy_vqa), 14)


@pytest.fixture(scope="module")
def batches(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def build(loaded):
    return loaded[2]


@pytest.fixture
def poison(monkeypatch, loaded):
    """Makes the loss of the batches of these numbers NaN."""
    return lambda *numbers: monkeypatch.setattr(losses, "next_token", poisoned([loaded[1][k] for k in numbers]))


def run(config, workdir):
    return jax.tree.map(np.asarray, train(config, pathlib.Path(workdir), jax.devices()[:1]))


def by_hand(config, batches, numbers):
    """The state behind steps on the batches of these numbers, with a step that judges nothing; None leaves one out."""
    config = config.copy_and_resolve_references()
    config.bad_steps.mode = "off"
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        made = stage.open_stage(config)
        step = stage.make_step(config, made.model, mesh, steps=config.steps)
        state = step.make_state(jax.random.key(config.seed), None)
        for k in numbers:
            if k is None:
                state = state.replace(step=state.step + 1)
            else:
                batch = jax.device_put(batches[k], sharding.batch_sharding(mesh))
                state, _ = step.fn(state, batch)
    return jax.tree.map(np.asarray, state)


def assert_same(found, expected):
    """Everything but the guard, which the loop by hand does not use."""
    for name in ("step", "params", "batch_stats", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(found, name), getattr(expected, name))


def lines(workdir):
    return [json.loads(line) for line in (workdir / faults.FILE).read_text().splitlines()]


def noted(workdir, step):
    """(data position, batches passed over) of a checkpoint."""
    notes = checkpoint.read_notes(workdir / "checkpoints" / str(step))
    return notes["position"], notes["passed_over"]


def saved(workdir):
    return checkpoint.steps_of(workdir)


def counts(state):
    """The optimizer's counts: those of Adam's bias correction and of the schedule of rates."""
    found = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return [int(x) for path, x in found if jax.tree_util.keystr(path).endswith(".count")]


def test_exactly_the_poisoned_updates_are_left_out_and_their_records_listed(
    easy_vqa, batches, build, poison, tmp_path, capfd
):
    config = settings(easy_vqa, checkpoint_every=3)
    expected = by_hand(config, batches, [0, 1, None, 3, 4, None, 6, 7])
    poison(2, 5)
    state = run(config, tmp_path)
    assert_same(state, expected)
    assert int(state.step) == 8 and counts(state) == [6, 6]  # steps are numbered on; the optimizer counts its updates
    assert (int(state.guard.skipped), int(state.guard.in_a_row)) == (2, 0)

    found = lines(tmp_path)
    assert [(line["step"], line["batch"], line["group"]) for line in found] == [
        (step, batch, group) for step, batch in ((3, 2), (6, 5)) for group in range(8)
    ]
    assert {line["why"] for line in found} == {"the loss is nan"} and {line["source"] for line in found} == {
        str(easy_vqa)
    }
    records = read_shards(easy_vqa, "train")
    assert all(records[line["record"]].key == line["key"] for line in found)
    shown = list(take_listed(build, read_keys(f"@{tmp_path / faults.FILE}"), 99))
    assert [(sample.batch, sample.group) for sample in shown] == [(line["batch"], line["group"]) for line in found]
    for sample in shown:  # `data inspect --keys` shows what the model saw
        np.testing.assert_array_equal(sample.views[0].pixels[0], batches[sample.batch].images[sample.group, 0])
    said = f"step 3 is bad, its update is left out: the loss is nan; its records are in {tmp_path / faults.FILE}"
    assert f"small: {said}" in capfd.readouterr().err

    rows = {row["step"]: row for row in read_metrics(tmp_path)}
    assert [step for step, row in rows.items() if "loss" not in row] == [3, 6]
    assert [rows[step]["skipped"] for step in range(1, 9)] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert rows[8]["lr"] > 0  # the schedule, of 8 steps, has seen 6 updates
    assert saved(tmp_path) == [3 + 1, 6 + 1, 8]  # none among bad steps, but behind them
    assert noted(tmp_path, 8) == (8, [])


def test_a_row_of_bad_steps_goes_back_and_passes_over_its_batches(easy_vqa, batches, poison, tmp_path, capfd):
    """Batch 3 fails too, alone: it is drawn again and its update left out again."""
    config = settings(easy_vqa, checkpoint_every=3, in_a_row=3)
    expected = by_hand(config, batches, [0, 1, 2, None, 4, 8, 9, 10])
    poison(3, 5, 6, 7)
    assert_same(run(config, tmp_path), expected)
    err = capfd.readouterr().err
    assert "small: 3 bad steps in a row: goes back to step 3, passing over batches 5-7 (the loss is nan)" in err
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 9))
    failed = [(6, 5), (7, 6), (8, 7), (4, 3)]
    assert [(x["step"], x["batch"]) for x in lines(tmp_path)[::8]] == failed
    known = {step: noted(tmp_path, step) for step in saved(tmp_path)}
    assert known == {3: (3, []), 6: (9, [5, 6, 7]), 8: (11, [5, 6, 7])}

    # The list stands in the checkpoint: a run that lost its last checkpoint passes over the same batches.
    shutil.rmtree(tmp_path / "checkpoints/8")
    assert_same(run(config, tmp_path), expected)
    assert [(x["step"], x["batch"]) for x in lines(tmp_path)[::8]] == failed


@pytest.mark.parametrize("stop_at, keep, kept", [pytest.param(5, 9, [2, 4, 6, 8], marks=pytest.mark.full), (6, 1, [8])])
def test_a_run_stopped_among_bad_steps_goes_back_as_one_that_was_not(
    easy_vqa, batches, poison, tmp_path, monkeypatch, capfd, stop_at, keep, kept
):
    """SIGTERM behind the second or the third of three bad steps: that state is saved, and set aside later."""
    calls = itertools.count(1)

    class StopAmongBadSteps(StopRequest):
        def reached(self):
            return super().reached() or next(calls) == stop_at

    config = settings(easy_vqa, checkpoint_every=2, in_a_row=3, keep_checkpoints=keep)
    expected = by_hand(config, batches, [0, 1, 2, 6, 7, 8, 9, 10])
    poison(3, 4, 5)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(train_lib, "StopRequest", StopAmongBadSteps)
        run(config, tmp_path)
    assert saved(tmp_path) == [2, stop_at] and noted(tmp_path, stop_at) == (stop_at, [])
    assert_same(run(config, tmp_path), expected)
    assert noted(tmp_path, 8) == (11, [3, 4, 5]) and saved(tmp_path) == kept
    err = capfd.readouterr().err
    assert f"checkpoints/{stop_at} is left out, it is kept as" in err
    assert f"{stop_at}.damaged: it was saved among bad steps" in err
    assert [(x["step"], x["batch"]) for x in lines(tmp_path)[::8]] == [(4, 3), (5, 4), (6, 5)]


def test_a_run_stopped_at_the_last_of_its_steps_and_of_a_row_is_not_finished(
    easy_vqa, batches, poison, tmp_path, monkeypatch
):
    calls = itertools.count(1)

    class StopAtTheEnd(StopRequest):
        def reached(self):
            return super().reached() or next(calls) == 4

    config = settings(easy_vqa, steps=4, checkpoint_every=2, in_a_row=2)
    expected = by_hand(config, batches, [0, 1, 4, 5])
    poison(2, 3)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(train_lib, "StopRequest", StopAtTheEnd)
        run(config, tmp_path)
    assert_same(run(config, tmp_path), expected)


def test_a_second_roll_back_to_a_checkpoint_does_not_draw_the_batches_of_the_first(easy_vqa, batches, poison, tmp_path):
    config = settings(easy_vqa, checkpoint_every=4, in_a_row=2)
    expected = by_hand(config, batches, [0, 3, 6, 7, 8, 9, 10, 11])
    poison(1, 2, 4, 5)
    assert_same(run(config, tmp_path), expected)
    assert noted(tmp_path, 4) == (8, [1, 2, 4, 5]) and noted(tmp_path, 8) == (12, [1, 2, 4, 5])
    assert [(x["step"], x["batch"]) for x in lines(tmp_path)[::8]] == [(2, 1), (3, 2), (3, 4), (4, 5)]


def test_a_run_without_a_checkpoint_goes_back_to_its_start(easy_vqa, batches, poison, tmp_path):
    config = settings(easy_vqa, steps=4, in_a_row=2)
    expected = by_hand(config, batches, [2, 3, 4, 5])
    poison(0, 1)
    assert_same(run(config, tmp_path), expected)
    assert noted(tmp_path, 4) == (6, [0, 1])


def test_after_enough_roll_backs_the_run_stops_with_a_report(easy_vqa, batches, poison, tmp_path):
    config = settings(easy_vqa, checkpoint_every=2, in_a_row=2, roll_backs=2)
    poison(*range(3, 14))
    report = (
        "2 bad steps in a row, 2 roll-backs to step 2 did not end them; 1. passing over batches 3-4 (the loss is nan); "
        "2. passing over batches 5-6 (the loss is nan); stopped before passing over batches 7-8 (the loss is nan). The "
        f"records of these batches are in {tmp_path / faults.FILE}: if they look right, lower the rates in groups or, "
        "for spikes, raise bad_steps.factor; the last checkpoint is of step 2"
    )
    with pytest.raises(FloatingPointError) as error:
        run(config, tmp_path)
    assert str(error.value) == report
    assert saved(tmp_path) == [2] and [x["batch"] for x in lines(tmp_path)[::8]] == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("mode", ["warn", "off"])
def test_a_state_that_is_not_finite_is_never_saved(easy_vqa, poison, tmp_path, mode):
    config = settings(easy_vqa, mode=mode, checkpoint_every=2, log_every=100, in_a_row=1)
    poison(2)
    words = (
        r"state at step 4, \S+ first, hold numbers that are not finite, and it is not saved.*; the last .* of step 2"
    )
    with pytest.raises(FloatingPointError, match=words):
        run(config, tmp_path)
    assert saved(tmp_path) == [2]
    told = [(x["step"], x["batch"]) for x in lines(tmp_path)[::8]] if (tmp_path / faults.FILE).exists() else []
    assert told == ([(3, 2)] if mode == "warn" else [])  # of a row, as many steps are listed as would end it


def test_a_run_of_before_goes_on_with_a_new_guard(easy_vqa, batches, poison, tmp_path):
    """Its checkpoint holds no guard and no list, its config.json no key bad_steps."""
    config = settings(easy_vqa, checkpoint_every=4)
    run(config, tmp_path)
    about = {"position": 4, "lineage": checkpoint.read_notes(tmp_path / "checkpoints/4")["lineage"]}
    shutil.rmtree(tmp_path / "checkpoints")
    four = by_hand(config, batches, [0, 1, 2, 3])
    stored = {
        "model": {"params": four.params, "batch_stats": four.batch_stats},
        "training": {"step": four.step, "opt_state": four.opt_state},
    }
    with ocp.training.Checkpointer((tmp_path / "checkpoints").absolute()) as before:
        before.save_checkpointables(4, jax.tree.map(jnp.asarray, stored), custom_metadata=about)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["config"]["bad_steps"]
    write_json(tmp_path / "config.json", written)

    expected = by_hand(config, batches, [0, 1, 2, 3, 4, 5, None, 7])
    poison(6)
    state = run(config, tmp_path)
    assert_same(state, expected)
    assert int(state.guard.skipped) == 1 and np.count_nonzero(state.guard.norms) == 3  # those of steps 5, 6 and 8


def outputs(in_a_row, why=guard.LOSS, loss=np.nan, norm=np.nan, median=2.0):
    return {"loss": loss, "grad_norm": norm, "verdict": guard.Verdict(why, median, 0, in_a_row)}


@pytest.mark.parametrize("now, goes_back_at", [(False, 6), (True, 4)])
def test_verdicts_are_read_two_steps_late_so_that_the_devices_never_wait(build, tmp_path, now, goes_back_at):
    read = faults.BadSteps(settings("", in_a_row=2).bad_steps, tmp_path, "small")
    read.begin(types.SimpleNamespace(step=0, guard=guard.begin()), 0, (), build)
    for step, in_a_row in enumerate([0, 1, 0, 1, 2, 3, 4, 5]):
        read.add(step, step, outputs(in_a_row))
        if read.too_many(now):
            break
    assert step == goes_back_at
    assert [(x["step"], x["batch"]) for x in lines(tmp_path)[::8]] == [(1, 1), (3, 3), (4, 4)]


@pytest.mark.parametrize(
    "found, words",
    [
        (outputs(1), "the loss is nan"),
        (outputs(1, guard.GRADIENT, 1.0, np.inf), "the norm of the gradient is inf"),
        (outputs(1, guard.STATISTICS, 1.0, 1.0), "its batch statistics are not finite"),
        (
            outputs(1, guard.SPIKE, 1.0, 123.456, 2.0),
            "the norm of the gradient, 123.5, is 61.7 times the median, 2",
        ),
    ],
)
def test_what_is_wrong_is_said_in_words(found, words):
    assert faults.describe(found) == words


def test_numbers_are_told_as_spans():
    assert faults.spans([]) == "" and faults.spans({7}) == "7"
    assert faults.spans({9, 4, 8, 7, 12, 13}) == "4, 7-9, 12-13"


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(mode="skip"), "bad_steps.mode='skip' must be on, warn or off"),
        (dict(factor=1.0), "bad_steps.factor=1.0 must be above 1, or 0 to look for no spikes"),
        (dict(factor=-3.0), "bad_steps.factor=-3.0 must be above 1"),
        (dict(in_a_row=0), "bad_steps.in_a_row=0 must be at least 1"),
        (dict(roll_backs=-1), "bad_steps.roll_backs=-1 must be at least 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        train(settings("/nowhere", **changes), tmp_path / "run", jax.devices()[:1])
