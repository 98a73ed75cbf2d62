"""Summarises for people what a run of `fastvlm data reinforce` wrote, and what to do with it."""

import dataclasses
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

from fastvlm_jax.data.rejected import FILE as REJECTED
from fastvlm_jax.data.rejected import Reasons, most_frequent


@dataclasses.dataclass(frozen=True)
class Summary:
    """Describes a folder of reinforced pairs.

    Attributes:
      output: the folder.
      plan: what it is made of, see plan.py.
      tars: number of tars.
      pairs: number of pairs in them.
      synthetic: number of pairs with synthetic captions.
      rejected: number of records that became no pair.
      reasons: (count, example) of the most frequent reasons.
      written: number of pairs that the last run wrote.
      seconds: time that this took, s.
    """

    output: pathlib.Path
    plan: dict[str, Any]
    tars: int
    pairs: int
    synthetic: int
    rejected: int
    reasons: Reasons
    written: int
    seconds: float

    def describe(self) -> str:
        """Returns the text that the command prints."""
        line = f"{self.output}: {self.pairs:,} pairs in {self.tars:,} tars, {self.rejected:,} rejected"
        if self.written:
            rate, views = self.written / self.seconds, self.plan["augmentations"]
            line += f"; {self.written:,} in {self.seconds:.0f} s, {rate:.1f} pictures/s, {rate * views:.1f} views/s"
        lines = [line] if self.written else [f"nothing to do: {self.output} is complete", line]
        if self.rejected:
            lines.append(f"rejected: {self.rejected:,} records, all named in {self.output / REJECTED}")
            lines += [f"{count:10,}  {reason}" for count, reason in self.reasons]
        return "\n".join([*lines, "next:", *self.next()])

    def next(self) -> list[str]:
        """Returns the commands that make shards of the tars, and train on them."""
        teachers = ", ".join(f"({told['features']}, {told['factor']:.4g})" for told in self.plan["teachers"])
        texts = " --config.data.texts=2" if self.synthetic == self.pairs else ""
        return [
            f"  fastvlm data write --source {shlex.quote(str(self.output))} --output DATA",
            "  fastvlm train --config configs/stage0_clip.py:SIZE/pairs --workdir DIR --config.data.path=DATA "
            f"--config.data.augment=replay{texts} --config.loss.hard=0 --config.loss.soft=1 "
            f"'--config.loss.teachers=({teachers},)'",
        ]


def summarise(
    output: pathlib.Path, plan: dict[str, Any], done: Sequence[dict[str, Any]], written: Sequence[int], seconds: float
) -> Summary:
    """Returns the summary of a folder.

    Args:
      done: what is recorded of each tar, see plan.py.
      written: numbers of the tars that the last run wrote.
      seconds: time that it took, s.
    """
    rejected, reasons = most_frequent(reason for told in done for *_, reason in told["rejected"])
    pairs, synthetic = (sum(told[name] for told in done) for name in ("pairs", "synthetic"))
    now = sum(done[number]["pairs"] for number in written)
    return Summary(output, plan, len(done), pairs, synthetic, rejected, reasons, now, seconds)
