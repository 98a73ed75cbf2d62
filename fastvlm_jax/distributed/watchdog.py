"""Watches over the steps of a run: names what holds up a step, writes all stacks, and tells supervisors how far it is.

WORKDIR/heartbeat.json           what the run is doing, written every few seconds; see Watchdog.state
WORKDIR/stacks/process_N.txt     stacks of all threads of a process, each time that a step took far longer than usual
"""

import collections
import contextlib
import faulthandler
import json
import os
import pathlib
import queue
import socket
import statistics
import threading
import time
from collections.abc import Hashable, Iterator
from typing import Any

import jax

from fastvlm_jax import disk
from fastvlm_jax.distributed.process import mark, slowest

SLOW, AT_LEAST = 10, 10.0  # a step is slow after so many times its median, but never before so many seconds
REMEMBERED, ENOUGH = 100, 5  # steps whose times make the median, at most and at least
LOOK_SECONDS, BEAT_SECONDS = 1.0, 10.0  # between two looks at the step, and between two heartbeats in the workdir
MOST_STACKS = 20  # times that a process writes its stacks
HEARTBEAT, STACKS = "heartbeat.json", "stacks"  # in a workdir


class Watchdog:
    """Follows the steps of a run within its context.

    A step lasts from the end of the step before it on the devices to its own end there, so it includes the wait for its
    batch. Compilation, saves and evaluations, the blocks of `doing`, may take long and count in no step. Nothing here
    ends a slow run; Peers ends one whose processes wait for one that is late.
    """

    def __init__(self, workdir: pathlib.Path, name: str, steps: int):
        """Prepares to watch a run of `steps` steps in its workdir; `name` stands before its lines on stderr."""
        self._workdir, self._name, self._steps = workdir, name, steps
        self._ended, self._given = threading.Event(), queue.SimpleQueue()
        self._lock = threading.Lock()  # guards all attributes below
        self._doing = "the start"  # what may take long now; "" in a step
        self._since = time.monotonic()  # when the devices ended the step before, or `doing` began or ended
        self._step = self._done = None  # the last step given to the devices, and the last that they ended
        self._size: Hashable = None  # of the last step
        self._times = collections.defaultdict(lambda: collections.deque(maxlen=REMEMBERED))  # of steps, by size, s
        self._held, self._slow, self._stacks = 0.0, False, 0

    def __enter__(self):
        mark(self._doing)
        work = {"steps": self._follow, "watchdog": self._watch}
        if jax.process_index() == 0:
            work["heartbeat"] = self._beat
        self._threads = [threading.Thread(target=run, name=name, daemon=True) for name, run in work.items()]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._doing = "nothing: it has ended"
        self._ended.set()
        self._given.put(None)
        for thread in self._threads:
            thread.join(2)  # a folder that hangs must not hold up the end

    def restart(self) -> None:
        """Notes that the run begins again, behind a roll-back: what it does before its next step may take long."""
        self._begin("the start")

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Runs the block, or each call of a function that it decorates, as work that may take long."""
        before = self._doing
        self._begin(what)
        try:
            yield
        finally:
            self._begin(before)

    def _begin(self, what: str) -> None:
        with self._lock:
            self._doing, self._since = what, time.monotonic()
            usual = None if what else self._usual()
        mark(what or f"step {self._step}", usual)

    def begin(self, step: int, size: Hashable, output: jax.Array) -> None:
        """Notes that the devices have got a step.

        Args:
          size: what the time of a step depends on: the shape of its images.
          output: a result of the step.
        """
        with self._lock:
            if self._doing:  # the first step
                self._doing, self._since, self._done = "", time.monotonic(), step - 1
            elif self._step == self._done:  # the devices had nothing to do
                self._held += time.monotonic() - self._since
            self._step, self._size = step, size
            usual = self._usual()
        self._given.put((step, size, output))
        mark(f"step {step}", usual)

    def held(self) -> float:
        """Returns the seconds, since the last call, in which the devices waited for this process."""
        with self._lock:
            held, self._held = self._held, 0.0
        return held

    def state(self) -> dict[str, Any]:
        """Returns what heartbeat.json says.

        "time" is in seconds since 1970: a heartbeat older than a minute is that of a run that is dead or frozen.
        "step" is the last step that has ended since this start, of "steps"; "doing" what the run does, for "seconds".
        """
        with self._lock:
            doing, since, step = self._doing or f"step {self._done + 1}", self._since, self._done
        return {
            "time": round(time.time(), 1), "host": socket.gethostname(), "pid": os.getpid(),
            "step": step, "steps": self._steps, "doing": doing, "seconds": round(time.monotonic() - since, 1),
        }  # fmt: skip

    def _usual(self) -> float | None:
        """Returns the median seconds of a step, of the slowest size; None until enough of the last size are known."""
        if len(self._times[self._size]) < ENOUGH:
            return None
        return max(map(statistics.median, filter(None, self._times.values())))

    def _follow(self) -> None:
        """Runs in a thread: waits for each step to end on the devices."""
        while (given := self._given.get()) is not None:
            step, size, output = given
            try:
                output.block_until_ready()
            except jax.errors.JaxRuntimeError:
                return  # the main thread meets the same error
            with self._lock:
                now = time.monotonic()
                seconds, self._since, self._done = now - self._since, now, step
                self._times[size].append(seconds)
                slow, self._slow = self._slow, False
            if slow:
                self._tell(f"step {step} has ended, after {seconds:.0f} s")

    def _watch(self) -> None:
        """Runs in a thread: tells once of each step that is slow, and writes the stacks."""
        while not self._ended.wait(LOOK_SECONDS):
            with self._lock:
                seconds, usual = time.monotonic() - self._since, self._usual()
                if self._doing or self._slow or usual is None or seconds <= max(AT_LEAST, SLOW * usual):
                    continue
                self._slow, self._stacks = True, self._stacks + 1
            line = f"step {self._done + 1} has taken {seconds:.0f} s, where {usual:.2g} s are usual"
            who = f"; {told}" if (told := slowest()) else ""
            write = self._stacks <= MOST_STACKS
            self._tell(f"{line}{who}{f'; stacks of all threads: {self._workdir / STACKS}' if write else ''}")
            if write:
                self._write_stacks(line)

    def _write_stacks(self, line: str) -> None:
        path = self._workdir / STACKS / f"process_{jax.process_index()}.txt"
        try:
            path.parent.mkdir(exist_ok=True)
            with path.open("a") as file:
                print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {line}", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            disk.tell(f"{self._name}: {path} cannot be written: {error.strerror}")

    def _beat(self) -> None:
        """Runs in a thread, whose writes may hang: writes the heartbeat until the run ends, and once more then."""
        path, told, last = self._workdir / HEARTBEAT, False, False
        while not last:
            last = self._ended.is_set()
            try:
                partial = path.with_suffix(".partial")
                partial.write_text(json.dumps(self.state()) + "\n")
                partial.replace(path)
            except OSError as error:
                if not told:
                    told = True
                    self._tell(f"{path} cannot be written, supervisors see no heartbeat: {error.strerror}")
            self._ended.wait(BEAT_SECONDS)

    def _tell(self, line: str) -> None:
        if jax.process_index() == 0:
            disk.tell(f"{self._name}: {line}")
