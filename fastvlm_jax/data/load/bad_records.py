"""Logs and counts the records that cannot be used and are replaced, and stops training if there are too many."""

from absl import logging

from fastvlm_jax.data.load.batch_builder import BatchBuilder, Substituted
from fastvlm_jax.data.load.pair_builder import PairBuilder
from fastvlm_jax.data.sources import RecordSource

_SHOWN = 20  # most records that the log names at the start, or the error names
_ENOUGH = 1000  # the allowed share is taken of at least this many records, if there are so many


class BadRecords:
    """Counts the unusable records of a run and logs each once; of those known from the index, the first _SHOWN.

    Raises:
      ValueError: here and in `add`: more than the fraction `share` of the records cannot be used; the message names
        the first ones.
    """

    def __init__(self, build: BatchBuilder | PairBuilder, share: float):
        self._share, self._seen, self._found = share, 0, {}
        self._total = sum(map(len, build.sources))
        for number, reason in build.schedule.unusable.items():
            source, record = build.schedule.where(number)
            where = build.sources[source].where(record)
            if len(self._found) < _SHOWN:
                self._log(Substituted(source, record, where, key_of(build.sources[source], record), reason))
            self._found[source, record] = f"{where}: {reason}"
        if len(self._found) > _SHOWN:
            logging.warning(
                "%d more records are replaced by others: `fastvlm data inspect --list_unusable FILE` lists all",
                len(self._found) - _SHOWN,
            )
        if len(self._found) > self._allowed(self._total):
            self._stop(f"{len(self._found):,} of {self._total:,} records")

    @property
    def count(self) -> int:
        """Returns the number of unusable records found so far."""
        return len(self._found)

    def add(self, substituted: list[Substituted], seen: int) -> None:
        """Adds the records that were replaced in a batch of `seen` records."""
        self._seen = min(self._seen + seen, self._total)
        for item in substituted:
            if (item.source, item.record) not in self._found:
                self._log(item)
                self._found[item.source, item.record] = f"{item.where} ({item.key}): {item.reason}"
        if len(self._found) > self._allowed(max(self._seen, min(self._total, _ENOUGH))):
            self._stop(f"{len(self._found):,} records")

    def _allowed(self, records: int) -> float:
        # A single bad record does not stop a small data set, unless the share is 0.
        return max(self._share * records, 1) if self._share else 0

    def _log(self, item: Substituted) -> None:
        key = f" ({item.key})" if item.key else ""
        logging.warning("%s%s cannot be used, another record takes its place: %s", item.where, key, item.reason)

    def _stop(self, count: str) -> None:
        listed = "; ".join(list(self._found.values())[:_SHOWN])
        raise ValueError(
            f"{count} cannot be used, more than data.max_substituted={self._share:g} allows. Mend them (`fastvlm data "
            f"write --verify` leaves out damaged images) or raise data.max_substituted. The first: {listed}"
        )


def key_of(source: RecordSource, record: int) -> str:
    """Returns the key of a record, "" if it cannot be read."""
    try:
        return source[record].key
    except ValueError:
        return ""
