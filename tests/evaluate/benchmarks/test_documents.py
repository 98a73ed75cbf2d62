"""DocVQA, InfoVQA, ChartQA, OCRBench, RealWorldQA and MME: rows from files in every layout, and lmms-eval's prompts."""

import dataclasses
import json

import harness
import pytest
from etils import epath
from published_files import encoded, parquet, png, save, table

from fastvlm_jax.evaluate.benchmark import Result
from fastvlm_jax.evaluate.benchmarks import BENCHMARKS
from fastvlm_jax.evaluate.results import summarise

RED, BLUE, GREEN = png("red"), png("blue"), png("green")
DOC = [
    {"questionId": "337", "question": "what is the date?", "answers": ["1/8/93", "8 January"],
     "question_types": ["handwritten", "form"], "docId": 279, "image": RED},
    {"questionId": "338", "question": "Who?\n", "answers": ["  Him"], "question_types": ["form"], "docId": 5,
     "image": BLUE},
]  # fmt: skip
INFO = [
    {"questionId": "98", "question": "How many %?", "answers": ["14%"], "answer_type": ["single span"], "image": RED},
    {"questionId": "99", "question": "Whose?", "answers": ["1", "one"], "answer_type": ["multi-span"], "image": RED},
]
CHART = [
    {"type": "human_test", "question": "What is the value?", "answer": "14", "image": RED},
    {"type": "human_test", "question": " Which\tyear? ", "answer": "2010", "image": BLUE},
    {"type": "augmented_test", "question": "Is it?", "answer": "Yes", "image": RED},
]
OCR = [
    {"dataset": "IIIT5K", "question": " what is written? ", "question_type": "Regular Text Recognition",
     "answer": ["centre"], "image": RED},
    {"dataset": "HME100k", "question": "Write the formula.", "answer": ["x^2", "x^ 2"], "image": BLUE,
     "question_type": "Handwritten Mathematical Expression Recognition"},
]  # fmt: skip
REAL = [
    {"question": "Which way?\nA. Left\nB. Right\nPlease answer directly with only the letter of the correct option and "
     "nothing else.", "answer": "B", "image": RED},
    {"question": " How many? ", "answer": "3", "image": BLUE},
]  # fmt: skip
MME = [
    {"question_id": f"{name}", "question": f"{text} Please answer yes or no.", "answer": answer, "image": image,
     "category": name.split("/")[0]}
    for name, image in (("artwork/7.jpg", RED), ("count/1.png", BLUE))
    for text, answer in (("Are there two dogs?", "Yes"), ("Is it red? ", "No"))
]  # fmt: skip
HUB = {
    "docvqa": ("DocVQA/validation-00000-of-00001.parquet", DOC),
    "docvqa-test": ("DocVQA/test-00000-of-00001.parquet", [{**row, "answers": None} for row in DOC]),
    "infovqa": ("InfographicVQA/validation-00000-of-00001.parquet", INFO),
    "infovqa-test": ("test-00000-of-00001.parquet", [{**row, "answers": None} for row in INFO]),
    "chartqa": ("data/test-00000-of-00001.parquet", CHART),
    "ocrbench": ("data/test-00000-of-00001.parquet", OCR),
    "realworldqa": ("data/test-00000-of-00001.parquet", REAL),
    "mme": ("data/test-00000-of-00001.parquet", MME),
}


def listed(rows, key, names):
    """Rows as published lists have them: with the name of an image in place of the image."""
    return [{**{k: v for k, v in row.items() if k != "image"}, key: names[row["image"]]} for row in rows]


def dump(path, value):
    save(path, json.dumps(value).encode())


def official_docvqa(folder, split="val", name="val_v1.0_withQT.json"):
    rows = listed(DOC, "image", {RED: "documents/a_1.png", BLUE: "documents/b_2.png"})
    rows = [{**row, "questionId": int(row["questionId"])} for row in rows]
    if split == "test":
        rows = [{key: value for key, value in row.items() if key != "answers"} for row in rows]
    dump(folder / name, {"dataset_name": "SP-DocVQA", "data": rows})
    save(folder / "documents/a_1.png", RED)
    save(folder / "documents/b_2.png", BLUE)


def official_infovqa(folder, name="infovqa_qas/infographicsVQA_val_v1.0_withQT.json"):
    dump(folder / name, {"data": listed(INFO, "image_local_name", {RED: "38208.jpeg"})})
    save(folder / "infographicsvqa_images/38208.jpeg", RED)


def official_chartqa(folder):
    folder = folder / "ChartQA Dataset/test"
    for kind in ("human", "augmented"):
        rows = [
            {"imgname": {RED: "1.png", BLUE: "2.png"}[row["image"]], "query": row["question"], "label": row["answer"]}
            for row in CHART
            if row["type"] == f"{kind}_test"
        ]
        dump(folder / f"test_{kind}.json", rows)
    save(folder / "png/1.png", RED)
    save(folder / "png/2.png", BLUE)


def official_ocrbench(folder):
    names = {"dataset": "dataset_name", "question_type": "type", "answer": "answers", "question": "question"}
    rows = [
        {new: row[old] for old, new in names.items()} | {"image_path": f"IIIT5K/{i}.png"} for i, row in enumerate(OCR)
    ]
    rows[0]["answers"] = "centre"
    dump(folder / "OCRBench/OCRBench.json", rows)
    save(folder / "OCRBench_Images/IIIT5K/0.png", RED)
    save(folder / "OCRBench_Images/IIIT5K/1.png", BLUE)


def official_mme(folder):
    folder = folder / "MME_Benchmark_release_version"
    text = "Are there two dogs? Please answer yes or no.\tYes\r\nIs it red?  Please answer yes or no.\tNo\r\n\r\n"
    save(folder / "artwork/questions_answers_YN/7.txt", text.encode())
    save(folder / "artwork/images/7.jpg", RED)
    save(folder / "count/1.txt", text.encode())
    save(folder / "count/1.png", BLUE)
    save(folder / "eval_tool/count.txt", b"1.png\tAre there two dogs?\tYes\tYes\n")


def table_mme(folder):
    rows = [
        {**row, "index": i, "image": encoded(row["image"]), "image_path": row["question_id"]}
        for i, row in enumerate(MME)
    ]
    table(folder / "MME.tsv", rows, ["index", "image", "image_path", "question", "answer", "category"])


def table_ocrbench(folder):
    rows = [
        {**row, "index": i, "image": encoded(row["image"]), "category": row["question_type"]}
        for i, row in enumerate(OCR)
    ]
    table(folder / "OCRBench.tsv", rows, ["index", "image", "question", "answer", "category"])


OFFICIAL = {
    "docvqa": official_docvqa,
    "docvqa-test": lambda folder: official_docvqa(folder, "test", "test/test_v1.0.json"),
    "infovqa": official_infovqa,
    "chartqa": official_chartqa,
    "ocrbench": official_ocrbench,
    "mme": official_mme,
}


def write_hub(name, folder, **changes):
    path, rows = HUB[name]
    parquet(folder / path, [{**row, **changes} for row in rows])


def read(name, folder):
    return BENCHMARKS[name].read(epath.Path(folder))


def seen(rows):
    return [(dataclasses.replace(row, pictures=()), [picture.read() for picture in row.pictures]) for row in rows]


@pytest.mark.parametrize("name", OFFICIAL)
def test_both_layouts_hold_the_same_rows_in_the_same_order(name, tmp_path):
    write_hub(name, tmp_path / "hub")
    OFFICIAL[name](tmp_path / "own")
    hub, own = read(name, tmp_path / "hub"), read(name, tmp_path / "own")
    assert seen(hub) == seen(own)
    assert [data for _, (data,) in seen(own)] == [row["image"] for row in HUB[name][1]]
    names = [picture.name for row in own for picture in row.pictures]
    assert len(set(names)) == len({row["image"] for row in HUB[name][1]}) and all(
        p.file.is_file() for p in own[0].pictures
    )


@pytest.mark.parametrize("name, write", [("mme", table_mme), ("ocrbench", table_ocrbench)])
def test_tables_of_vlmevalkit_hold_the_same_rows(name, write, tmp_path):
    write_hub(name, tmp_path / "hub")
    write(tmp_path / "own")
    hub, own = read(name, tmp_path / "hub"), read(name, tmp_path / "own")
    if name == "ocrbench":  # the table tells the data set of formulas alone
        hub[0] = dataclasses.replace(hub[0], groups={k: v for k, v in hub[0].groups.items() if k != "dataset"})
    assert seen(hub) == seen(own)


@pytest.mark.parametrize(
    "name, number, row",
    [
        ("docvqa", 0, ("337", "what is the date?", ("1/8/93", "8 January"), {})),
        ("docvqa-test", 1, ("338", "Who?\n", None, {})),
        ("infovqa", 1, ("99", "Whose?", ("1", "one"), {})),
        ("infovqa-test", 0, ("98", "How many %?", None, {})),
        ("chartqa", 2, ("2", "Is it?", ("Yes",), {"type": "augmented"})),
        ("ocrbench", 1, ("1", "Write the formula.", ("x^2", "x^ 2"), {
            "part": "handwritten formulas", "type": "Handwritten Mathematical Expression Recognition",
            "dataset": "HME100k",
        })),
        ("realworldqa", 1, ("1", " How many? ", ("3",), {"kind": "open"})),
        ("mme", 3, ("count/1.png#2", "Is it red?  Please answer yes or no.", ("no",), {
            "part": "perception", "category": "count",
        })),
    ],
)  # fmt: skip
def test_rows(name, number, row, tmp_path):
    write_hub(name, tmp_path)
    rows = read(name, tmp_path)
    found = rows[number]
    assert (found.id, found.question, found.references, dict(found.groups)) == row
    assert len(rows) == len(HUB[name][1]) and BENCHMARKS[name].size >= 765


def test_sets_of_one_folder_are_told_apart(tmp_path):
    write_hub("docvqa", tmp_path)
    write_hub("infovqa", tmp_path)
    official_docvqa(tmp_path / "own")
    official_infovqa(tmp_path / "own")
    for folder in (tmp_path, tmp_path / "own"):
        assert [row.id for row in read("docvqa", folder)] == ["337", "338"]
        assert [row.id for row in read("infovqa", folder)] == ["98", "99"]


PROMPTS = """
import os, yaml
from importlib import import_module

yaml.SafeLoader.add_multi_constructor("!", lambda loader, tag, node: None)

def settings(name, module):
    folder = os.path.dirname(module.__file__)
    files = [os.path.join(folder, file) for file in (f"_default_template_{name}_yaml", f"{name}.yaml")]
    config = yaml.safe_load(open(next(filter(os.path.exists, files))))
    given = config.get("lmms_eval_specific_kwargs", config.get("model_specific_prompt_kwargs"))
    return given and given["default"], config["generation_kwargs"]

def main(value):
    found = {}
    for name, docs in value.items():
        module = import_module(f"lmms_eval.tasks.{name}.utils")
        given, generation = settings(name, module)
        ask = getattr(module, f"{name}_doc_to_text")
        texts = [ask(doc, given) if given else ask(doc) for doc in docs]
        found[name] = [texts, generation["max_new_tokens"], generation["temperature"], generation["do_sample"]]
    return found
"""


@pytest.mark.parametrize("version", harness.LMMS_EVAL)
def test_prompts_are_those_of_lmms_eval(version, tmp_path):
    names = [name for name in HUB if not name.endswith("-test")]
    docs = {name: [{key: row[key] for key in row if key != "image"} for row in HUB[name][1]] for name in names}
    theirs = harness.ask(version, PROMPTS, docs)
    for name in names:
        write_hub(name, tmp_path / name)
        protocol = BENCHMARKS[name].protocol("lmms-eval" if version == "lmms-eval-0.7.3" else "paper")
        assert protocol.version == ("lmms-eval 0.7.3" if version == "lmms-eval-0.7.3" else "lmms-eval 0.2.2")
        prompts = [protocol.prompt(row) for row in read(name, tmp_path / name)]
        texts, *settings = theirs[name]
        assert prompts == [(("user", (0, f"\n{text}")),) for text in texts], name
        assert settings == [protocol.max_tokens, 0, False], name


def test_llavas_protocol_of_mme(tmp_path):
    write_hub("mme", tmp_path)
    protocol = BENCHMARKS["mme"].protocol("llava")
    first, second = read("mme", tmp_path)[:2]
    sentence = "Answer the question using a single word or phrase."
    assert protocol.prompt(first) == (("user", (0, f"\nAre there two dogs?\n{sentence}")),)
    assert protocol.max_tokens == 128
    assert [protocol.score(text, first).score for text in ("Yes", "y", "know")] == [1, 0, 0]
    assert BENCHMARKS["mme"].protocol("paper").score("y", first).score == 1
    assert protocol.score("y", second).parsed is None


def result(row, answer, protocol):
    return Result(row, "", answer, protocol.score(answer, row) if row.references else None)


def test_figures_and_submission(tmp_path):
    for name in HUB:
        write_hub(name, tmp_path / name)
    mean = pytest.approx(100 * (5 / 6 + 1) / 2)  # ANLS 5/6 and 1; lmms-eval 0.2.2 counts both as right
    for name, figures in (
        ("lmms-eval", {"by_type": {"form": mean, "handwritten": pytest.approx(500 / 6)}}),
        ("paper", {"anls": mean, "by_type": {"form": 100, "handwritten": 100}}),
    ):
        protocol = BENCHMARKS["docvqa"].protocol(name)
        rows = read("docvqa", tmp_path / "docvqa")
        results = [result(row, answer, protocol) for row, answer in zip(rows, ["1/8/9", "him"], strict=True)]
        assert protocol.figures(results) == figures
        assert summarise(BENCHMARKS["docvqa"], protocol, results)["score"] == (100 if name == "paper" else mean)
    test = BENCHMARKS["docvqa-test"]
    results = [result(row, "x", test.protocol()) for row in read("docvqa-test", tmp_path / "docvqa-test")]
    assert test.submission(results) == [{"questionId": 337, "answer": "x"}, {"questionId": 338, "answer": "x"}]
    ocrbench = BENCHMARKS["ocrbench"].protocol()
    results = [result(row, "CENTRE x^2", ocrbench) for row in read("ocrbench", tmp_path / "ocrbench")]
    sums = dict.fromkeys(["scene text VQA", "document VQA", "key information extraction"], 0)
    sums |= {"text recognition": 1, "handwritten formulas": 1}
    assert ocrbench.figures(results) == {"sum": 2, "sums": sums}


def test_protocols_that_are_refused():
    for name in ("docvqa", "infovqa-test", "chartqa", "ocrbench", "realworldqa"):
        with pytest.raises(ValueError, match=f"LLaVA has no script for it; {name} has paper, lmms-eval"):
            BENCHMARKS[name].protocol("llava")


def without(name, column):
    def write(folder):
        path, rows = HUB[name]
        parquet(folder / path, [{key: row[key] for key in row if key != column} for row in rows])

    return name, write


def hub(name, **changes):
    return name, lambda folder: write_hub(name, folder, **changes)


def changed(name, path, content=None):
    """Writes published files, with other content in the file `path`, or without it."""

    def write(folder):
        OFFICIAL[name](folder)
        (folder / path).unlink()
        if content is not None:
            save(folder / path, content if isinstance(content, bytes) else json.dumps(content).encode())

    return name, write


def moved(folder):
    official_docvqa(folder)
    (folder / "documents").rename(folder / "pages")


DOC_LIST, CHART_FOLDER, MME_COUNT = (
    "val_v1.0_withQT.json",
    "ChartQA Dataset/test",
    "MME_Benchmark_release_version/count",
)
INFO_LIST = "infovqa_qas/infographicsVQA_val_v1.0_withQT.json"


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
            without("infovqa", "answer_type"),
            "validation-00000-of-00001.parquet has no column answer_type: it is not a table of InfoVQA",
        ),
        (without("realworldqa", "image"), "has no column image"),
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
        (changed("mme", f"{MME_COUNT}/1.txt", b"no tab\n"), "1.txt line 1 has no tab between question and answer"),
        (changed("mme", f"{MME_COUNT}/1.txt", b"\xff"), "1.txt is not UTF-8 (at its byte 0)"),
        (changed("mme", f"{MME_COUNT}/1.txt", b"a\tYes\n"), "the image 'count/1.png' has 1 questions"),
        (changed("mme", f"{MME_COUNT}/1.png"), "lacks 1 of 2 images, the first 'count/1.jpg'"),
    ],
)
def test_wrong_files_are_named_in_one_line(case, words, tmp_path):
    name, write = case
    write(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read(name, tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value), str(error.value)
