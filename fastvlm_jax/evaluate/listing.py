"""Tells which benchmarks there are: what they measure, the files that they need, and the paper's figures."""

import textwrap
from collections.abc import Iterable

from fastvlm_jax.evaluate.benchmark import Benchmark, Protocol
from fastvlm_jax.evaluate.paper import NAMES, PAPER, PaperRow, most_trained

WIDTH = 100  # columns
INDENT = 18  # columns of the names before the texts
IN_DOMAIN = "in-domain *"
NOTES = (
    "* The training mixes of the FastVLM paper hold the training split of the benchmark.",
    "paper: FastVLM's figure at 1024 px, by millions of samples of pretraining + instruction tuning.",
)


def listing(benchmarks: Iterable[Benchmark]) -> str:
    """Returns what there is to know of every benchmark before one scores a model on it, in lines of WIDTH columns."""
    blocks = ["\n".join(_block(benchmark)) for benchmark in benchmarks]
    return "\n\n".join([*blocks, "\n".join(NOTES)])


def details(benchmark: Benchmark) -> str:
    """Returns all that is known of one benchmark: also the rule of each protocol, and all the paper's figures."""
    lines = _block(benchmark)
    for protocol in benchmark.protocols:
        lines += ["", f"protocol {protocol.name}"]
        lines += _named("rules of", [protocol.version])
        lines += _named("rule", [protocol.rule])
        if protocol.matching is None:
            lines += _named("answer", [f"at most {protocol.max_tokens:,} tokens, greedy"])
    for name, why in benchmark.refused.items():
        lines += ["", f"no protocol {name}", *_named("because", [why])]
    if rows := [row for row in PAPER if benchmark.name in row.figures]:
        lines += ["", "figures of the paper, by millions of samples of pretraining + instruction tuning"]
        lines += [_line(row, benchmark.name) for row in rows]
    return "\n".join(lines)


def _block(benchmark: Benchmark) -> list[str]:
    size, domain = f"{benchmark.size:,} rows" if benchmark.size else "", IN_DOMAIN if benchmark.in_domain else ""
    facts = " | ".join(filter(None, (benchmark.title, size, benchmark.metric, domain)))
    lines = _named(benchmark.name, [facts], margin="")
    lines += _named("protocols", [", ".join(map(_protocol, benchmark.protocols))])
    lines += _named("files", benchmark.files, "or")
    lines += _named("from", [benchmark.source])
    if rows := most_trained(benchmark.name):
        figures = (f"{NAMES[row.llm]} {row.figures[benchmark.name]:.1f} ({row.data})" for row in rows)
        lines += _named("paper", [", ".join(figures)])
    return lines


def _protocol(protocol: Protocol) -> str:
    return protocol.name if protocol.name == "own" else f"{protocol.name} ({protocol.version})"


def _named(name: str, texts: Iterable[str], between: str = "", margin: str = "  ") -> list[str]:
    """Returns texts in lines of WIDTH columns, the first behind its name, each other one behind the word `between`."""
    lines = []
    for text in texts:
        first = f"{margin}{between if lines else name} ".ljust(INDENT)
        lines += textwrap.wrap(
            text, WIDTH, initial_indent=first, subsequent_indent=" " * INDENT, break_on_hyphens=False
        )
    return lines


def _line(row: PaperRow, name: str) -> str:
    where = "model card" if row.tables == "card" else f"table{'s' if ',' in row.tables else ''} {row.tables}"
    return f"  {row.figures[name]:5.1f}  {row.data:14}{row.model:42}{where}"
