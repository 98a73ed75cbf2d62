"""Summarises for people what a folder holds after a write."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from fastvlm_jax.data.rejected import FILE as REJECTED
from fastvlm_jax.data.rejected import Reasons, read_reasons


@dataclasses.dataclass(frozen=True)
class Summary:
    """Describes what a folder holds after a write.

    Attributes:
      splits: name of a split -> {"records", "images", "shards"}, the number of each.
      rejected: number of entries that became no record.
      reasons: (count, example) of the most frequent reasons; reasons that differ only in numbers and quoted names count
        as one.
      nothing_to_do: whether the splits were complete before.
      exclude: {"list", "records"}: the list of records to leave out and the number that it names; {} without one.
      excluded: number of records that were left out because of it; they count as rejected too.
    """

    splits: dict[str, dict[str, int]]
    rejected: int
    reasons: Reasons
    nothing_to_do: bool
    exclude: dict[str, Any] = dataclasses.field(default_factory=dict)
    excluded: int = 0

    def describe(self, output: str | os.PathLike) -> str:
        """Returns the text that the command prints."""
        lines = [
            f"{output} {name}: {split['records']:,} records, {split['images']:,} images, {split['shards']} shards"
            for name, split in self.splits.items()
        ]
        if len(self.splits) > 1 and not all(split["records"] for split in self.splits.values()):
            empty = next(name for name, split in self.splits.items() if not split["records"])
            lines.append(
                f"{empty} is empty: a picture (of records without one, a text) stands in one split only, and all "
                "records hang together by theirs; training will run without validation"
            )
        if self.exclude:
            name, listed = self.exclude["list"], self.exclude["records"]
            lines.append(f"left out by --exclude {name}: {self.excluded:,} records, of {listed:,} that it names")
            if listed and not self.excluded:
                lines.append("  none of them is in the source: the list is of another data set, or of another split")
        if self.rejected:
            lines.append(f"rejected: {self.rejected:,} entries, all named in {pathlib.Path(output) / REJECTED}")
            lines += [f"{count:10,}  {reason}" for count, reason in self.reasons]
        return "\n".join(([f"nothing to do: {output} is complete"] if self.nothing_to_do else []) + lines)


def summarise(output: pathlib.Path, manifest: dict[str, Any], splits: Sequence[str], nothing_to_do: bool) -> Summary:
    """Returns the summary of these splits, from the manifest and the list of rejected entries."""
    found = {name: manifest["splits"][name] for name in splits}
    return Summary(
        {
            name: {"records": split["records"], "images": split["images"], "shards": len(split["shards"])}
            for name, split in found.items()
        },
        found[splits[0]]["rejected"],
        read_reasons(output, splits[0])[1],
        nothing_to_do,
        found[splits[0]]["source"].get("exclude", {}),
        found[splits[0]].get("excluded", 0),
    )
