"""Logs training steps: the outputs of a step, and the rates of the steps since the last log."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import jax
import ml_collections

from fastvlm_jax import distributed
from fastvlm_jax.chips import peak_flops
from fastvlm_jax.config_values import rows_of
from fastvlm_jax.data.load.loader import Flow
from fastvlm_jax.evaluate.benchmark import Result
from fastvlm_jax.metrics.throughput import memory_scalars, mfu_scalars
from fastvlm_jax.metrics.writer import MetricsWriter
from fastvlm_jax.models.kinds import Model


class StepRecord(NamedTuple):
    """Holds what the training loop knows about a step.

    Attributes:
      step: its number, from 1.
      outputs: the metrics that train_step returned, on the devices.
      flow: counts of what the loader gave out since the last record.
      substituted: number of records found to be unusable so far.
      held: seconds, since the last record, in which the devices waited for this process; see Watchdog.held.
    """

    step: int
    outputs: dict[str, jax.Array]
    flow: Flow
    substituted: int
    held: float


class StepLog:
    """Writes the records of a run: scalars of the step, rates, MFU, memory, losses by data set, learning rates.

    All processes take part in every record; the writer decides which of them writes.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        config: ml_collections.ConfigDict,
        model: Model,
        trainable: Collection[str],
        names: Sequence[str],
        devices: Sequence[jax.Device],
        *,
        start: int,
        rates: Callable[[int], dict[str, float]],
    ):
        """Begins the log of a run behind step `start`.

        Args:
          trainable: paths of the parameters that learn.
          names: names of the data sets, as in the metrics.
          rates: number of updates -> learning rates by their names in the metrics.
        """
        self._writer, self._config, self._model, self._trainable = writer, config, model, trainable
        self._names, self._devices, self._rates_at = names, devices, rates
        self._peak = peak_flops(devices)
        self.restart_clock(start)

    def restart_clock(self, step: int) -> None:
        """Begins a new interval after `step`; time before it counts in no rate."""
        self._since, self._last = self._writer.seconds(), step

    def write(self, record: StepRecord) -> None:
        """Writes a step's scalars; waits for its outputs."""
        outputs = dict(record.outputs)
        by_source, verdict = outputs.pop("loss_by_source", None), outputs.pop("verdict", None)
        first = {"loss": outputs.pop("loss")}
        scalars = {key: float(value) for key, value in (first | outputs).items()}
        scalars = {key: value for key, value in scalars.items() if math.isfinite(value)}  # the others are a bad step's
        seconds, steps = max(self._writer.seconds() - self._since, 1e-9), record.step - self._last
        scalars["step_seconds"] = seconds / steps
        self.restart_clock(record.step)
        scalars |= self._rates(record, seconds)
        scalars |= memory_scalars(self._devices)
        scalars |= slowest_host(
            distributed.exchange(f"host {record.step}", (scalars["input_bound"], record.held / steps))
        )
        if by_source is not None:
            losses = zip(self._names, by_source.tolist(), strict=True)
            scalars |= {f"loss/{name}": loss for name, loss in losses if math.isfinite(loss)}
        if verdict is not None:
            scalars["skipped"] = int(verdict.skipped)
        scalars |= self._rates_at(record.step - scalars.get("skipped", 0))  # the schedule counts updates
        self._writer.write(record.step, scalars)

    def write_evaluation(self, step: int, scalars: dict[str, float]) -> None:
        """Writes the results of an evaluation, whose time counts in no rate."""
        if scalars:
            self._writer.write(step, scalars)
        self.restart_clock(step)

    def write_predictions(self, step: int, results: Sequence[Result]) -> None:
        """Writes the answers to sample questions, whose time counts in no rate."""
        self._writer.write_predictions(step, results)
        self.restart_clock(step)

    def _rates(self, record: StepRecord, seconds: float) -> dict[str, float]:
        flow = record.flow
        scalars = {
            "images/s": flow.images / seconds,
            "tokens/s": flow.tokens / seconds,
            "input_bound": min(flow.waited / seconds, 1.0),
            "substituted": record.substituted,
            "truncated": flow.truncated,
        }
        if len(self._names) > 1:
            scalars |= {f"records/{name}": count for name, count in zip(self._names, flow.records, strict=True)}
        _, row_length = rows_of(self._config)
        mfu = mfu_scalars(self._model, self._trainable, flow, seconds, row_length=row_length, peak=self._peak)
        return scalars | mfu


def slowest_host(found: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Returns the scalars of the process that holds up all others, from (input_bound, seconds held) of each process.

    "skew_seconds" is how much longer, a step, the devices waited for the slowest process than for the fastest.
    """
    bounds, held = zip(*found, strict=True)
    scalars = {"input_bound": max(bounds)}
    if len(found) > 1:
        scalars |= {"skew_seconds": max(held) - min(held), "slowest_process": held.index(max(held))}
    return scalars
