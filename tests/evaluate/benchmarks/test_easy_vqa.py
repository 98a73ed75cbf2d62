"""easy-VQA: rows of hand-written shards, the baseline, and what is wrong in one line."""

import pytest
from etils import epath
from published_files import png

from fastvlm_jax.data.record import Record
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.evaluate.benchmark import Result
from fastvlm_jax.evaluate.benchmarks import BENCHMARKS
from fastvlm_jax.evaluate.records import own_prompt

BENCHMARK, RED = BENCHMARKS["easy-vqa"], png("red")


def record(key, *pairs):
    turns = [turn for question, answer in pairs for turn in (("user", (question,)), ("assistant", (answer,)))]
    return Record(key, (RED,), (("user", (0, *turns[0][1])), *turns[1:]))


COLOUR, ROUND = "what colour?", "is it round?"


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path, "train", [record("1", (COLOUR, "red"), (ROUND, "no")), record("2", (COLOUR, "blue"))])
    write_shards(tmp_path, "validation", [record("3", (COLOUR, "blue"), (ROUND, "no"))])
    write_shards(tmp_path, "test", [record("4", (COLOUR, "blue"), (ROUND, "yes"), ("how big?", "3"))])
    return epath.Path(tmp_path)


def test_rows_and_the_most_frequent_answer_to_each_question_in_training(folder):
    rows = BENCHMARK.read(folder)
    assert [(row.id, row.references, row.groups["kind"], row.fields["common"]) for row in rows] == [
        ("4/0", ("blue",), "open", "blue"),
        ("4/1", ("yes",), "yes/no", "no"),
        ("4/2", ("3",), "open", ""),
    ]
    assert [own_prompt(row) for row in rows] == [(("user", (0, question)),) for question in (COLOUR, ROUND, "how big?")]
    own = BENCHMARK.protocol()
    results = [
        Result(row, "", text, own.score(text, row)) for row, text in zip(rows, ["Blue.", "no", "3"], strict=True)
    ]
    assert [result.mark.score for result in results] == [1, 0, 1]
    assert own.figures(results) == {"baseline_accuracy": 1 / 3} and own.max_tokens == 16


def test_a_split_that_is_missing_or_wrong_is_named(folder):
    with pytest.raises(FileNotFoundError, match="there is no dataset folder"):
        BENCHMARK.read(folder / "lost")
    other = folder / "other"
    write_shards(other, "test", [Record("5", (RED,), (("assistant", ("hi",)),))])
    with pytest.raises(ValueError, match="has no split 'train': it has test"):
        BENCHMARK.read(other)
    for split in ("train", "validation"):
        write_shards(other, split, [record("1", (COLOUR, "red"))])
    with pytest.raises(ValueError, match="record 5 cannot be scored: turns must alternate user, assistant"):
        BENCHMARK.read(other)
