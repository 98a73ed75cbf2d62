"""Follows the bad steps of a run: tells of them, lists their records, and goes back where they do not end.

The compiled step judges itself and leaves the update of a bad step out (guard.py). Its verdict is read a few steps
later, so that the devices never wait for it, and in the same way in all processes:

    step                    11    12    13    14    15    16    17      with in_a_row = 3
                            fine  bad   bad   bad   ...
    verdict read behind     13    14    15    16                        bad_steps.jsonl: the records of 12, 13 and 14
    then                                      go back to the last checkpoint, and never draw those three batches again

WORKDIR/bad_steps.jsonl     a JSON object for each record of each bad step:
                            {"step", "batch", "group", "source", "record", "key", "why"}
"""

import collections
import concurrent.futures
import itertools
import json
import os
import pathlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from fastvlm_jax import guard
from fastvlm_jax.data.load.bad_records import key_of
from fastvlm_jax.data.load.loader import Builder
from fastvlm_jax.files import write_whole
from fastvlm_jax.metrics.log_file import LogFile
from fastvlm_jax.metrics.opening import tell
from fastvlm_jax.train_state import TrainState

FILE = "bad_steps.jsonl"  # in a workdir
LAG = 2  # steps that the devices may be ahead of the last verdict read


class BadSteps:
    """Knows the bad steps of a run so far, the same in all processes; process 0 tells of them and lists their records.

    A run begins, and begins again behind each roll-back, with `begin`; `add` takes every step, `too_many` reads.
    """

    def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path, name: str):
        """Follows a run.

        Args:
          config: the keys `bad_steps.*`.
          name: name of the run, for messages.
        """
        self._config, self._path, self._name = config, workdir / FILE, name
        self._log = LogFile(self._path)
        self._goes_back, self._back_to, self._tries = False, 0, []
        self._row: dict[int, str] = {}  # batches of the bad steps since the last one that was fine -> why
        self._first = 0  # the first of these steps
        self._given_up: set[int] = set()  # batches that are not drawn again: of the rows that ended in a roll-back
        self._waiting = collections.deque()

    def begin(
        self, state: TrainState, position: int, passed_over: Collection[int], build: Builder
    ) -> tuple[TrainState, tuple[int, ...]]:
        """Begins at a state: returns it, ready to go on, and the batches that are passed over from here on.

        Those of a row that led to a roll-back are passed over for good. Lines about batches that the run draws again
        are dropped from the file.

        Args:
          position, passed_over: data position of the state, and the batches that were passed over before it.
          build: builder of the batches.

        Raises:
          FloatingPointError: the run went back to this state as often as the config allows; the message is a report.
        """
        self._given_up.update(passed_over)
        if self._goes_back:
            self._note_try(int(state.step))
            self._given_up.update(self._row)
            state = state.replace(guard=state.guard.replace(in_a_row=jnp.zeros_like(state.guard.in_a_row)))
        in_a_row = int(state.guard.in_a_row)  # above 0 where the run was stopped among bad steps
        passed_over = tuple(sorted(self._given_up))
        drawn = (k for k in range(position - 1, -1, -1) if k not in passed_over)
        row = sorted(itertools.islice(drawn, in_a_row))[: self._config.in_a_row]
        self._row = dict.fromkeys(row, "before the run was stopped")
        self._first = int(state.step) - in_a_row + 1
        self._build, self._goes_back = build, self._is_full
        self._waiting.clear()
        if jax.process_index() == 0:
            self._drop_lines(position, passed_over)
        return state, passed_over

    def add(self, step: int, batch: int, outputs: dict[str, Any]) -> None:
        """Takes in a step that was dispatched: its number, that of its batch, and what train_step returned."""
        if "verdict" in outputs:
            self._waiting.append((step, batch, outputs))

    def too_many(self, now: bool) -> bool:
        """Reads the verdicts of all steps but the last LAG, or of all `now`; returns whether the run has to go back."""
        while len(self._waiting) > (0 if now else LAG) and not self._goes_back:
            self._read(*self._waiting.popleft())
            self._goes_back = self._is_full
        return self._goes_back

    def flush(self) -> None:
        """Raises OSError if the disk does not take lines about bad steps that it has not taken yet."""
        self._log.flush()

    @property
    def first_of_row(self) -> int | None:
        """Returns the first of the bad steps behind which the run has to go back; None if it need not."""
        return self._first if self._goes_back else None

    @property
    def unsettled(self) -> bool:
        """Returns whether the last step read was left out, so that going back may undo the steps before it too."""
        return self._config.mode == "on" and bool(self._row)

    @property
    def _is_full(self) -> bool:
        """Returns whether the row of bad steps is as long as the config allows."""
        return self.unsettled and len(self._row) >= self._config.in_a_row

    def _read(self, step: int, batch: int, outputs: dict[str, Any]) -> None:
        if int(outputs["verdict"].in_a_row) == 0:
            self._row.clear()
            return
        self._first = self._first if self._row else step
        self._row[batch] = why = describe(outputs)
        if len(self._row) > self._config.in_a_row:  # with "warn" a broken run would list all of its data
            return
        if jax.process_index() == 0:
            lines = [{"step": step, "batch": batch, **record, "why": why} for record in records_of(self._build, batch)]
            self._log.append("".join(json.dumps(line) + "\n" for line in lines).encode())
        done = "its update is left out" if self._config.mode == "on" else "its update is made all the same"
        tell(self._name, f"step {step} is bad, {done}: {why}; its records are in {self._path}")

    def _note_try(self, step: int) -> None:
        """Notes a roll-back to the state of `step`; raises FloatingPointError if there were enough of them."""
        if self._back_to != step:  # a new checkpoint: the run got further
            self._back_to, self._tries = step, []
        *_, why = self._row.values()
        self._tries.append(f"passing over batches {spans(self._row)} ({why})")
        row = f"{self._config.in_a_row} bad steps in a row"
        if len(self._tries) > self._config.roll_backs:
            *tried, last = self._tries
            tried = "".join(f"; {number}. {what}" for number, what in enumerate(tried, 1))
            raise FloatingPointError(
                f"{row}, {self._config.roll_backs} roll-backs to step {step} did not end them{tried}; stopped before "
                f"{last}. The records of these batches are in {self._path}: if they look right, lower the rates in "
                "groups or, for spikes, raise bad_steps.factor"
            )
        tell(self._name, f"{row}: goes back to step {step}, {self._tries[-1]}")

    def _drop_lines(self, position: int, passed_over: Collection[int]) -> None:
        """Drops the lines about batches that will be drawn again, and a line that a crash has cut."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if (k := _batch_of(line)) in passed_over or 0 <= k < position]
        if len(kept) < len(lines):
            write_whole(self._path, "".join(f"{line}\n" for line in kept).encode())


def _batch_of(line: str) -> int:
    try:
        return int(json.loads(line)["batch"])
    except (ValueError, KeyError, TypeError):
        return -1


def describe(outputs: dict[str, Any]) -> str:
    """Returns in words what is wrong with a bad step, by what train_step returned of it."""
    verdict, loss, norm = outputs["verdict"], float(outputs["loss"]), float(outputs["grad_norm"])
    if (why := int(verdict.why)) == guard.LOSS:
        return f"the loss is {loss}"
    if why == guard.GRADIENT:
        return f"the norm of the gradient is {norm}"
    if why == guard.STATISTICS:
        return "its batch statistics are not finite"
    median = float(verdict.median)
    return f"the norm of the gradient, {norm:.4g}, is {norm / median:.3g} times the median, {median:.4g}"


def records_of(build: Builder, k: int) -> Iterator[dict[str, Any]]:
    """Yields where each record of global batch k comes from: its group, its data set, its number there and its key."""
    schedule = build.schedule
    plan = schedule.batch(k)
    places = [(g, place) for g in range(schedule.groups) for place in schedule.group(plan, g)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # each record may be a round trip to a bucket
        keys = pool.map(lambda found: key_of(build.sources[found[1].source], found[1].record), places)
        for (g, place), key in zip(places, keys, strict=True):
            source = os.fspath(build.sources[place.source].folder)
            yield {"group": g, "source": source, "record": place.record, "key": key}


def spans(numbers: Iterable[int]) -> str:
    """Returns numbers in words: {4, 7, 8, 9} -> "4, 7-9"."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{first}-{last}" if first < last else str(first) for first, last in found)
