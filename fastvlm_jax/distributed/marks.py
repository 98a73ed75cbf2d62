"""Knows how far each process of a run has come, and so which one the others wait for, and whether it is late.

process 0   ... step 41, step 42             waits in a collective of step 42
process 1   ... step 41                      has not begun step 42: the others wait for it
process 2   ... step 41, step 42             waits too
"""

from typing import NamedTuple

LONG = 12  # where work may take long, a process is late after so many times as many seconds as in a step
LATE = 20  # in a step, it is not late before so many times the usual seconds: a slow run goes on


class Mark(NamedTuple):
    """Tells how far a process has come.

    Attributes:
      count: number of places that it has passed; all processes pass them in the same order.
      doing: what it has been doing since the last place, in words.
      allowed: seconds after which it is late there.
    """

    count: int
    doing: str
    allowed: float

    def passed(self, doing: str, late: float, usual: float | None) -> "Mark":
        """Returns the mark at the next place.

        Args:
          doing: what begins there.
          late: seconds after which a process is late in a step.
          usual: seconds that this usually takes; None for what may take long.
        """
        return Mark(self.count + 1, doing, LONG * late if usual is None else max(late, LATE * usual))


class Marks:
    """Holds the last mark of each process of a run, and when it was told."""

    def __init__(self, num_processes: int):
        self._num_processes = num_processes
        self._found: dict[int, tuple[Mark, float]] = {}

    def note(self, process: int, mark: Mark, now: float) -> None:
        """Notes the mark that a process tells at the time `now`, seconds."""
        if process not in self._found or self._found[process][0].count != mark.count:
            self._found[process] = mark, now

    def restart_clock(self, now: float) -> None:
        """Lets the time of all processes begin anew, because nobody could listen before."""
        self._found = {process: (mark, now) for process, (mark, _) in self._found.items()}

    def behind(self) -> tuple[list[int], Mark, float]:
        """Returns the processes that have passed the fewest places, their mark, and when the last of them told it.

        The list is empty until each process has told a mark and passed a place.
        """
        least = min((mark.count for mark, _ in self._found.values()), default=0)
        if len(self._found) < self._num_processes or not least:
            return [], Mark(0, "", 0.0), 0.0
        behind = {process: found for process, found in self._found.items() if found[0].count == least}
        return sorted(behind), *max(behind.values(), key=lambda found: found[1])

    def late(self, now: float) -> tuple[list[int], Mark]:
        """Returns the processes that are behind and have not gone on for longer than allowed, and their mark."""
        behind, mark, since = self.behind()
        return (behind if now - since > mark.allowed else []), mark
