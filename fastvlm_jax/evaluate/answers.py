"""Lets a model answer questions by greedy decoding, over any mesh and any number of processes.

A batch is one group of rows (groups.py) for each data shard of the mesh. Every process builds and decodes the groups on
its own devices; where several processes hold one group, the first of them reads its answers.
"""

import collections
import concurrent.futures
import functools
import itertools
import os
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fastvlm_jax import distributed, sharding
from fastvlm_jax.batch import Batch
from fastvlm_jax.evaluate import groups as groups_lib
from fastvlm_jax.evaluate.groups import Built, Group
from fastvlm_jax.evaluate.placing import inside, one_ahead, placed, places_here
from fastvlm_jax.evaluate.questions import Question
from fastvlm_jax.generate import generate_tokens, until
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.processor import Processor

_exchanges = itertools.count()  # every exchange has a name of its own, the same in all processes


class Answer(NamedTuple):
    """Holds an answer without white space at its ends, and the digest of each image of its row."""

    text: str
    images: tuple[str, ...]


class Answered(NamedTuple):
    """Holds what a batch brought.

    Attributes:
      own: the answers that this process decoded, by the number of the question.
      count: number of questions that all processes answered.
    """

    own: dict[int, Answer]
    count: int


def answer(
    model: FastVLM,
    variables: Any,
    processor: Processor,
    questions: Sequence[Question],
    *,
    max_tokens: int,
    mesh: jax.sharding.Mesh | None = None,
    batch_size: int | None = None,
    told: Callable[[str], None] | None = None,
) -> list[str]:
    """Returns the answers to all questions, in every process; see `answer_batches`."""
    own: dict[int, Answer] = {}
    for batch in answer_batches(
        model, variables, processor, questions, max_tokens=max_tokens, mesh=mesh, batch_size=batch_size, told=told
    ):
        own |= batch.own
    texts = gathered({number: answer.text for number, answer in own.items()})
    return [texts[number] for number in range(len(questions))]


def answer_batches(
    model: FastVLM,
    variables: Any,
    processor: Processor,
    questions: Sequence[Question],
    *,
    max_tokens: int,
    mesh: jax.sharding.Mesh | None = None,
    batch_size: int | None = None,
    known: Container[int] = (),
    told: Callable[[str], None] | None = None,
) -> Iterator[Answered]:
    """Answers the questions batch by batch; who stops iterating ends it between two batches.

    While a batch is answered, a thread builds the next one.

    Args:
      variables: variables of the model; with a mesh, laid out on it in any way.
      max_tokens: longest answer, tokens.
      mesh: mesh of the variables; without it one device answers.
      batch_size: most questions that a data shard of the mesh answers at once; by default as many as fit.
      known: numbers of questions that are not asked. The others keep their places in their groups, so that their
        answers are the same whatever is known.
      told: function that is called with a line about each shape of batches, which is compiled once.

    Raises:
      ValueError: an image cannot be read; the message names its row.
    """
    with inside(mesh):
        shards = sharding.batch_shards()
    layout = None if mesh is None else sharding.batch_sharding(mesh)
    mine, owned = places_here(layout, shards)
    planned = groups_lib.plan(questions, Decoder(**model.llm_args), shards=shards, batch_size=batch_size)
    batches = list(_batches(planned, known, shards))
    untold = collections.Counter(batch[0].group.shape for batch in batches)
    threads = min(os.cpu_count() or 1, 16)
    with concurrent.futures.ThreadPoolExecutor(1) as ahead, concurrent.futures.ThreadPoolExecutor(threads) as decoders:

        def build(batch: list[_Asked]) -> dict[int, Built]:
            """Builds the groups of this process by their places; places beyond the last group repeat it."""
            build_group = functools.cache(
                lambda n: groups_lib.build(batch[n].group, questions, batch[n].numbers, processor, decoders.map)
            )
            return {place: build_group(min(place, len(batch) - 1)) for place in mine}

        builds = one_ahead(ahead, build, batches)
        for batch, built in zip(batches, builds, strict=True):
            shape = batch[0].group.shape
            if told and (count := untold.pop(shape, 0)):
                told(f"{count} {'batch' if count == 1 else 'batches'} of {shards} x {shape}")
            with inside(mesh):
                tokens = generate_tokens(
                    model, variables, _batch_of(built, shards, layout), jax.random.key(0), max_tokens=max_tokens,
                    end=processor.end_ids,
                )  # fmt: skip
            rows = np.asarray(tokens).reshape(shards, shape.rows, max_tokens)
            own: dict[int, Answer] = {}
            for place in owned:
                if place < len(batch):
                    own |= _read(batch[place], rows[place], built[place], questions, processor)
            yield Answered(own, sum(len(asked.numbers) for asked in batch))


def exchange_name(what: str) -> str:
    """Returns a new name for an exchange; all processes ask for the same names in the same order."""
    return f"{what} {next(_exchanges)} of the evaluation"


def gathered(own: dict[int, Any]) -> dict[int, Any]:
    """Returns the JSON-ready values of all processes by their numbers, the same in every process."""
    found: dict[int, Any] = {}
    for values in distributed.exchange(exchange_name("answers"), {str(k): v for k, v in own.items()}):
        found |= {int(number): value for number, value in values.items()}
    return found


class _Asked(NamedTuple):
    """Holds a group, and the numbers of its members that are asked."""

    group: Group
    numbers: list[int]


def _batches(planned: Sequence[Group], known: Container[int], shards: int) -> Iterator[list[_Asked]]:
    """Yields up to `shards` groups of one shape, each with the numbers to ask; what is known whole is left out."""
    groups = [_Asked(group, [number for number in group.members if number not in known]) for group in planned]
    for _, found in itertools.groupby(
        (asked for asked in groups if asked.numbers), key=lambda asked: asked.group.shape
    ):
        alike = list(found)
        for start in range(0, len(alike), shards):
            yield alike[start : start + shards]


def _batch_of(built: dict[int, Built], shards: int, layout: jax.sharding.NamedSharding | None) -> Batch:
    """Returns the batch, fields [shards, ...], on the devices."""
    return jax.tree.map(
        lambda *fields: placed(dict(zip(built, fields, strict=True)), shards, layout),
        *(group.batch for group in built.values()),
    )


def _read(
    asked: _Asked, rows: np.ndarray, built: Built, questions: Sequence[Question], processor: Processor
) -> dict[int, Answer]:
    """Returns the answers to the questions of a group that were asked, by their numbers."""
    found = {}
    for row, number in zip(rows, asked.group.members, strict=False):
        if number in asked.numbers:
            text = processor.tokenizer.decode(until(row, processor.end_ids)).strip()
            found[number] = Answer(text, tuple(built.digests[p.name] for p in questions[number].row.pictures))
    return found
