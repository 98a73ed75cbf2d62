"""Reads our own shards as a source: to shrink their images, split off validation records, or change the shard size."""

import contextlib
from collections.abc import Iterator

from etils import epath

from fastvlm_jax.data.features import beside, whole
from fastvlm_jax.data.readers import Options, Part
from fastvlm_jax.data.readers.array_records import entries, local_copy
from fastvlm_jax.data.record import Record, Rejected, unpack
from fastvlm_jax.data.sources import MANIFEST, files_of, read_manifest


def recognise(path: epath.Path) -> bool:
    """Returns whether `path` is a folder with a manifest that `fastvlm data write` wrote."""
    try:
        return (path / MANIFEST).is_file() and bool(read_manifest(path)["splits"])
    except (OSError, ValueError):
        return False


def parts(path: epath.Path, options: Options) -> list[Part]:
    """Returns one part for each shard of a split.

    Raises:
      FileNotFoundError: `path` holds no data set, or a shard is missing.
      ValueError: the manifest is damaged, or there is no such split.
    """
    manifest = read_manifest(path)
    splits = manifest["splits"]
    if not splits:
        raise FileNotFoundError(f"{path} was not written by `fastvlm data write`: it has no {MANIFEST}")
    if options.split not in splits:
        raise ValueError(f"{path} has no split {options.split!r}: it has {', '.join(sorted(splits))}")
    shards = splits[options.split]["shards"]
    for name in files_of(manifest, options.split):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name} is missing: write the data set again")
    return [Part(str(path / name), 0, int(shard["records"])) for name, shard in shards.items()]


def features(path: epath.Path, options: Options) -> list[str | None]:
    """Returns the checksums of the files of features beside the shards of a split, for a fingerprint of the source."""
    written = read_manifest(path)["splits"][options.split]["shards"].values()
    return [shard["features"].get("sha256") for shard in written if "features" in shard]


def read(part: Part, options: Options) -> Iterator[Record | Rejected]:
    """Yields the records of a shard, with their features in them; a damaged record is a Rejected."""
    file = epath.Path(beside(part.path))
    with local_copy(file) if file.is_file() else contextlib.nullcontext(str(file)) as held:
        for number, data, reason in entries(part.path, part.start, part.stop):
            if data is not None:
                try:
                    yield whole(unpack(data), held)
                    continue
                except ValueError as error:
                    reason = str(error)[:200]
            yield Rejected(part.path, f"{epath.Path(part.path).name}/{number}", reason)
