"""Asks a model in training the same few questions, time after time, so that a person sees its answers change."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
from absl import logging

from fastvlm_jax.config_values import lora_of
from fastvlm_jax.data.load.from_config import open_sources
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sources import RecordSource
from fastvlm_jax.evaluate import run
from fastvlm_jax.evaluate.benchmark import Result, Row
from fastvlm_jax.evaluate.benchmarks import qa
from fastvlm_jax.evaluate.questions import prepare
from fastvlm_jax.evaluate.records import rows_of
from fastvlm_jax.evaluate.validation import Entry, most_rows
from fastvlm_jax.generate import answer_limit
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.processor import Processor
from fastvlm_jax.train_state import TrainState, model_variables


def make_samples(
    config, model: FastVLM, processor: Processor, mesh: jax.sharding.Mesh
) -> Callable[[TrainState], list[Result]] | None:
    """Chooses and reads the questions, and returns the function that answers them; None without predictions_every.

    All processes call that function, and all get the results. The model is the moving average, if the run keeps one.

    Raises:
      ValueError: there is no held-out split, or none of its questions can be asked; the message names the key.
    """
    if not config.predictions_every:
        return None
    asked = f"predictions_every={config.predictions_every}"
    held_out = open_sources(config.data, "validation")
    if not held_out:
        raise ValueError(
            f"{asked} asks the held-out split, and no data set has records in a split 'validation'; `fastvlm data "
            "write --validation_share 0.05` sets some aside"
        )
    benchmark = qa.benchmark(turns=config.data.turns)
    protocol = benchmark.protocols[0]
    rows = sample_rows(held_out, config.data.turns, config.num_predictions)
    limit = answer_limit(model, protocol.max_tokens, None)
    prepared = prepare(rows, protocol, processor, most_tokens=limit, strict=False)
    if not prepared.questions:
        raise ValueError(f"{asked}: none of {len(rows)} questions can be asked ({prepared.describe_left_out()})")
    if prepared.left_out and jax.process_index() == 0:
        logging.warning("%s leaves out %d questions: %s", asked, len(prepared.left_out), prepared.describe_left_out())
    run.check_same(prepared.questions)
    batch_size = most_rows(Entry(benchmark, protocol, prepared), config)
    adapters = lora_of(config)

    def answers(state: TrainState) -> list[Result]:
        return run.score_prepared(
            model, model_variables(state, adapters), processor, protocol, prepared,
            max_tokens=protocol.max_tokens, mesh=mesh, batch_size=batch_size,
        ).results  # fmt: skip

    return answers


def sample_rows(sources: Sequence[RecordSource], turns: str, count: int) -> list[Row]:
    """Returns `count` questions, about records that lie evenly over all sources; fewer if there are fewer records.

    A record gives one question: the first record of a source its first, the second its sixth, and so on, round and
    round, so that records that ask alike show different questions.

    Args:
      turns: how questions are asked; see records.rows_of.
    """
    rows = []
    for number, source in enumerate(sources):
        share = min(len(source), count // len(sources) + (number < count % len(sources)))
        few = _Few(source, [i * len(source) // share for i in range(share)])
        by_record = itertools.groupby(rows_of(few, turns), key=lambda row: row.fields["record"])
        for i, found in enumerate(list(group) for _, group in by_record):
            row = found[5 * i % len(found)]
            rows.append(_named(row, number, source.folder.name) if len(sources) > 1 else row)
    return rows


@dataclasses.dataclass(frozen=True)
class _Few:
    """Holds some records of a source, as a sequence."""

    source: RecordSource
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Record:
        return self.source[self.numbers[i]]


def _named(row: Row, source: int, folder: str) -> Row:
    """Returns a row that tells its source; its images have names that no other source has."""
    pictures = [dataclasses.replace(picture, name=f"source {source} {picture.name}") for picture in row.pictures]
    return dataclasses.replace(row, id=f"{folder}/{row.id}", pictures=tuple(pictures))
