"""What a training set shares with a benchmark: by hand-made pairs of images and questions, and the list that a write
leaves out."""

import json

import documents
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import fastvlm
from documents import encoded, render

from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sources import read_manifest, read_shards
from fastvlm_jax.data.write import write, write_shards
from fastvlm_jax.data.write.job import Settings
from fastvlm_jax.evaluate import looked_for
from fastvlm_jax.evaluate.contamination import compare
from fastvlm_jax.evaluate.looked_for import KINDS, learn, open_rows, words_of

PAGES = [render(documents.page, number) for number in range(4)]
BLANK = PIL.Image.new("RGB", (300, 200), "white")


def record(key, images, *questions):
    turns = [turn for text in questions for turn in (("user", (text,)), ("assistant", ("yes",)))]
    numbers = tuple(range(len(images)))
    turns[0] = ("user", (*numbers, *turns[0][1]))
    return Record(key, tuple(images), tuple(turns))


RECORDS = [
    record("file", [encoded(PAGES[0])], "what is written here?"),
    record("pixels", [encoded(PAGES[1], "BMP")], "which one?"),
    record("near", [encoded(documents.scaled(PAGES[2], 0.5), "JPEG", quality=60)], "who signed it?"),
    record("other page", [encoded(PAGES[3])], "where?\nAnswer the question using a single word or phrase."),
    record("question", [encoded(render(documents.bars, 0))], "a first one?", "\nWhat, is the DATE"),
    record("both", [encoded(render(documents.bars, 1)), encoded(PAGES[0], "JPEG", quality=80)], "What is the date ?"),
    record("blank", [encoded(BLANK)], "is it empty?"),
    record("broken", [b"\xff\xd8\xff no picture"], "is it broken?"),
]
# The benchmark: a folder of DocVQA's Parquet, whose rows 1 and 2 share a page.
ROWS = [
    ("1", "What is the date?", encoded(PAGES[0])),
    ("2", "How many tables are there?", encoded(PAGES[0])),
    ("3", "Where?", encoded(PAGES[1])),
    ("4", "Whose name is it?", encoded(PAGES[2])),
    ("5", "What colour has it?", encoded(BLANK.resize((400, 100)))),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Writes the training set, DocVQA's validation split, and its pages as a folder of images."""
    root = tmp_path_factory.mktemp("contamination")
    write_shards(root / "train", "train", RECORDS, 2)
    rows = [
        {"questionId": name, "question": question, "answers": ["x"], "image": {"bytes": image, "path": None},
         "question_types": [], "docId": 1, "ucsf_document_id": "", "ucsf_document_page_no": "", "data_split": "val"}
        for name, question, image in ROWS
    ]  # fmt: skip
    (root / "published/DocVQA").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "published/DocVQA/validation-00000-of-00001.parquet")
    (root / "pages/inner").mkdir(parents=True)
    for name, _, image in ROWS:
        (root / f"pages/{'inner/' if name == '4' else ''}{name}.png").write_bytes(image)
    (root / "pages/notes.txt").write_text("no image")
    return root


def found(folders, against, benchmark=None, kinds=KINDS, split="train"):
    """The report, and the list by the keys of records."""
    name, rows = open_rows(str(folders / against), benchmark, str(folders / "train"), split)
    path = folders / "list.jsonl"
    report = compare(read_shards(folders / "train", split), learn(name, rows, kinds), kinds, path)
    lines: dict[str, list] = {}
    for line in map(json.loads, path.read_text().splitlines()):
        lines.setdefault(line["key"], []).append(line)
    return report, lines


def test_each_kind_of_match_is_found_and_named(folders):
    report, lines = found(folders, "published", "docvqa")
    kinds = {key: [(line["kind"], line["row"]) for line in own] for key, own in lines.items()}
    assert kinds == {
        "file": [("file", "1")],
        "pixels": [("pixels", "3")],
        "near": [("near", "4")],
        "other page": [("question", "3")],
        "question": [("question", "1")],
        "both": [("near", "1"), ("question", "1")],
    }
    assert lines["file"] == [
        {"key": "file", "split": "train", "kind": "file", "distance": 0, "image": 0, "benchmark": "docvqa", "row": "1",
         "picture": "DocVQA/validation-00000-of-00001.parquet row 0 image"}
    ]  # fmt: skip
    assert lines["both"][0]["image"] == 1 and 0 < lines["both"][0]["distance"] <= 60
    assert [own[-1]["same_image"] for own in (lines["both"], lines["question"])] == [True, False]
    assert report.by_kind == {
        "file": {"records": 1, "images": 1, "rows": 2},
        "pixels": {"records": 1, "images": 1, "rows": 1},
        "near": {"records": 2, "images": 2, "rows": 3},
        "question": {"records": 3, "images": 0, "rows": 2},
    }
    assert (report.records, report.images, report.matching, report.by_image, report.both) == (8, 9, 6, 4, 1)
    assert len(report.left_out) == 1 and report.left_out[0].startswith("broken image 0: ")


def test_kinds_that_are_not_asked_for_are_not_found(folders):
    assert set(found(folders, "published", "docvqa", ["question"])[1]) == {"other page", "question", "both"}
    assert set(found(folders, "published", "docvqa", ["file"])[1]) == {"file"}
    assert [line["kind"] for line in found(folders, "published", "docvqa", ["near"])[1]["pixels"]] == ["near"]


def test_a_folder_of_images_and_shards_are_compared_too(folders):
    _, lines = found(folders, "pages")
    assert {key: own[0]["row"] for key, own in lines.items()} == {
        "file": "1.png", "pixels": "3.png", "near": "inner/4.png", "both": "1.png"
    }  # fmt: skip
    write_shards(folders / "other", "test", [RECORDS[2], record("new", [encoded(PAGES[3])], "Which one?")])
    _, lines = found(folders, "other")
    assert {key: sorted((line["kind"], line["row"]) for line in own) for key, own in lines.items()} == {
        "near": [("file", "test/near"), ("question", "test/near")],
        "other page": [("file", "test/new")],
        "pixels": [("question", "test/new")],
    }


def test_a_data_set_is_compared_with_its_own_other_splits(folders):
    write_shards(folders / "train", "validation", [RECORDS[1]])
    _, lines = found(folders, "train")
    assert set(lines) == {"pixels"} and lines["pixels"][0]["row"] == "validation/pixels"
    assert found(folders, "train", split="validation")[1].keys() == {"pixels"}
    with pytest.raises(ValueError, match="no other split"):
        open_rows(str(folders / "other"), None, str(folders / "other"), "test")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\nWhat  IS\tit?", "what is it"),
        ("what's 1,000 \u00bd", "what s 1 000 1 2"),
        ("\uff37HAT \ufb01ts \u2014 Stra\u00dfe", "what fits strasse"),
        ("?!", ""),
    ],
)
def test_words_are_compared_without_case_signs_and_spaces(text, words):
    assert words_of(text) == words


def test_records_of_the_list_are_left_out_named_and_counted(folders, tmp_path, capsys):
    found(folders, "published", "docvqa", ["file", "near"])
    listed, clean = folders / "list.jsonl", tmp_path / "clean"
    listed.write_text(listed.read_text() + '\n{"key": "of another set"}\n')
    summary = write(folders / "train", clean, settings=Settings(exclude=str(listed)), workers=1)
    kept = read_shards(clean, "train")
    assert sorted(kept[i].key for i in range(len(kept))) == ["blank", "other page", "question"]
    manifest = read_manifest(clean)["splits"]["train"]
    assert manifest["excluded"] == 4 and manifest["source"]["exclude"] == {"list": str(listed), "records": 5}
    assert f"left out by --exclude {listed}: 4 records, of 5 that it names" in summary.describe(clean)
    rejected = [json.loads(line) for line in (clean / "rejected.jsonl").read_text().splitlines()]
    assert {(line["key"], line["reason"]) for line in rejected if line["key"] != "broken"} == {
        ("file", "left out by --exclude: file, docvqa, 1"),
        ("pixels", "left out by --exclude: near, docvqa, 3"),
        ("near", "left out by --exclude: near, docvqa, 4"),
        ("both", "left out by --exclude: near, docvqa, 1"),
    }
    again = write(folders / "train", clean, settings=Settings(exclude=str(listed)), workers=1)
    assert again.nothing_to_do and again.excluded == 4
    listed.write_text('{"key": "blank"}\n')
    contamination_free = Settings(exclude=str(listed))
    with pytest.raises(ValueError, match="other settings"):
        write(folders / "train", clean, settings=contamination_free, workers=1)


def test_the_commands_lead_from_the_list_to_clean_shards(folders, tmp_path, monkeypatch, capsys):
    listed, clean = tmp_path / "list.jsonl", tmp_path / "clean"
    argv = ["data", "inspect", f"--data={folders / 'train'}", f"--against={folders / 'published'}"]
    argv += ["--benchmark=docvqa", f"--output={listed}", f"--json={tmp_path / 'counts.json'}"]
    status, said, _ = fastvlm(monkeypatch, capsys, *argv)
    assert status == 0
    assert "docvqa: 5 rows, 4 different images and 5 different questions" in said
    assert (
        "6 records match: 4 by an image (1 of them hold the question of one of its rows too), 2 by a question" in said
    )
    assert "could not be looked at" in said
    assert json.loads((tmp_path / "counts.json").read_text())["by_kind"]["near"]["rows"] == 3
    argv = said.splitlines()[-1].replace("DIR", str(clean)).split()  # the command that it names
    status, said, _ = fastvlm(monkeypatch, capsys, *argv[1:])
    assert status == 0 and "6 records, of 6 that it names" in said
    assert {read_shards(clean, "train")[i].key for i in range(1)} == {"blank"}


def test_a_benchmark_is_found_in_the_folder_of_its_family(folders, tmp_path):
    table = pq.read_table(folders / "published/DocVQA/validation-00000-of-00001.parquet")
    (tmp_path / "docvqa/InfographicVQA").mkdir(parents=True)
    names = ["answer_type" if name == "question_types" else name for name in table.column_names]
    pq.write_table(table.rename_columns(names), tmp_path / "docvqa/InfographicVQA/validation-00000-of-00001.parquet")
    name, rows = open_rows(str(tmp_path), "infovqa", "train", "train")
    assert name == "infovqa" and [row.id for row in rows] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--against=nowhere"], "--against nowhere: there is no such folder"),
        (["--against={published}"], "name it with --benchmark"),
        (["--against={pages}", "--benchmark=docvqa"], "expected are"),
        (["--against={pages}", "--benchmark=dcvqa"], "there is no benchmark 'dcvqa' (did you mean docvqa?)"),
        (["--against={pages}", "--kinds=file,same"], "--kinds same: the kinds are file, pixels, near, question"),
        (["--against={pages}", "--verify"], "--verify is not for --against"),
        (["--benchmark=docvqa"], "--benchmark goes with --against"),
    ],
)
def test_wrong_flags_are_told_in_a_line(folders, flags, message, monkeypatch, capsys):
    flags = [flag.format(published=folders / "published", pages=folders / "pages") for flag in flags]
    status, _, said = fastvlm(monkeypatch, capsys, "data", "inspect", f"--data={folders / 'train'}", *flags)
    assert status and message in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("key\n", "line 1: it is not JSON"),
        ('\n{"id": 1}\n', 'line 2 has no "key" of a record'),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "is a Git LFS pointer"),
    ],
)
def test_a_wrong_list_is_named_before_anything_is_written(folders, tmp_path, content, message):
    listed = tmp_path / "list.jsonl"
    if content is not None:
        listed.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=f"--exclude {listed} {message}"):
        write(folders / "train", tmp_path / "out", settings=Settings(exclude=str(listed)), workers=1)
    assert not (tmp_path / "out").exists()


def test_a_list_of_another_data_set_is_told(folders, tmp_path):
    listed = tmp_path / "list.jsonl"
    listed.write_text('{"key": "of another set"}\n')
    summary = write(folders / "train", tmp_path / "out", settings=Settings(exclude=str(listed)), workers=1)
    assert "none of them is in the source" in summary.describe(tmp_path / "out")


def test_a_list_that_names_nothing_leaves_nothing_out(folders, tmp_path):
    listed = tmp_path / "list.jsonl"
    listed.write_text("")
    summary = write(folders / "train", tmp_path / "out", settings=Settings(exclude=str(listed)), workers=1)
    told = summary.describe(tmp_path / "out")
    assert f"{listed}: 0 records, of 0 that it names" in told and "none of them" not in told


def test_distances_do_not_depend_on_how_many_images_there_are(monkeypatch, folders):
    monkeypatch.setattr(looked_for, "_BLOCK", 3)
    assert found(folders, "published", "docvqa")[0].matching == 6
    assert np.all([len(own) == 1 for key, own in found(folders, "pages")[1].items()])
