"""Decides by its pictures whether an entry goes to the validation split, so that no picture stands in both splits.

    picture   hash of its bytes, 0 to 1          entry          goes to validation at a share of 0.05
    cat       0.031                              1: cat         yes: 0.031 is below the share
    dog       0.870                              2: cat         yes, as every entry about this picture
    fish      0.440                              3: dog, fish   by its lead, one of the two that a second order picks

A text-only entry has its text in place of a picture. Entries that share pictures are one group and go together, by the
lead of all their pictures; only the whole data set shows these groups, so settle.py has the last word.
"""

from collections.abc import Sequence

import msgpack

from fastvlm_jax.data.record import Record
from fastvlm_jax.data.write.shard import hash_of

RULE = "by picture, 1"  # part of a write's fingerprint: another rule gives other splits


def picture_hashes(record: Record) -> list[int]:
    """Returns the hashes of a record's pictures, or that of its text if it has none."""
    return [hash_of(image) for image in record.images] or [hash_of(msgpack.packb(record.turns))]


def lead_of(pictures: Sequence[int]) -> int:
    """Returns the hash of the picture that decides for its group: the first one by the lower half of its hash.

    Only the upper half says where a share ends, so that a group of any size is below it with the same probability.
    """
    return min(pictures, key=lambda picture: (picture & 0xFFFFFFFF, picture))


def limit_of(share: float) -> int:
    """Returns the hash below which pictures belong to validation."""
    return int(share * 2**64)
