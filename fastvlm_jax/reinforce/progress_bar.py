"""Shows the progress of a reinforcement: a bar on a terminal, a line every half minute elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

import tqdm

from fastvlm_jax.reinforce.run import Progress

_EVERY = 30  # seconds between lines


@contextlib.contextmanager
def shown(stream: TextIO | None = None) -> Iterator[Callable[[Progress], None]]:
    """Yields a function that shows the progress on `stream`, by default on stderr."""
    stream = stream or sys.stderr
    last = 0.0
    with tqdm.tqdm(desc="reinforce", unit="record", file=stream, disable=not stream.isatty()) as bar:

        def show(state: Progress) -> None:
            nonlocal last
            now = state.written + state.rejected  # the rate and the time left count what is done now, not before
            bar.total, bar.initial = state.records, state.done - now
            bar.set_postfix_str(f"{state.rejected:,} rejected", refresh=False)
            bar.update(state.done - bar.n)
            last = last or time.monotonic()  # behind the first pair, and so behind all compiling
            if bar.disable and time.monotonic() - last >= _EVERY:
                left = tqdm.tqdm.format_interval((state.records - state.done) * state.seconds / now)
                line = f"{state.done:,} of {state.records:,} records, {state.rejected:,} rejected, {left} left"
                print(f"reinforce: {line}", file=stream, flush=True)
                last = time.monotonic()

        yield show
