"""The page about runs: names that keep them apart, curves and legends, rates, settings that differ."""

import json
import pathlib
import re

import matplotlib
import pytest
from browser import Browser, needs_browser
from command import fastvlm

from fastvlm_jax.report.curves import names, plot_losses, plot_rates, plt, read_runs
from fastvlm_jax.report.runs import write_report
from fastvlm_jax.workdir import origin

CONFIG = {"stage": "instruct", "seed": 0, "data": {"image_size": 192, "path": "data/a"}}
LINEAGE = {"stage": "instruct", "data_fingerprint": "x", "parent": None, "parent_step": None}


def workdir(folder, rows, config=CONFIG, lineage=LINEAGE):
    folder.mkdir(parents=True)
    run = {"format": "fastvlm_jax workdir", "config": config, "lineage": lineage}
    (folder / "config.json").write_text(json.dumps(run))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row(step, **metrics):
    return {"step": step, "seconds": step / 2, **{key.replace("__", "/"): value for key, value in metrics.items()}}


def texts(runs, tmp_path):
    """All words of the drawing, from an SVG that keeps them as text."""
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_losses(runs, tmp_path / "loss.svg")
    return re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "loss.svg").read_text())


def tables(page):
    """{title: [[cell, ...], ...]} of the tables of a page."""
    found = re.findall(r"<h2>([^<]*)</h2>\s*<div class=\"wide\"><table>(.*?)</table>", page.read_text(), re.S)
    return {
        title: [re.findall(r"<t[hd]>([^<]*)", line) for line in body.split("<tr>")[1:]] for title, body in found
    }  # fmt: skip


@pytest.mark.parametrize(
    "paths, stages, expected",
    [
        (["r/one", "r/two"], ["align", "instruct"], ["align", "instruct"]),
        (["runs/slow", "runs/fast"], ["instruct", "instruct"], ["slow", "fast"]),
        (["first/tune", "second/tune"], ["instruct", "instruct"], ["first/tune", "second/tune"]),
        (["a/x/tune", "b/x/tune", "b/y/tune"], ["s"] * 3, ["a/x/tune", "b/x/tune", "b/y/tune"]),
        (["a/x/tune", "b/y/tune"], ["s", "s"], ["x/tune", "y/tune"]),
        (["a/one", "b/two", "c/three"], ["s", "s", "t"], ["one", "two", "three"]),
        (["r/one"], [""], ["one"]),
    ],
)
def test_runs_are_named_by_their_stage_or_the_shortest_path_that_keeps_them_apart(paths, stages, expected):
    assert names([pathlib.Path(path) for path in paths], stages) == expected


def test_two_runs_of_one_stage_begin_at_step_0_and_have_their_own_legend(tmp_path):
    runs = [row(10, loss=2.0), row(20, loss=1.0)]
    found = read_runs([workdir(tmp_path / "a/tune", runs), workdir(tmp_path / "b/tune", runs[:1])])
    assert [(run.name, run.start, run.points("loss")) for run in found] == [
        ("a/tune", 0, [(10, 2.0), (20, 1.0)]),
        ("b/tune", 0, [(10, 2.0)]),
    ]
    words = texts(found, tmp_path)
    assert "a/tune" in words and "b/tune" in words
    # Nothing was validated: no legend and no axis for it.
    assert not any("validation" in word for word in words)


def test_a_stage_begins_where_the_one_ended_that_it_started_from(tmp_path):
    first = workdir(tmp_path / "align", [row(8, loss=3.0)], {**CONFIG, "stage": "align"}, {**LINEAGE, "stage": "align"})
    child = {**LINEAGE, "parent": {**LINEAGE, "stage": "align", "step": 6}, "parent_step": 6}
    rows = [row(4, loss=2.0), row(4, validation__loss=2.5, validation__accuracy=0.5)]
    found = read_runs([first, workdir(tmp_path / "instruct", rows, lineage=child)])
    assert [(run.name, run.start) for run in found] == [("align", 0), ("instruct", 6)]
    assert found[1].points("loss") == [(10, 2.0)] and found[1].points("validation/accuracy", 100) == [(10, 50.0)]
    assert {"align", "instruct", "validation loss", "validation accuracy (right)"} <= set(texts(found, tmp_path))


def test_it_begins_there_though_the_one_before_has_since_gone_on_under_changes(tmp_path):
    changes = [{"step": 6, "key": "steps", "before": 6, "now": 8}]
    first = workdir(tmp_path / "align", [row(8, loss=3.0)], CONFIG, {**LINEAGE, "stage": "align", "changes": changes})
    child = {**LINEAGE, "parent": {**LINEAGE, "stage": "align", "step": 6}, "parent_step": 6}
    found = read_runs([first, workdir(tmp_path / "instruct", [row(4, loss=2.0)], lineage=child)])
    assert [run.start for run in found] == [0, 6]


def test_scores_of_benchmarks_stand_beside_the_losses_and_those_of_old_runs_too(tmp_path):
    scored = [
        row(2, loss=2.0), row(2, validation__loss=2.5, evaluate__docvqa=61.0, evaluate__docvqa_stderr=3.25),
        row(4, validation__loss=2.0, evaluate__docvqa=71.234, evaluate__docvqa_stderr=1.125, evaluate__mme=1500.0),
    ]  # fmt: skip
    old = [row(4, loss=1.0), row(4, validation__loss=2.5, validation__accuracy=0.5)]
    folders = [workdir(tmp_path / "a/tune", scored), workdir(tmp_path / "b/tune", old)]
    new, before = read_runs(folders)
    assert new.scores() == {"evaluate/docvqa": 1.0, "evaluate/mme": 1.0} and before.scores() == {
        "validation/accuracy": 100.0
    }
    words = texts([new, before], tmp_path)
    assert {"docvqa (right)", "mme (right)", "validation accuracy (right)", "validation loss", "score"} <= set(words)
    assert not any("stderr" in word for word in words)
    page, _ = write_report(folders, tmp_path / "page.html")
    assert tables(page)["Results"] == [
        ["run", "steps", "seconds", "last loss", "validation loss", "docvqa", "mme", "validation accuracy"],
        ["a/tune", "4", "2", "2", "2", "71.23 ± 1.1", "1,500", "-"],
        ["b/tune", "4", "2", "1", "2.5", "-", "-", "0.5"],
    ]


def test_stage_0_shows_how_well_pairs_are_told_apart(tmp_path):
    told = [row(s, loss=3 / s, logit_scale=14.0 + s, top1_images=s / 8, top1_texts=s / 4) for s in (1, 2)]
    page, _, rates = write_report([workdir(tmp_path / "run", told)], tmp_path / "page.html")
    assert tables(page)["Results"] == [
        ["run", "steps", "seconds", "last loss", "images that find their caption", "factor of the logits"],
        ["instruct", "2", "1", "1.5", "0.25", "16"],
    ]
    assert "<h2>Pairs told apart, and rates</h2>" in page.read_text() and rates.stat().st_size > 5000
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        assert plot_rates(read_runs([tmp_path / "run"]), tmp_path / "rates.svg")
    words = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "rates.svg").read_text())
    titles = {"images that find their caption", "captions that find their image", "factor of the logits"}
    assert titles <= set(words) and "highest learning rate" not in words


def test_the_page_shows_results_rates_and_the_settings_that_differ(tmp_path):
    rates = {"step_seconds": 0.5, "images/s": 32.0, "tokens/s": 1234.5}
    slow = [row(1, loss=9.0, step_seconds=60.0), *(row(s, loss=1 / s, **rates) for s in (2, 3, 4))]
    other = {**CONFIG, "data": {"image_size": 128, "path": "data/a"}, "extra": "<b>"}
    first = workdir(tmp_path / "a/tune", [*slow, row(4, validation__accuracy=0.75)])
    second = workdir(tmp_path / "b/tune", [row(1, loss=2.0)], other)
    page, *pictures = write_report([first, second], tmp_path / "page.html")
    assert pictures == [tmp_path / "page_loss.png", tmp_path / "page_rates.png"]
    assert all(picture.stat().st_size > 5000 for picture in pictures)
    found = tables(page)
    assert found == {
        "Results": [
            ["run", "steps", "seconds", "last loss", "validation accuracy"],
            ["a/tune", "4", "2", "0.25", "0.75"],
            ["b/tune", "1", "0", "2", "-"],
        ],
        # Medians; the first log of a run holds its compilation.
        "Rates (medians)": [
            ["run", "seconds a step", "images/s", "tokens/s"],
            ["a/tune", "0.5", "32", "1,234"],
            ["b/tune", "-", "-", "-"],
        ],
        "Settings that differ": [
            ["key", "a/tune", "b/tune"],
            ["data.image_size", "192", "128"],
            ["extra", "-", "&lt;b&gt;"],
        ],
        "Validation": [
            ["run", "metric", "best", "at step", "last"],
            ["a/tune", "validation accuracy", "0.75", "4", "0.75"],
        ],
        # What neither settings nor lineage say is "-".
        "Stages": found["Stages"],
        "Lineage": found["Lineage"],
    }
    assert [len(found[title]) for title in ("Stages", "Lineage")] == [3, 3]


def test_the_page_shows_the_best_scores_what_learns_and_where_weights_and_data_come_from(tmp_path):
    config = {
        "stage": "instruct", "groups": [["vision/.*", 0.0, 0.0], ["llm/.*", 1e-3, 0.1], [".*", 2e-3, 0.0]],
        "data": {"path": "", "mixture": [["easy", 1.0], ["mine", 2.0]], "image_size": 128,
                 "resolutions": [[128, 0.5], [192, 0.5]], "grids": [[2, 2]], "groups": 4, "images_per_group": 8},
    }  # fmt: skip
    lineage = {
        "stage": "instruct", "code": "0.1.0", "jax": "0.10.2", "data_fingerprint": "12ab", "parent_step": 238,
        "data_sets": [{"fingerprint": "1", "records": {"train": 1000, "test": 34}}, {"records": {"train": 200}}],
        "parent": {"stage": "pretrain", "step": 238, "parent": {"stage": "align", "step": 90, "parent": None}},
    }  # fmt: skip
    scored = [(1, 2.5, 60.0), (2, 1.5, 62.0), (3, 1.75, 62.0), (4, 2.0, 61.0)]
    rows = [row(step, validation__loss=loss, evaluate__qa=score) for step, loss, score in scored]
    rates = {"mfu": 0.25, "mfu/llm": 0.5, "input_bound": 0.125, "lr": 1e-3, "grad_norm": 3.0}
    memory = [row(step, loss=1.0, hbm_peak_gb=gb, **rates) for step, gb in ((1, 3.0), (2, 7.5), (3, 7.5))]
    page, *pictures = write_report([workdir(tmp_path / "run", [*rows, *memory], config, lineage)], tmp_path / "p.html")
    found = tables(page)
    # The lowest loss and the highest score, at the first step that had it.
    assert found["Validation"][1:] == [
        ["instruct", "validation loss", "1.5", "2", "2"],
        ["instruct", "qa", "62", "2", "61"],
    ]
    assert found["Rates (medians)"] == [
        ["run", "MFU", "MFU LLM", "share of waiting for input", "most memory, GB"],
        ["instruct", "0.25", "0.5", "0.125", "7.5"],
    ]
    assert found["Stages"][1] == [
        "instruct", "instruct", "llm/.* at 0.001, .* at 0.002", "128, 192, 2x2 tiles", "32"
    ]  # fmt: skip
    assert found["Lineage"][1] == [
        "instruct", "pretrain (step 238) ← align (step 90)", "easy, mine", "1,234", "12ab", "0.1.0", "0.10.2"
    ]  # fmt: skip
    assert [picture.name for picture in pictures] == ["p_loss.png", "p_rates.png"]


@pytest.mark.parametrize(
    "parent, words",
    [
        (None, "random weights"),
        ({"layout": "hf", "path": "models/mine"}, "models/mine (hf)"),
        (
            {"parts": {"vision": {"path": "a", "stage": "clip", "step": 7, "parent": None},
                       "llm": {"path": "b", "layout": "gguf"}}},
            "vision: clip (step 7); llm: b (gguf)",
        ),
        # An exported model of a run: its lineage has no step.
        ({"stage": "align", "parent": {"layout": "llava", "path": "x"}}, "align ← x (llava)"),
    ],
)  # fmt: skip
def test_the_origin_of_weights_in_words(parent, words):
    assert origin(parent) == words


def test_the_rates_over_the_steps_are_those_of_the_logs(tmp_path, monkeypatch):
    first = workdir(tmp_path / "align", [row(8, loss=3.0, lr=1e-3)], {**CONFIG, "stage": "align"}, LINEAGE)
    rows = [row(2, loss=2.0, lr=2e-3, mfu=0.25), row(4, loss=1.0, lr=1e-3, mfu=0.5)]
    child = {**LINEAGE, "parent": {**LINEAGE, "step": 6}, "parent_step": 6}
    runs = read_runs([first, workdir(tmp_path / "instruct", rows, lineage=child)])
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    assert plot_rates(runs, tmp_path / "rates.png")
    monkeypatch.undo()
    panels = {
        axis.get_title(): [line.get_xydata().tolist() for line in axis.lines] for axis in kept[0].axes if axis.lines
    }
    plt.close(kept[0])
    assert panels == {
        "highest learning rate": [[[8, 1e-3]], [[8, 2e-3], [10, 1e-3]]],
        "MFU": [[[8, 0.25], [10, 0.5]]],
    }


@needs_browser
def test_the_page_of_a_run_fits_a_phone_and_its_tables_sort(tmp_path):
    lines = [row(step, loss=3.0 - step, lr=1e-3, validation__loss=2.0 - step) for step in (1, 2)]
    folders = [workdir(tmp_path / name, lines, {**CONFIG, "long": "x" * 300 + name}) for name in ("b", "a<i>")]
    page, *_ = write_report(folders, tmp_path / 'with "quotes" & #.html')
    with Browser(width=360, height=700) as browser:
        browser.open(page)
        assert browser.run("document.documentElement.scrollWidth") == 360
        assert browser.run("[...document.images].map(image => image.naturalWidth > 300)") == [True, True]
        first = "[...document.querySelector('table').tBodies[0].rows].map(row => row.cells[0].textContent)"
        assert browser.run(first) == ["b", "a<i>"]
        browser.run("document.querySelector('th').click()")
        assert browser.run(first) == ["a<i>", "b"]
        assert browser.complaints == []


def test_one_run_has_no_table_of_differences_and_all_settings(tmp_path):
    page, _ = write_report([workdir(tmp_path / "run", [row(1, loss=2.0)])], tmp_path / "page.html")
    assert list(tables(page)) == ["Results", "Stages", "Lineage"]
    assert "&#34;image_size&#34;: 192" in page.read_text()


def test_a_run_that_is_named_twice_is_refused(tmp_path, monkeypatch, capsys):
    run = workdir(tmp_path / "run", [row(1, loss=2.0)])
    argv = ("report", run, tmp_path / "run/../run", f"--output={tmp_path / 'page.html'}")
    status, out, err = fastvlm(monkeypatch, capsys, *argv)
    assert (status, out) == (1, "") and err.count("\n") == 1 and "run is named twice: name each workdir once" in err
