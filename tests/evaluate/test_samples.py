"""Sample answers of a real run, which also decays its rates by layer, keeps a moving average and takes Lion's steps."""

import io
import pathlib
import shutil
from typing import NamedTuple

import jax
import numpy as np
import PIL.Image
import pytest
from small import ONE_STAGE, ask, small_config
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from fastvlm_jax import config_checks, stage
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.evaluate.samples import sample_rows
from fastvlm_jax.metrics.rows import read_metrics, read_rows
from fastvlm_jax.models import kinds
from fastvlm_jax.report.runs import write_report
from fastvlm_jax.train import train
from fastvlm_jax.train_state import TrainState

PAIRS = (("what?", "red"), ("is it?", "yes"))
SETTINGS = dict(steps=6, checkpoint_every=3, keep_checkpoints=5, mesh=(1, 1, 1, 1), data__groups=4, **ONE_STAGE)
SETTINGS |= dict(predictions_every=4, num_predictions=2, ema=0.5, optimizer="lion", beta2=0.99)
SETTINGS |= dict(layer_decay__llm=0.5, layer_decay__vision=0.25)
SETTINGS |= dict(groups=(("vision/.*", 1e-3, 0.1), (".*", 2e-2, 0.1)), warmup_ratio=0.0, final_rate=1.0)


def about(number, pairs=PAIRS):
    """Returns questions about picture `number`, a colour of its own."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (16, 16), (20 * number, 90, 20)).save(file, "PNG")
    return Record(str(number), (file.getvalue(),), ask(*pairs))


class Asked(NamedTuple):
    """A run that asked sample questions: its config's data and tokenizer, its workdir, its last state."""

    data: pathlib.Path
    workdir: pathlib.Path
    state: TrainState


def run(data, tokenizer, workdir, **changes):
    config = small_config(data, data__tokenizer=str(tokenizer.files[0]), **{**SETTINGS, **changes})
    return jax.tree.map(np.asarray, train(config, workdir, jax.devices()[:1]))


@pytest.fixture(scope="module")
def asked(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    write_shards(folder / "data", "train", [about(i) for i in range(4)])
    write_shards(folder / "data", "validation", [about(i) for i in range(6)])
    return Asked(folder / "data", folder / "run", run(folder / "data", tokenizer, folder / "run"))


def predictions(workdir):
    return read_rows(workdir / "predictions.jsonl")


def test_the_same_questions_are_answered_at_every_interval_and_at_the_end(asked):
    rows = predictions(asked.workdir)
    # Of six records the first and the fourth; of the second one that is asked, its sixth question of two.
    expected = [("0/0", "what?", ["red"]), ("3/1", "is it?", ["yes"])]
    assert [(row["step"], row["id"], row["question"], row["references"]) for row in rows] == [
        (step, *question) for step in (4, 6) for question in expected
    ]
    for row, number in zip(rows, (0, 3, 0, 3), strict=True):
        (image,) = row["images"]
        pixels = np.asarray(PIL.Image.open(asked.workdir / image), int)
        assert pixels.shape == (16, 16, 3) and abs(pixels[8, 8] - (20 * number, 90, 20)).max() < 4
        assert row["score"] == float(row["answer"] == row["references"][0])


def test_tensorboard_has_the_answers_of_every_time_and_the_images_once(asked):
    (path,) = (asked.workdir / "tensorboard").iterdir()
    values = []
    for event in LegacyEventFileLoader(str(path)).Load():
        values += [(event.step, value) for value in event.summary.value if value.tag.startswith("predictions/")]
    texts = {(step, v.tag): v.tensor.string_val[0].decode() for step, v in values if v.tensor.string_val}
    tags = [f"predictions/{number}" for number in (1, 2)]
    assert list(texts) == [(step, tag) for step in (4, 6) for tag in tags]
    for row, (step, tag) in zip(predictions(asked.workdir), texts, strict=True):
        answer = f"    {row['answer'] or ' '}".replace("\n", "\n    ")
        truth = row["references"][0]
        assert row["step"] == step
        assert texts[step, tag] == f"question\n\n    {row['question']}\n\nanswer\n\n{answer}\n\ntruth\n\n    {truth}"
    images = [
        (step, v.tag, PIL.Image.open(io.BytesIO(v.image.encoded_image_string))) for step, v in values if v.image.width
    ]
    assert [image[:2] for image in images] == [(4, f"predictions/{number}/image_1") for number in (1, 2)]
    assert all(image.size == (16, 16) and image.format == "JPEG" for *_, image in images)


def test_a_killed_run_goes_on_bit_for_bit_and_asks_again(asked, tokenizer, tmp_path):
    """Its last checkpoint was lost, and the answers behind the one before it are written once."""
    shutil.copytree(asked.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    state = run(asked.data, tokenizer, tmp_path / "run")
    assert state.average is not None
    jax.tree.map(np.testing.assert_array_equal, state, asked.state)
    assert predictions(tmp_path / "run") == predictions(asked.workdir)


def test_every_rate_is_in_the_log(asked):
    """A stage of one block makes L = 2, two layers of the language model make L = 3."""
    (rates,) = {tuple((key, row[key]) for key in row if key.startswith("lr")) for row in read_metrics(asked.workdir)}
    assert dict(rates) == pytest.approx(
        {"lr": 2e-2, "lr/vision": 1e-3, "lr_lowest/vision": 1e-3 / 16, "lr/rest": 2e-2, "lr_lowest/rest": 2e-2 / 8}
    )


def test_a_state_has_the_same_arrays_with_and_without_decay(asked, tokenizer):
    """So that a run may change it, by --allow_changes."""
    names = []
    for decay in (0.5, 1.0):
        config = small_config(asked.data, **SETTINGS | dict(layer_decay__llm=decay, layer_decay__vision=decay))
        mesh = stage.make_mesh(config, jax.devices()[:1])
        abstract = stage.make_step(config, kinds.build(**config.model.to_dict()), mesh, steps=6).abstract
        names.append([jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract)])
    assert names[0] == names[1]


def test_the_page_of_runs_has_a_sheet_of_answers(asked, tmp_path):
    written = write_report([asked.workdir], tmp_path / "page.html")
    assert tmp_path / "page_answers.png" in written
    assert "Answers of small to its sample questions" in (tmp_path / "page.html").read_text()
    with PIL.Image.open(tmp_path / "page_answers.png") as sheet:
        assert sheet.size == (1200, 280)


def test_samples_lie_evenly_over_sources_and_their_records(tmp_path):
    two, five = ("one?", "1"), ("two?", "2")
    write_shards(tmp_path / "a", "validation", [about(i, (two, five)) for i in range(10)])
    write_shards(tmp_path / "b", "validation", [about(i) for i in range(2)])
    sources = [read_shards(tmp_path / name, "validation") for name in "ab"]
    rows = sample_rows(sources, "separate", 7)
    assert [row.id for row in rows] == ["a/0/0", "a/2/1", "a/5/0", "a/7/1", "b/0/0", "b/1/1"]
    names = [picture.name for row in rows for picture in row.pictures]
    assert len(set(names)) == 6
    assert rows[3].pictures[0].read() == about(7).images[0] and rows[5].pictures[0].read() == about(1).images[0]
    assert [row.id for row in sample_rows(sources[:1], "conversation", 1)] == ["0/0"]


def test_a_run_without_a_held_out_split_or_askable_questions_is_refused_before_it_begins(asked, tokenizer, tmp_path):
    write_shards(tmp_path / "none", "train", [about(0)])
    words = r"^predictions_every=4 asks the held-out split, and no data set has records in a split 'validation'; `fast"
    with pytest.raises(ValueError, match=words):
        run(tmp_path / "none", tokenizer, tmp_path / "run")
    write_shards(tmp_path / "cut", "train", [about(0)])
    write_shards(tmp_path / "cut", "validation", [Record("cut", (about(0).images[0][:50],), about(0).turns)])
    with pytest.raises(ValueError, match=r"^predictions_every=4: none of 1 questions can be asked \(1 x "):
        run(tmp_path / "cut", tokenizer, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config_checks.validate(small_config(asked.data, **SETTINGS))
