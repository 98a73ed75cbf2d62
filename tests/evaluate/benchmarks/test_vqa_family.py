"""GQA, VQAv2, TextVQA and POPE: rows from files in every layout, prompts, figures and submissions.

Their files are written by published_vqa.py; test_vqa_wrong_files.py has those that are wrong.
"""

import json

import harness
import pytest
from published_files import BLUE, RED, edit_lines, read, without
from published_vqa import (
    GQA,
    GQA_LLAVA,
    LAYOUTS,
    POPE,
    SHORT,
    TEN,
    TEXT_LLAVA,
    TEXTVQA,
    VQAV2,
    hub_gqa,
    hub_pope,
    hub_textvqa,
    hub_vqav2,
    llava_gqa,
    llava_textvqa,
    official_pope,
    official_textvqa,
)

from fastvlm_jax.evaluate import run, suite
from fastvlm_jax.evaluate.benchmark import Result
from fastvlm_jax.evaluate.benchmarks import BENCHMARKS

IMAGES = {
    "gqa": [RED, BLUE, RED], "textvqa": [RED, RED, BLUE], "textvqa-test": [RED, RED, BLUE], "vqav2": [RED, BLUE, BLUE],
    "vqav2-testdev": [RED, BLUE, BLUE], "pope": [row["image"] for row in POPE], "pope-random": [BLUE, RED, RED],
    "pope-popular": [BLUE, RED],
}  # fmt: skip


def prompt(name, protocol, row):
    return BENCHMARKS[name].protocol(protocol).prompt(row)


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_layouts_hold_the_same_rows_in_the_same_order(name, tmp_path):
    found = []
    for number, write in enumerate(LAYOUTS[name]):
        write(tmp_path / str(number))
        rows = read(name, tmp_path / str(number))
        assert [picture.read() for row in rows for picture in row.pictures] == IMAGES[name]
        found.append(
            [(row.id, row.question, row.references, row.groups, prompt(name, "lmms-eval", row)) for row in rows]
        )
    assert found[1:] == found[:-1]


@pytest.mark.parametrize(
    "name, number, row",
    [
        ("gqa", 0, ("201307251", "Is it overcast?", ("no",), {
            "structural": "verify", "semantic": "attr", "answers": "binary",
        })),
        ("gqa", 1, ("202", "Who?", ("man",), {"structural": "query", "semantic": "attr", "answers": "open"})),
        ("textvqa", 0, ("34602", "what is the BRAND of NASA?", tuple(TEN), {})),
        ("textvqa-test", 0, ("34602", "what is the BRAND of NASA?", None, {})),
        ("vqav2", 0, ("458752000", "What color is the bus?", ("red", "dark red") * 5, {"answer_type": "other"})),
        ("vqav2-testdev", 2, ("42001", "How many?", None, {})),
        ("pope", 4, ("random/1", "Is there a snowboard in the image?", ("yes",), {"category": "random"})),
        ("pope-popular", 1, ("popular/2", "Is there a person in the image?", ("no",), {"category": "popular"})),
    ],
)  # fmt: skip
def test_rows(name, number, row, tmp_path):
    LAYOUTS[name][0](tmp_path)
    found = read(name, tmp_path)[number]
    assert (found.id, found.question, found.references, found.groups) == row


def test_pope_without_llavas_file_asks_what_the_labels_ask(tmp_path):
    official_pope(tmp_path, lambda row: {**row, "text": row["text"].replace("image", "imange")})
    assert read("pope", tmp_path)[0].question == "Is there a snowboard in the imange?"


def test_labels_of_pope_in_any_case(tmp_path):
    official_pope(tmp_path, lambda row: {**row, "label": f"{row['label'].upper()} "})
    assert [row.references for row in read("pope-random", tmp_path)] == [("yes",), ("no",), ("yes",)]


def test_gqa_asks_what_llavas_file_asks(tmp_path):
    llava_gqa(tmp_path)
    edit_lines(GQA_LLAVA, lambda rows: (rows.pop(0), rows[0].update(text="Who is it?" + SHORT)))(tmp_path)
    assert [row.question for row in read("gqa", tmp_path)] == ["Who is it?", "Is it a  CAT?"]


PROMPTS = """
import inspect, os, yaml
from lmms_eval.tasks.gqa.utils import gqa_doc_to_text
from lmms_eval.tasks.pope.utils import pope_doc_to_text
from lmms_eval.tasks.textvqa.utils import textvqa_doc_to_text
from lmms_eval.tasks.vqav2.utils import vqav2_doc_to_text

yaml.SafeLoader.add_multi_constructor("!", lambda loader, tag, node: None)

def asked(function, rows):
    folder = os.path.dirname(inspect.getsourcefile(function))
    name = os.path.basename(folder)
    files = [os.path.join(folder, file) for file in (f"_default_template_{name}_yaml", f"{name}.yaml")]
    config = yaml.safe_load(open(next(filter(os.path.exists, files))))
    given = config.get("lmms_eval_specific_kwargs", config.get("model_specific_prompt_kwargs"))
    more = [given["default"]] if len(inspect.signature(function).parameters) > 1 else []
    longest = config["generation_kwargs"].get("max_new_tokens", 1024)
    return {"texts": [function(row, *more) for row in rows], "max": longest}

def main(rows):
    functions = dict(gqa=gqa_doc_to_text, pope=pope_doc_to_text, textvqa=textvqa_doc_to_text, vqav2=vqav2_doc_to_text)
    return {name: asked(function, rows[name]) for name, function in functions.items()}
"""
ODD = ["Is it?", "What is the BRAND of NASA?", "ÉTÉ? ", " is\tthere\na dog? ", "", "straße ﬁ ǆ", "«Q» what?"]


@pytest.mark.parametrize("version", harness.LMMS_EVAL)
def test_prompts_of_lmms_eval(version, tmp_path):
    """Its model puts the image and a line break in front; `ask_lmms_eval` is tested with several images elsewhere."""
    names = ("gqa", "textvqa", "vqav2", "pope")
    for name in names:
        LAYOUTS[name][0](tmp_path / name)
    tables = dict(zip(names, (GQA, TEXTVQA, VQAV2, POPE), strict=True))
    odd = [{"question": text, "ocr_tokens": ["A"]} for text in ODD]
    docs = {name: [without(row, "image") for row in tables[name]] + odd for name in names}
    theirs = harness.ask(version, PROMPTS, docs)
    for name in names:
        rows = read(name, tmp_path / name)
        rows += [type(rows[0])(str(i), text, rows[0].pictures, None) for i, text in enumerate(ODD)]
        ours = BENCHMARKS[name].protocol("lmms-eval" if version == "lmms-eval-0.7.3" or name != "vqav2" else "paper")
        assert [ours.prompt(row) for row in rows] == [(("user", (0, f"\n{text}")),) for text in theirs[name]["texts"]]
        assert ours.max_tokens == theirs[name]["max"]
        assert version.removeprefix("lmms-eval-")[:3] == ours.version.removeprefix("lmms-eval ")[:3] or name != "vqav2"


@pytest.mark.parametrize("name", ["gqa", "textvqa", "pope", "vqav2-testdev"])
def test_prompts_of_llava_are_the_texts_of_its_files(name, tmp_path):
    """LLaVA's loader puts the image and a line break in front of `text`."""
    LAYOUTS[name][-1](tmp_path)
    (path,) = [path for path in tmp_path.glob("llava_*.jsonl") if "test2015" not in path.name]
    texts = sorted(json.loads(line)["text"] for line in path.read_text().splitlines())
    rows = read(name, tmp_path)
    assert sorted(prompt(name, "llava", row)[0][1][1] for row in rows) == ["\n" + text for text in texts]
    assert BENCHMARKS[name].protocol("llava").max_tokens == 128
    if name != "vqav2-testdev":
        assert [prompt(name, "paper", row) for row in rows] == [prompt(name, "llava", row) for row in rows]


def scored(name, protocol, rows, answers):
    protocol = BENCHMARKS[name].protocol(protocol)
    found = []
    for row, answer in zip(rows, answers, strict=True):
        mark = None if row.references is None else protocol.score(answer, row)
        found.append(Result(row, "", answer, mark, tuple(picture.name for picture in row.pictures)))
    return found


def test_textvqa_says_where_its_ocr_tokens_are_from(tmp_path):
    for number, write in enumerate((hub_textvqa, llava_textvqa, official_textvqa)):
        write(tmp_path / str(number))
    hub, llavas = (read("textvqa", tmp_path / str(number)) for number in range(2))
    assert prompt("textvqa", "paper", hub[0]) == (
        ("user", (0, f"\nwhat is the BRAND of NASA?\nReference OCR token: DAKOTA, DIGITAL{SHORT}")),
    )
    # LLaVA joins by the question in lower case, and asks it as its own file spells it.
    assert prompt("textvqa", "paper", llavas[0]) == (
        ("user", (0, f"\nWhat is the BRAND of NASA?\nReference OCR token: DAKOTA, DIGITAL{SHORT}")),
    )
    assert prompt("textvqa", "lmms-eval", hub[0]) == (("user", (0, f"\nWhat is the brand of nasa?{SHORT}")),)
    for rows, source in ((hub, "ocr_tokens of the Parquet files"), (llavas, "llava_textvqa_val_v051_ocr.jsonl")):
        results = scored("textvqa", "paper", rows, ["Dakota."] * 3)
        assert BENCHMARKS["textvqa"].protocol("paper").figures(results) == {"ocr_tokens": source}
        assert [result.mark.score for result in results] == [1, 1, 0] and results[0].mark.parsed == "dakota"
    results = scored("textvqa", "lmms-eval", hub, ["", "A dakota digital", "x"])
    assert BENCHMARKS["textvqa"].protocol("lmms-eval").figures(results) == {"ocr_tokens": "not in the prompt"}
    assert [result.mark.score for result in results] == pytest.approx(
        [0.3, 0.6, 1]
    )  # "a" is an article: nothing is left
    for protocol in ("paper", "llava"):
        with pytest.raises(
            ValueError, match=r"^textvqa: LLaVA's prompt lists the OCR tokens .*: add LLaVA's llava_textv"
        ):
            suite.choose(["textvqa"], tmp_path / "2", BENCHMARKS, protocol=protocol, told=print)
    assert len(suite.choose(["textvqa"], tmp_path / "2", BENCHMARKS, protocol="lmms-eval", told=print)[0].rows) == 3


def test_textvqa_of_the_hub_is_asked_as_llavas_file_does_where_it_is_there(tmp_path):
    llava_textvqa(tmp_path / "llava")
    hub_textvqa(tmp_path)
    hub_textvqa(tmp_path, "test")
    (tmp_path / "llava" / TEXT_LLAVA).rename(tmp_path / TEXT_LLAVA)
    rows = read("textvqa", tmp_path)
    assert {row.fields["ocr"] for row in rows} == {TEXT_LLAVA}
    assert prompt("textvqa", "paper", rows[0])[0][1][1].startswith(
        "\nWhat is the BRAND of NASA?\nReference OCR token: D"
    )
    assert {row.fields["ocr"] for row in read("textvqa-test", tmp_path)} == {"ocr_tokens of the Parquet files"}


def test_pope_reports_the_mean_of_the_f1_of_its_splits(tmp_path):
    hub_pope(tmp_path)
    rows = read("pope", tmp_path)
    answers = ["Yes", "yes there is", "Yes.", "No", "no", "NO", "yes"]
    paper, pooled = BENCHMARKS["pope"].protocol("paper"), BENCHMARKS["pope"].protocol("lmms-eval")
    results = scored("pope", "paper", rows, answers)
    # adversarial: 1 right yes, 1 wrong yes; popular: both right; random: 1 of 2 yes found, "NO" is read as yes
    assert paper.aggregate(results) == pytest.approx(100 * (2 / 3 + 1 + 0.5) / 3)
    assert paper.aggregate(results[:2]) == pytest.approx(200 / 3)
    found = paper.figures(results)
    assert list(found) == ["adversarial", "popular", "random"]
    assert found["adversarial"] == pytest.approx(
        {"f1": 200 / 3, "accuracy": 50, "precision": 50, "recall": 100, "yes_share": 100, "questions": 2}
    )
    results = scored("pope", "lmms-eval", rows, answers)
    assert [result.mark.parsed for result in results] == ["yes", None, None, "no", "no", "no", "yes"]
    found = pooled.figures(results)
    assert list(found) == ["all", "adversarial", "popular", "random"]
    assert found["adversarial"] == pytest.approx(
        {"f1": 100, "accuracy": 50, "precision": 100, "recall": 100, "yes_share": 50, "questions": 2, "yes_ratio": 50}
    )
    assert (found["all"]["yes_ratio"], found["all"]["questions"]) == (pytest.approx(400 / 7), 7)
    # 2 right yes, no wrong yes, 1 yes missed by "no"
    assert pooled.aggregate(results) == pytest.approx(100 * 2 * (1 * 2 / 3) / (1 + 2 / 3))


def test_marks_differ_by_protocol(tmp_path):
    hub_gqa(tmp_path / "gqa")
    hub_vqav2(tmp_path / "vqav2")
    gqa, vqav2 = read("gqa", tmp_path / "gqa"), read("vqav2", tmp_path / "vqav2")
    answers = ["No!", "the man", "Yes."]
    assert [result.mark for result in scored("gqa", "paper", gqa, answers)] == [(0, "no!"), (0, "the man"), (1, "yes")]
    assert [result.mark for result in scored("gqa", "lmms-eval", gqa, answers)] == [
        (1, "no"),
        (0, "the man"),
        (1, "yes"),
    ]
    answers = ["a dark red", "the sky", "two"]
    paper, newer = scored("vqav2", "paper", vqav2, answers), scored("vqav2", "lmms-eval", vqav2, answers)
    assert [result.mark for result in paper] == [(1, "dark red"), (0, "sky"), (1, "2")]
    assert [result.mark for result in newer] == [(1, "dark red"), (1, "sky"), (1, "2")]
    assert [result.mark for result in scored("vqav2", "llava", vqav2, answers)] == [result.mark for result in paper]


def test_submissions(tmp_path):
    made = {}
    for name, answers in (
        ("gqa", ["No.", "A man", "yes"]),
        ("textvqa-test", ["The Dakota,", "", "Two dogs, isnt it?"]),
    ):
        LAYOUTS[name][0](tmp_path / name)
        rows, protocol = read(name, tmp_path / name), BENCHMARKS[name].protocol("llava")
        entry = suite.Entry(BENCHMARKS[name], protocol, rows)
        suite.write(tmp_path, entry, run.Scored(scored(name, "llava", rows, answers), [], 3, 1.0), None, {}, True)
        made[name] = json.loads((tmp_path / f"{name}-llava.submission.json").read_text())
    assert made["gqa"] == [
        {"questionId": "201307251", "prediction": "no"},
        {"questionId": "202", "prediction": "a man"},
        {"questionId": "203", "prediction": "yes"},
    ]
    assert made["textvqa-test"] == [
        {"question_id": 34602, "answer": "dakota"},
        {"question_id": 34603, "answer": ""},
        {"question_id": 34604, "answer": "2 dogs isn't it"},
    ]


@pytest.mark.parametrize("write", LAYOUTS["vqav2-testdev"])
def test_submission_of_vqav2_answers_every_question_of_test2015(write, tmp_path):
    write(tmp_path)
    results = scored("vqav2-testdev", "paper", read("vqav2-testdev", tmp_path)[:2], ["Dark-red.", "The yes"])
    assert BENCHMARKS["vqav2-testdev"].submission(results) == [
        {"question_id": 7, "answer": ""},
        {"question_id": 458752000, "answer": "dark red"},
        {"question_id": 42000, "answer": "yes"},
        {"question_id": 42001, "answer": ""},
        {"question_id": 9, "answer": ""},
    ]
