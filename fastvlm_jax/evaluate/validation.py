"""Evaluates a model during training: the loss on the held-out split, and the scores of benchmarks.

The scores are those of `fastvlm evaluate` with each benchmark's first protocol, computed on the parameters of the
training state where they lie. Names in the metrics: "validation/loss"; "evaluate/NAME", and "evaluate/NAME_stderr".
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence

import jax
from absl import logging
from etils import epath

from fastvlm_jax import sharding
from fastvlm_jax.config_values import lora_of
from fastvlm_jax.data.load.from_config import open_sources
from fastvlm_jax.data.sources import RecordSource
from fastvlm_jax.evaluate import embed, run, towers
from fastvlm_jax.evaluate.benchmark import Benchmark, Picture, Protocol, Row
from fastvlm_jax.evaluate.benchmarks import clip_benchmark, folder_of, known, named_pictures, qa
from fastvlm_jax.evaluate.groups import padded, rows_that_fit
from fastvlm_jax.evaluate.held_out_loss import make_loss
from fastvlm_jax.evaluate.questions import Prepared, prepare
from fastvlm_jax.evaluate.records import rows_of
from fastvlm_jax.evaluate.results import summarise
from fastvlm_jax.generate import answer_limit
from fastvlm_jax.losses import Loss
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.models.kinds import Model
from fastvlm_jax.pair_processor import PairProcessor
from fastvlm_jax.processor import Processor
from fastvlm_jax.train_state import TrainState, model_variables

# Computes the scalars of a state, by their names in the metrics, or None if the function, asked after every batch, says
# that the run is to stop.
Evaluate = Callable[[TrainState, Callable[[], bool]], dict[str, float] | None]


@dataclasses.dataclass(frozen=True)
class Entry:
    """Holds an entry of the config's `evaluate`, ready to be asked again and again."""

    benchmark: Benchmark
    protocol: Protocol
    prepared: Prepared | towers.Prepared


class _Stopped(Exception):
    """Raised to leave an evaluation between two batches."""


def make_evaluation(
    config, model: Model, loss: Loss, processor: Processor | PairProcessor, batches: jax.sharding.Sharding
) -> Evaluate | None:
    """Looks at all that evaluation needs, and returns the function that evaluates; None if there is nothing to do.

    The model is the moving average, if the run keeps one. The loss is that of all data sets with a held-out split. The
    questions of ("qa", "", N) are asked as `data.turns` makes samples; see `_own_questions`.

    Args:
      config: config of the run; its eval_batches and `evaluate` say what to evaluate.
      loss: what the run minimises.
      batches: sharding of the batches.

    Raises:
      ValueError: files of a benchmark are missing or damaged, it is unknown or cannot be scored, none of its questions
        can be asked, the held-out split cannot be used for the loss, or is missing for keep_best; the message names
        the key.
    """
    wanted = [tuple(entry) for entry in config.evaluate]
    own = [entry for entry in wanted if not entry[1]]
    held_out = open_sources(config.data, "validation") if config.eval_batches or own else []
    if (config.eval_batches or own) and not held_out:
        wanted = [entry for entry in wanted if entry not in own]
        _say(
            "this run has no validation: no data set has records in a split 'validation'; `fastvlm data write "
            "--validation_share 0.05` sets some aside"
        )
    held_out_loss = make_loss(config, loss, processor, batches) if config.eval_batches and held_out else None
    if isinstance(processor, PairProcessor):
        entries = [_open_towers(*entry, processor, held_out) for entry in wanted]
    else:
        entries = [_open(*entry, config.data.turns, model, processor, held_out) for entry in wanted]
    scores = ["validation/loss"] * bool(held_out_loss) + [f"evaluate/{entry.benchmark.name}" for entry in entries]
    if config.keep_best and config.keep_best not in scores:
        raise ValueError(f"keep_best={config.keep_best!r}: no data set has records in a split 'validation'")

    adapters = lora_of(config)

    def evaluate(state: TrainState, stopped: Callable[[], bool]) -> dict[str, float] | None:
        def go_on(*_) -> None:
            if stopped():
                raise _Stopped

        variables, scalars = model_variables(state, adapters), {}
        try:
            if held_out_loss:
                scalars["validation/loss"] = held_out_loss(variables, go_on)
            for entry in entries:
                scalars |= score(entry, config, model, variables, processor, batches.mesh, go_on)
        except _Stopped:
            return None
        return scalars

    return evaluate if scores else None


def score(
    entry: Entry,
    config,
    model: Model,
    variables: dict,
    processor: Processor | PairProcessor,
    mesh: jax.sharding.Mesh,
    go_on: Callable,
) -> dict[str, float]:
    """Returns the score of a benchmark and its standard error; calls `go_on`, whose errors end it, between batches."""
    protocol, name = entry.protocol, f"evaluate/{entry.benchmark.name}"
    if protocol.matching:
        # No more pictures at once than the shard trains on, beside the state that stays in its memory.
        pictures = config.data.images_per_group * _groups_at_once(config)
        scored = towers.score(
            model, variables, processor, protocol, entry.prepared, mesh=mesh,
            batch_size=min(pictures, embed.BATCH), progress=go_on,
        )  # fmt: skip
    else:
        scored = run.score_prepared(
            model, variables, processor, protocol, entry.prepared, max_tokens=protocol.max_tokens, mesh=mesh,
            batch_size=most_rows(entry, config), progress=go_on,
        )  # fmt: skip
    summary = summarise(entry.benchmark, protocol, scored.results)
    found = {name: summary["score"], f"{name}_stderr": summary["standard_error"]}
    return {key: value for key, value in found.items() if value is not None}


def most_rows(entry: Entry, config) -> int:
    """Returns how many questions a data shard answers at once, beside the state that stays in its memory meanwhile.

    With their answers they have no more tokens than the groups that the shard trains on at once, so that what fits in
    training fits here; and they are no more than `fastvlm evaluate` would ask together.
    """
    longest = max(question.length for question in entry.prepared.questions)
    tokens = _groups_at_once(config) * config.data.rows_per_group * config.data.row_length
    trained = tokens // (longest + entry.protocol.max_tokens)
    return max(1, min(trained, rows_that_fit(padded(longest), Decoder(**config.model.llm.to_dict()))))


def _groups_at_once(config) -> int:
    """Returns the number of groups that a data shard trains on at once."""
    return max(1, config.data.groups // (sharding.batch_shards() * config.accumulate))


def _open(
    name: str,
    folder: str,
    limit: int,
    turns: str,
    model: Model,
    processor: Processor,
    held_out: Sequence[RecordSource],
) -> Entry:
    """Reads and prepares the questions of an entry of `evaluate`, and says what is left out.

    Raises:
      ValueError: see `make_evaluation`.
    """
    try:
        benchmark = qa.benchmark(turns=turns, limit=limit or None) if name == "qa" else known([name])[0]
    except ValueError as error:
        raise ValueError(f"evaluate: {error}") from error
    protocol = benchmark.protocols[0]

    def ready(rows: Sequence[Row]) -> Prepared:
        most_tokens = answer_limit(model, protocol.max_tokens, None)
        return prepare(rows, protocol, processor, most_tokens=most_tokens, strict=benchmark.strict)

    try:
        if folder:
            rows = benchmark.read(folder_of(benchmark, epath.Path(folder).expanduser(), single=True))
            prepared = ready(rows if name == "qa" else rows[: limit or None])
        else:
            prepared = _own_questions(ready, held_out, turns, limit or None)
        if not prepared.questions:
            raise ValueError(f"none of its questions can be asked ({prepared.describe_left_out()})")
        if protocol.score is None or all(question.row.references is None for question in prepared.questions):
            raise ValueError("it has no public answers, or only a judge can score them: leave it out")
        if benchmark.strict:  # of others, each was read once above
            _check_images([question.row for question in prepared.questions], processor.decode)
    except (OSError, ValueError) as error:
        raise ValueError(f"evaluate, {name} of {folder or 'the validation split'}: {error}") from error
    run.check_same(prepared.questions)
    _tell(name, protocol, prepared, processor)
    return Entry(benchmark, protocol, prepared)


def _own_questions(
    ready: Callable[[list[Row]], Prepared], held_out: Sequence[RecordSource], turns: str, limit: int | None
) -> Prepared:
    """Returns the questions of the first data set whose held-out split holds some that can be asked."""
    for source in held_out:
        prepared = ready(rows_of(source, turns, limit))
        if prepared.questions:
            break
    return prepared


def _open_towers(
    name: str, folder: str, limit: int, processor: PairProcessor, held_out: Sequence[RecordSource]
) -> Entry:
    """Reads the pictures and texts of an entry of stage 0; see `_open`."""
    benchmark = {"zero-shot": clip_benchmark.zero_shot, "retrieval": clip_benchmark.retrieval}[name](
        limit=limit or None
    )
    try:
        if folder:
            rows = benchmark.read(folder_of(benchmark, epath.Path(folder).expanduser(), single=True))
        elif name == "zero-shot":
            rows = clip_benchmark.class_rows(named_pictures.classes_of(held_out[0]), limit or None)
        else:
            rows = clip_benchmark.caption_rows(named_pictures.captioned(held_out[0]), limit or None)
        _check_images(rows, processor.view)
    except (OSError, ValueError) as error:
        raise ValueError(f"evaluate, {name} of {folder or 'the validation split'}: {error}") from error
    return Entry(benchmark, benchmark.protocols[0], towers.prepare(rows, benchmark.protocols[0], processor))


def _check_images(rows: Sequence[Row], decode: Callable[[bytes, str], object]) -> None:
    """Decodes each image once, so that a damaged one shows before the first step and does not end a long run.

    Raises:
      ValueError: an image cannot be read; the message names it.
    """

    def look(picture: Picture) -> None:
        try:
            decode(picture.read(), picture.name)
        except ValueError as error:
            raise ValueError(str(error) if picture.name in str(error) else f"{picture.name}: {error}") from error

    pictures = {picture.name: picture for row in rows for picture in row.pictures}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(look, pictures.values()))


def _tell(name: str, protocol: Protocol, prepared: Prepared, processor: Processor) -> None:
    """Says which questions are left out, and which cannot be answered right."""
    count, most = len(prepared.questions), protocol.max_tokens
    if prepared.left_out:
        _say(f"evaluate/{name} leaves out {len(prepared.left_out)} questions: {prepared.describe_left_out()}")
    if long := run.count_long(prepared.questions, processor, most):
        _say(f"{long} of {count} references of evaluate/{name} are longer than {most} tokens and cannot be matched")


def _say(line: str) -> None:
    if jax.process_index() == 0:
        logging.warning("%s", line)
