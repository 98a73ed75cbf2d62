"""One's own questions in a list: what is asked, how each metric scores, and what is wrong in one line."""

import json

import pytest
from etils import epath
from published_files import png, save

from fastvlm_jax.cli import evaluate as cli
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.evaluate.benchmark import Result
from fastvlm_jax.evaluate.benchmarks import qa
from fastvlm_jax.evaluate.records import own_prompt

RED, BLUE = png("red"), png("blue")
LETTER = "Answer with the option's letter from the given choices directly."


def write(folder, rows, name="mine.jsonl"):
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    save(folder / name, text.encode())
    save(folder / "images/7.png", RED)
    save(folder / "b.png", BLUE)
    return epath.Path(folder / name)


def read(path, **settings):
    return qa.benchmark(**settings).read(epath.Path(path))


ROWS = [
    {"image": "7.png", "question": "what is it?", "answer": "a square", "id": "first", "category": "shapes"},
    {"images": ["images/7.png", "b.png"], "question": "<image> or <image>?", "choices": ["the first", "Both."],
     "answers": "both"},
    {"question": "1 + 1?", "answers": [2, "two"], "metric": "f1", "id": None, "category": None, "choices": None},
]  # fmt: skip


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.json"])
def test_rows_of_a_list(name, tmp_path):
    path = write(tmp_path, ROWS, name)
    rows = read(path)
    assert read(tmp_path) == rows  # the only list of a folder
    assert [row.id for row in rows] == ["first", "1", "2"]
    assert [own_prompt(row) for row in rows] == [
        (("user", (0, "what is it?")),),
        (("user", (0, "or", 1, f"?\nA. the first\nB. Both.\n{LETTER}")),),
        (("user", ("1 + 1?",)),),
    ]
    assert [[picture.read() for picture in row.pictures] for row in rows] == [[RED], [RED, BLUE], []]
    assert [row.references for row in rows] == [("a square",), ("B",), ("2", "two")]
    assert [row.fields["metric"] for row in rows] == ["exact", "choice", "f1"]
    assert rows[0].groups == {"category": "shapes"} and read(path, limit=1) == rows[:1]
    assert [row.fields["metric"] for row in read(path, metric="anls")] == ["anls", "anls", "f1"]


@pytest.mark.parametrize(
    "metric, answer, references, score",
    [
        ("exact", "Square.", ["circle", "square"], 1),
        ("exact", "a square", ["square"], 0),
        ("anls", "helo world", ["hello world", "x"], 10 / 11),
        ("relaxed", "10", ["x", "10.4"], 1),
        ("relaxed", "10", ["10.6", "11"], 0),
        ("f1", "a big red dog", ["red dog"], 0.8),
        ("vqa", "red", ["red"] * 3 + ["blue"] * 7, 0.9),
        ("vqa", "Two dogs", ["2 dogs"] * 10, 1),
    ],
)
def test_metrics(metric, answer, references, score, tmp_path):
    path = write(tmp_path, [{"question": "?", "answers": references, "metric": metric}])
    (row,) = read(path)
    assert qa.benchmark().protocol().score(answer, row).score == pytest.approx(score)


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"), ("b) no", None), ("(C)", "C"), ("The answer is A.", "A"), ("an apple", "C"), ("A PEAR.", "A"),
        ("B. an apple", "B"), ("", None), ("neither", None), ("D", None),
    ],
)  # fmt: skip
def test_choices_are_named_by_their_text_or_their_letter(answer, letter, tmp_path):
    choices = {"question": "?", "choices": ["a pear", "plums", "An apple"]}
    rows = [{**choices, "answer": right} for right in ("A", "plums", "an apple")]
    right = [qa.score(answer, row).score for row in read(write(tmp_path, rows))]
    assert qa.score(answer, read(write(tmp_path, rows))[0]).parsed == letter
    assert right == [float(letter == other) for other in "ABC"]


def test_the_command_names_the_metrics():
    assert tuple(qa.METRICS) == cli.METRICS


def test_figures_tell_the_score_of_each_metric(tmp_path):
    rows = read(write(tmp_path, ROWS))
    results = [
        Result(row, "", text, qa.score(text, row)) for row, text in zip(rows, ["A square ", "A", "two"], strict=True)
    ]
    figures = qa.benchmark().protocol().figures(results)
    assert figures["accuracy_exact"] == 1 / 3 and "split" not in figures
    assert {name: (part["score"], part["n"]) for name, part in figures["metrics"].items()} == {
        "choice": (0, 1), "exact": (100, 1), "f1": (100, 1),
    }  # fmt: skip
    assert figures["metrics"]["f1"]["rule"].startswith("token F1")


def test_shards_are_scored_by_any_metric_of_one_reference(tmp_path):
    turns = (("user", (0, "what?")), ("assistant", ("red dog",)))
    write_shards(tmp_path, "validation", [Record("a", (RED,), turns)])
    save(tmp_path / "notes.json", b"[]")  # a folder with a manifest holds shards
    (row,) = read(tmp_path, metric="f1")
    assert qa.score("a big red dog", row).score == pytest.approx(0.8)
    assert qa.benchmark(metric="f1").protocol().rule.startswith("token F1")
    figures = qa.benchmark(turns="separate").protocol().figures([Result(row, "", "x", qa.score("x", row))])
    assert (figures["split"], figures["turns"]) == ("validation", "separate")
    with pytest.raises(ValueError, match="the metric vqa is for a list of questions"):
        read(tmp_path, metric="vqa")


GOOD = {"question": "?", "answer": "x"}


@pytest.mark.parametrize(
    "row, words",
    [
        ({"answer": "x"}, "row 1 has no question: it has answer"),
        ({"question": "?"}, "row 1 has no answers: it has question"),
        ({**GOOD, "answer": None}, "row 1: the answers are 'None', not texts or numbers"),
        ({**GOOD, "answer": []}, "row 1: the answers are '[]', not texts or numbers"),
        ({**GOOD, "answer": True}, "row 1: the answers are 'True', not texts or numbers"),
        ({**GOOD, "question": 3}, "row 1: question is 3, not a text"),
        ({**GOOD, "question": "\ud800"}, "row 1: question holds half a surrogate pair"),
        ({**GOOD, "image": None}, "row 1: image is None, not a text"),
        ({**GOOD, "images": []}, "row 1: images is an empty list, not a list of texts"),
        ({**GOOD, "image": "lost.png"}, "lacks 1 of 1 images, the first 'lost.png'"),
        ({**GOOD, "image": "7.png", "question": "<image><image>"}, "row 1: it has 2 <image> marks for 1 images"),
        ({**GOOD, "metric": "bleu"}, "row 1: metric is 'bleu': choose exact, anls, vqa, relaxed, f1, choice"),
        ({**GOOD, "metric": ["f1"]}, "row 1: metric is \"['f1']\": choose exact"),
        ({**GOOD, "metric": "vqa"}, "row 1: the metric vqa compares with 10 answers, not 1"),
        ({**GOOD, "metric": "choice"}, "row 1 has no choices, which the metric choice needs"),
        ({**GOOD, "choices": ["x"] * 27}, "row 1: choices are 27 options, more than letters"),
        ({**GOOD, "choices": ["y", "z"]}, "row 1: the answer 'x' is neither a choice nor its letter"),
        ({**GOOD, "choices": ["x", "X."]}, "row 1: two choices are the same text"),
        ({**GOOD, "choices": "xy"}, "row 1: choices is 'xy', not a list of texts"),
        ({**GOOD, "id": "0"}, "the id '0' of row 1 stands twice"),
        ({**GOOD, "category": 3}, "row 1: category is 3, not a text"),
        ("x", "line 2 holds no object"),
    ],
)
def test_wrong_rows_are_named_in_one_line(row, words, tmp_path):
    path = write(tmp_path, [GOOD, row])
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read(path)
    assert words in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_wrong_files_are_named_in_one_line(tmp_path):
    def error(path):
        with pytest.raises((ValueError, FileNotFoundError)) as found:
            read(path)
        assert "\n" not in str(found.value)
        return str(found.value)

    write(tmp_path, [GOOD])
    assert "b.png is no list of questions: expected is a .jsonl or .json file, or a folder" in error(tmp_path / "b.png")
    assert "there is no dataset folder" in error(tmp_path / "lost")
    assert "there is no list of questions" in error(tmp_path / "lost.jsonl")
    with pytest.raises(
        ValueError, match=r"mine\.jsonl is a list of questions and has no split 'test': --split is for shards"
    ):
        read(tmp_path, split="test")
    write(tmp_path, [GOOD], "other.json")
    assert f"{tmp_path} holds 2 lists, mine.jsonl and other.json: name the one to score" in error(tmp_path)
    save(tmp_path / "other.json", b'["x"]')
    assert "other.json row 0 is no object with question and answers" in error(tmp_path / "other.json")
    save(tmp_path / "other.json", b"[]")
    assert "other.json holds no rows" in error(tmp_path / "other.json")
    (tmp_path / "secret.png").write_bytes(RED)
    (row,) = read(write(tmp_path / "inner", [{**GOOD, "image": "../secret.png"}]))
    with pytest.raises(ValueError, match="leads out of the images' folder"):
        row.pictures[0].read()
