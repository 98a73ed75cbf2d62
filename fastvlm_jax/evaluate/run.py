"""Scores a model on a benchmark: its rows are prepared, asked, answered and marked, each process its own share."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from fastvlm_jax import distributed
from fastvlm_jax.evaluate.answers import Answer, answer_batches, exchange_name, gathered
from fastvlm_jax.evaluate.benchmark import Benchmark, Mark, Protocol, Result, Row
from fastvlm_jax.evaluate.journal import Journal
from fastvlm_jax.evaluate.questions import Prepared, Question, prepare
from fastvlm_jax.files import json_digest
from fastvlm_jax.generate import answer_limit
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.processor import Processor

MANY = 5000  # questions that take long to prepare


class Progress(NamedTuple):
    """Says how far a benchmark is.

    Attributes:
      done: number of questions that all processes have answered, those of the journal included.
      total: number of questions.
      asked: number of questions that were answered since the start.
      score: 100 times the mean of the scores of this process's answers so far; None if there are no scores.
      seconds: time since the start.
    """

    done: int
    total: int
    asked: int
    score: float | None
    seconds: float


class Scored(NamedTuple):
    """Holds the outcome of a benchmark, the same in all processes.

    Attributes:
      results: a result for each row that was asked, in the order of the rows.
      left_out: (id, reason) of each row that the model cannot be asked.
      asked: number of questions that were answered now; the journal had the others.
      seconds: how long that took.
    """

    results: list[Result]
    left_out: list[tuple[str, str]]
    asked: int
    seconds: float


def score(
    model: FastVLM,
    variables: Any,
    processor: Processor,
    benchmark: Benchmark,
    protocol: Protocol,
    rows: Sequence[Row],
    *,
    max_tokens: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    batch_size: int | None = None,
    journal: Journal | None = None,
    progress: Callable[[Progress], None] | None = None,
    told: Callable[[str], None] | None = None,
) -> Scored:
    """Asks the model all rows and marks its answers; all processes call it with the same arguments.

    Args:
      variables: variables of the model, laid out on the mesh in any way, such as those of a training state.
      max_tokens: longest answer, tokens; by default the protocol's.
      mesh, batch_size, told: see `answer_batches`.
      journal: journal whose answers are taken, and which gets all others.
      progress: function that is called before the first and after every batch, in all processes; what it raises ends
        this between two batches.

    Raises:
      ValueError: a row of a strict benchmark cannot be asked, or none of another's; `max_tokens` leaves no room for a
        prompt; the model has no language model or no tokenizer; or the processes have different rows.
    """
    check_answers(model, processor)
    max_tokens = max_tokens or protocol.max_tokens
    most_tokens = answer_limit(model, max_tokens, None)
    if told and len(rows) > MANY:
        told(f"reads {len(rows):,} questions")  # a second or two for each thousand
    prepared = prepare(rows, protocol, processor, most_tokens=most_tokens, strict=benchmark.strict)
    if rows and not prepared.questions:
        raise ValueError(f"none of {len(rows)} questions can be asked: {prepared.describe_left_out()}")
    if told and not benchmark.strict:
        _tell_own(prepared, processor, max_tokens, told)
    return score_prepared(
        model, variables, processor, protocol, prepared,
        max_tokens=max_tokens, mesh=mesh, batch_size=batch_size, journal=journal, progress=progress, told=told,
    )  # fmt: skip


def check_answers(model: FastVLM, processor: Processor | None) -> None:
    """Raises ValueError if a model cannot answer, as it lacks its language model or its tokenizer."""
    if model.llm_args is None or processor is None:
        raise ValueError("this model has no language model or no tokenizer, so it answers nothing")


def score_prepared(
    model: FastVLM,
    variables: Any,
    processor: Processor,
    protocol: Protocol,
    prepared: Prepared,
    *,
    max_tokens: int,
    mesh: jax.sharding.Mesh | None = None,
    batch_size: int | None = None,
    journal: Journal | None = None,
    progress: Callable[[Progress], None] | None = None,
    told: Callable[[str], None] | None = None,
) -> Scored:
    """Asks the model the questions of prepared rows, which may be asked again and again; see `score`."""
    start = time.monotonic()
    questions, left_out = prepared
    check_same(questions)
    known = journal.known(questions, max_tokens) if journal else {}
    if known and told:
        told(f"{len(known):,} of {len(questions):,} answers are in the journal")
    share, asked = _Share(protocol, questions), 0

    def look() -> None:
        if progress:
            done, seconds = len(known) + asked, time.monotonic() - start
            progress(Progress(done, len(questions), asked, share.mean, seconds))

    process, processes = jax.process_index(), jax.process_count()
    share.add({number: answer for number, answer in known.items() if number % processes == process})
    look()
    for batch in answer_batches(
        model, variables, processor, questions, max_tokens=max_tokens, mesh=mesh, batch_size=batch_size, known=known,
        told=told,
    ):  # fmt: skip
        if journal:
            journal.append(questions, batch.own)
        share.add(batch.own)
        asked += batch.count
        look()
    found = gathered(share.marked)
    results = [_result(question, *found[number]) for number, question in enumerate(questions)]
    return Scored(results, left_out, asked, time.monotonic() - start)


class _Share:
    """Holds the answers of this process with their marks, and the mean score so far."""

    def __init__(self, protocol: Protocol, questions: Sequence[Question]):
        self._protocol, self._questions = protocol, questions
        self.marked: dict[int, tuple[Answer, Mark | None]] = {}
        self._count, self._sum = 0, 0.0

    def add(self, answers: Mapping[int, Answer]) -> None:
        """Marks answers, by the numbers of their questions."""
        for number, answer in answers.items():
            found = mark(self._protocol, self._questions[number], answer.text)
            self.marked[number] = answer, found
            if found is not None:
                self._count, self._sum = self._count + 1, self._sum + found.score

    @property
    def mean(self) -> float | None:
        """Returns 100 times the mean score; None without scores."""
        return 100 * self._sum / self._count if self._count else None


def _tell_own(prepared: Prepared, processor: Processor, max_tokens: int, told: Callable[[str], None]) -> None:
    """Says what lowers the score of one's own data, or changes its questions, though the model is not at fault."""
    if prepared.left_out:
        told(f"{len(prepared.left_out)} rows are left out: {prepared.describe_left_out()}")
    if long := count_long(prepared.questions, processor, max_tokens):
        what = f"{long} of {len(prepared.questions)} references are longer than {max_tokens} tokens"
        told(f"{what} and cannot be matched: raise --max_tokens")


def count_long(questions: Sequence[Question], processor: Processor, max_tokens: int) -> int:
    """Returns the number of questions all of whose references are longer than an answer may be."""
    references = [question.row.references or () for question in questions]
    encode = processor.tokenizer.encode
    return sum(bool(own) and min(len(encode(text)) for text in own) > max_tokens for own in references)


def check_same(questions: Sequence[Question]) -> None:
    """Raises ValueError if the processes have different questions."""
    check_same_rows([[question.row.id, question.turns, question.length] for question in questions])


def check_same_rows(rows: Sequence[Any]) -> None:
    """Raises ValueError if the processes have different rows, given as JSON values."""
    own = json_digest(rows)
    digests = distributed.exchange(exchange_name("questions"), own)
    for process, digest in enumerate(digests):
        if digest != digests[0]:
            raise ValueError(
                f"process {process} has other questions than process 0: give all processes the same command and files"
            )


def mark(protocol: Protocol, question: Question, answer: str) -> Mark | None:
    """Returns the mark of an answer; None if the row has no public references, or only a judge can score it."""
    if protocol.score is None or question.row.references is None:
        return None
    return protocol.score(answer, question.row)


def _result(question: Question, answer: Sequence, marked: Sequence | None) -> Result:
    text, images = answer
    return Result(question.row, question.prompt, text, None if marked is None else Mark(*marked), tuple(images))
