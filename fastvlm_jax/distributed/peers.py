"""Keeps the processes of one run in touch: it notices lost and late ones, exchanges values, agrees on when to stop.

    process 1 ──┐
    process 2 ──┼── process 0       one connection each, one JSON object per line
    process 3 ──┘

JAX's own service finds a dead process late, and then ends the others with a stack dump that names nobody. Here, the
kernel closes the connection of a dead process at once. A process that freezes, or whose machine fails, is found by its
silence: heartbeats are missing. Heartbeats also tell process 0 how far each process has come, so that one that lives
but waits is found too, while all others wait for it.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from fastvlm_jax.distributed.marks import LONG, Mark, Marks
from fastvlm_jax.distributed.rendezvous import Settings, meet, readable, send

MEND = "start all processes again: they go on from what is saved"
END = "the end of the run"  # name of the last exchange; after it a connection may close


class Peers:
    """Holds the connections to the other processes of a run. Creating it waits until all processes have met.

    Args:
      settings: address, number of processes and id of this one.
      greeting: JSON object that process 0 sends to the others.
      on_loss: function called once, in the watching thread, when a process is lost or late; its argument is a line that
        names the process.

    Attributes:
      greeting: the greeting of process 0.
      stop_status: exit status that all processes end with after `stop_reached`, as the first to ask told it.

    Raises:
      TimeoutError, ConnectionError: the processes did not all meet; see rendezvous.meet.
    """

    def __init__(self, settings: Settings, greeting: dict[str, Any], on_loss: Callable[[str], None]):
        self.settings, self._on_loss = settings, on_loss
        self._sockets, self._hosts, self.greeting = meet(settings, greeting)
        self._buffers = dict.fromkeys(self._sockets, b"")
        self._last_heard = dict.fromkeys(self._sockets, time.monotonic())
        self._period = min(settings.heartbeat_seconds / 5, 2.0)  # seconds between two heartbeats
        self._changed = threading.Condition(threading.RLock())  # guards all attributes below
        self._ended = False  # the run has ended, or this process has reported why it fails
        self._lost = ""  # the line that names the first lost or late process
        self._answers: dict[str, dict[str, Any]] = {}  # results of exchanges, by name
        self._step, self._halted, self._stop_at, self.stop_status = -1, False, None, 0
        self._mark = Mark(0, "the last batch", LONG * settings.late_step_seconds)
        # Used only by process 0: values received for open exchanges, their deadlines, the last step of each process.
        self._values: dict[str, dict[int, Any]] = {}
        self._deadlines: dict[str, float] = {}
        self._steps: dict[int, int] = {}
        self._marks = Marks(settings.num_processes)
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def who(self, process: int) -> str:
        """Returns the number and host of a process, in words."""
        return f"process {process} on {self._hosts[process]}"

    def _names(self, processes: Sequence[int]) -> str:
        more = f" and {len(processes) - 4} more" if len(processes) > 4 else ""
        return ", ".join(map(self.who, processes[:4])) + more

    def exchange(self, name: str, value: Any = None, seconds: float = 600.0) -> list[Any]:
        """Exchanges values: returns the value of every process, in the order of their ids.

        All processes must call it with the same `name`; none continues before the last one has called.

        Args:
          name: name of the exchange; another one may have it once this one has ended.
          value: JSON-ready value of this process.
          seconds: how long to wait for all processes, from the first call.

        Raises:
          TimeoutError: not all called within `seconds`; the message names the missing processes.
          ConnectionError: a process was lost; the message names it.
        """
        with self._changed:
            self._send_to_first({"kind": "value", "name": name, "value": value, "seconds": seconds})
            self._changed.wait_for(lambda: name in self._answers or self._lost)
            if name not in self._answers:
                raise ConnectionError(self._lost)
            answer = self._answers.pop(name)
        if "late" in answer:
            raise TimeoutError(
                f"{self._names(answer['late'])} did not join {name!r} within {seconds:g} s: see its output"
            )
        return answer["values"]

    def mark(self, doing: str, usual: float | None) -> None:
        """Notes that this process begins something; heartbeats tell process 0. All must call it at the same places.

        Args:
          doing: what it begins, in words, as "step 7".
          usual: seconds that this usually takes; None for what may take long.
        """
        with self._changed:
            self._mark = self._mark.passed(doing, self.settings.late_step_seconds, usual)

    def slowest(self) -> str:
        """Returns in words which processes the others wait for, as far as heartbeats have told process 0."""
        with self._changed:
            now = time.monotonic()
            silent = [process for process, heard in self._last_heard.items() if now - heard > 2 * self._period + 1]
            if silent:
                seconds = now - max(self._last_heard[process] for process in silent)
                return f"{self._names(silent)} gave no sign for {seconds:.0f} s"
            behind, mark, _ = self._marks.behind()
            if 0 < len(behind) < self.settings.num_processes:
                return f"{self._names(behind)} came no further than {mark.doing}"
            return "no process is behind the others"

    def ask_stop(self, status: int) -> None:
        """Asks all processes to stop after the same step, and to end with this exit status. It does not block."""
        threading.Thread(target=self._send_to_first, args=({"kind": "stop", "status": status},), daemon=True).start()

    def stop_reached(self, step: int) -> bool:
        """Returns whether all processes stop after `step`. Call it after every step.

        Until a process asks to stop, a call costs no more than a lock. Steps are dispatched ahead of the devices, and
        some processes are further ahead than others. So all pause, report their step, and continue to the step after
        the furthest one. Background threads exchange the messages: a process may be inside a collective meanwhile.

            process 0   ... 41 42       -> 44
            process 1   ... 41 42 43    -> 44     no process has asked about step 44 yet
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._halted or self._stop_at is not None or self._lost)
            self._step = step
            self._mark = self._mark._replace(count=self._mark.count + 1)
            return self._stop_at is not None and step >= self._stop_at

    def end(self) -> None:
        """Waits until all processes have finished their work, then closes the connections."""
        self.exchange(END)
        for connection in self._sockets.values():
            if self.settings.process_id == 0:
                # The others close first: closing with unread input would make the kernel drop what process 0 has sent.
                connection.settimeout(2)
                with contextlib.suppress(OSError):
                    while connection.recv(1 << 16):
                        pass
            connection.close()

    def fail(self, why: str) -> None:
        """Reports to the others why this process cannot continue, which stops them."""
        with self._changed:
            self._ended = True
            if self.settings.process_id == 0:
                self._send_all({"kind": "lost", "line": f"{self.who(0)} {why}"})
            else:
                self._send_to_first({"kind": "failed", "why": why})
        time.sleep(0.5)  # the others read it before this process ends and its connection closes

    def wait_for_loss(self, seconds: float) -> bool:
        """Waits up to `seconds` for a process to be lost or late, and returns whether one is."""
        with self._changed:
            return bool(self._changed.wait_for(lambda: self._lost, seconds))

    def _watch(self) -> None:
        """Runs in the watching thread: reads messages, sends heartbeats, notices who is silent, late or missing."""
        beat, processes = 0.0, {connection: process for process, connection in self._sockets.items()}
        while not (self._ended or self._lost):
            before = time.monotonic()
            ready = readable(processes, min(self._period, 1.0))
            now = time.monotonic()
            with self._changed:
                if now - before > 2 * self._period + 1:  # this process itself stood still, so silence proves nothing
                    self._last_heard = dict.fromkeys(self._last_heard, now)
                    self._marks.restart_clock(now)
                for connection in ready:
                    self._read(processes[connection], connection)
                if now - beat >= self._period:
                    beat = now
                    self._send_all({"kind": "beat", "mark": self._mark})
                self._find_silent(now)
                if self.settings.process_id == 0:
                    self._marks.note(0, self._mark, now)
                    self._find_late(now)
                for name in [name for name, deadline in self._deadlines.items() if now > deadline]:
                    self._answer(name, {"late": sorted(set(self._hosts) - set(self._values[name]))})
        if self._lost and not self._ended:
            if self.settings.process_id == 0:
                time.sleep(0.5)  # the others read which process is lost before their connections close
            self._on_loss(self._lost)

    def _find_silent(self, now: float) -> None:
        for process, heard in self._last_heard.items():
            if now - heard > self.settings.heartbeat_seconds:
                silent = f"silent for {self.settings.heartbeat_seconds:g} s"
                self._lose(f"{self.who(process)} is frozen or cut off, {silent}; {MEND}")

    def _find_late(self, now: float) -> None:
        behind, mark = self._marks.late(now)
        if len(behind) == self.settings.num_processes:
            hang = "the devices or the network between them hang"
            self._lose(f"no process came further than {mark.doing} in {mark.allowed:g} s: {hang}; {MEND}")
        elif behind:
            so = f"came no further than {mark.doing} in {mark.allowed:.0f} s, while the others waited"
            self._lose(f"{self._names(behind)} {so}; {MEND}")

    def _read(self, process: int, connection: socket.socket) -> None:
        """Reads what has arrived from `process` and handles the complete lines; a closed connection is a loss."""
        if self._ended:
            return
        try:
            data = connection.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self._lose(f"{self.who(process)} died; {MEND}")
            return
        self._last_heard[process] = time.monotonic()
        *lines, self._buffers[process] = (self._buffers[process] + data).split(b"\n")
        for line in lines:
            self._handle(process, json.loads(line))

    def _handle(self, process: int, message: dict[str, Any]) -> None:
        """Acts on a message from `process`, which may be this process itself."""
        match message["kind"]:
            case "value":  # the value of one process, sent to process 0
                name = message["name"]
                values = self._values.setdefault(name, {})
                values[process] = message["value"]
                self._deadlines.setdefault(name, time.monotonic() + message["seconds"])
                if len(values) == self.settings.num_processes:
                    self._answer(name, {"values": [value for _, value in sorted(values.items())]})
            case "answer":  # the result of an exchange, sent by process 0
                self._answers[message["name"]] = message["answer"]
                self._ended |= message["name"] == END and "values" in message["answer"]
            case "beat" if self.settings.process_id == 0:
                self._marks.note(process, Mark(*message["mark"]), time.monotonic())
            case "stop" if not self._halted:
                self._send_all({**message, "kind": "halt"})
                self._handle(0, {**message, "kind": "halt"})
            case "halt":
                self._halted, self.stop_status = True, message["status"]
                self._send_to_first({"kind": "at", "step": self._step})
            case "at":
                self._steps[process] = message["step"]
                if len(self._steps) == self.settings.num_processes:
                    decision = {"kind": "stop_at", "step": max(self._steps.values()) + 1}
                    self._send_all(decision)
                    self._handle(0, decision)
            case "stop_at":
                self._stop_at = message["step"]
            case "failed":
                self._lose(f"{self.who(process)} {message['why']}")
            case "lost":
                self._lose(message["line"])
        self._changed.notify_all()

    def _answer(self, name: str, answer: dict[str, Any]) -> None:
        """Ends an exchange (process 0 only): sends its result to all."""
        del self._values[name], self._deadlines[name]
        message = {"kind": "answer", "name": name, "answer": answer}
        self._send_all(message)
        self._handle(0, message)

    def _lose(self, line: str) -> None:
        """Records the first line that says why the run cannot go on; process 0 passes it on to the others."""
        if self._lost or self._ended:
            return
        self._lost = line
        if self.settings.process_id == 0:
            self._send_all({"kind": "lost", "line": line})
        self._changed.notify_all()

    def _send_to_first(self, message: dict[str, Any]) -> None:
        """Sends a message to process 0, which may be this process itself."""
        with self._changed:
            if self.settings.process_id == 0:
                self._handle(0, message)
            else:
                send(self._sockets[0], message)

    def _send_all(self, message: dict[str, Any]) -> None:
        for connection in self._sockets.values():
            send(connection, message)
