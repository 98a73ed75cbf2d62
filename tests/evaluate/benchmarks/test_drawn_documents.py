"""Documents: rows of hand-written pages, the pages that the blind rows show, and what is wrong in one line."""

import pytest
from etils import epath
from published_files import png

from fastvlm_jax.data.record import Record
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.evaluate.benchmark import Result
from fastvlm_jax.evaluate.benchmarks import BENCHMARKS
from fastvlm_jax.evaluate.records import own_prompt
from fastvlm_jax.evaluate.results import summarise
from fastvlm_jax.evaluate.suite import choose

COLORS = ("red", "blue", "green", "black")


def page(number, size, *questions, prompt=("Transcribe the page.",), font_size=12):
    turns = [("user", (0, *prompt)), ("assistant", (f"{number} 7\n30",))]
    for _, question, answer in questions:
        turns += [("user", (question,)), ("assistant", (answer,))]
    asked = ["transcription", *(kind for kind, _, _ in questions)]
    extra = {"kind": "table", "size": size, "font_size": font_size, "asked": asked}
    return Record(f"test/{number}", (png(COLORS[number]),), tuple(turns), extra)


@pytest.fixture
def folder(tmp_path):
    wide, tall = [512, 256], [256, 384]
    asked = [("cell", "What stands in row 1, column 1?", "1"), ("yes/no", "Is 9 on the page?", "no")]
    pages = [page(0, wide), page(1, tall, *asked), page(2, wide, font_size=40), page(3, wide, prompt=())]
    write_shards(tmp_path, "test", pages)
    return epath.Path(tmp_path)


def test_transcriptions_and_questions_are_rows_of_their_own(folder):
    rows = BENCHMARKS["documents"].read(folder)
    assert [(row.id, row.references) for row in rows] == [
        ("test/0", ("0 7\n30",)), ("test/1/0", ("1 7\n30",)), ("test/2", ("2 7\n30",)), ("test/3", ("3 7\n30",)),
    ]  # fmt: skip
    assert own_prompt(rows[0]) == (("user", (0, "Transcribe the page.")),)
    assert own_prompt(rows[3]) == (("user", (0,)),)  # asked as it is trained
    assert rows[2].groups == {"page": "table", "asked": "transcription", "text": "35 px or more"}
    asked = BENCHMARKS["documents-qa"].read(folder)
    assert [(row.id, row.references, row.groups["asked"]) for row in asked] == [
        ("test/1/1", ("1",), "cell"), ("test/1/2", ("no",), "yes/no"),
    ]  # fmt: skip
    assert own_prompt(asked[1]) == (("user", (0, "Is 9 on the page?")),)


def test_blind_rows_show_the_next_page_of_the_same_size(folder):
    """Pages 0, 2 and 3 are wide; page 1 alone is tall, so that it gets the next page of any size."""
    rows = BENCHMARKS["documents-blind"].read(folder)
    assert [row.pictures[0].read() for row in rows] == [png(COLORS[n]) for n in (2, 2, 3, 0)]
    seeing = BENCHMARKS["documents"].read(folder)
    assert [row.pictures[0].read() for row in seeing] == list(map(png, COLORS))
    for one, other in zip(rows, seeing, strict=True):
        assert (one.id, one.references, one.groups, own_prompt(one)) == (
            other.id, other.references, other.groups, own_prompt(other),
        )  # fmt: skip
    blind = BENCHMARKS["documents-qa-blind"].read(folder)
    assert [row.pictures[0].read() for row in blind] == [png("green")] * 2


def test_the_score_is_the_mean_over_pages(folder):
    benchmark, rows = BENCHMARKS["documents"], BENCHMARKS["documents"].read(folder)
    own = benchmark.protocol()
    answers = ["0 7 30", "1 7\n31", "", "3 7"]  # right, one of six characters wrong, nothing, half
    results = [Result(row, "", text, own.score(text, row), (row.id,)) for row, text in zip(rows, answers, strict=True)]
    summary = summarise(benchmark, own, results)
    assert summary["score"] == pytest.approx(100 * (1 + 5 / 6 + 0 + 1 / 2) / 4)
    assert summary["figures"] == {"accuracy_exact": 0.25} and summary["standard_error"] > 0
    assert summary["groups"]["text"]["16 px or less"]["n"] == 3
    asked = BENCHMARKS["documents-qa"]
    marks = [
        asked.protocol().score(text, row).score for row, text in zip(asked.read(folder), ["1.", "yes"], strict=True)
    ]
    assert marks == [1, 0]


def test_a_family_in_one_folder_is_chosen_together(folder):
    names = ["documents", "documents-blind"]
    entries = choose(names, folder, BENCHMARKS, told=print)
    assert [(entry.name, len(entry.rows)) for entry in entries] == [("documents-own", 4), ("documents-blind-own", 4)]
    with pytest.raises(FileNotFoundError, match=r"there is no dataset folder .*/documents"):
        choose(["documents", "easy-vqa"], folder, BENCHMARKS, told=print)


def test_other_shards_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no dataset folder"):
        BENCHMARKS["documents"].read(folder / "lost")
    one = epath.Path(tmp_path / "one")
    write_shards(one, "test", [page(0, [256, 256])])
    with pytest.raises(ValueError, match="holds one page, and no other to show in its place"):
        BENCHMARKS["documents-blind"].read(one)
    with pytest.raises(FileNotFoundError, match=r"the test split of .* holds no questions"):
        BENCHMARKS["documents-qa"].read(one)
    told = {"asked": ["transcription"], "size": [256, 256], "font_size": 12}
    for number, wrong in enumerate(({"asked": ["transcription", "cell"]}, {"size": [[256], 256]}, {"font_size": "12"})):
        other = epath.Path(tmp_path / f"other{number}")
        turns = (("user", (0,)), ("assistant", ("hi",)))
        write_shards(other, "test", [Record("5", (png("red"),), turns, {**told, **wrong})])
        with pytest.raises(ValueError, match=r"record 5 of .* does not say what is asked: write the pages with"):
            BENCHMARKS["documents"].read(other)
    broken = epath.Path(tmp_path / "broken")
    write_shards(broken, "test", [Record("6", (png("red"),), (("assistant", ("hi",)),))])
    with pytest.raises(ValueError, match=r"record 6 of .* cannot be scored: turns must alternate user, assistant"):
        BENCHMARKS["documents"].read(broken)
