"""LLaVA-Bench in the Wild: both layouts, requests to the judge and its review, against LLaVA's scripts."""

import json

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from harness import LLAVA, ask, folder
from pictures import encode

from fastvlm_jax.evaluate.benchmark import Result
from fastvlm_jax.evaluate.benchmarks import llava_w
from fastvlm_jax.evaluate.published import read_lines

(BENCHMARK,) = llava_w.BENCHMARKS
# (question_id, image, question, category, GPT-4's answer)
QUESTIONS = [
    (0, "001", "What is the name of this famous sight?", "conv", "Diamond Head."),
    (1, "001", "Describe this photo in detail.", "detail", "It shows a view\n\nof Diamond Head [End of Assistant 1]."),
    (2, "002", "What {is} special?", "complex", "A café, \u201cChez\u201d."),
]
CAPTIONS = {"001": "An aerial view of Diamond Head.", "002": ["A café.", "People sit outside."]}
ANSWERS = ["A mountain", "", "Two\nlines | {x}"]


def picture(colour: int) -> bytes:
    return encode(PIL.Image.new("RGB", (2, 2), (colour, 0, 0)), format="png")


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def official(tmp_path):
    where = tmp_path / "official"
    (where / "images").mkdir(parents=True)
    for name in CAPTIONS:
        (where / f"images/{name}.jpg").write_bytes(picture(int(name)))
    questions = [{"question_id": i, "image": f"{im}.jpg", "text": q, "category": c} for i, im, q, c, _ in QUESTIONS]
    write(where / "questions.jsonl", questions)
    write(where / "context.jsonl", [{"id": k, "image": f"{k}.jpg", "caption": v} for k, v in CAPTIONS.items()])
    more = {"prompt": "", "answer_id": "x", "model_id": "gpt4", "metadata": {}}
    write(where / "answers_gpt4.jsonl", [{"question_id": i, "text": a, **more} for i, _, _, _, a in QUESTIONS][::-1])
    return epath.Path(where)


@pytest.fixture
def hub(tmp_path):
    rows = {
        "question_id": [str(i) for i, *_ in QUESTIONS],
        "question": [q for _, _, q, _, _ in QUESTIONS],
        "image": [{"bytes": picture(int(image)), "path": f"{image}.jpg"} for _, image, *_ in QUESTIONS],
        "category": [c for *_, c, _ in QUESTIONS],
        "image_id": [image for _, image, *_ in QUESTIONS],
        "gpt_answer": [a for *_, a in QUESTIONS],
        "caption": ["\n".join(np.atleast_1d(CAPTIONS[image])) for _, image, *_ in QUESTIONS],
    }
    where = tmp_path / "hub" / "data"
    where.mkdir(parents=True)
    pq.write_table(pa.table(rows), where / "train-00000-of-00001.parquet")
    return epath.Path(where.parent)


def answered(rows) -> list[Result]:
    return [Result(row, "", answer, None, ("d",)) for row, answer in zip(rows, ANSWERS, strict=True)]


def test_both_layouts_give_the_same_rows(official, hub):
    rows, others = BENCHMARK.read(official), BENCHMARK.read(hub)
    assert [(r.id, r.question, r.references, r.fields, r.groups) for r in rows] == [
        (r.id, r.question, r.references, r.fields, r.groups) for r in others
    ]
    assert [[picture.read() for picture in row.pictures] for row in rows] == [
        [picture.read() for picture in row.pictures] for row in others
    ]
    assert [row.id for row in rows] == ["0", "1", "2"]
    (official.parent / "data").mkdir()
    official.rename(official.parent / "data" / "llava-bench-in-the-wild")
    assert BENCHMARK.read(official.parent / "data") == rows
    assert rows[2].fields == {"caption": "A café.\nPeople sit outside."}
    assert (rows[0].references, rows[0].groups) == (("Diamond Head.",), {"category": "conv"})


def test_prompts_are_those_of_llava_and_lmms_eval(official):
    code = """
import importlib
utils = importlib.import_module("lmms_eval.tasks.llava-in-the-wild.utils")
def main(docs): return [utils.llava_doc_to_text(doc, {"pre_prompt": "", "post_prompt": ""}) for doc in docs]
"""
    expected = ask("lmms-eval-0.7.3", code, [{"question": q} for _, _, q, _, _ in QUESTIONS])
    for name in ("paper", "llava", "lmms-eval"):  # LLaVA's model_vqa.py puts "<image>\n" in front of the text
        prompts = [BENCHMARK.protocol(name).prompt(row) for row in BENCHMARK.read(official)]
        assert prompts == [(("user", (0, f"\n{text}")),) for text in expected]
    assert [BENCHMARK.protocol(name).max_tokens for name in ("paper", "llava", "lmms-eval")] == [1024, 1024, 4096]


# Runs LLaVA's script with a judge that gives the replies, and returns what it was asked and what the script prints.
LLAVA_SCRIPTS = """
import contextlib, io, runpy, sys, types
def main(value):
    asked, replies = [], list(value["replies"])
    def create(**request):
        asked.append(request)
        return {"choices": [{"message": {"content": replies.pop(0)}}]}
    openai = types.ModuleType("openai")
    openai.ChatCompletion = types.SimpleNamespace(create=create)
    openai.error = types.SimpleNamespace(RateLimitError=OSError)
    sys.modules["openai"] = openai
    sys.argv = ["", "-q", value["questions"], "-c", value["context"], "-a", *value["answers"], "-r", value["rule"],
                "-o", value["review"]]
    runpy.run_module("llava.eval.eval_gpt_review_bench", run_name="__main__")
    sys.argv, printed = ["", "-f", value["review"]], io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_module("llava.eval.summarize_gpt_review", run_name="__main__")
    return {"asked": asked, "printed": printed.getvalue()}
"""


@pytest.fixture
def scripts(official, tmp_path):
    """Returns a function: the judge's replies -> (requests, printed lines, path of the review) of LLaVA's scripts."""

    def run(replies):
        answers = [tmp_path / "gpt4.jsonl", tmp_path / "ours.jsonl"]
        texts = ([a for *_, a in QUESTIONS], ANSWERS)
        for path, found in zip(answers, texts, strict=True):
            write(path, [{"question_id": i, "text": text, "answer_id": "x"} for i, text in enumerate(found)])
        value = {
            "questions": str(official / "questions.jsonl"),
            "context": str(official / "context.jsonl"),
            "answers": list(map(str, answers)),
            "rule": str(folder("lmms-eval-0.7.3") / "lmms_eval/tasks/llava-in-the-wild/rule.json"),
            "review": str(tmp_path / "review.jsonl"),
            "replies": replies,
        }
        done = ask(LLAVA, LLAVA_SCRIPTS, value)
        return done["asked"], done["printed"].splitlines(), epath.Path(value["review"])

    return run


def test_the_judge_is_asked_what_llavas_script_asks_and_its_review_is_summed_alike(official, scripts):
    rows = BENCHMARK.read(official)
    asked, printed, path = scripts(["8 6\nThe first.", "9,8.5\nThe second.", "10 2"])
    lines = BENCHMARK.protocol("llava").judge(answered(rows))
    keys = ("model", "messages", "temperature", "max_tokens")
    assert [{key: line[key] for key in keys} for line in lines] == asked
    assert [line["category"] for line in lines] == ["llava_bench_conv", "llava_bench_detail", "llava_bench_complex"]
    assert {line["model"] for line in BENCHMARK.protocol("paper").judge(answered(rows))} == {"gpt-4-0613"}
    assert printed[1:5] == [
        "all 61.1 90.0 55.0",
        "llava_bench_complex 20.0 100.0 20.0",
        "llava_bench_conv 75.0 80.0 60.0",
        "llava_bench_detail 94.4 90.0 85.0",
    ]
    review = read_lines(path)
    for given in (review, review[::-1], [{k: v for k, v in line.items() if k != "tuple"} for line in review]):
        summary = BENCHMARK.protocol("paper").review(given, rows)
        assert (summary["score"], summary["n"], summary["unparsed"]) == (pytest.approx(100 * 16.5 / 27), 3, 0.0)
        assert summary["figures"] == {"reference": pytest.approx(90.0), "answer": pytest.approx(55.0)}
        groups = summary["groups"]["category"]
        shown = [round(groups[name]["score"], 1) for name in ("complex", "conv", "detail")]
        assert shown == [20.0, 75.0, 94.4]


def test_a_reply_without_scores_is_left_out_where_llavas_script_lets_it_in(official, scripts):
    rows = BENCHMARK.read(official)
    _, printed, path = scripts(["8 6\n", "I cannot tell.", "10 2"])
    assert printed[1] == "all 41.2 56.7 23.3"  # 7 / 17, with -1 of 3 replies: 8 + 10 - 1 and 6 + 2 - 1
    summary = BENCHMARK.protocol("paper").review(read_lines(path), rows)
    assert (summary["score"], summary["n"]) == (pytest.approx(100 * 8 / 18), 2)
    assert summary["unparsed"] == pytest.approx(1 / 3)
    assert (summary["review"]["replies_without_score"], summary["review"]["replies"]) == (["1"], 3)
    assert "left out" in summary["review"]["note"] and "-1" in summary["review"]["note"]
    assert "detail" not in summary["groups"]["category"]


def test_the_judge_is_asked_what_lmms_eval_asks_and_its_replies_are_summed_alike(official):
    code = """
import importlib, types
utils = importlib.import_module("lmms_eval.tasks.llava-in-the-wild.utils")
def main(value):
    asked, results = [], []
    for doc, answer, reply in value:
        def verify(question, prediction, ground_truth, content):
            asked.append(content)
            found = utils._parse_comparative_scores(reply)
            return types.SimpleNamespace(raw_output=reply, metadata=found.metadata)
        utils._get_pipeline = lambda: verify
        results.append(utils.llava_process_results(doc, [answer]))
    names = ("all", "conv", "detail", "complex")
    scores = [getattr(utils, f"llava_{n}_aggregation")([r[f"gpt_eval_llava_{n}"] for r in results]) for n in names]
    return [asked, scores]
"""
    rows, protocol = BENCHMARK.read(official), BENCHMARK.protocol("lmms-eval")
    replies = ["Scores: 8; 6", "9,8.5\nThe second.", "10 2"]
    docs = [
        {"question": q, "gpt_answer": a, "caption": CAPTIONS[image], "category": c} for _, image, q, c, a in QUESTIONS
    ]
    asked, scores = ask("lmms-eval-0.7.3", code, list(zip(docs, ANSWERS, replies, strict=True)))
    lines = protocol.judge(answered(rows))
    assert [line["messages"] for line in lines] == [[{"role": "user", "content": content}] for content in asked]
    review = [{"question_id": str(i), "content": reply} for i, reply in enumerate(replies)]
    summary = protocol.review(review, rows)
    groups = summary["groups"]["category"]
    found = [summary["score"], *(groups[name]["score"] for name in ("conv", "detail", "complex"))]
    assert [round(score, 1) for score in found] == scores == [61.1, 75.0, 94.4, 20.0]
    assert BENCHMARK.protocol("paper").review(review, rows)["review"]["replies_without_score"] == ["0"]


def test_the_error_of_a_review_is_clustered_by_image(official):
    rows = BENCHMARK.read(official)  # two images: a half is one of them
    summary = BENCHMARK.protocol("paper").review(
        [{"question_id": i, "content": f"10 {score}"} for i, score in enumerate((4, 6, 9))], rows
    )
    assert summary["standard_error_method"].startswith("half-sample bootstrap over images: 2 clusters")
    assert summary["standard_error"] == pytest.approx(20, rel=0.01)  # 50 or 90, each in half of the draws


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"content": "8 6"}], "line 1 of the review has no question_id: it has content"),
        ([{"question_id": 7, "content": "8 6"}], "line 1 of the review: the benchmark has no question '7'"),
        ([{"question_id": 0}, {"question_id": "0"}], "line 2 of the review: the question '0' stands twice"),
        ([], "the review holds no lines"),
    ],
)
def test_a_review_of_other_questions_is_refused(official, lines, message):
    with pytest.raises(ValueError) as caught:
        BENCHMARK.protocol("paper").review(lines, BENCHMARK.read(official))
    assert str(caught.value) == message


def test_a_review_without_scores_invents_none(official):
    for line in ({"question_id": 1}, {"question_id": 1, "tuple": [-1, -1]}, {"question_id": 1, "tuple": ["a", None]}):
        summary = BENCHMARK.protocol("paper").review([line], BENCHMARK.read(official))
        assert (summary["score"], summary["standard_error"], summary["interval_95"]) == (None, None, None)
        assert summary["not_scored"] == "not scored: the judge's replies hold no scores"
        assert summary["review"]["questions_without_reply"] == 2


def replaced(path: epath.Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "questions.jsonl").unlink(), "expected are questions.jsonl, context.jsonl"),
        (lambda f: (f / "context.jsonl").unlink(), "there is no"),
        (lambda f: (f / "images/001.jpg").unlink(), "lacks 1 of 2 images, the first '001.jpg'"),
        (lambda f: (f / "images").rmtree(), "has no folder of images: expected is images"),
        (lambda f: replaced(f / "context.jsonl", "002.jpg", "003.jpg"), "line 3: context.jsonl has no image '002.jpg'"),
        (
            lambda f: replaced(f / "answers_gpt4.jsonl", ": 2,", ": 5,"),
            "line 3: answers_gpt4.jsonl has no question_id '2'",
        ),
        (lambda f: replaced(f / "answers_gpt4.jsonl", ": 2,", ": 1,"), "line 2: the question_id '1' stands twice"),
        (
            lambda f: replaced(f / "answers_gpt4.jsonl", '"text"', '"texts"'),
            "answers_gpt4.jsonl, question 2, has no text: it has question_id, texts",
        ),
        (
            lambda f: replaced(f / "context.jsonl", '"caption"', '"c"'),
            "context.jsonl, '001.jpg', has no caption: it has",
        ),
        (lambda f: replaced(f / "questions.jsonl", '"conv"', '"chat"'), "line 1: its category is 'chat', not conv or"),
        (lambda f: replaced(f / "questions.jsonl", '"text"', '"texts"'), "line 1 has no text: it has question_id"),
        (lambda f: replaced(f / "questions.jsonl", '_id": 1', '_id": 0'), "the id '0' of row 1 stands twice"),
    ],
)
def test_wrong_files_are_named_in_a_line(official, break_it, message):
    break_it(official)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        BENCHMARK.read(official)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_parquet_file_without_a_column_or_with_a_null_image_is_refused(hub):
    path = hub / "data" / "train-00000-of-00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["caption"]), path)
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet has no column caption"):
        BENCHMARK.read(hub)
    images = pa.array([None, *table["image"].to_pylist()[1:]], table.schema.field("image").type)
    pq.write_table(table.set_column(table.schema.get_field_index("image"), "image", images), path)
    with pytest.raises(ValueError, match="row 0, id '0', has no image"):
        BENCHMARK.read(hub)
