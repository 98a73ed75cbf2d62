"""Takes the records that a list names as samples, in the batches that hold them: `fastvlm data inspect --keys`.

The list is "KEY,KEY,..." or "@FILE", a file of JSON lines with a "key" each, such as bad_steps.jsonl of a run. That one
names batch and group too; a record without them is looked for in the first epoch, which reads the records before it.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from fastvlm_jax.data.inspect.samples import Sample, sample_of
from fastvlm_jax.data.load.bad_records import key_of
from fastvlm_jax.data.load.batch_builder import BatchBuilder
from fastvlm_jax.data.readers import files

_MAX_LINE = 1 << 20  # bytes
_EPOCHS = 1000  # a batch behind so many is a mistake: epochs are planned one after another
_MEND = "name the config of the run, with all that its command line set"


class Listed(NamedTuple):
    """Names a record, and the batch and group that hold it; None where they are to be looked for."""

    key: str
    batch: int | None = None
    group: int | None = None


def read_keys(text: str) -> tuple[Listed, ...]:
    """Returns the records that "KEY,KEY,..." or "@FILE" names, each once, in order.

    Raises:
      FileNotFoundError, ValueError: there is no such file, a line of it names no record, or no record is named.
    """
    path = epath.Path(text[1:]).expanduser()
    if not text.startswith("@"):
        found = [Listed(key.strip()) for key in text.split(",") if key.strip()]
    elif path.is_file():
        found = [_listed(row, f"{path} line {number}") for number, row in files.objects(path, _MAX_LINE)]
    else:
        raise FileNotFoundError(f"--keys={text}: there is no file {path}")
    if not found:
        raise ValueError(f"--keys={text} names no record")
    return tuple(dict.fromkeys(found))


def _listed(row: dict[str, Any], where: str) -> Listed:
    place = [row.get(name) for name in ("batch", "group")]
    whole = place == [None, None] or all(type(at) is int and at >= 0 for at in place)
    if not isinstance(row.get("key"), str) or not whole:
        raise ValueError(f'--keys: {where} has no "key" of a record, or a wrong "batch" or "group"')
    return Listed(row["key"], *place)


def take_listed(build: BatchBuilder, wanted: Sequence[Listed], count: int) -> Iterator[Sample]:
    """Yields the first `count` of the records as samples, those of one group together.

    Raises:
      ValueError: a record is not where the list says, or nowhere; the message names it.
    """
    at = collections.defaultdict(set)
    for key, k, g in _placed(build, wanted[:count]):
        at[k, g].add(key)
    for (k, g), keys in at.items():
        if k > _EPOCHS * build.schedule.batches_per_epoch or g >= build.schedule.groups:
            raise ValueError(f"--keys: the data of this config have no batch {k} with a group {g}: {_MEND}")
        plan = build.schedule.batch(k)
        places = {place: key_of(build.sources[place.source], place.record) for place in build.schedule.group(plan, g)}
        if missing := keys - set(places.values()):
            raise ValueError(f"--keys: batch {k}, group {g} does not hold record {min(missing)!r}: {_MEND}")
        arrays, replaced = build(k, [g])
        arrays = {name: array[0] for name, array in arrays.items()}
        for place, key in places.items():
            if key in keys:
                yield sample_of(build, k, g, plan, place, arrays, replaced)


def _placed(build: BatchBuilder, wanted: Sequence[Listed]) -> Iterator[Listed]:
    """Yields the records with their batch and group; those without are looked for, which reads the records before."""
    yield from (item for item in wanted if item.batch is not None)
    left, schedule = {item.key for item in wanted if item.batch is None}, build.schedule
    for k in range(schedule.batches_per_epoch):
        plan = schedule.batch(k)
        for g in range(schedule.groups if left else 0):
            for place in schedule.group(plan, g):
                if (key := key_of(build.sources[place.source], place.record)) in left:
                    left.remove(key)
                    yield Listed(key, k, g)
    if left:
        raise ValueError(f"--keys: the data have no record {min(left)!r}, or the config cannot use it")
