"""The records that cannot be used, and are replaced: named in the log, counted, and too many of them an error."""

from absl import logging

from fastvlm_jax.data.load.batch_builder import BatchBuilder, Substituted
from fastvlm_jax.data.sources import RecordSource

_SHOWN = 20  # records that the index cannot use are named one by one, up to this
_ENOUGH = 1000  # records before the share of unusable ones says something


class BadRecords:
    """Keeps count; each record is logged once, those that the index knows when this is made.

    Raises:
      ValueError: here and in `add`, when more than the share of all records cannot be used, with the first of them.
    """

    def __init__(self, build: BatchBuilder, share: float):
        self._share, self._seen, self._found = share, 0, {}
        self._total = sum(map(len, build.sources))
        for number, reason in build.schedule.unusable.items():
            source, record = build.schedule.where(number)
            where = build.sources[source].where(record)
            if len(self._found) < _SHOWN:
                self._log(Substituted(source, record, where, _key(build.sources[source], record), reason))
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
        """How many records are known by now that cannot be used."""
        return len(self._found)

    def add(self, substituted: list[Substituted], seen: int) -> None:
        """Takes the records replaced in a batch of `seen` records."""
        self._seen = min(self._seen + seen, self._total)
        for item in substituted:
            if (item.source, item.record) not in self._found:
                self._log(item)
                self._found[item.source, item.record] = f"{item.where} ({item.key}): {item.reason}"
        if len(self._found) > self._allowed(max(self._seen, min(self._total, _ENOUGH))):
            self._stop(f"{len(self._found):,} records")

    def _allowed(self, records: int) -> float:
        # A single record stops no small data set, unless none is allowed at all.
        return max(self._share * records, 1) if self._share else 0

    def _log(self, item: Substituted) -> None:
        key = f" ({item.key})" if item.key else ""
        logging.warning("%s%s cannot be used, another record takes its place: %s", item.where, key, item.reason)

    def _stop(self, count: str) -> None:
        listed = "; ".join(list(self._found.values())[:_SHOWN])
        raise ValueError(
            f"{count} cannot be used, more than data.max_substituted={self._share:g} allows. Mend them (`fastvlm data "
            f"write --verify` leaves out damaged images) or raise it. The first: {listed}"
        )


def _key(source: RecordSource, record: int) -> str:
    try:
        return source[record].key
    except ValueError:
        return ""
