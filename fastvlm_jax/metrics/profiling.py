"""Traces chosen steps for xprof or TensorBoard: `fastvlm train --profile=FIRST:LAST`."""

import pathlib
import re
import sys

import jax


def parse_steps(text: str, steps: int) -> tuple[int, int]:
    """Parses steps to trace: "10:13" -> (10, 13), "10" -> (10, 10), "" -> (0, 0), which is no step.

    Raises:
      ValueError: the text has another form, or a run of `steps` steps ends before the first.
    """
    if not text:
        return 0, 0
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"--profile={text} must be the first and the last step to trace, as 10:13, counted from 1")
    if first > steps:
        raise ValueError(f"--profile={text}: the run has {steps} steps; choose among them")
    return first, last


class Trace:
    """Traces the steps `chosen` (first, last) of a run of steps start + 1 to steps, as far as the run reaches them.

    Every process writes WORKDIR/profile/plugins/profile/steps_FIRST_LAST/HOST.xplane.pb: xprof shows them together.
    Tracing waits for the devices before the first and after the last of these steps, and at no other time.
    """

    def __init__(self, chosen: tuple[int, int], folder: pathlib.Path, start: int, steps: int):
        self._first, self._last = max(chosen[0], start + 1), min(chosen[1], steps)
        self._folder, self._running = folder, False
        if chosen[1] and self._first > self._last:
            print(f"--profile: the run goes on after step {start}, nothing is left to trace", file=sys.stderr)

    def begin(self, step: int, state) -> jax.profiler.StepTraceAnnotation:
        """Returns the marker to enter around a step; before the first chosen step it starts the trace."""
        if self._first == step <= self._last:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python calls of every thread would hide the rest and slow the step
            options.session_id = f"steps_{self._first}_{self._last}"  # the same on all hosts
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def end(self, step: int, state) -> None:
        """Writes the trace after the last chosen step."""
        if self._running and step >= self._last:
            jax.block_until_ready(state)
            if self.close():
                print(f"steps {self._first} to {self._last} are traced: {self._folder}", file=sys.stderr)

    def close(self) -> bool:
        """Writes the trace so far, unless it is written, and returns whether it did; a full disk is told in a line."""
        if not self._running:
            return False
        self._running = False
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            print(f"--profile: {self._folder} cannot be written: {str(error).splitlines()[0]}", file=sys.stderr)
            return False
        return True
