"""Shows the progress of an evaluation: a bar on a terminal, a line every half minute elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

import jax
import tqdm

from fastvlm_jax.evaluate.run import Progress

_EVERY = 30  # seconds between lines


@contextlib.contextmanager
def shown(name: str, stream: TextIO | None = None) -> Iterator[Callable[[Progress], None]]:
    """Yields a function that shows the progress of the benchmark `name` on `stream`, by default on stderr.

    Of several processes only the first shows it.
    """
    stream = stream or sys.stderr
    last, silent = time.monotonic(), jax.process_index() > 0
    with tqdm.tqdm(desc=name, unit="question", file=stream, disable=silent or not stream.isatty()) as bar:

        def show(state: Progress) -> None:
            nonlocal last
            score = "" if state.score is None else f"score {state.score:.1f}"
            # The rate and the time left count what is asked now, not what the journal held.
            bar.total, bar.initial, bar.n = state.total, state.done - state.asked, state.done
            bar.set_postfix_str(score)
            if bar.disable and not silent and time.monotonic() - last > _EVERY:
                print(f"{name}: {line(state)}", file=stream, flush=True)
                last = time.monotonic()

        yield show


def line(state: Progress) -> str:
    """Returns the progress in words: "120 of 500 questions, score 61.2, 14.1 questions/s, 00:27 left"."""
    parts = [f"{state.done:,} of {state.total:,} questions"]
    if state.score is not None:
        parts.append(f"score {state.score:.1f}")
    if state.asked:
        rate = state.asked / max(state.seconds, 1e-9)
        parts.append(f"{rate:.1f} questions/s")
        parts.append(f"{tqdm.tqdm.format_interval((state.total - state.done) / rate)} left")
    return ", ".join(parts)
