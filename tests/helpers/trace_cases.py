"""Traces of a few steps, written in a process of its own: `trace_cases.write(FOLDER)`."""

import pathlib

import jax

from fastvlm_jax.metrics import profiling

CASES = [  # (steps done before, chosen, all steps, traced)
    (0, (2, 3), 5, [2, 3]),
    (2, (2, 9), 5, [3, 4, 5]),
    (3, (2, 3), 5, []),
    (0, (0, 0), 2, []),
]


def write(folder):
    """Writes a trace of each case into folder/INDEX, and of a run that stops in its second traced step."""
    for i, (start, chosen, steps, _) in enumerate(CASES):
        trace, x = profiling.Trace(chosen, pathlib.Path(folder) / str(i), start, steps), jax.numpy.ones(4)
        for step in range(start + 1, steps + 1):
            with trace.begin(step, x):
                x = x + 1
            trace.end(step, x)
    trace = profiling.Trace((1, 9), pathlib.Path(folder) / "stopped", 0, 9)
    for step in (1, 2):
        with trace.begin(step, None):
            pass
    trace.close()
