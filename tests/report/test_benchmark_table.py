"""docs/evaluation.md: its tables are those of today, its commands and flags exist, its example of a benchmark runs."""

import re
import shlex
import types

import pytest
from command import fastvlm
from documents import bars, encoded, render
from etils import epath
from paths import ROOT

from fastvlm_jax.evaluate.benchmark import Result
from fastvlm_jax.evaluate.benchmarks import BENCHMARKS
from fastvlm_jax.evaluate.results import summarise
from fastvlm_jax.report import benchmark_table

PAGE = (ROOT / "docs/evaluation.md").read_text()


def test_docs_hold_the_tables_of_today():
    assert benchmark_table.page(PAGE) == PAGE


def test_every_benchmark_has_its_rows_and_a_page_without_marks_is_refused():
    for name in BENCHMARKS.keys() - {"qa"}:
        assert PAGE.count(f"`{name}`") >= 3, name
    row = next(line for line in PAGE.splitlines() if line.startswith("| `docvqa` |"))
    assert row == (
        "| `docvqa` | DocVQA, validation | 5,349 | ANLS, %; paper: share of 0.5 or more, % | lmms-eval 0.2.2 "
        "| 0.5b 79.1, 1.5b 84.2, 7b 88.0 | yes |"
    )
    with pytest.raises(ValueError, match="has not both marks"):
        benchmark_table.page("# A page\n")


def commands():
    """The commands in the page's blocks, without comments and continued lines."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("fastvlm ")]


@pytest.mark.parametrize("line", commands())
def test_every_command_and_flag_of_the_page_exists(line, monkeypatch, capsys):
    words = shlex.split(line, comments=True)[1:]
    command = words[: 2 if words[0] == "data" else 1]
    status, said, _ = fastvlm(monkeypatch, capsys, *command, "--help")
    assert status == 0
    for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert flag.startswith("--config.") or re.search(rf"{flag}\b", said), flag


def test_flags_that_the_text_names_exist(monkeypatch, capsys):
    known = ""
    for command in (["evaluate"], ["data", "inspect"], ["data", "write"], ["train"], ["report"]):
        known += fastvlm(monkeypatch, capsys, *command, "--help")[1]
    known += "--include_path --use_cache"  # of lmms-eval's own command
    named = set(re.findall(r"`(--[a-z_]+)", PAGE))
    assert {flag for flag in named if not re.search(rf"{flag}\b", known)} == set()


def test_the_example_of_a_benchmark_reads_its_rows_and_scores_them(tmp_path):
    (source,) = re.findall(r"```python\n(\"\"\"Colours.*?)```", PAGE, re.DOTALL)
    module = types.ModuleType("colours")
    exec(compile(source, "colours.py", "exec"), module.__dict__)
    (benchmark,) = module.BENCHMARKS
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(encoded(render(bars, 0)))
    line = '{{"id": "{}", "image": "a.png", "question": "What colour has {}?", "answer": "{}", "thing": "{}"}}\n'
    rows = [("1", "the bar", "blue", "bar"), ("2", "the text", "black", "text"), ("3", "the sky", "white", "sky")]
    (tmp_path / "colours.jsonl").write_text("".join(line.format(*row) for row in rows))
    read, protocol = benchmark.read(epath.Path(tmp_path)), benchmark.protocol()
    assert len(read) == benchmark.size and read[0].pictures[0].read().startswith(b"\x89PNG")
    assert protocol.prompt(read[0]) == (
        ("user", (0, "\nWhat colour has the bar?\nAnswer the question using a single word or phrase.")),
    )
    answers = ("Blue.", "It is black", "")
    results = [
        Result(row, "", answer, protocol.score(answer, row), ("a",)) for row, answer in zip(read, answers, strict=True)
    ]
    summary = summarise(benchmark, protocol, results)
    assert summary["score"] == pytest.approx(100 / 3) and summary["unparsed"] == pytest.approx(1 / 3)
    (tmp_path / "images/a.png").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of 1 images"):
        benchmark.read(epath.Path(tmp_path))
