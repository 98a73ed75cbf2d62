"""results.json: accuracies, their mean and its error, the blind score beside the one it belongs to, seconds."""

import json
import math

from tiny_sweep import get_config

from fastvlm_jax.report.sweep_results import RESULTS, read_sweep
from fastvlm_jax.sweep import plan, results, state


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_scores_their_mean_and_the_blind_score(tmp_path):
    c = get_config("data")
    c.benchmarks, c.ttft = ("docvqa", "gqa", "pope"), False
    made = plan.make_plan(c, str(tmp_path))
    for task in made.tasks:
        state.finish(tmp_path, task, 1.0)
    for name, score, error in (("docvqa", 60.0, 3.0), ("gqa", 50.0, 4.0), ("pope", 10.0, 12.0)):
        scores = {"small-16": dict(score=score, standard_error=error, n=7)}
        scores["small-8"] = dict(score=None, standard_error=None, n=0)
        for point, content in scores.items():
            write(tmp_path / f"points/{point}/evaluation/{name}-paper.json", content)
    run = tmp_path / made.tasks[0].output / "metrics.jsonl"
    run.write_text('{"step": 1, "seconds": 2.5}\n{"step": 2, "seconds": 4.5}\n{"step": 3, "sec')  # a kill cut it
    unscored, scored = results.collect(made, tmp_path, str(tmp_path), {"small-16": "why"})["points"]
    assert scored["mean"] == 40.0 and scored["mean_standard_error"] == math.sqrt(3**2 + 4**2 + 12**2) / 3
    assert (scored["state"], scored["error"], unscored["state"]) == ("failed", "why", "done")
    assert unscored["mean"] is None and unscored["accuracy"]["gqa"]["value"] is None
    assert (unscored["train_seconds"], scored["train_seconds"]) == (4.5, None)
    assert scored["runs"] == [task.output for task in made.tasks if task.kind == "train"]
    # Trained weights of an encoder of one stage, 3 -> 8 channels, and of the rest, as the trainer counts them too.
    assert unscored["parameters"] == {"vision": 1809, "projector": 1600, "llm": 35104}


def test_a_blind_score_stands_beside_the_one_it_belongs_to_and_in_no_mean(tmp_path):
    c = get_config("data")
    # documents-qa is not asked, so the score of documents-qa-blind stands for itself.
    c.benchmarks, c.ttft = ("documents-blind", "documents", "docvqa", "documents-qa-blind", "documents"), False
    made = plan.make_plan(c, str(tmp_path))
    scores = {"documents-blind-own": 9.0, "documents-own": 60.0, "docvqa-paper": 33.0, "documents-qa-blind-own": 12.0}
    for task in made.tasks:
        state.finish(tmp_path, task, 1.0)
        if task.kind == "evaluate":
            for name, score in scores.items():
                write(tmp_path / task.output / f"{name}.json", dict(score=score, standard_error=1.0, n=7))
    write(tmp_path / RESULTS, results.collect(made, tmp_path, str(tmp_path), {}))
    found = json.loads((tmp_path / RESULTS).read_text())
    assert found["benchmarks"] == ["documents", "docvqa", "documents-qa-blind"]
    for point in found["points"]:
        assert {name: (each["value"], each["blind"]) for name, each in point["accuracy"].items()} == {
            "documents": (60.0, 9.0), "docvqa": (33.0, None), "documents-qa-blind": (12.0, None),
        }  # fmt: skip
        assert point["mean"] == 35.0
    # Only where every benchmark has one is there a blind score of the point.
    assert [point.blind for point in read_sweep(tmp_path).points] == [None, None]
    c.benchmarks = ("documents", "documents-blind")
    made = plan.make_plan(c, str(tmp_path))
    for task in made.tasks:
        state.finish(tmp_path, task, 1.0)
    write(tmp_path / RESULTS, results.collect(made, tmp_path, str(tmp_path), {}))
    assert [(point.mean, point.blind) for point in read_sweep(tmp_path).points] == [(60, 9), (60, 9)]


def test_what_is_not_finished_is_pending_whatever_lies_in_its_folder(tmp_path):
    made = plan.make_plan(get_config("data"), str(tmp_path))
    write(tmp_path / "points/small-8/evaluation/easy-vqa-own.json", {"score": 1.0, "standard_error": 1.0, "n": 1})
    write(tmp_path / "points/small-8/ttft.json", {"points": [{}]})
    point = results.collect(made, tmp_path, str(tmp_path), {})["points"][0]
    assert (point["state"], point["accuracy"], point["ttft"], point["mean"]) == ("pending", {}, None, None)
