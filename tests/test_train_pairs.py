"""Runs of stage 0: they go on bit for bit, tell what they learn, and are parents of a VLM stage."""

import hashlib
import json
import os
import pathlib
import signal
import threading
import time

import jax
import numpy as np
import pytest
from command import fastvlm
from flax.traverse_util import flatten_dict, unflatten_dict
from small import small_config
from small_pairs import VISION, get_config, write_pairs

import fastvlm_jax
from fastvlm_jax import changes, checkpoint, model_io
from fastvlm_jax import config as config_lib
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.evaluate import towers
from fastvlm_jax.evaluate.benchmarks import clip_benchmark, known
from fastvlm_jax.metrics.rows import read_metrics
from fastvlm_jax.models import kinds
from fastvlm_jax.models.fold import fold_variables
from fastvlm_jax.train import Interrupted, train

# Metrics that depend on the clock and not on the run.
CLOCK = ("seconds", "step_seconds", "images/s", "tokens/s", "input_bound")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder)
    return folder


def run(config, workdir):
    config.mesh = (1, 1, 1, 1)
    return jax.tree.map(np.asarray, train(config, pathlib.Path(workdir), jax.devices()[:1]))


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    return workdir, run(get_config(data), workdir)


def rows(workdir):
    return [{key: x for key, x in row.items() if key not in CLOCK} for row in read_metrics(workdir)]


def test_a_stopped_run_goes_on_bit_for_bit(data, straight, tmp_path):
    """Parameters, statistics, slots, averages, and all rows of the metrics."""

    def stop_after_the_second_step():
        while not any(row["step"] == 2 for row in read_metrics(tmp_path / "run")):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_after_the_second_step, daemon=True).start()
    with pytest.raises(Interrupted):
        run(get_config(data), tmp_path / "run")
    (stopped_at,) = (int(path.name) for path in (tmp_path / "run/checkpoints").iterdir())
    assert 2 <= stopped_at < 6
    state = run(get_config(data), tmp_path / "run")
    assert jax.tree.structure(state) == jax.tree.structure(straight[1]) and state.average is not None
    jax.tree.map(np.testing.assert_array_equal, state, straight[1])
    assert rows(tmp_path / "run") == rows(straight[0])


def test_the_metrics_tell_what_stage_0_learns(straight):
    steps = [row for row in rows(straight[0]) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    for row in steps:
        assert 0 < row["loss"] < 8 and 1 <= row["logit_scale"] <= 100 and row["grad_norm"] > 0
        assert 0 <= row["top1_images"] <= 1 and 0 <= row["top1_texts"] <= 1 and 0 <= row["equal_captions"] <= 1
    assert steps[-1]["logit_scale"] != steps[0]["logit_scale"]
    assert [row["step"] for row in rows(straight[0]) if "validation/loss" in row] == [3, 6]


def test_it_is_evaluated_as_the_command_evaluates_it(monkeypatch, capsys, straight, data, tmp_path):
    """The scores of the averaged weights, also over eight devices, which the pictures do not fill."""
    workdir, _ = straight
    (row,) = [row for row in rows(workdir) if row["step"] == 6 and "evaluate/zero-shot" in row]
    command = ["evaluate", f"--model={workdir}", "--benchmark=zero-shot,retrieval", f"--data={data}", "--limit=30"]
    status, out, err = fastvlm(monkeypatch, capsys, *command, f"--output={tmp_path}", "--batch_size=3")
    assert status == 0 and "zero-shot classification" in out, err
    found = {
        name: json.loads((tmp_path / f"{name}-clip-benchmark.json").read_text()) for name in ("zero-shot", "retrieval")
    }
    assert row["evaluate/retrieval"] == pytest.approx(found["retrieval"]["score"])
    assert row["evaluate/retrieval_stderr"] == pytest.approx(found["retrieval"]["standard_error"])
    assert (found["retrieval"]["n"], found["zero-shot"]["n"]) == (60, 30)
    assert (tmp_path / "predictions.html").is_file()
    model, variables, processor = fastvlm_jax.load(workdir)
    source = read_shards(data, "validation")
    captions = [source[i].turns[1][1][0] for i in range(len(source))]
    images = model.apply(variables, processor.images([source[i].images[0] for i in range(40)]), method="embed_images")
    texts = model.apply(variables, processor.texts(sorted(captions)), method="embed_texts")
    best = np.asarray(images @ texts.T).argmax(axis=1)
    right = np.mean([sorted(captions)[k] == caption for k, caption in zip(best, captions, strict=True)])
    assert row["evaluate/zero-shot"] == pytest.approx(100 * right)
    lines = (tmp_path / "zero-shot-clip-benchmark.predictions.jsonl").read_text().splitlines()
    assert len(lines) == 30
    held = {hashlib.sha256(source[i].images[0]).hexdigest()[:16] for i in range(len(source))}
    assert {image["digest"] for line in lines for image in json.loads(line)["images"]} <= held


def test_a_model_that_answers_is_not_asked_for_embeddings(straight):
    model, _, processor = fastvlm_jax.load(straight[0])
    (zero_shot, retrieval), (qa, *_) = clip_benchmark.BENCHMARKS, known(["easy-vqa"])
    towers.check_kind(model, processor, retrieval)
    answering = kinds.build(**small_config(pathlib.Path()).model.to_dict())
    towers.check_kind(answering, None, qa)
    with pytest.raises(ValueError, match="zero-shot is for the two towers of stage 0, and this model has no text"):
        towers.check_kind(answering, None, zero_shot)
    with pytest.raises(ValueError, match="this model has no tokenizer, so it reads no texts"):
        towers.check_kind(model, None, zero_shot)


def test_a_run_is_a_model_with_the_averaged_weights(straight, data):
    workdir, state = straight
    model, variables, processor = fastvlm_jax.load(workdir)
    found = flatten_dict(variables["params"], sep="/")
    assert found.keys() == state.average["params"].keys()
    for path, x in found.items():
        np.testing.assert_array_equal(x, state.average["params"][path], err_msg=path)
    last = flatten_dict(state.params, sep="/")
    assert any(not np.array_equal(x, last[path]) for path, x in found.items())
    jax.tree.map(np.testing.assert_array_equal, variables["batch_stats"], state.average["batch_stats"])
    assert not np.array_equal(*(flatten_dict(x, sep="/")["vision/stem_0/conv/bn/mean"]
                                for x in (state.batch_stats, variables["batch_stats"])))  # fmt: skip
    assert processor.image_mean == (0.5, 0.4, 0.3) and processor.image_std == (0.3, 0.3, 0.2)
    assert "text" in variables["params"] and model.text_args["context_length"] == processor.context_length == 6


def test_the_next_stage_begins_with_the_averaged_encoder_folded_and_without_its_projection(straight, data, tmp_path):
    """Its encoder is frozen, so that what it begins with is what it ends with."""
    workdir, state = straight
    encoder = {key: value for key, value in VISION.items() if not key.startswith("head")}
    settings = {f"model__vision__{key}": value for key, value in encoder.items()}
    settings |= dict(model__vision__form="folded", model__vision__batch_norm="frozen", data__image_size=8)
    settings |= dict(model__vision__image_mean=(0.5, 0.4, 0.3), model__vision__image_std=(0.3, 0.3, 0.2))
    settings |= dict(model__llm__num_layers=1, data__groups=1, data__rows_per_group=1)
    config = small_config(data, steps=1, parent=f"vision={workdir}", **settings)
    config.groups = (("vision/.*", 0.0, 0.0), (".*", 1e-3, 0.0))
    after = run(config, tmp_path / "run")
    averages = unflatten_dict(state.average["params"], sep="/")
    given = {"params": {"vision": averages["vision"]}, "batch_stats": state.average["batch_stats"]}
    expected, found = fold_variables(given)["params"]["vision"], after.params["vision"]
    expected.pop("head")
    assert jax.tree.structure(found) == jax.tree.structure(expected) and "folded" in found["stem_0"]
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    lineage = json.loads((tmp_path / "run/config.json").read_text())["lineage"]
    parent = lineage["parent"]["parts"]["vision"]
    assert (parent["stage"], parent["step"]) == ("pairs", 6)
    processor = model_io.load(tmp_path / "run")[2]
    assert processor.image_mean == (0.5, 0.4, 0.3) and processor.image_std == (0.3, 0.3, 0.2)


@pytest.mark.parametrize(
    "command, words",
    [
        (["generate", "--model=RUN", "--prompt=hi"], "no language model or no tokenizer"),
        (
            ["evaluate", "--model=RUN", "--benchmark=qa", "--data=DATA", "--output=OUT"],
            "qa: the two towers of stage 0 answer n",
        ),
        (["bench", "ttft", "--model=RUN"], "this model has no language model, and a first token"),
        (["report", "RUN", "--model=RUN", "--data=DATA", "--output=OUT/r.html"], "so it answers nothing"),
        (["convert", "--source=RUN", "--target=OUT", "--layout=hf"], "the hf layout holds no CLIP: use --layout openc"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_commands_that_need_answers_refuse_its_model_in_a_line(
    monkeypatch, capsys, straight, data, tmp_path, command, words
):
    places = {"RUN": straight[0], "DATA": data, "OUT": tmp_path / "out"}
    for name, place in places.items():
        command = [word.replace(name, str(place)) for word in command]
    status, out, err = fastvlm(monkeypatch, capsys, *command)
    assert (status, out) == (1, "") and words in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


def test_settings_that_change_no_result_are_free_and_others_are_not(straight, data):
    def claimed(**settings):
        config = get_config(data)
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in settings.items()})
        run(config, straight[0])

    claimed(loss__block=8, loss__ring=True)
    for settings, words in (
        (dict(ema=0.5), "ema is 0.75 there and 0.5 here; no run can change ema"),
        (dict(optimizer="adamw"), "optimizer is 'adafactor' there and 'adamw' here; no run can change optimizer"),
        (dict(decayed=("kernel",)), "--allow_changes=decayed goes on"),
        (dict(warmup="transformers", final_rate=0.0), "--allow_changes=final_rate,warmup goes on"),
        (dict(loss__hard=0.5), "--allow_changes=loss.hard goes on"),
    ):
        with pytest.raises(ValueError, match=words):
            claimed(**settings)


def test_a_run_of_a_version_before_goes_on_without_questions(tmp_path):
    """Its config has none of the keys that have come since, with stage 0 and later."""
    settings = config_lib.plain(small_config(tmp_path))
    before = {key: x for key, x in settings.items() if key not in changes.ADDED}
    assert len(before) == len(settings) - 10
    assert not changes.compare({"config": before, "lineage": {}}, settings, {})
    other = changes.compare({"config": before, "lineage": {}}, settings | {"ema": 0.9, "warmup": "open_clip"}, {})
    assert [(change.key, change.before, change.fixed) for change in other] == [
        ("ema", 0.0, True), ("warmup", "transformers", False),
    ]  # fmt: skip


def test_the_last_checkpoint_holds_the_position_of_the_data(straight):
    assert checkpoint.read_notes(straight[0] / "checkpoints/6")["position"] == 6
