"""Our own shards as a source: to shrink their images, to take part of them to validation, to cut them anew."""

from collections.abc import Iterator

from etils import epath

from fastvlm_jax.data.readers import Options, Part
from fastvlm_jax.data.readers.array_records import entries
from fastvlm_jax.data.record import Record, Rejected, unpack
from fastvlm_jax.data.sources import MANIFEST, read_manifest


def recognise(path: epath.Path) -> bool:
    """Whether `path` is a folder with a manifest of ours."""
    try:
        return (path / MANIFEST).is_file() and bool(read_manifest(path)["splits"])
    except (OSError, ValueError):
        return False


def parts(path: epath.Path, options: Options) -> list[Part]:
    """Returns the shards of a split.

    Raises:
      FileNotFoundError: no such folder, or no data set in it.
      ValueError: a damaged manifest, or no such split.
    """
    splits = read_manifest(path)["splits"]
    if not splits:
        raise FileNotFoundError(f"{path} is no folder that `fastvlm data write` wrote: it has no {MANIFEST}")
    if options.split not in splits:
        raise ValueError(f"{path} has no split {options.split!r}: it has {', '.join(sorted(splits))}")
    shards = splits[options.split]["shards"]
    for name in shards:
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name} is missing: write the data set again")
    return [Part(str(path / name), 0, int(shard["records"])) for name, shard in shards.items()]


def read(part: Part, options: Options) -> Iterator[Record | Rejected]:
    """Yields the records of a shard; each damaged one is a Rejected."""
    for number, data, reason in entries(part.path, part.start, part.stop):
        if data is not None:
            try:
                yield unpack(data)
                continue
            except ValueError as error:
                reason = str(error)[:200]
        yield Rejected(part.path, f"{epath.Path(part.path).name}/{number}", reason)
