"""What the processes of one run know of each other: who died or froze, what all say, when all stop.

    process 1 ──┐
    process 2 ──┼── process 0       a connection each, one JSON object a line
    process 3 ──┘

JAX's own service finds a dead process late, and then ends the others with a stack dump that names nobody. Here the
kernel closes the connection of a process that dies, at once; one that freezes, or whose machine is gone, falls silent.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from fastvlm_jax.distributed.rendezvous import Settings, meet, readable, send

AGAIN = "start all processes again: they go on from the last checkpoint"
END = "the end of the run"  # the last exchange; after it a connection may close


class Peers:
    """The other processes of a run, which are met when this is made.

    Args:
      greeting: what process 0 tells the others.
      on_loss: called once, in the thread that watches, when a process is gone: with a line that names it.

    Attributes:
      greeting: process 0's.

    Raises:
      TimeoutError, ConnectionError: see rendezvous.meet.
    """

    def __init__(self, settings: Settings, greeting: dict[str, Any], on_loss: Callable[[str], None]):
        self.settings, self._on_loss = settings, on_loss
        self._sockets, self._hosts, self.greeting = meet(settings, greeting)
        self._buffers = dict.fromkeys(self._sockets, b"")
        self._heard = dict.fromkeys(self._sockets, time.monotonic())
        self._changed = threading.Condition(threading.RLock())  # guards all that follows
        self._over = False  # the run has ended, or this process has told why it must
        self._lost = ""  # the line about the first process that is gone
        self._answers: dict[str, dict[str, Any]] = {}  # what exchanges ended with
        self._step, self._halted, self._stop_at = -1, False, None
        # Only process 0 uses these: what came for exchanges so far, until when, and how far all are.
        self._values: dict[str, dict[int, Any]] = {}
        self._deadlines: dict[str, float] = {}
        self._steps: dict[int, int] = {}
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def who(self, process: int) -> str:
        """A process in words."""
        return f"process {process} on {self._hosts[process]}"

    def exchange(self, name: str, value: Any = None, seconds: float = 600.0) -> list[Any]:
        """What every process gives under `name`, by process; all must call it, and none goes on before the last.

        Args:
          name: used once a run. value: JSON.

        Raises:
          TimeoutError: after `seconds`, naming the processes that have not come.
          ConnectionError: a process is gone.
        """
        with self._changed:
            self._tell({"kind": "value", "name": name, "value": value, "seconds": seconds})
            self._changed.wait_for(lambda: name in self._answers or self._lost)
            if name not in self._answers:
                raise ConnectionError(self._lost)
            answer = self._answers.pop(name)
        if "late" in answer:
            late = ", ".join(self.who(process) for process in answer["late"])
            raise TimeoutError(f"{late} did not come to {name!r} within {seconds:g} s: see its output")
        return answer["values"]

    def ask_stop(self) -> None:
        """Asks all processes to stop after the same step. For signal handlers: it waits for nothing."""
        threading.Thread(target=self._tell, args=({"kind": "stop"},), daemon=True).start()

    def stop_reached(self, step: int) -> bool:
        """Whether all processes stop after `step`; asked after every step. Until one asks to stop it costs a lock.

        Steps are handed to the devices ahead of time, not equally far in all processes: so all halt, say how far they
        are, and go on to the step after the furthest. Only threads talk: a process may be at its collectives meanwhile.

            process 0   ... 41 42       -> 44
            process 1   ... 41 42 43    -> 44     no process has asked about step 44 yet
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._halted or self._stop_at is not None or self._lost)
            self._step = step
            return self._stop_at is not None and step >= self._stop_at

    def end(self) -> None:
        """Waits until all processes have done their work; closes the connections."""
        self.exchange(END)
        for connection in self._sockets.values():
            if self.settings.process_id == 0:
                # The others close first: what process 0 still had to read would make the kernel drop what it sent.
                connection.settimeout(2)
                with contextlib.suppress(OSError):
                    while connection.recv(1 << 16):
                        pass
            connection.close()

    def fail(self, why: str) -> None:
        """Tells the others that this process cannot go on, which stops them."""
        with self._changed:
            self._over = True
            if self.settings.process_id == 0:
                self._send_all({"kind": "lost", "process": 0, "why": why})
            else:
                self._tell({"kind": "failed", "why": why})
        time.sleep(0.5)  # so that it is read before this process, and with it the connection, ends

    def wait_for_loss(self, seconds: float) -> bool:
        """Whether a process turns out to be gone within `seconds`."""
        with self._changed:
            return bool(self._changed.wait_for(lambda: self._lost, seconds))

    def _watch(self) -> None:
        """The thread: reads what comes, sends heartbeats, notices silence and exchanges that last too long."""
        period, beat = self.settings.heartbeat_seconds / 5, 0.0
        processes = {connection: process for process, connection in self._sockets.items()}
        while not (self._over or self._lost):
            before = time.monotonic()
            ready = readable(processes, min(period, 1.0))
            now = time.monotonic()
            with self._changed:
                if now - before > 2 * period + 1:  # this process itself stood still: silence says nothing
                    self._heard = dict.fromkeys(self._heard, now)
                for connection in ready:
                    self._read(processes[connection], connection)
                if now - beat >= period:
                    beat = now
                    self._send_all({"kind": "beat"})
                for process, heard in self._heard.items():
                    if now - heard > self.settings.heartbeat_seconds:
                        self._lose(
                            process, f"is frozen or cut off, silent for {self.settings.heartbeat_seconds:g} s; {AGAIN}"
                        )
                for name in [name for name, deadline in self._deadlines.items() if now > deadline]:
                    self._answer(name, {"late": sorted(set(self._hosts) - set(self._values[name]))})
        if self._lost and not self._over:
            if self.settings.process_id == 0:
                time.sleep(0.5)  # so that the others read who is gone before their connections close
            self._on_loss(self._lost)

    def _read(self, process: int, connection: socket.socket) -> None:
        if self._over:
            return
        try:
            data = connection.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self._lose(process, f"died; {AGAIN}")
            return
        self._heard[process] = time.monotonic()
        *lines, self._buffers[process] = (self._buffers[process] + data).split(b"\n")
        for line in lines:
            self._handle(process, json.loads(line))

    def _handle(self, process: int, message: dict[str, Any]) -> None:
        """Acts on a message of `process`, which may be this one."""
        match message["kind"]:
            case "value":  # of one process
                name = message["name"]
                values = self._values.setdefault(name, {})
                values[process] = message["value"]
                self._deadlines.setdefault(name, time.monotonic() + message["seconds"])
                if len(values) == self.settings.num_processes:
                    self._answer(name, {"values": [value for _, value in sorted(values.items())]})
            case "answer":  # the values of all
                self._answers[message["name"]] = message["answer"]
                self._over |= message["name"] == END and "values" in message["answer"]
            case "stop" if not self._halted:
                self._send_all({"kind": "halt"})
                self._handle(0, {"kind": "halt"})
            case "halt":
                self._halted = True
                self._tell({"kind": "at", "step": self._step})
            case "at":
                self._steps[process] = message["step"]
                if len(self._steps) == self.settings.num_processes:
                    go_on = {"kind": "stop_at", "step": max(self._steps.values()) + 1}
                    self._send_all(go_on)
                    self._handle(0, go_on)
            case "stop_at":
                self._stop_at = message["step"]
            case "failed":
                self._lose(process, message["why"])
            case "lost":
                self._lose(message["process"], message["why"])
        self._changed.notify_all()

    def _answer(self, name: str, answer: dict[str, Any]) -> None:
        """Process 0: ends an exchange."""
        del self._values[name], self._deadlines[name]
        message = {"kind": "answer", "name": name, "answer": answer}
        self._send_all(message)
        self._handle(0, message)

    def _lose(self, process: int, why: str) -> None:
        if self._lost or self._over:
            return
        self._lost = f"{self.who(process)} {why}"
        if self.settings.process_id == 0:
            self._send_all({"kind": "lost", "process": process, "why": why})
        self._changed.notify_all()

    def _tell(self, message: dict[str, Any]) -> None:
        """Gives process 0 a message."""
        with self._changed:
            if self.settings.process_id == 0:
                self._handle(0, message)
            else:
                send(self._sockets[0], message)

    def _send_all(self, message: dict[str, Any]) -> None:
        for connection in self._sockets.values():
            send(connection, message)
