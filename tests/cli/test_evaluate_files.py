"""`fastvlm evaluate` where it asks no model: --list, --compare and --review."""

import json

import PIL.Image
import pytest
from command import fastvlm

from fastvlm_jax.evaluate.benchmarks import BENCHMARKS


@pytest.fixture
def llava_w(tmp_path):
    """A folder of LLaVA-Bench with two questions, and a review of them."""
    folder = tmp_path / "data" / "llava-w"
    (folder / "images").mkdir(parents=True)
    for name in ("001", "002"):
        PIL.Image.new("RGB", (2, 2), (int(name), 0, 0)).save(folder / f"images/{name}.jpg")
    lines = {
        "questions": [
            {"question_id": i, "image": f"00{i + 1}.jpg", "text": "What?", "category": "conv"} for i in range(2)
        ],
        "context": [{"id": f"00{i}", "image": f"00{i}.jpg", "caption": "A view."} for i in (1, 2)],
        "answers_gpt4": [{"question_id": i, "text": "It is.", "answer_id": "x"} for i in range(2)],
    }
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    review = tmp_path / "review.jsonl"
    replies = [{"question_id": 1, "content": "10 5\n.."}, {"question_id": 0, "content": "no"}]
    review.write_text("".join(json.dumps(row) + "\n" for row in replies))
    return folder.parent, review


def predictions(path, scores):
    row = {"benchmark": "gqa", "protocol": "paper", "question": "Why?", "prompt": "", "answer": "x", "parsed": "x"}
    row |= {"references": ["x"], "groups": {}, "images": []}
    path.write_text("".join(json.dumps({**row, "id": str(i), "score": s}) + "\n" for i, s in enumerate(scores)))
    return path


def test_list_tells_all_benchmarks_and_all_of_one(monkeypatch, capsys):
    status, out, err = fastvlm(monkeypatch, capsys, "evaluate", "--list")
    assert (status, err) == (0, "") and all(f"{name} " in out for name in BENCHMARKS)
    status, out, err = fastvlm(monkeypatch, capsys, "evaluate", "--list", "--benchmark=docvqa,mm-vet")
    assert (status, err) == (0, "") and "First please" not in out
    assert out.startswith("docvqa            DocVQA, validation | 5,349 rows") and "\nmm-vet            MM-Vet" in out
    assert "  rule            ANLS" in out and "gqa" not in out


def test_compare_prints_the_difference_and_writes_all_of_it(monkeypatch, capsys, tmp_path):
    a, b = predictions(tmp_path / "a.jsonl", [1, 0, 0]), predictions(tmp_path / "b.jsonl", [1, 1, 1])
    ask = ("evaluate", "--compare", a, b)
    status, out, err = fastvlm(monkeypatch, capsys, *ask)
    assert (status, err) == (0, "") and "B - A  +66.67  95 %: +1.33 to +100.00" in out
    assert fastvlm(monkeypatch, capsys, *ask, f"--output={tmp_path / 'out'}") == (0, out, "")
    assert json.loads((tmp_path / "out/comparison.json").read_text())["better"] == 2


def test_review_scores_a_judges_replies(monkeypatch, capsys, tmp_path, llava_w):
    data, review = llava_w
    ask = ("evaluate", f"--review={review}", "--benchmark=llava-w", f"--data={data}", f"--output={tmp_path / 'out'}")
    status, out, err = fastvlm(monkeypatch, capsys, *ask)
    summary = json.loads(out)
    assert (status, err) == (0, "")
    assert (summary["score"], summary["n"], summary["standard_error"]) == (50.0, 1, None)
    assert summary["protocol"]["name"] == "paper" and summary["review"]["replies_without_score"] == ["0"]
    assert json.loads((tmp_path / "out/llava-w-paper.review.json").read_text()) == summary


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--list", "--benchmark=doc-vqa"], 1, "there is no benchmark 'doc-vqa' (did you mean docvqa?)"),
        (["--list", "--model=x"], 2, "--model has no meaning with --list"),
        (["--compare", "A"], 2, "--compare takes two files of predictions, A.jsonl B.jsonl, and not 1"),
        (["--compare"], 2, "name at least one file of predictions"),
        (["--compare", "A", "A"], 1, "there is no file nowhere.jsonl"),
        (["--compare", "A", "A", "--limit=3"], 2, "--limit has no meaning with --compare"),
        (
            ["--review=nowhere.jsonl", "--benchmark=llava-w", "--data=D"],
            1,
            "there is no file nowhere.jsonl with a judge's",
        ),
        (["--review=R", "--benchmark=gqa", "--data=D"], 1, "must be one that a judge scores: llava-w or mm-vet"),
        (["--review=R", "--data=D"], 1, "must be one that a judge scores: llava-w or mm-vet"),
        (["--review=R", "--benchmark=llava-w"], 2, "--data is missing"),
        (["--review=R", "--benchmark=mm-vet", "--data=D"], 1, "expected are mm-vet.json and images/"),
        (["--review=A", "--benchmark=llava-w", "--data=D"], 1, "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_line(monkeypatch, capsys, llava_w, flags, status, words):
    data, review = llava_w
    names = {"A": "nowhere.jsonl", "--review=R": f"--review={review}", "--data=D": f"--data={data}"}
    names["--review=A"] = "--review=nowhere.jsonl"
    found, out, err = fastvlm(monkeypatch, capsys, "evaluate", *(names.get(flag, flag) for flag in flags))
    assert (found, out) == (status, "") and words in err and err.startswith("fastvlm evaluate: "), err
    assert len(err.splitlines()) == 1


def test_a_review_of_other_questions_names_its_file(monkeypatch, capsys, llava_w):
    data, review = llava_w
    review.write_text('{"question_id": 7, "content": "8 6"}\n')
    _, _, err = fastvlm(monkeypatch, capsys, "evaluate", f"--review={review}", "--benchmark=llava-w", f"--data={data}")
    assert f"{review}: line 1 of the review: the benchmark has no question '7'" in err
