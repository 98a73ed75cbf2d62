"""Makes the tables in docs/evaluation.md: `python -m fastvlm_jax.report.benchmark_table [--page FILE.md]`.

They stand between two marks in the page, which is written by hand otherwise, and say what BENCHMARKS says.
"""

import pathlib
from collections.abc import Iterable, Sequence

from absl import app, flags

from fastvlm_jax import files
from fastvlm_jax.evaluate.benchmark import Benchmark
from fastvlm_jax.evaluate.benchmarks import BENCHMARKS
from fastvlm_jax.evaluate.paper import PaperRow, most_trained

PAGE = flags.DEFINE_string("page", "docs/evaluation.md", "Markdown file whose tables are made anew")
BEGIN = "<!-- The tables up to the next mark are made by `python -m fastvlm_jax.report.benchmark_table`. -->"
MOST_DATA = "15+23.1"  # millions of samples of the paper's largest mixes
END = "<!-- End of the tables. -->"


def tables() -> str:
    """Returns the tables: what each benchmark is, the files that it needs, and the rules of its protocols."""
    known = [benchmark for benchmark in BENCHMARKS.values() if benchmark.strict]  # not one's own data
    return "\n\n".join(
        [
            _table(
                ("name", "benchmark", "rows", "score", "the paper's harness", "the paper's figures", "in-domain"),
                [_what(benchmark) for benchmark in known],
            ),
            "Files, one layout after the other, and where one gets them:",
            _table(("name", "files", "from"), _merged((_name(b), _files(b), b.source) for b in known)),
            "Rules:",
            _table(
                ("name", "protocol", "as in", "tokens", "rule"),
                _merged((_name(b), *row) for b in known for row in _rules(b)),
            ),
        ]
    )


def page(text: str) -> str:
    """Returns a page with the tables of today between its two marks.

    Raises:
      ValueError: it lacks a mark.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has not both marks {BEGIN} and {END}: put them where the tables belong")
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def _what(benchmark: Benchmark) -> list[str]:
    harness = next((own.version for own in benchmark.protocols if own.name == "paper"), "")
    by = harness if benchmark.paper and harness else "unknown" if benchmark.paper else ""
    figures = [_figure(row, benchmark.name) for row in most_trained(benchmark.name)]
    in_domain = "yes" if benchmark.in_domain else ""
    title, size = benchmark.title, f"{benchmark.size:,}" if benchmark.size else "as written"
    return [_name(benchmark), title, size, benchmark.metric, by, ", ".join(figures), in_domain]


def _figure(row: PaperRow, name: str) -> str:
    """Returns a figure of the paper with its model, and its data if these are not the most: "7b 71.1 (15+12.5)"."""
    data = "" if row.data == MOST_DATA else f" ({row.data})"
    return f"{row.llm} {row.figures[name]:.1f}{data}"


def _name(benchmark: Benchmark) -> str:
    return f"`{benchmark.name}`"


def _files(benchmark: Benchmark) -> str:
    return "; or ".join(benchmark.files)


def _rules(benchmark: Benchmark) -> list[list[str]]:
    """Returns protocol, version, tokens and rule; protocols that differ in their names alone are one."""
    rows = [(f"`{own.name}`", own.version, str(own.max_tokens or ""), own.rule) for own in benchmark.protocols]
    return _merged(rows)


def _merged(rows: Iterable[Sequence[str]]) -> list[list[str]]:
    """Joins the first cells of rows whose other cells are the same; each stands where the first of them stood."""
    found: dict[tuple[str, ...], list[str]] = {}
    for first, *rest in rows:
        found.setdefault(tuple(rest), []).append(first)
    return [[", ".join(firsts), *rest] for rest, firsts in found.items()]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell.replace("|", "\\|").replace("*", "\\*") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    path = pathlib.Path(PAGE.value)
    files.write_whole(path, page(path.read_text()).encode())


if __name__ == "__main__":
    app.run(main)
