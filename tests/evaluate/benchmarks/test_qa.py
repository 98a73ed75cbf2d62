"""`fastvlm evaluate --benchmark qa`: scores of answers on shards, worked out by hand from the printed answers."""

import json
import unicodedata

import jax
import pytest
from command import fastvlm
from small import ONE_STAGE, small_config

from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.train import train


@pytest.fixture(scope="module")
def trained(easy_vqa, tmp_path_factory):
    """A workdir of one step, and a data set whose reference answers are partly those that this model gives."""
    folder = tmp_path_factory.mktemp("qa")
    config = small_config(easy_vqa, steps=1, mesh=(1, 1, 1, 1), model__llm__num_layers=1, **ONE_STAGE)
    train(config, folder / "run", jax.devices()[:1])
    return folder / "run", read_shards(easy_vqa, "test")[0].images[0], folder


def record(key, image, *pairs):
    turns = [turn for q, a in pairs for turn in (("user", (q,)), ("assistant", (a,)))]
    return Record(key, (image,), (("user", (0, *turns[0][1])), *turns[1:]))


def asked(monkeypatch, capsys, folder, *flags):
    """Runs the command, and returns its summary, its predictions and what it said."""
    status, _, error = fastvlm(monkeypatch, capsys, "evaluate", "--benchmark=qa", f"--output={folder}", *flags)
    assert status == 0, error
    lines = (folder / "qa-own.predictions.jsonl").read_text().splitlines()
    return json.loads((folder / "qa-own.json").read_text()), [json.loads(line) for line in lines], error


def test_scores_wrong_answers_and_what_was_left_out(monkeypatch, capsys, trained):
    run, image, folder = trained
    ask = ["--model=" + str(run), "--max_tokens=4", "--turns=separate"]
    write_shards(folder / "first", "test", [record("q", image, ("what color is the shape?", "?"))])
    first = [f"--data={folder / 'first'}", "--split=test"]
    _, (wrong,), _ = asked(monkeypatch, capsys, folder / "first-scores", *ask, *first)
    said = wrong["answer"]
    assert (wrong["id"], wrong["prompt"], wrong["references"]) == ("q", "<image>what color is the shape?", ["?"])
    assert said and wrong["score"] == 0

    question = "what color is the shape?"
    records = [
        record("same", image, (question, f"{said}\n")),
        record("louder", image, (question, f" {said.upper()} . ")),
        record("other", image, (question, "something else than so few tokens"), (question, said)),
        Record("cut", (image[:50],), (("user", (0, question)), ("assistant", (said,)))),
    ]
    write_shards(folder / "data", "validation", records)
    summary, lines, error = asked(monkeypatch, capsys, folder / "scores", *ask, f"--data={folder / 'data'}")
    right = 3 if unicodedata.normalize("NFC", said.upper()).casefold() == said.casefold() else 2
    assert (summary["questions"], summary["score"], summary["figures"]["accuracy_exact"]) == (4, 25 * right, 0.5)
    assert (summary["figures"]["split"], summary["figures"]["turns"]) == ("validation", "separate")
    assert summary["left_out"]["questions"] == 1 and "case folding" in summary["protocol"]["rule"]
    assert [line["id"] for line in lines if line["score"] == 0 and line["id"] != "louder"] == ["other/0"]
    assert "qa-own: 1 rows are left out: 1 x record 3 image 0: the image cannot be read" in error
    assert " of 4 references are longer than 4 tokens and cannot be matched: raise --max_tokens" in error


@pytest.mark.parametrize(
    "flags, status, words",
    [
        (["--benchmark=qa", "--split=tset"], 1, "has no split 'tset': it has test, validation"),
        (["--benchmark=qa", "--split=test"], 1, "it holds no records; choose another --split"),
        (
            ["--benchmark=qa", "--split=validation"],
            1,
            "qa: none of 1 questions can be asked: 1 x record 0 image 0: the image cannot be read",
        ),
        (["--benchmark=qa", "--max_tokens=0"], 2, "max_tokens"),
        (["--benchmark=easy-vqa", "--split=test"], 2, "--split is for --benchmark=qa"),
        (["--benchmark=aqa"], 1, "there is no benchmark 'aqa' (did you mean qa?)"),
    ],
)
def test_what_cannot_be_scored_is_one_line(flags, status, words, monkeypatch, capsys, trained, tmp_path):
    run, image, _ = trained
    write_shards(tmp_path, "test", [])
    write_shards(tmp_path, "validation", [record("cut", image[:50], ("what?", "it"))])
    given = [f"--model={run}", f"--data={tmp_path}", f"--output={tmp_path / 'scores'}", *flags]
    found, out, error = fastvlm(monkeypatch, capsys, "evaluate", *given)
    assert found == status and not out and words in error and error.count("\n") == 1, (found, error)
