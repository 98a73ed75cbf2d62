"""Runs the model in one thread: questions wait in a queue, and each is answered alone."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable

from absl import logging

from fastvlm_jax.chat.answering import Answering, Event
from fastvlm_jax.chat.question import Question

MAX_WAITING = 64  # questions
STOP_SECONDS = 5.0  # longest wait for the answer that is being written, which may be compiling


class Job:
    """Holds a question that waits or is answered.

    Attributes:
      question: what is asked.
      tell: function that is called, in the worker's thread, with each event and in the end with None.
      gone: to be set when nobody waits for the answer any more, which ends it.
      asked: when it was asked, s.
    """

    def __init__(self, question: Question, tell: Callable[[Event | None], None]):
        self.question, self.tell = question, tell
        self.gone, self.asked = threading.Event(), time.perf_counter()


class Worker:
    """Answers questions in their order, in a thread of its own."""

    def __init__(self, answering: Answering):
        self.answering = answering
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._open: list[Job] = []  # those that wait, and the one that is answered
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="model")
        self._thread.start()

    def ask(self, job: Job) -> int:
        """Queues a question; returns how many are before it.

        Raises:
          ValueError: too many wait.
        """
        with self._lock:
            ahead = len(self._open)
            if ahead >= MAX_WAITING:
                raise ValueError(f"{ahead} questions wait already: ask again later")
            self._open.append(job)
        self._jobs.put(job)
        return ahead

    def stop(self) -> None:
        """Ends the answer that is being written, those that wait, and the thread."""
        with self._lock:
            for job in self._open:
                job.gone.set()
        self._jobs.put(None)
        self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if not job.gone.is_set():
                    self._answer(job)
            finally:
                with self._lock:
                    self._open.remove(job)
                job.tell(None)

    def _answer(self, job: Job) -> None:
        waited = time.perf_counter() - job.asked
        try:
            with contextlib.closing(self.answering.answer(job.question)) as events:
                for event in events:
                    if job.gone.is_set():
                        return
                    if "first" in event:
                        event["first"]["seconds"] = {"queue": waited, **event["first"]["seconds"]}
                    job.tell(event)
        except ValueError as error:
            job.tell({"error": " ".join(str(error).split())})
        except Exception as error:  # the next question may fit into memory where this one did not
            logging.exception("a question was not answered")
            self.answering.forget()
            full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
            reason = "the memory of the device is too small for it" if full else type(error).__name__
            job.tell({"error": f"the question could not be answered: {reason}"})
