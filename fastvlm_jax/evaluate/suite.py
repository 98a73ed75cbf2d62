"""Scores a model on several benchmarks, and writes the files of each into one folder.

FOLDER/docvqa-paper.json                 the summary, written last
FOLDER/docvqa-paper.predictions.jsonl    a line for each question
FOLDER/docvqa-paper.submission.json      for the benchmark's server, where there is one
FOLDER/docvqa-paper.judge.jsonl          what to ask a judge, where one is needed
FOLDER/docvqa-paper.journal-0.jsonl      the answers of process 0, from which a stopped evaluation goes on
FOLDER/docvqa-paper.speed.json           how long this start took; the other files do not depend on it
"""

import contextlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from fastvlm_jax import distributed, files
from fastvlm_jax.evaluate import fingerprint, progress_bar, published, results, towers
from fastvlm_jax.evaluate.benchmark import PROTOCOLS, Benchmark, Protocol, Result, Row
from fastvlm_jax.evaluate.benchmarks import family_of, folder_of, known
from fastvlm_jax.evaluate.journal import Journal
from fastvlm_jax.evaluate.run import Progress, Scored, check_answers, score
from fastvlm_jax.models.kinds import Model
from fastvlm_jax.pair_processor import PairProcessor
from fastvlm_jax.processor import Processor

SPEED = ("seconds", "questions_per_second")  # keys of a summary that differ from start to start


class Entry(NamedTuple):
    """Holds a benchmark to score, how, and the rows to ask."""

    benchmark: Benchmark
    protocol: Protocol
    rows: list[Row]

    @property
    def name(self) -> str:
        return f"{self.benchmark.name}-{self.protocol.name}"


def choose(
    names: Sequence[str],
    data: os.PathLike | str,
    benchmarks: Mapping[str, Benchmark],
    *,
    protocol: str | None = None,
    limit: int | None = None,
    samples: Sequence[str] = (),
    told: Callable[[str], None],
) -> list[Entry]:
    """Reads the rows of benchmarks.

    Args:
      names: names of benchmarks, or "all" alone: those whose files lie under `data`.
      data: folder with a folder for each benchmark, as DATA/docvqa; a family may share that of its first. The files of
        a single benchmark, or of a single family, may lie in it directly.
      benchmarks: the known benchmarks, by name.
      protocol: name of the protocol; by default each benchmark's first.
      limit: number of rows to ask of each, from the first; None asks all.
      samples: ids of the rows to ask; () asks all.
      told: function that is called with a line about a benchmark that "all" leaves out.

    Raises:
      ValueError, FileNotFoundError: a benchmark, protocol, id or file is not there or not as published.
    """
    root = epath.Path(data).expanduser()
    if list(names) != ["all"]:
        chosen = [(benchmark, benchmark.protocol(protocol)) for benchmark in known(names, benchmarks)]
        single = len({next(iter(family_of(benchmark)), benchmark).name for benchmark, _ in chosen}) == 1
        read = [(*pair, pair[0].read(folder_of(pair[0], root, single))) for pair in chosen]
    else:
        read = _all(benchmarks, root, protocol, told)
    entries = [Entry(own, how, select(rows, own.name, limit, samples)) for own, how, rows in read]
    for entry in entries:
        _check_first(entry)
    return entries


def _check_first(entry: Entry) -> None:
    """Raises ValueError, before a model is asked, if the first row of a published benchmark cannot be asked."""
    if entry.benchmark.strict and entry.rows:
        try:
            entry.protocol.prompt(entry.rows[0])
        except ValueError as error:
            raise ValueError(f"{entry.benchmark.name}: {error}") from error


def _all(
    benchmarks: Mapping[str, Benchmark], root: epath.Path, protocol: str | None, told: Callable[[str], None]
) -> list[tuple[Benchmark, Protocol, list[Row]]]:
    """Reads the benchmarks whose files lie under a folder."""
    if protocol and all(protocol != how.name for benchmark in benchmarks.values() for how in benchmark.protocols):
        raise ValueError(f"there is no --protocol {protocol}: choose {', '.join(PROTOCOLS)}")
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    found = []
    for benchmark in benchmarks.values():
        own = root / benchmark.name
        if not own.is_dir() and not folder_of(benchmark, root, False).is_dir():
            continue
        try:
            how = benchmark.protocol(protocol)
            found.append((benchmark, how, benchmark.read(folder_of(benchmark, root, False))))
        except FileNotFoundError as error:
            if own.is_dir():
                raise
            told(f"{benchmark.name} is left out: {error}")  # the folder of its family holds other members
        except ValueError as error:
            if protocol is None or protocol in {other.name for other in benchmark.protocols}:
                raise
            told(f"{benchmark.name} is left out: {error}")
    if not found:
        names = ", ".join(benchmarks)
        raise FileNotFoundError(f"{root} holds no folder of a benchmark: expected is one or more of {names}")
    return found


def select(rows: Sequence[Row], name: str, limit: int | None, samples: Sequence[str]) -> list[Row]:
    """Returns the rows of these ids, in their published order, up to `limit`.

    Raises:
      ValueError: the benchmark `name` has no row of an id.
    """
    if samples:
        ids = {row.id for row in rows}
        if missing := [sample for sample in samples if sample not in ids]:
            shown = f"{missing[0]!r}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            raise ValueError(f"--samples: {name} has no row {shown}; its first ids are {', '.join(sorted(ids)[:3])}")
        wanted = set(samples)
        rows = [row for row in rows if row.id in wanted]
    return list(rows[:limit])


def evaluate(
    entries: Sequence[Entry],
    model: Model,
    variables: Any,
    processor: Processor | PairProcessor,
    folder: os.PathLike | str,
    *,
    source: Mapping[str, Any],
    max_tokens: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    batch_size: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
    told: Callable[[str], None] = lambda line: None,
) -> list[tuple[dict[str, Any], list[Result]]]:
    """Scores a model on benchmarks, one after the other, and returns (summary, results) of each, in all processes.

    Process 0 writes the files; every process writes its own journals.

    Args:
      folder: folder of the files; answers that its journals hold are not asked again. Two towers keep no journal.
      source: JSON values that say where the model comes from.
      max_tokens, mesh, batch_size: see run.score.
      stopped: function that all processes call between batches, and that says whether to stop.
      told: function that is called with lines about what happens, in process 0.

    Raises:
      Interrupted: `stopped` said so; the journals are whole.
      ValueError: a benchmark is not for such a model, or see run.score and towers.score.
    """
    for entry in entries:
        towers.check_kind(model, processor, entry.benchmark)
        if entry.protocol.matching is None:
            check_answers(model, processor)
    folder, first = pathlib.Path(folder), jax.process_index() == 0
    told = told if first else lambda line: None
    folder.mkdir(parents=True, exist_ok=True)  # a mistake in its name shows before the first question
    key = fingerprint.of_model(model, variables, processor, mesh)
    done = []
    for entry in entries:
        if _other_model(folder / f"{entry.name}.json", key):
            told(f"{entry.name}: the results of another model in {folder} are replaced; --output names another folder")
        journal = Journal(folder, entry.benchmark, entry.protocol, key)
        with progress_bar.shown(entry.name) as show:

            def look(state: Progress, entry=entry, show=show) -> None:
                show(state)
                if stopped() and state.done < state.total:
                    raise distributed.Interrupted(_stopped(entry, state, folder))

            try:
                if entry.protocol.matching:
                    prepared = towers.prepare(entry.rows, entry.protocol, processor)
                    scored = towers.score(
                        model, variables, processor, entry.protocol, prepared, mesh=mesh, batch_size=batch_size,
                        progress=look,
                    )  # fmt: skip
                else:
                    scored = score(
                        model, variables, processor, entry.benchmark, entry.protocol, entry.rows,
                        max_tokens=max_tokens, mesh=mesh, batch_size=batch_size, journal=journal, progress=look,
                        told=lambda line, name=entry.name: told(f"{name}: {line}"),
                    )  # fmt: skip
            except ValueError as error:
                raise ValueError(f"{entry.benchmark.name}: {error}") from error
            finally:
                journal.close()
        summary = write(folder, entry, scored, max_tokens, {**source, "fingerprint": key}, first)
        done.append((summary, scored.results))
    return done


def _stopped(entry: Entry, state: Progress, folder: pathlib.Path) -> str:
    what = f"stopped at {state.done:,} of {state.total:,}"
    if entry.protocol.matching:
        return f"{what} pictures and texts of {entry.name}; the same command begins it again"
    return f"{what} questions of {entry.name}, whose answers are in {folder}; the same command goes on from there"


def _other_model(summary: pathlib.Path, key: str) -> bool:
    """Returns whether a summary is there and says that it is of a model with another fingerprint than `key`."""
    with contextlib.suppress(OSError, ValueError):
        return files.read_object(summary).get("model", {}).get("fingerprint") not in (None, key)
    return False


def write(
    folder: pathlib.Path, entry: Entry, scored: Scored, max_tokens: int | None, source: Mapping[str, Any], first: bool
) -> dict[str, Any]:
    """Returns the summary of a benchmark; process 0 writes its files, none of which depends on the number of starts."""
    benchmark, protocol, _ = entry
    summary = results.summarise(
        benchmark, protocol, scored.results, max_tokens=max_tokens, left_out=scored.left_out, seconds=scored.seconds,
        answered=scored.asked, lineage=source,
    )  # fmt: skip
    if first:
        results.write_lines(
            folder / f"{entry.name}.predictions.jsonl", results.predictions(benchmark, protocol, scored.results)
        )
        if benchmark.submission and scored.results:
            files.write_json(folder / f"{entry.name}.submission.json", benchmark.submission(scored.results))
        if protocol.judge and (requests := protocol.judge(scored.results)):
            results.write_lines(folder / f"{entry.name}.judge.jsonl", requests)
        speed = {"questions_answered": scored.asked, **{name: summary[name] for name in SPEED}}
        files.write_json(folder / f"{entry.name}.speed.json", speed)
        kept = {name: value for name, value in summary.items() if name not in SPEED}
        files.write_json(folder / f"{entry.name}.json", kept)
    return summary


def review(
    names: Sequence[str],
    data: os.PathLike | str,
    benchmarks: Mapping[str, Benchmark],
    path: os.PathLike | str,
    *,
    protocol: str | None = None,
) -> tuple[str, dict[str, Any]]:
    """Returns the name, as "llava-w-paper", and the summary of a file of a judge's replies; no model is asked.

    Args:
      names: name of the one benchmark that the replies are about.
      data, benchmarks, protocol: see `choose`.

    Raises:
      ValueError, FileNotFoundError: the benchmark needs no judge, or a file is not there or not as it should be.
    """
    judged = [name for name, benchmark in benchmarks.items() if any(how.review for how in benchmark.protocols)]
    if len(names) != 1 or known(names, benchmarks)[0].name not in judged:
        raise ValueError(f"--review: --benchmark must be one that a judge scores: {' or '.join(judged)}")
    if not epath.Path(path).expanduser().is_file():
        raise FileNotFoundError(f"there is no file {path} with a judge's replies")
    ((benchmark, how, rows),) = choose(names, data, benchmarks, protocol=protocol, told=lambda line: None)
    try:
        scores = how.review(published.read_lines(epath.Path(path).expanduser()), rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return f"{benchmark.name}-{how.name}", {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "protocol": {"name": how.name, "version": how.version, "rule": how.rule},
        "metric": benchmark.metric,
        **scores,
        "questions_published": benchmark.size,
    }
