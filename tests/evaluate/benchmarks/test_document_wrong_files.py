"""DocVQA, InfoVQA, ChartQA, OCRBench, RealWorldQA and MME: wrong or missing files end in a line."""

import pytest
from published_documents import CHART_FOLDER, DOC_LIST, HUB, INFO_LIST, MME_FOLDER, OFFICIAL, official_docvqa, write_hub
from published_files import dump, parquet, read, save, without


def lacking(name, column):
    """Writes the hub's table without a column."""

    def write(folder):
        path, rows = HUB[name]
        parquet(folder / path, [without(row, column) for row in rows])

    return name, write


def hub(name, **changes):
    """Writes the hub's table with changed values in all rows."""
    return name, lambda folder: write_hub(name, folder, **changes)


def changed(name, path, content=None):
    """Writes the files of the authors, with other content in the file `path`, or without it."""

    def write(folder):
        OFFICIAL[name](folder)
        (folder / path).unlink()
        if isinstance(content, bytes):
            save(folder / path, content)
        elif content is not None:
            dump(folder / path, content)

    return name, write


def moved(folder):
    official_docvqa(folder)
    (folder / "documents").rename(folder / "pages")


@pytest.mark.parametrize(
    "case, words",
    [
        (
            ("docvqa", lambda folder: save(folder / "x.txt", b"")),
            "holds 'x.txt': expected are DocVQA/validation-*.parquet; or val_v1.0_withQT.json or val_v1.0.json, docum",
        ),
        (
            ("mme", lambda folder: save(folder / "eval_tool/a.txt", b"")),
            "expected are data/test-*.parquet; or MME.tsv (VLMEvalKit); or MME_Bench",
        ),
        (("chartqa", lambda folder: folder.rmdir()), "there is no folder"),
        (
            lacking("infovqa", "answer_type"),
            "validation-00000-of-00001.parquet has no column answer_type: it is not a table of InfoVQA",
        ),
        (lacking("realworldqa", "image"), "has no column image"),
        (hub("docvqa", questionId="337"), "the id '337' of row 1 stands twice"),
        (hub("docvqa", questionId="x1"), "row 0: questionId is 'x1', not a number"),
        (hub("docvqa", answers=None), "row 0: answers is None, not a list of texts"),
        (hub("docvqa-test", image=None), "row 0, id '337', has no image"),
        (hub("chartqa", type="train"), "row 0: type is 'train': the types are human_test and augmented_test"),
        (hub("chartqa", answer=None), "row 0: answer is None, not a text"),
        (hub("ocrbench", question_type="Reading"), "row 0: question_type is 'Reading', which OCRBench does not have"),
        (hub("mme", category="animals"), "row 0: category is 'animals', which MME does not have"),
        (hub("mme", answer="maybe"), "row 0: answer is 'maybe', not Yes or No"),
        (hub("mme", question_id="count/1.png"), "the image 'count/1.png' has 4 questions: MME asks 2 of each"),
        (("docvqa", moved), "has no folder of images: expected is documents or"),
        (changed("docvqa", "documents/a_1.png"), "documents lacks 1 of 2 images, the first 'a_1.png'"),
        (changed("docvqa", DOC_LIST, {"data": {}}), f"{DOC_LIST} has no list of questions under data"),
        (changed("docvqa", DOC_LIST, []), f"{DOC_LIST} holds no object: it is not the published file"),
        (changed("docvqa", DOC_LIST, {"data": [{"image": 3}]}), f"{DOC_LIST} row 0: image is 3, not a text"),
        (changed("infovqa", INFO_LIST, {"data": []}), "holds no rows"),
        (changed("chartqa", f"{CHART_FOLDER}/test_augmented.json"), "lacks test_augmented.json: half of the questions"),
        (changed("chartqa", f"{CHART_FOLDER}/test_human.json", ["x"]), "test_human.json row 0 is no object"),
        (
            changed("ocrbench", "OCRBench/OCRBench.json", [{"image_path": "a"}]),
            "OCRBench.json row 0 has no answers: it has image_path",
        ),
        (
            changed("mme", f"{MME_FOLDER}/count/1.txt", b"no tab\n"),
            "1.txt line 1 has no tab between question and answer",
        ),
        (changed("mme", f"{MME_FOLDER}/count/1.txt", b"\xff"), "1.txt is not UTF-8 (at its byte 0)"),
        (changed("mme", f"{MME_FOLDER}/count/1.txt", b"a\tYes\n"), "the image 'count/1.png' has 1 questions"),
        (changed("mme", f"{MME_FOLDER}/count/1.png"), "lacks 1 of 2 images, the first 'count/1.jpg'"),
    ],
)
def test_wrong_files_are_named_in_one_line(case, words, tmp_path):
    name, write = case
    write(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read(name, tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value), str(error.value)
