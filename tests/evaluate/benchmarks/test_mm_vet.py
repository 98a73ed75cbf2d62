"""MM-Vet: its layouts, requests to the judge, its review and the submission, against lmms-eval's code."""

import dataclasses
import json

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from harness import LMMS_EVAL, ask
from pictures import encode

from fastvlm_jax.evaluate import published, suite
from fastvlm_jax.evaluate.benchmark import Result
from fastvlm_jax.evaluate.benchmarks import mm_vet
from fastvlm_jax.evaluate.run import Scored

(BENCHMARK,) = mm_vet.BENCHMARKS
# (id, question, answer, capabilities)
QUESTIONS = [
    ("v1_0", "What is x in the equation?", "-1<AND>-5", ["ocr", "math"]),
    ("v1_1", "Who is\nthis?", "a<OR>b | c", ["rec", "know"]),
    ("v1_2", "What does it say?", "café", ["ocr"]),
    ("v1_3", "Where?", "left", ["math", "ocr"]),
]
ANSWERS = ["x = -1\nor -5", "", "{caf\u00e9} | 1.0", "right"]


def picture(number: int) -> bytes:
    return encode(PIL.Image.new("RGB", (2, 2), (number // 2, 0, 0)), format="png")  # two questions an image


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(len(QUESTIONS)):
        (tmp_path / f"images/v1_{number}.png").write_bytes(picture(number))
    return epath.Path(tmp_path)


@pytest.fixture
def official(images):
    rows = {
        name: {"imagename": f"{name}.png", "question": q, "answer": a, "imagesource": "..", "capability": c}
        for name, q, a, c in QUESTIONS
    }
    (images / "mm-vet.json").write_text(json.dumps(rows))
    return images


@pytest.fixture
def hub(tmp_path):
    rows = {
        "question_id": [name for name, *_ in QUESTIONS],
        "image": [{"bytes": picture(number), "path": None} for number in range(len(QUESTIONS))],
        "question": [question for _, question, _, _ in QUESTIONS],
        "answer": [answer for *_, answer, _ in QUESTIONS],
        "image_source": [".."] * len(QUESTIONS),
        "capability": [",".join(capabilities) for *_, capabilities in QUESTIONS],
    }
    (tmp_path / "hub" / "data").mkdir(parents=True)
    pq.write_table(pa.table(rows), tmp_path / "hub/data/test-00000-of-00001.parquet")
    return epath.Path(tmp_path / "hub")


def answered(rows) -> list[Result]:
    return [Result(row, "", answer, None) for row, answer in zip(rows, ANSWERS, strict=True)]


def test_both_layouts_give_the_same_rows(official, hub):
    rows, others = BENCHMARK.read(official), BENCHMARK.read(hub)
    assert [(r.id, r.question, r.references, r.fields, r.groups) for r in rows] == [
        (r.id, r.question, r.references, r.fields, r.groups) for r in others
    ]
    assert [[p.read() for p in row.pictures] for row in rows] == [[p.read() for p in row.pictures] for row in others]
    (official / "data" / "mm-vet").mkdir(parents=True)
    for name in ("mm-vet.json", "images"):
        (official / name).rename(official / "data" / "mm-vet" / name)
    assert BENCHMARK.read(official / "data") == rows
    assert rows[0].references == ("-1<AND>-5",)
    assert rows[0].groups == rows[3].groups == {"capabilities": "math, ocr"}


def test_llavas_questions_have_the_same_ids_and_no_references(images):
    lines = [
        {"question_id": number, "image": f"{name}.png", "text": question, "category": "default"}
        for number, (name, question, _, _) in enumerate(QUESTIONS)
    ]
    (images / "llava-mm-vet.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = BENCHMARK.read(images)
    assert [(row.id, row.question, row.references) for row in rows] == [(n, q, None) for n, q, _, _ in QUESTIONS]
    assert BENCHMARK.protocol("llava").judge(answered(rows)) == []
    assert list(BENCHMARK.submission(answered(rows))) == ["v1_0", "v1_1", "v1_2", "v1_3"]


@pytest.mark.parametrize("version", LMMS_EVAL)
def test_prompts_are_those_of_lmms_eval(official, version):
    code = """
import importlib, pathlib, yaml
utils = importlib.import_module("lmms_eval.tasks.mmvet.utils")
def main(docs):
    text = pathlib.Path(utils.__file__).with_name("mmvet.yaml").read_text().replace("!function ", "")
    settings = yaml.safe_load(text)["lmms_eval_specific_kwargs"]["default"]
    return [utils.doc_to_text(doc, settings) for doc in docs]
"""
    expected = ask(version, code, [{"question": question} for _, question, _, _ in QUESTIONS])
    rows = BENCHMARK.read(official)
    for name in ("paper", "lmms-eval"):
        prompts = [BENCHMARK.protocol(name).prompt(row) for row in rows]
        assert prompts == [(("user", (0, f"\n{text}")),) for text in expected]
        assert prompts[0][0][1][1].startswith("\nFirst please perform reasoning, and think step by step")
    assert BENCHMARK.protocol("llava").prompt(rows[0]) == (("user", (0, "\nWhat is x in the equation?")),)


# Lets lmms-eval ask a judge that gives the replies; returns what it is asked, and what the aggregation logs.
REVIEW = """
import importlib, types
utils = importlib.import_module("lmms_eval.tasks.mmvet.utils")
class Column(list):
    def squeeze(self): return self
    def tolist(self): return self
def main(value):
    asked, results, logged = [], [], []
    for doc, answer, reply in value["rows"]:
        def judge(prompt, temperature=0.0):
            asked.append(prompt)
            return reply, "judge"
        utils.get_chat_response = judge
        results.append(utils.mmvet_process_results(doc, [answer])["gpt_eval_score"])
    utils.eval_logger = types.SimpleNamespace(info=logged.append)
    utils.cap_columns, utils.cap_details_columns = map(Column, value["capabilities"])
    return [asked, utils.mmvet_aggregate_results(results), logged]
"""


@pytest.mark.parametrize("version", ["lmms-eval-0.7.3", "lmms-eval-0.2.3"])
def test_the_judge_is_asked_what_lmms_eval_asks_and_its_review_is_summed_alike(official, version):
    rows = BENCHMARK.read(official)
    protocol = BENCHMARK.protocol("lmms-eval" if version == "lmms-eval-0.7.3" else "paper")
    replies = ["1.0", "0.3 because", "0.45", "0"]
    docs = [{"question_id": name, "question": q, "answer": a, "capability": ",".join(c)} for name, q, a, c in QUESTIONS]
    names = [["rec", "ocr", "know", "math"], ["rec_know", "ocr", "math_ocr"]]
    value = {"rows": list(zip(docs, ANSWERS, replies, strict=True)), "capabilities": names}
    asked, score, logged = ask(version, REVIEW, value)
    lines = protocol.judge(answered(rows))
    assert [line["messages"] for line in lines] == [[{"role": "user", "content": prompt}] for prompt in asked]
    model = "gpt-4o-2024-11-20" if version == "lmms-eval-0.7.3" else "gpt-4-0613"
    assert {(line["model"], line["temperature"], line["max_tokens"]) for line in lines} == {(model, 0.0, 128)}
    review = [{"question_id": name, "content": reply} for (name, *_), reply in zip(QUESTIONS, replies, strict=True)]
    for given in (review, review[::-1], [{"question_id": "v1_3", "score": 0}, *review[:3]]):
        summary = protocol.review(given, rows)
        assert (summary["score"], summary["n"]) == (pytest.approx(score), 4)
        single, combined = summary["groups"]["capability"], summary["groups"]["capabilities"]
        found = [f"Overall Score: {summary['score']:.2f}"]
        found += [f"Score for {name}: {single[name]['score']:.2f}" for name in names[0]]
        exact = {"rec_know": "know, rec", "ocr": "ocr", "math_ocr": "math, ocr"}
        found += [f"Score for {name}: {combined[exact[name]]['score']:.2f}" for name in names[1]]
        assert found == logged


def test_a_review_worked_by_hand(official):
    """Grades 1, none, 0.5 and 0: the mean of three is a half; questions 2 and 3 are about one image."""
    review = [
        {"question_id": "v1_0", "score": 1},
        {"question_id": "v1_1", "content": "Sorry, I cannot."},
        {"question_id": "v1_2", "content": "0.5"},
        {"question_id": "v1_3", "content": "0.0 The answer"},
    ]
    summary = BENCHMARK.protocol("paper").review(review, BENCHMARK.read(official))
    assert (summary["score"], summary["n"], summary["unparsed"]) == (50.0, 3, 0.25)
    assert summary["review"]["replies_without_score"] == ["v1_1"]
    # Deviations 1/2, 0, -1/2: squares 1/2; the clusters' sums are 1/2 and -1/2, so that clustering adds nothing.
    assert summary["standard_error"] == pytest.approx(100 * (1 / 12) ** 0.5)
    assert summary["standard_error_method"] == "central limit theorem, clustered by image: 2 clusters"
    assert summary["groups"]["capability"]["ocr"]["n"] == 3


def test_the_submission_is_that_of_llavas_converter(official):
    """LLaVA's scripts/convert_mmvet_for_eval.py writes {"v1_QUESTION_ID": text} in the order of the answers."""
    assert BENCHMARK.submission(answered(BENCHMARK.read(official))) == dict(
        zip(["v1_0", "v1_1", "v1_2", "v1_3"], ANSWERS, strict=True)
    )


def test_a_scored_model_leaves_requests_and_a_submission_but_no_score(official, tmp_path):
    rows, protocol = BENCHMARK.read(official), BENCHMARK.protocol()
    results = [dataclasses.replace(result, images=("digest",)) for result in answered(rows)]
    entry = suite.Entry(BENCHMARK, protocol, rows)
    summary = suite.write(tmp_path / "out", entry, Scored(results, [], 4, 1.0), None, {}, True)
    assert (summary["score"], summary["questions"]) == (None, 4)
    assert "only a judge can score it; mm-vet-paper.judge.jsonl is what to ask it" in summary["not_scored"]
    assert published.read_lines(epath.Path(tmp_path / "out/mm-vet-paper.judge.jsonl")) == protocol.judge(results)
    assert json.loads((tmp_path / "out/mm-vet-paper.submission.json").read_text())["v1_3"] == "right"


def rewritten(folder: epath.Path, change) -> None:
    rows = json.loads((folder / "mm-vet.json").read_text())
    (folder / "mm-vet.json").write_text(json.dumps(change(rows)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [rows], "holds no object: it is not the published file"),
        (lambda rows: {}, "holds no rows"),
        (lambda rows: {**rows, "v1_0": []}, "mm-vet.json: 'v1_0' is no object"),
        (
            lambda rows: {**rows, "v1_2": {**rows["v1_2"], "imagename": "9.png"}},
            "lacks 1 of 4 images, the first '9.png'",
        ),
        (lambda rows: {**rows, "v1_2": {**rows["v1_2"], "capability": "ocr"}}, "'v1_2': its capability is no list"),
        (lambda rows: {**rows, "v1_2": {**rows["v1_2"], "answer": 5}}, "'v1_2': answer is 5, not a text"),
        (lambda rows: {**rows, "v1_2": {"imagename": "v1_2.png"}}, "'v1_2' has no capability: it has imagename"),
    ],
)
def test_wrong_files_are_named_in_a_line(official, change, message):
    rewritten(official, change)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        BENCHMARK.read(official)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_folders_of_another_layout_are_refused(tmp_path, hub):
    with pytest.raises(FileNotFoundError, match=r"holds 'hub': expected are mm-vet\.json and images/"):
        BENCHMARK.read(epath.Path(tmp_path))
    path = hub / "data/test-00000-of-00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["capability"]), path)
    with pytest.raises(ValueError, match=r"test-00000-of-00001\.parquet has no column capability"):
        BENCHMARK.read(hub)
    pq.write_table(pa.concat_tables([table, table]), path)
    with pytest.raises(ValueError, match=r"the id 'v1_0' of row 4 stands twice"):
        BENCHMARK.read(hub)
