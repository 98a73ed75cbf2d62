"""DocVQA, InfoVQA, ChartQA, OCRBench, RealWorldQA and MME: rows from every layout, prompts and figures.

Their files are written by published_documents.py; test_document_wrong_files.py has those that are wrong.
"""

import dataclasses

import harness
import pytest
from published_documents import HUB, OFFICIAL, official_docvqa, official_infovqa, table_mme, table_ocrbench, write_hub
from published_files import read, without

from fastvlm_jax.evaluate.benchmark import Result
from fastvlm_jax.evaluate.benchmarks import BENCHMARKS
from fastvlm_jax.evaluate.results import summarise


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
    docs = {name: [without(row, "image") for row in HUB[name][1]] for name in names}
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
