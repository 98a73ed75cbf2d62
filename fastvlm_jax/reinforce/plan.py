"""Keeps what a folder of reinforced pairs is made of, so that a command that was stopped goes on with the same.

OUTPUT/reinforced.json       source, teachers and settings, with a fingerprint; written first
OUTPUT/00000000.tar          the first `tar_records` records of the source
OUTPUT/index/00000000.json   written when the tar is complete: its size, its numbers of pairs, its rejected records
OUTPUT/rejected.jsonl        the rejected records of all tars, as `fastvlm data write` lists them; written last
"""

import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Sequence
from typing import Any

from fastvlm_jax.data.readers.datacompdr import MAX_ARRAY_BYTES, MAX_AUGMENTATIONS
from fastvlm_jax.data.rejected import FILE as REJECTED
from fastvlm_jax.data.sources import RecordSource
from fastvlm_jax.data.write.reinforced import DTYPES
from fastvlm_jax.files import PARTIALS, json_digest, read_object, whole_file, write_json
from fastvlm_jax.images.augment import MAX_MAGNITUDE, MAX_OPS
from fastvlm_jax.images.header import MAX_SIDE
from fastvlm_jax.reinforce.teachers import Teacher

PLAN, INDEX = "reinforced.json", "index"
_VERSION = 1  # of what is drawn and written


@dataclasses.dataclass(frozen=True)
class Settings:
    """Holds how a data set is reinforced.

    Attributes:
      split: split of the source.
      augmentations: augmentations of each picture.
      image_size: side of the augmented views, pixels.
      crop_area: smallest and largest fraction of a picture's area in a crop.
      operations: number of RandAugment's operations on a view, and their magnitude.
      seed: seed of the augmentations.
      dtype: dtype of the stored embeddings, "float32" or "bfloat16".
      tar_records: records of the source whose pairs share a tar.
      batch_size: views, and texts, that a teacher sees at once; rounded up to a multiple of the devices.
      workers: threads that decode and augment pictures; 0 for one a core.
    """

    split: str = "train"
    augmentations: int = 10
    image_size: int = 224
    crop_area: tuple[float, float] = (0.08, 1.0)
    operations: tuple[int, int] = (2, 9)
    seed: int = 0
    dtype: str = "float32"
    tar_records: int = 1024
    batch_size: int = 64
    workers: int = 0

    def __post_init__(self):
        limits = {
            "augmentations": (1, MAX_AUGMENTATIONS), "image_size": (1, MAX_SIDE), "seed": (0, 2**63),
            "tar_records": (1, 10**6), "batch_size": (1, 10**6), "workers": (0, 10**4),
        }  # fmt: skip
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"--{name} {getattr(self, name)} must be {least} to {most}")
        if len(self.crop_area) != 2 or not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            given = ",".join(f"{share:g}" for share in self.crop_area)
            raise ValueError(f"--crop_area {given} must be two fractions of the area, the smaller one first")
        most = MAX_OPS, MAX_MAGNITUDE
        if len(self.operations) != 2 or not all(0 <= x <= y for x, y in zip(self.operations, most, strict=True)):
            raise ValueError(
                f"--operations {','.join(map(str, self.operations))} must be a number of 0 to {MAX_OPS} and a "
                f"magnitude of 0 to {MAX_MAGNITUDE}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype!r} must be one of {', '.join(DTYPES)}")


def make_plan(source: RecordSource, teachers: Sequence[Teacher], settings: Settings) -> dict[str, Any]:
    """Returns what decides the contents of the tars, with its fingerprint.

    Raises:
      ValueError: the embeddings of a picture are more than a reader takes.
    """
    if settings.augmentations * sum(teacher.features for teacher in teachers) * 4 > MAX_ARRAY_BYTES:
        raise ValueError(
            f"--augmentations {settings.augmentations}: the embeddings of a picture would be over "
            f"{MAX_ARRAY_BYTES >> 20} MB, more than any reader takes"
        )
    kept = {name: value for name, value in vars(settings).items() if name not in ("batch_size", "workers")}
    digests = [teacher.digest for teacher in teachers]
    return {
        "source": str(source.folder), "records": len(source), **kept,
        "teachers": [
            {"source": teacher.source, "features": teacher.features, "factor": teacher.factor} for teacher in teachers
        ],
        "fingerprint": json_digest([_VERSION, source.fingerprint, digests, kept]),
    }  # fmt: skip


def begin(output: pathlib.Path, plan: dict[str, Any], overwrite: bool) -> None:
    """Writes the plan into a new folder, or goes on in one of the same plan.

    Raises:
      ValueError: the folder holds tars of something else, or of another plan and `overwrite` is False.
    """
    for stale in [*output.glob(PARTIALS), *output.glob(f"{INDEX}/{PARTIALS}")]:  # of a run that was killed
        stale.unlink()
    tars = sorted(path for path in output.glob("*.tar") if re.fullmatch(r"\d{8,}", path.stem))
    if not (output / PLAN).is_file():
        if strange := next(output.glob("*.tar"), None):
            raise ValueError(f"{strange} was not written by this command: choose another --output")
    elif read_object(output / PLAN).get("fingerprint") == plan["fingerprint"]:
        return
    elif tars and not overwrite:
        raise ValueError(
            f"{output} holds pairs of another source, by other teachers or with other settings (see {PLAN} there): "
            "choose another --output, or pass --overwrite"
        )
    for path in tars:
        path.unlink()
    shutil.rmtree(output / INDEX, ignore_errors=True)
    (output / REJECTED).unlink(missing_ok=True)
    write_json(output / PLAN, plan)


def tar_of(output: pathlib.Path, number: int) -> pathlib.Path:
    """Returns the path of a tar."""
    return output / f"{number:08d}.tar"


def save_done(tar: pathlib.Path, told: dict[str, Any]) -> None:
    """Records what a complete tar holds; it counts as done from then on."""
    (tar.parent / INDEX).mkdir(exist_ok=True)
    write_json(tar.parent / INDEX / f"{tar.stem}.json", {"bytes": tar.stat().st_size, **told})


def read_done(tar: pathlib.Path) -> dict[str, Any] | None:
    """Returns what `save_done` recorded; None if the tar must be written."""
    try:
        told = read_object(tar.parent / INDEX / f"{tar.stem}.json")
        return told if tar.stat().st_size == told["bytes"] else None
    except (OSError, ValueError, KeyError):
        return None


def list_rejected(output: pathlib.Path, split: str, done: Sequence[dict[str, Any]]) -> None:
    """Writes rejected.jsonl: a line for each record of the source that became no pair."""
    with whole_file(output / REJECTED, "w") as file:
        for place, key, reason in (entry for told in done for entry in told["rejected"]):
            file.write(json.dumps({"split": split, "file": place, "key": key, "reason": reason}) + "\n")
