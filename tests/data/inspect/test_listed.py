"""Checks that `data inspect --keys` shows the records that are named, as they lie in their batches."""

import json
import re

import pytest
from command import fastvlm
from loading import config, sharding, take
from paths import ROOT
from small import ask

from fastvlm_jax.data.inspect.listed import Listed, read_keys, take_listed
from fastvlm_jax.data.load.from_config import make_builder, make_loader
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.processor import Processor

WORDS = ("red", "green", "blue", "one", "two", "three")


@pytest.fixture
def data(tmp_path):
    records = [Record(f"r{i}", (), ask(("what is it", f"{WORDS[i // 6]} {WORDS[i % 6]}"), images=0)) for i in range(36)]
    write_shards(tmp_path / "data", "train", records)
    return tmp_path / "data"


def settings(data):
    return config(data, images_per_group=0, groups=2, rows_per_group=1, row_length=64)


def answers(sample):
    return [
        "".join(piece.text for piece in text.pieces if piece.learnt and piece.kind == "text") for text in sample.texts
    ]


def test_records_are_shown_as_the_loader_gives_them_out(data, tokenizer):
    """Found by key alone or by batch and group, in an epoch behind the first too."""
    processor = Processor(tokenizer, "chatml", 16, 2)
    loader = make_loader(settings(data), processor, "train", seed=3, sharding=sharding(1))
    per_epoch = loader.batches_per_epoch
    batches = take(loader, per_epoch + 2)
    build = make_builder(settings(data), processor, "train", 3)
    (first,) = take_listed(build, [Listed("r17")], 9)
    assert answers(first) == [f"{WORDS[2]} {WORDS[5]}\n"] and first.key == "r17"
    for k in (0, per_epoch + 1):
        plan = build.schedule.batch(k)
        (place, *_) = build.schedule.group(plan, 1)
        (sample,) = take_listed(build, [Listed(f"r{place.record}", k, 1)], 9)
        i = place.record
        assert answers(sample) == [f"{WORDS[i // 6]} {WORDS[i % 6]}\n"]
        (text,) = sample.texts
        ids = [token for piece in text.pieces for token in piece.tokens]
        assert ids == batches[k].tokens[1, text.row, text.start : text.stop].tolist()
    everything = [sample.key for sample in take_listed(build, [Listed(f"r{i}") for i in range(36)], 99)]
    assert sorted(everything) == sorted(f"r{i}" for i in range(36))
    assert len(list(take_listed(build, [Listed("r3"), Listed("r4"), Listed("r5")], 2))) == 2


def test_a_list_is_keys_or_a_file_of_json_lines(tmp_path):
    assert read_keys("a, b,a") == (Listed("a"), Listed("b"))
    (tmp_path / "bad_steps.jsonl").write_text(
        '{"step": 3, "batch": 7, "group": 1, "key": "x", "why": "the loss is nan"}\n\n{"key": "y", "kind": "file"}\n'
        '{"step": 9, "batch": 7, "group": 1, "key": "x"}\n'
    )
    assert read_keys(f"@{tmp_path}/bad_steps.jsonl") == (Listed("x", 7, 1), Listed("y"))


@pytest.mark.parametrize(
    "text, words",
    [
        (" , ", "names no record"),
        ("@/nowhere", "there is no file /nowhere"),
        ('{"batch": 3}', 'line 1 has no "key" of a record'),
        ('{"key": "a", "batch": -1, "group": 0}', 'a wrong "batch"'),
        ('{"key": "a", "batch": true, "group": 0}', 'a wrong "batch"'),
        ('{"key": "a", "batch": 3}', 'a wrong "batch" or "group"'),
        ("[]", "line 1 holds no object"),
        ("{", "line 1: it is not JSON"),
        ('{"key": "r1", "batch": 9' + "9" * 15 + ', "group": 0}', "have no batch 99"),
        ('{"key": "r1", "batch": 0, "group": 2}', "have no batch 0 with a group 2: name the config of the run"),
        ('{"key": "r99", "batch": 0, "group": 1}', "batch 0, group 1 does not hold record 'r99': name the config"),
        ('{"key": "r99"}', "the data have no record 'r99', or the config cannot use it"),
    ],
)
def test_a_list_that_does_not_fit_is_refused_in_a_line(data, tokenizer, tmp_path, text, words):
    if text[0] in "{[":
        (tmp_path / "list.jsonl").write_text(text + "\n")
        text = f"@{tmp_path}/list.jsonl"
    build = make_builder(settings(data), Processor(tokenizer, "chatml", 16, 2), "train", 3)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(words)):
        list(take_listed(build, read_keys(text), 9))


def test_the_command_writes_a_page_of_them(data, tokenizer, tmp_path, monkeypatch, capsys):
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"key": f"r{i}"}) + "\n" for i in range(20)))
    command = ["data", "inspect", "--data", data]
    run = ["--config", f"{ROOT}/configs/quickstart.py:stage2_instruct", f"--config.data.tokenizer={tokenizer.files[0]}"]
    page = tmp_path / "page.html"
    keys = f"--keys=@{tmp_path}/list.jsonl"
    status, out, err = fastvlm(monkeypatch, capsys, *command, *run, keys, "--output", page)
    assert (status, err) == (0, "") and f"listed records as the model sees them: {page}" in out
    assert len(re.findall(r"<header><b>r\d+</b>", page.read_text())) == 20
    for argv in ([*command, keys], [*command, *run, keys], [*command, "--keys=r1", "--output", page]):
        status, out, err = fastvlm(monkeypatch, capsys, *argv)
        assert (status, out) == (2, "") and "--keys shows records as a run sees them: give its --config" in err
