"""Defines what a benchmark is: its rows as published, and the protocols that say how they are asked and scored.

Row "337"   question "what is the date?"   pictures (page.png,)   references ("1/8/93",)
Protocol "paper"   prompt(row) -> (("user", (0, "\\nwhat is the date?\\nAnswer the question using a single word ...")),)
Result      answer "1/8/93."   mark (score 0.86, parsed "1/8/93.")
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from fastvlm_jax.text.conversation import Turn

PROTOCOLS = ("paper", "llava", "lmms-eval")
# The format sentences of LLaVA's mixes, as LLaVA and lmms-eval write them behind a question.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."
NO_LLAVA = {"llava": "LLaVA has no script for it"}  # of benchmarks that came later: see Benchmark.refused


@dataclasses.dataclass(frozen=True)
class Picture:
    """Names an image of a row, and reads it when it is needed.

    Attributes:
      name: where it lies, unique in its benchmark, for messages: "images/7.jpg" or "test-00000-of-00001.parquet row 7".
      read: returns the encoded image; raises ValueError, with a short line, if it cannot.
      file: the file that holds it, whose size and time tell whether it was changed; None if that is not a file.
      in_table: whether the file holds the images of other rows too, perhaps the same image again.
    """

    name: str
    read: Callable[[], bytes] = dataclasses.field(compare=False, repr=False)
    file: os.PathLike | None = dataclasses.field(default=None, compare=False, repr=False)
    in_table: bool = dataclasses.field(default=False, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Row:
    """Holds one question as it was published.

    Attributes:
      id: its published id or, where there is none, its number from 0; unique in the benchmark.
      question: the question alone, without options, hints and format sentence.
      pictures: its images, in their published order; empty for a row of text alone.
      references: its right answers; None if they are not public.
      fields: other published values that a prompt, a rule or a submission reads, as {"choices": [...], "hint": ""}.
      groups: names of the parts of the benchmark that the row belongs to, as {"category": "color"}.
    """

    id: str
    question: str
    pictures: tuple[Picture, ...]
    references: tuple[str, ...] | None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Mark(NamedTuple):
    """Holds what a rule made of an answer.

    Attributes:
      score: 0 to 1.
      parsed: what the rule compared with the references; None if it could read nothing in the answer.
    """

    score: float
    parsed: str | None


@dataclasses.dataclass(frozen=True)
class Result:
    """Holds a row with the model's answer.

    Attributes:
      prompt: the conversation that was asked, with "<image>" where an image stands.
      answer: the model's answer, without white space at the ends.
      mark: its score; None if the references are not public, or only a judge can score it.
      images: digest of each image that the prompt shows, by its number; the same for the same image of other rows.
    """

    row: Row
    prompt: str
    answer: str
    mark: Mark | None
    images: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Matching:
    """Says what two towers compare, where nothing is asked and answered.

    Attributes:
      texts: returns the texts, from rows of one picture each.
      results: returns the results, from the rows, the embeddings of their pictures, float32 [rows, F], and of the
        texts, float32 [texts, F], all of length 1, and the digest of each row's picture.
    """

    texts: Callable[[Sequence[Row]], list[str]]
    results: Callable[[Sequence[Row], np.ndarray, np.ndarray, Sequence[str]], list[Result]]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Says how a row is asked and scored.

    Attributes:
      name: one of PROTOCOLS, or one of them with a variant of the harness behind it, as "lmms-eval-solution"; "own" for
        a benchmark of this project.
      version: the harness whose rules these are, as "lmms-eval 0.7.3".
      prompt: returns the conversation to ask; numbers in it are indices into `row.pictures`. Raises ValueError, with a
        short reason, for a row that cannot be asked: of a benchmark that is not strict, it is left out.
      score: returns the mark of an answer, which has no white space at its ends; None if only a judge can score it.
      max_tokens: longest answer, tokens.
      rule: how an answer is parsed and scored, in a line for people.
      aggregate: returns the score of the whole benchmark, as it is published; by default 100 times the mean.
        It is also asked of halves of the images, each with all rows of these images, for the standard error.
      figures: returns further figures for the summary, beside the score and the means of the groups, as
        {"perception": 1500.0}; None if there are none.
      judge: returns the lines of the file that says what to ask a judge; None if rules score it.
      review: returns the scores of a file of a judge's replies, from its lines and the benchmark's rows; None if rules
        score it.
      matching: what the two towers of stage 0 compare; None if a language model answers. With it, `score` is None.
    """

    name: str
    version: str
    prompt: Callable[[Row], tuple[Turn, ...]]
    score: Callable[[str, Row], Mark] | None
    max_tokens: int
    rule: str
    aggregate: Callable[[Sequence[Result]], float] | None = None
    figures: Callable[[Sequence[Result]], dict[str, Any]] | None = None
    judge: Callable[[Sequence[Result]], list[dict[str, Any]]] | None = None
    review: Callable[[Sequence[Mapping[str, Any]], Sequence[Row]], dict[str, Any]] | None = None
    matching: Matching | None = None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Describes a benchmark.

    Attributes:
      name: its name on the command line.
      title: its published name and split, as "DocVQA, validation".
      read: reads the rows in their published order from a folder of the published files, of any of its layouts.
      protocols: how it may be asked and scored; the first is the default.
      metric: what the score is, as "ANLS, %".
      size: number of rows as published; 0 if it depends on how the files were written.
      files: for each layout a line: the files that the folder must hold.
      source: where one gets them, in words.
      paper: its column in the tables of the FastVLM paper, as "DocVQA"; "" if it has none.
      in_domain: whether the paper's training mixes hold its training split.
      refused: name of a protocol -> why the benchmark has none of that name.
      submission: makes the value of the file that the benchmark's server takes; None if there is no server.
      strict: whether a row that the model cannot be asked is an error, as in a published benchmark; else it is left
        out.
    """

    name: str
    title: str
    read: Callable[[epath.Path], list[Row]]
    protocols: tuple[Protocol, ...]
    metric: str
    size: int
    files: tuple[str, ...]
    source: str
    paper: str = ""
    in_domain: bool = False
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    submission: Callable[[Sequence[Result]], Any] | None = None
    strict: bool = True

    def protocol(self, name: str | None = None) -> Protocol:
        """Returns the protocol of that name, or the default.

        Raises:
          ValueError: there is none; the message says why and which there are.
        """
        if name is None:
            return self.protocols[0]
        for protocol in self.protocols:
            if protocol.name == name:
                return protocol
        known = ", ".join(protocol.name for protocol in self.protocols)
        why = self.refused.get(name, f"{self.title} was not scored by it")
        raise ValueError(f"--protocol {name}: {why}; {self.name} has {known}")


def ask(*content: str | int) -> tuple[Turn, ...]:
    """Returns the conversation of one user turn: `ask(0, "\\nwhat is this?")`."""
    return (("user", content),)


def ask_llava(row: Row, text: str) -> tuple[Turn, ...]:
    """Returns the conversation of LLaVA's scripts: an image, a line break and the text, or the text alone."""
    return ask(0, f"\n{text}") if row.pictures else ask(text)


def ask_lmms_eval(row: Row, text: str) -> tuple[Turn, ...]:
    """Returns the conversation of lmms-eval's LLaVA model: all images, a space between, a line break, the text."""
    content: list[str | int] = []
    for number in range(len(row.pictures)):
        content += [" ", number] if content else [number]
    return ask(*content, f"\n{text}") if content else ask(text)


def mean_by(scores: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Returns name -> mean of its scores, in percent, by name, from pairs (name, score 0 to 1)."""
    found: dict[str, list[float]] = {}
    for name, score in scores:
        found.setdefault(name, []).append(score)
    return {name: 100 * sum(own) / len(own) for name, own in sorted(found.items())}
