"""Describes what a data set holds, from its manifest, its index and a few hundred of its records."""

import collections
import concurrent.futures
import dataclasses
import itertools
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tqdm
from etils import epath

from fastvlm_jax.data.index import FOLDER, ShardIndex
from fastvlm_jax.data.rejected import Reasons, read_reasons
from fastvlm_jax.data.sources import RecordSource, files_of, incomplete_shards, read_manifest, read_shards
from fastvlm_jax.files import cache_folder, load_arrays, sha256
from fastvlm_jax.images.header import read_header

READ = 500  # records that are read for the numbers that no index holds
SIDES = (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)  # px
ASPECTS = (0.33, 0.5, 0.7, 0.9, 1.1, 1.43, 2.0, 3.0)  # width / height; 4:3 and 16:9 lie well inside a range
IMAGES = (1, 2, 3, 4, 5, 6, 8, 11, 16, 21, 51)  # per record
TURNS = (1, 3, 5, 7, 9, 11, 17, 33, 65)  # per record; a question and its answer fall into one range

Counts = dict[str, int]  # label -> count, in display order


@dataclasses.dataclass(frozen=True)
class Contents:
    """Describes what one split of a data set holds.

    Attributes:
      folder: folder of the data set.
      split: name of the split.
      records, images, shards: number of each.
      bytes: size of all shards and of the features beside them, bytes.
      verified: True if the checksums of all files were compared and match.
      rejected: number of source entries that became no record.
      reasons: most frequent reasons for that.
      longer_side: number of images by longer side, pixels.
      aspect: number of images by width / height after EXIF rotation.
      largest, smallest: largest and smallest image by area, "WIDTH x HEIGHT in SHARD record N"; "" without images.
      images_per_record: number of records by number of images.
      read: number of records that were read, drawn at random from the split.
      turns: number of records read, by number of turns.
      formats: number of their images by format.
      damaged: "SHARD record N ..." for each of them that is damaged.
    """

    folder: str
    split: str
    records: int
    images: int
    shards: int
    bytes: int
    verified: bool
    rejected: int
    reasons: Reasons
    longer_side: Counts
    aspect: Counts
    largest: str
    smallest: str
    images_per_record: Counts
    read: int
    turns: Counts
    formats: Counts
    damaged: tuple[str, ...]


class Sizes(NamedTuple):
    """Holds the image sizes of M records with I images.

    Attributes:
      num_images: int [M], images of each record.
      width, height: int [I], size of each image after EXIF rotation, pixels; record after record.
    """

    num_images: np.ndarray
    width: np.ndarray
    height: np.ndarray


def look_at(source: RecordSource, sizes: Sizes, verified: bool) -> Contents:
    """Returns a description of a split; reads up to READ of its records.

    Args:
      source: the split.
      sizes: its image sizes, see `load_sizes`.
      verified: whether `verify` has compared the checksums.

    Raises:
      ValueError: the split holds no records.
    """
    if not len(source):
        raise ValueError(f"split {source.split!r} of {source.folder} holds no records: write the data set again")
    manifest = read_manifest(source.folder)
    width, height = np.maximum(sizes.width, 1), np.maximum(sizes.height, 1)
    area = width.astype(np.int64) * height

    def extreme(image: int) -> str:
        record = int(np.searchsorted(np.cumsum(sizes.num_images), image, side="right"))
        return f"{width[image]} x {height[image]} in {epath.Path(source.where(record)).name}"

    rejected, reasons = read_reasons(source.folder, source.split)
    turns, formats, damaged = _read(source)
    return Contents(
        folder=str(source.folder),
        split=source.split,
        records=len(source),
        images=len(width),
        shards=len(source.shards),
        bytes=sum(file["bytes"] for file in files_of(manifest, source.split).values()),
        verified=verified,
        rejected=rejected,
        reasons=reasons,
        longer_side=histogram(np.maximum(width, height), SIDES),
        aspect=histogram(width / height, ASPECTS),
        largest=extreme(int(area.argmax())) if len(area) else "",
        smallest=extreme(int(area.argmin())) if len(area) else "",
        images_per_record=histogram(sizes.num_images, IMAGES),
        read=min(len(source), READ),
        turns=histogram(np.array(turns, int), TURNS),
        formats=dict(collections.Counter(formats).most_common()),
        damaged=tuple(damaged),
    )


def check_shards(folder: str | os.PathLike, split: str) -> None:
    """Raises ValueError if files of a split are missing or have another size than written; the message names them."""
    folder = epath.Path(folder).expanduser()
    manifest = read_manifest(folder)
    broken = incomplete_shards(folder, manifest, split) if split in manifest["splits"] else []
    if broken:
        raise ValueError(
            f"{folder}: {len(broken)} of {len(files_of(manifest, split))} files are missing or not as they were "
            f"written ({shortened(broken)}): write the data set again"
        )


def verify(source: RecordSource) -> None:
    """Compares the checksum of every shard, and of the features beside it, with the manifest's.

    Raises:
      ValueError: a checksum differs; the message names the damaged files.
    """
    written = files_of(read_manifest(source.folder), source.split)
    bar = tqdm.tqdm(written.items(), desc="verify", unit="file", disable=not sys.stderr.isatty())
    if wrong := [name for name, file in bar if sha256(source.folder / name) != file.get("sha256")]:
        raise ValueError(
            f"{source.folder}: {len(wrong)} of {len(written)} files are damaged, their checksums differ "
            f"({shortened(wrong)}): write the data set again"
        )


def load_sizes(source: RecordSource) -> Sizes:
    """Returns the image sizes of a split from its index; without one, reads all records and caches the index.

    Raises:
      ValueError: an index file is damaged.
    """
    beside, kept = source.folder / FOLDER, epath.Path(cache_folder()) / FOLDER / source.fingerprint[:16]
    found = []
    for shard, records in source.shards.items():
        name = f"{shard.name}.sizes.npz"
        path = beside / name if (beside / name).is_file() else kept / name
        if not path.is_file():
            _measure(source, shard.name, kept)
        try:
            stored = load_arrays(path, Sizes._fields)
            sizes = Sizes(*(stored[name].astype(np.int64) for name in Sizes._fields))
            if len(sizes.num_images) != records or not sizes.num_images.sum() == len(sizes.width) == len(sizes.height):
                raise ValueError("it belongs to another shard")
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete the folder {path.parent}") from error
        found.append(sizes)
    return Sizes(*map(np.concatenate, zip(*found, strict=True))) if found else Sizes(*np.zeros((3, 0), int))


def _measure(source: RecordSource, shard: str, folder: epath.Path) -> None:
    """Writes the index file of a shard's image sizes to `folder`."""
    index = ShardIndex()
    part = read_shards(source.folder, source.split, only=shard)
    for number in tqdm.tqdm(range(len(part)), desc=f"measure {shard}", disable=not sys.stderr.isatty()):
        try:
            index.add(part[number])
        except ValueError as error:
            index.add_unusable(str(error))
    index.save(pathlib.Path(shard), folder)


def some(total: int, count: int) -> np.ndarray:
    """Returns `count` numbers below `total`, sorted and the same each time; all of them if `total` is not larger.

    They are drawn at random: in a data set that alternates between kinds, every n-th record may be of one kind.
    """
    if count >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(0).choice(total, count, replace=False))


def histogram(values: np.ndarray, edges: Sequence[float]) -> Counts:
    """Returns the counts of values in ranges that begin at the edges; empty ranges at both ends are left out.

    histogram([1, 2, 2, 9], (1, 2, 5))  ->  {"1": 1, "2-4": 2, "5 or more": 1}
    """
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
    if not counts.any():
        return {}
    whole = all(isinstance(edge, int) for edge in edges)
    labels = ["0" if whole and edges[0] == 1 else f"below {edges[0]:,}"]
    for low, high in itertools.pairwise(edges):
        last = f"{high - 1:,}" if whole else f"{high:g}"
        labels.append(f"{low:,}" if whole and high == low + 1 else f"{low:,g}-{last}")
    labels.append(f"{edges[-1]:,g} or more")
    first, last = np.flatnonzero(counts)[[0, -1]]
    return dict(zip(labels[first : last + 1], counts[first : last + 1].tolist(), strict=True))


def shortened(names: Sequence[str]) -> str:
    """Returns the first three names and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read(source: RecordSource) -> tuple[list[int], list[str], list[str]]:
    """Reads records drawn from a split: turns of each, format of each image, and a message for each damaged one."""

    def check(number: int) -> tuple[int, list[str]] | str:
        try:
            record = source[number]
        except ValueError as error:
            return str(error)
        return len(record.turns), [_kind(image) for image in record.images]

    numbers = some(len(source), READ).tolist()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # each record is a round trip to a bucket
        found = list(pool.map(check, numbers))
    fine = [item for item in found if not isinstance(item, str)]
    kinds = [kind for _, own in fine for kind in own]
    return [turns for turns, _ in fine], kinds, [item for item in found if isinstance(item, str)]


def _kind(image: bytes) -> str:
    try:
        return read_header(image).kind
    except ValueError:
        return "unreadable"
