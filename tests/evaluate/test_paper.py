"""The paper's figures, against the means that its tables print, and the table that shows them beside a model's."""

import pytest

from fastvlm_jax.evaluate.paper import PAPER, rows_of
from fastvlm_jax.evaluate.score_table import make_table
from fastvlm_jax.models.sizes import LLM_SIZES, QWEN2, VISION_SIZES

# Avg-5 as tables 1 and 4 print it, and the means of table 6's columns: (llm, encoder, image size, data) -> mean.
AVG_5 = {
    ("vicuna-7b", "clip_vit_l_336", 336, "0.5+0.6"): 60.1,
    ("vicuna-7b", "clip_vit_l_336", 336, "0.5+0.6 tuned"): 61.2,
    ("vicuna-7b", "mci2", 256, "0.5+0.6"): 54.4,
    ("vicuna-7b", "mci2", 768, "0.5+0.6"): 62.6,
    ("vicuna-7b", "fastvithd", 256, "0.5+0.6"): 55.5,  # 55.4 of the rounded figures
    ("vicuna-7b", "fastvithd", 512, "0.5+0.6"): 60.4,
    ("vicuna-7b", "fastvithd", 768, "0.5+0.6"): 62.8,
    ("vicuna-7b", "fastvithd", 1024, "0.5+0.6"): 63.9,
    ("vicuna-7b", "convnext_l", 320, "0.5+0.6"): 57.7,
    ("vicuna-7b", "convnext_l", 512, "0.5+0.6"): 61.3,
    ("vicuna-7b", "convnext_xxl", 256, "0.5+0.6"): 58.3,
    ("vicuna-7b", "convnext_xxl", 512, "0.5+0.6"): 63.9,
    ("0.5b", "fastvithd", 1024, "15+1.1"): 66.6,
    ("0.5b", "fastvithd", 1024, "15+12.5"): 70.4,
    ("0.5b", "fastvithd", 1024, "15+23.1"): 72.6,
    ("1.5b", "fastvithd", 1024, "15+12.5"): 74.0,
    ("1.5b", "fastvithd", 1024, "15+23.1"): 76.0,
    ("7b", "fastvithd", 1024, "15+1.1"): 74.8,
    ("7b", "fastvithd", 1024, "15+6.5"): 76.2,
    ("7b", "fastvithd", 1024, "15+12.5"): 76.5,
    ("7b", "fastvithd", 1024, "15+23.1"): 78.0,
}


def test_the_means_of_five_benchmarks_are_the_printed_ones():
    found = {(row.llm, row.encoder, row.image_size, row.data): row.avg_5 for row in PAPER if not row.grids}
    assert {key: found[key] for key in AVG_5} == {key: pytest.approx(mean, abs=0.11) for key, mean in AVG_5.items()}


def test_every_row_is_of_a_size_that_exists_and_stands_once():
    assert {row.llm for row in PAPER} <= set(LLM_SIZES) and {row.encoder for row in PAPER} <= set(VISION_SIZES)
    keys = [(row.llm, row.encoder, row.image_size, row.grids, row.data) for row in PAPER]
    assert len(set(keys)) == len(keys) == 42
    assert all(10 < figure < 100 for row in PAPER for figure in row.figures.values())


def test_figures_of_several_tables_stand_in_one_row():
    (row,) = [row for row in PAPER if (row.llm, row.data) == ("7b", "15+6.5")]
    assert row.tables == "6, 11, 12"
    assert [row.figures[name] for name in ("gqa", "infovqa", "cvbench-3d", "mathvista")] == [66.0, 44.2, 69.6, 57.6]
    assert row.model == "Qwen2-7B, FastViTHD, 1024 px"


def test_a_models_rows_are_found_by_its_config():
    vision, llm = VISION_SIZES["fastvithd"], QWEN2 | LLM_SIZES["0.5b"]
    built = {**vision, "layers": list(vision["layers"]), "embed_dims": list(vision["embed_dims"]), "form": "folded"}
    assert [row.data for row in rows_of(built, llm, 1024)] == ["15+1.1", "15+12.5", "15+23.1", "card"]
    (tiles, more) = rows_of(built, llm, 1024, [[2, 2]])
    assert tiles.model == "Qwen2-0.5B, FastViTHD, 1024 px AnyRes 2x2" and more.data == "15+23.1"
    (llava, tuned) = rows_of(VISION_SIZES["clip_vit_l_336"], LLM_SIZES["vicuna-7b"], 336)
    assert (llava.figures["gqa"], tuned.figures["gqa"]) == (62.0, 63.5)


def test_other_models_have_no_rows():
    vision, llm = VISION_SIZES["fastvithd"], LLM_SIZES["0.5b"]
    assert rows_of(vision, llm, 512) == rows_of(vision, LLM_SIZES["tiny"], 1024) == rows_of(None, llm, 1024) == []
    assert rows_of({**vision, "layers": (2, 12, 24, 4, 4)}, llm, 1024) == []


def summary(
    name: str, title: str, score: float | None, error: float | None, count: int, protocol: str = "paper"
) -> dict:
    return {
        "benchmark": name,
        "title": title,
        "score": score,
        "standard_error": error,
        "not_scored": None if score else "not scored: only a judge can score it",
        "questions": count,
        "questions_published": 5000,
        "protocol": {"name": protocol},
    }


FIVE = [
    summary("gqa", "GQA, testdev balanced", 60.0, 0.3, 12578),
    summary("textvqa", "TextVQA, validation", 50.0, 0.4, 5000),
    summary("pope", "POPE, all three kinds of questions", 80.04, None, 9000),
    summary("docvqa", "DocVQA, validation", 40.0, 0.5, 100, "lmms-eval"),
    summary("seedbench-image", "SEED-Bench, images", 70.0, 0.6, 14232),
]


def test_a_table_for_a_terminal():
    paper = rows_of(VISION_SIZES["fastvithd"], LLM_SIZES["1.5b"], 768)
    assert make_table(FIVE, paper, ("textvqa", "docvqa")).text() == (
        "benchmark                         score   95 %             n  protocol   15+1.1  15+12.5\n"
        "----------------------------------------------------------------------------------------\n"
        "GQA, testdev balanced              60.0  ± 0.6        12,578  paper        63.9     64.2\n"
        "TextVQA, validation *              50.0  ± 0.8         5,000  paper        64.4     66.4\n"
        "POPE, all three kinds of ques...   80.0                9,000  paper        87.2     88.3\n"
        "DocVQA, validation *               40.0  ± 1.0  100 of 5,000  lmms-eval    61.3     69.4\n"
        "SEED-Bench, images                 70.0  ± 1.2        14,232  paper        71.7     72.4\n"
        "Avg-5                              60.0                                    69.7     72.1\n"
        "\n"
        "* in-domain: the paper's training mixes hold its training split\n"
        "right: the paper's Qwen2-1.5B, FastViTHD, 768 px, by millions of samples of pretraining + tuning\n"
        "only scores of the protocol paper were made as the paper's were\n"
        "of: fewer questions were asked than are published"
    )


def test_a_table_in_markdown_without_the_paper():
    results = [FIVE[0], summary("llava-w", "LLaVA|W", None, None, 5000)]
    assert make_table(results, [], ()).markdown() == (
        "| benchmark | score | 95 % | n | protocol |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| GQA, testdev balanced | 60.0 | ± 0.6 | 12,578 | paper |\n"
        "| LLaVA\\|W | not scored |  | 5,000 | paper |\n"
        "\n"
        "- LLaVA|W: not scored: only a judge can score it\n"
        "- Avg-5 needs gqa, textvqa, pope, docvqa, seedbench-image; without a score: textvqa, pope, docvqa, "
        "seedbench-image"
    )


def test_the_error_of_avg_5_joins_those_of_its_parts():
    five = [{**found, "standard_error": 1.0} for found in FIVE]
    last = make_table(five, [], ()).rows[-1]
    assert last[:3] == ("Avg-5", "60.0", "± 0.9")  # 1.96 * sqrt(5) / 5
