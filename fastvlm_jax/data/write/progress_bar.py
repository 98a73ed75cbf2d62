"""Shows the progress of a write: a bar on a terminal, a line every half minute elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

import tqdm

from fastvlm_jax.data.write.progress import Progress

_EVERY = 30  # seconds between lines


@contextlib.contextmanager
def shown(stream: TextIO | None = None) -> Iterator[Callable[[Progress], None]]:
    """Yields a function that shows the progress of a write on `stream`, by default on stderr."""
    stream = stream or sys.stderr
    start = last = time.monotonic()
    with tqdm.tqdm(desc="write", unit="job", file=stream, disable=not stream.isatty()) as bar:

        def show(state: Progress) -> None:
            nonlocal last
            now = time.monotonic()
            rate = state.bytes / 1e6 / max(now - start, 1e-9)
            line = f"{state.records:,} records, {state.rejected:,} rejected, {rate:.0f} MB/s"
            bar.total, bar.n = state.jobs, state.done
            bar.set_postfix_str(line)
            if bar.disable and now - last > _EVERY:
                print(f"{state.done} of {state.jobs} jobs done: {line}", file=stream, flush=True)
                last = now

        yield show
