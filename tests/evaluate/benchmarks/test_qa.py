"""`fastvlm evaluate --benchmark qa`: scores of answers on shards, worked out by hand from the printed answers."""

import json
import math
import unicodedata

import jax
import pytest
from command import fastvlm
from small import small_config

from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.train import train


@pytest.fixture(scope="module")
def trained(easy_vqa, tmp_path_factory):
    """A workdir of one step, and a data set whose reference answers are partly those that this model gives."""
    folder = tmp_path_factory.mktemp("qa")
    small = dict(model__vision__layers=(1,), model__vision__embed_dims=(8,), model__vision__mixers=("repmixer",))
    config = small_config(easy_vqa, steps=1, mesh=(1, 1, 1, 1), model__llm__num_layers=1, data__image_size=8, **small)
    train(config, folder / "run", jax.devices()[:1])
    return folder / "run", read_shards(easy_vqa, "test")[0].images[0], folder


def record(key, image, *pairs):
    turns = [turn for q, a in pairs for turn in (("user", (q,)), ("assistant", (a,)))]
    return Record(key, (image,), (("user", (0, *turns[0][1])), *turns[1:]))


def test_scores_wrong_answers_and_what_was_left_out(monkeypatch, capsys, trained):
    run, image, folder = trained
    ask = ["--model=" + str(run), "--benchmark=qa", "--max_tokens=4", "--turns=separate"]
    write_shards(folder / "first", "test", [record("q", image, ("what color is the shape?", "?"))])
    data = [f"--data={folder / 'first'}", "--split=test", f"--output={folder / 'first.json'}"]
    status, _, _ = fastvlm(monkeypatch, capsys, "evaluate", *ask, *data)
    (wrong,) = json.loads((folder / "first.json").read_text())["wrong"]
    said = wrong.pop("answer")
    assert status == 0 and wrong == {"key": "q", "question": "what color is the shape?", "truth": "?"} and said

    question = "what color is the shape?"
    records = [
        record("same", image, (question, f"{said}\n")),
        record("louder", image, (question, f" {said.upper()} . ")),
        record("other", image, (question, "something else"), (question, said)),
        Record("cut", (image[:50],), (("user", (0, question)), ("assistant", (said,)))),
    ]
    write_shards(folder / "data", "validation", records)
    output = folder / "out.json"
    status, out, error = fastvlm(
        monkeypatch, capsys, "evaluate", *ask, f"--data={folder / 'data'}", f"--output={output}"
    )
    summary, whole = json.loads(out), json.loads(output.read_text())
    assert status == 0 and not error
    right = 3 if unicodedata.normalize("NFC", said.upper()).casefold() == said.casefold() else 2
    assert summary["questions"] == 4 and summary["accuracy"] == right / 4 and summary["accuracy_exact"] == 0.5
    assert summary["standard_error"] == math.sqrt(right / 4 * (1 - right / 4) / 4)
    assert (summary["split"], summary["turns"], summary["records_left_out"]) == ("validation", "separate", 1)
    assert summary["left_out_because"].startswith("1 x ") and "case folding" in summary["rule"]
    assert (
        whole.pop("wrong")
        == [{"key": "other", "question": question, "truth": "something else", "answer": said}] * (right == 3)
        and whole == summary
    )


@pytest.mark.parametrize(
    "flags, status, words",
    [
        (["--benchmark=qa", "--split=tset"], 1, "has no split 'tset': it has test, validation"),
        (["--benchmark=qa", "--split=test"], 1, "it holds no records; choose another --split"),
        (["--benchmark=qa", "--split=validation"], 1, "can be asked: 1 x images[0]: the image cannot be read"),
        (["--benchmark=qa", "--max_tokens=0"], 2, "max_tokens"),
        (["--benchmark=easy-vqa", "--split=test"], 2, "--split is for --benchmark=qa"),
        (["--benchmark=gqa"], 2, "gqa"),
    ],
)
def test_what_cannot_be_scored_is_one_line(flags, status, words, monkeypatch, capsys, trained, tmp_path):
    run, image, _ = trained
    write_shards(tmp_path, "test", [])
    write_shards(tmp_path, "validation", [record("cut", image[:50], ("what?", "it"))])
    found, out, error = fastvlm(monkeypatch, capsys, "evaluate", f"--model={run}", f"--data={tmp_path}", *flags)
    assert found == status and not out and words in error and error.count("\n") == 1, (found, error)
