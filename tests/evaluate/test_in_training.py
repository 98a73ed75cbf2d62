"""Scores and the best checkpoint of real runs: a tiny model learns to answer "red", and the held-out answers differ."""

import contextlib
import io
import json
import math
import pathlib
import re
import shutil
from typing import NamedTuple

import jax
import numpy as np
import PIL.Image
import pytest
from published_files import parquet
from small import ONE_STAGE, small_config

from fastvlm_jax import checkpoint, model_io, sharding
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.evaluate import validation
from fastvlm_jax.evaluate.benchmarks import qa
from fastvlm_jax.evaluate.questions import Prepared, Question
from fastvlm_jax.losses import next_token
from fastvlm_jax.metrics.best import BestScore, best_step, better, find_best
from fastvlm_jax.metrics.rows import read_metrics
from fastvlm_jax.stage import make_step, open_stage
from fastvlm_jax.train import train
from fastvlm_jax.train_state import TrainState


def about(number, answer="red"):
    """Returns the question about picture `number`, a colour of its own."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (16, 16), (40 * number, 90, 20)).save(file, "PNG")
    return Record(str(number), (file.getvalue(),), (("user", (0, "what?")), ("assistant", (answer,))))


DEVICES = 4
# Of four questions one is answered right. Their loss falls while the model learns to answer, and rises when it knows.
HELD_OUT = [about(i, answer) for i, answer in enumerate(("red", "blue", "blue", "green"))]
RUN = dict(steps=16, eval_every=2, eval_batches=1, checkpoint_every=7, keep_checkpoints=1)
RUN |= dict(
    keep_best="validation/loss",
    stop_after=2,
    mesh=(1, 2, 2, 1),
    data__groups=4,
    groups=((".*", 2e-2, 0.0),),
)


class Ended(NamedTuple):
    """A run that ended early: its data, its workdir, its last state, what it said, and its best step."""

    data: pathlib.Path
    workdir: pathlib.Path
    state: TrainState
    said: str
    best: int


def run(config, workdir):
    return jax.tree.map(np.asarray, train(config, workdir, jax.devices()[:DEVICES]))


def settings(data, tokenizer, **changes):
    return small_config(
        data, data__tokenizer=str(tokenizer), **{**ONE_STAGE, **RUN, "evaluate": (("qa", "", 0),), **changes}
    )


@pytest.fixture(scope="module")
def tokenizer_file(tokenizer):
    return tokenizer.files[0]


@pytest.fixture(scope="module")
def ended(tokenizer_file, tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("in_training"), io.StringIO()
    write_shards(folder / "data", "train", [about(i) for i in range(4)])
    write_shards(folder / "data", "validation", HELD_OUT)
    with contextlib.redirect_stderr(said):
        state = run(settings(folder / "data", tokenizer_file), folder / "run")
    losses = dict(scores(folder / "run", "validation/loss"))
    return Ended(folder / "data", folder / "run", state, said.getvalue(), min(losses, key=losses.get))


def scores(workdir, name):
    return [(row["step"], row[name]) for row in read_metrics(workdir) if name in row]


def saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_scores_are_percent_with_their_standard_error_beside_the_loss(ended):
    last = int(ended.state.step)
    assert scores(ended.workdir, "evaluate/qa")[-1] == (last, 25.0)
    # sqrt(0.25 * 0.75 / (4 - 1)) = 0.25
    assert scores(ended.workdir, "evaluate/qa_stderr")[-1] == (last, pytest.approx(25.0))
    rows = [row for row in read_metrics(ended.workdir) if "evaluate/qa" in row]
    assert [row["step"] for row in rows] == list(range(2, last + 1, 2)) and all(
        "validation/loss" in row for row in rows
    )


def test_the_best_checkpoint_stays_beside_the_latest_and_can_be_named(ended):
    best, last = ended.best, ended.best + 4
    # At neither step was a checkpoint due.
    assert best > 2 and best % RUN["checkpoint_every"] and last % RUN["checkpoint_every"]
    assert saved(ended.workdir) == [best, last]
    assert find_best(ended.workdir) == ended.workdir / "checkpoints" / str(best)
    for source, step in ((ended.workdir, last), (f"{ended.workdir}@best", best)):
        assert model_io.read(source).lineage["step"] == step
    stored = model_io.read(ended.workdir).variables["params"]
    np.testing.assert_array_equal(stored["llm"]["embedding"][:], ended.state.params["llm"]["embedding"])


def test_a_run_that_gets_no_better_ends_and_the_same_command_trains_no_further(ended, tokenizer_file, capsys):
    value = dict(scores(ended.workdir, "validation/loss"))[ended.best]
    assert int(ended.state.step) == ended.best + 4 < 16
    line = (
        f"small: ended at step {ended.best + 4} of 16: in 2 evaluations validation/loss was not better than "
        f"{value:.4g}, that of step {ended.best}; --config.stop_after=0 goes on\n"
    )
    assert ended.said.endswith(line)
    before = (ended.workdir / "metrics.jsonl").read_text()
    jax.tree.map(np.testing.assert_array_equal, run(settings(ended.data, tokenizer_file), ended.workdir), ended.state)
    assert capsys.readouterr().err.endswith(line)
    assert (ended.workdir / "metrics.jsonl").read_text() == before


def test_a_killed_run_knows_its_best_and_ends_at_the_same_step_bit_for_bit(ended, tokenizer_file, tmp_path):
    """It was killed while its last checkpoint was written: the metrics know steps behind the one it goes on from."""
    shutil.copytree(ended.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(ended.best + 4))
    jax.tree.map(
        np.testing.assert_array_equal, run(settings(ended.data, tokenizer_file), tmp_path / "run"), ended.state
    )
    for name in ("loss", "validation/loss", "evaluate/qa"):
        assert scores(tmp_path / "run", name) == scores(ended.workdir, name)
    assert saved(tmp_path / "run") == [ended.best, ended.best + 4]


def list_of_questions(folder, *answers):
    """Writes a list of questions about pictures, beside them, as `fastvlm evaluate --benchmark qa` reads it."""
    for i in range(len(answers)):
        (folder / f"{i}.png").write_bytes(about(i).images[0])
    rows = [{"image": f"{i}.png", "question": "what?", "answer": answer} for i, answer in enumerate(answers)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_is_evaluated_without_a_second_copy_of_its_parameters(ended, tokenizer_file, tmp_path, monkeypatch):
    """The arrays on all devices while it answers are those before it and, at most, what a batch leaves."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_ELEMENTS", 64)
    list_of_questions(tmp_path, "red", "green", "red", "blue")
    own = (("qa", str(tmp_path), 0),)
    config = settings(ended.data, tokenizer_file, eval_batches=0, keep_best="", stop_after=0, evaluate=own)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:DEVICES])
    stage = open_stage(config)

    def size(arrays):
        shapes = [(x.sharding.shard_shape(x.shape), len(x.sharding.device_set), x.dtype.itemsize) for x in arrays]
        return sum(math.prod(shape) * devices * itemsize for shape, devices, itemsize in shapes)

    with jax.set_mesh(mesh):
        checkpointer = checkpoint.open_checkpointer(ended.workdir, checkpoint.Retention(1))
        state, *_ = checkpoint.restore(checkpointer, make_step(config, stage.model, mesh, steps=16).abstract)
        evaluate = validation.make_evaluation(
            config, stage.model, next_token(stage.model), stage.processor, sharding.batch_sharding(mesh)
        )
        params, before, seen = jax.tree.leaves(state.params), size(jax.live_arrays()), []
        found = evaluate(state, lambda: bool(seen.append(size(jax.live_arrays()))))
        assert evaluate(state, lambda: True) is None  # it is left behind the batch at which the run is to stop
    # Two of four are "red": 0.5, and sqrt(0.5 * 0.5 / (4 - 1))
    assert found == {"evaluate/qa": 50.0, "evaluate/qa_stderr": pytest.approx(28.8675, abs=1e-4)}
    assert seen and max(seen) - before < size(params) / 2
    assert any(not x.is_fully_replicated for x in params)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(evaluate=(("docqa", "/x", 9),)), r"^evaluate: there is no benchmark 'docqa' \(did you mean docvqa\?\)"),
        (dict(evaluate=(("easy-vqa", "/nowhere", 9),)), r"^evaluate, easy-vqa of /nowhere: there is no dataset folder"),
        (dict(evaluate=(("qa", "DAMAGED", 9),)), r"^evaluate, qa of \S+: none of its questions can be asked \(1 x "),
        (dict(evaluate=(("qa", "NONE", 9),)), r"^evaluate, qa of \S+: .*no split 'validation'"),
        (dict(evaluate=(("docvqa", "DOCUMENTS", 1),)), r"^evaluate, docvqa of \S+: \S+parquet row 0 image: the image"),
        (dict(evaluate=(("docvqa-test", "DOCUMENTS", 0),)), r"^evaluate, docvqa-test of \S+: it has no public answers"),
        (dict(data__path="NONE", evaluate=()), r"^keep_best='validation/loss': no data set has records in a split"),
    ],
    ids=["unknown", "missing", "damaged", "no split", "damaged image", "no answers", "no validation loss"],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_an_error_before_anything_is_written(
    ended, tokenizer_file, tmp_path, changes, words
):
    write_shards(tmp_path / "NONE", "train", HELD_OUT)
    write_shards(tmp_path / "DAMAGED", "validation", [Record("cut", (HELD_OUT[0].images[0][:50],), HELD_OUT[0].turns)])
    row = {"questionId": "1", "question": "what?", "question_types": ["form"], "docId": 1, "answers": ["red"]}
    row |= {"image": HELD_OUT[0].images[0][:50]}
    parquet(tmp_path / "DOCUMENTS" / "DocVQA" / "validation-00000-of-00001.parquet", [row])
    row |= {"answers": None, "image": HELD_OUT[0].images[0]}
    parquet(tmp_path / "DOCUMENTS" / "DocVQA" / "test-00000-of-00001.parquet", [row])
    changes = json.loads(re.sub("(NONE|DAMAGED|DOCUMENTS)", rf"{tmp_path}/\1", json.dumps(changes)))
    with pytest.raises(ValueError, match=words):
        run(settings(ended.data, tokenizer_file, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "longest, changes, rows",
    [
        # Tokens that a data shard trains on at once / (the longest prompt and 128 tokens of its answer)
        (172, dict(data__groups=8, data__rows_per_group=2, data__row_length=2048), 8 * 2 * 2048 // 300),
        (172, dict(data__groups=8, data__rows_per_group=2, data__row_length=2048, accumulate=4), 2 * 2 * 2048 // 300),
        (172, dict(data__groups=1, data__row_length=80), 1),
        (172, dict(data__groups=999, data__row_length=9999), 192),  # as `fastvlm evaluate` asks at most
        # 4 GiB in float32 hold 18 prompts padded to 192 tokens, each with 64 keys and values, 301,664 activations
        # (4 x 32 of the width, 3 x 100,000 of the MLP, 2 x 4 x 192 scores) and the logits of one token
        (
            172,
            dict(data__groups=999, data__row_length=9999, model__llm__vocab_size=151936, model__llm__mlp_dim=100_000),
            2**32 // (4 * (192 * (64 + 301_664) + 151_936)),
        ),
    ],
)
def test_a_batch_of_questions_fits_where_a_part_of_a_training_batch_does(longest, changes, rows):
    question = Question(None, (), (), longest, None, ())
    entry = validation.Entry(None, qa.benchmark().protocols[0], Prepared([question], []))
    config = small_config("/data", data__rows_per_group=1)
    with config.unlocked():
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    assert validation.most_rows(entry, config) == rows


def test_better_is_lower_for_a_loss_and_higher_for_a_score_and_never_nan():
    nan = float("nan")
    assert better("validation/loss", 1.0, 2.0) and not better("validation/loss", 2.0, 1.0)
    assert better("evaluate/docvqa", 2.0, 1.0) and not better("evaluate/docvqa", 1.0, 2.0)
    for name in ("validation/loss", "evaluate/docvqa"):
        assert not better(name, 1.0, 1.0) and not better(name, nan, 1.0) and not better(name, nan, nan)
        assert better(name, 1.0, nan)


@pytest.mark.parametrize(
    "values, stored, expected",
    [
        # (step, score) of a run that keeps the highest; its checkpoints; (best step, evaluations since, ends)
        ([(2, 61.0), (4, 71.2), (6, 70.0)], [4, 6], (4, 1, False)),
        ([(2, 61.0), (4, 71.2), (6, 70.0), (8, 71.2)], [4, 8], (4, 2, True)),  # the first of two that are equal
        ([(2, 61.0), (4, 71.2), (6, 70.0)], [6], (6, 0, False)),  # a score whose checkpoint was not kept
        ([(2, 61.0), (4, 71.2)], [2], (2, 1, False)),  # killed before the better state was written
        ([(2, float("nan")), (4, float("nan"))], [2, 4], (None, 2, True)),
        ([], [4], (None, 0, False)),
    ],
)  # fmt: skip
def test_a_resumed_run_knows_the_best_of_its_checkpoints(tmp_path, values, stored, expected):
    rows = [{"step": step, "seconds": 1.0, "evaluate/docvqa": value} for step, value in values]
    later = [{"step": 10, "seconds": 2.0, "evaluate/docvqa": 99.0}]  # behind the checkpoint it goes on from
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + later))
    best = BestScore("evaluate/docvqa", stop_after=2)
    best.resume(tmp_path, 8, stored)
    assert (best.step, best.since, best.ends) == expected
    assert ("was not a number" in best.describe()) == (best.step is None)
    assert best_step("evaluate/docvqa", rows, stored) == expected[0]


def test_a_run_without_a_best_checkpoint_is_told(ended, tokenizer_file, tmp_path):
    shutil.copytree(ended.workdir, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    for value, words in (
        ("", "its config has no keep_best"),
        ("evaluate/docvqa", "no checkpoint has evaluate/docvqa yet"),
    ):
        config["config"]["keep_best"] = value
        (tmp_path / "run" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"run@best: .*{words}"):
            model_io.read(f"{tmp_path / 'run'}@best")
    with pytest.raises(FileNotFoundError, match="nowhere@best: there is no training workdir"):
        model_io.read(f"{tmp_path / 'nowhere'}@best")
