"""Writes reinforced pairs into tars as DataCompDR and DFNDR are published; readers/datacompdr.py reads them.

000000012.jpg        the picture, upright, whose pixels the boxes in paug.json count; or .png, .webp
000000012.txt        its caption; the layout has one, so several stand in .json as `captions`, and there is no .txt
000000012.syn.json   {key: [synthetic caption, ...]}, if there are any
000000012.paug.json  {"param_aug": [[[top, left, height, width], [[operation, magnitude], ...]], ...]}
000000012.npz        image_emb, text_emb, float32, named as readers/datacompdr.py tells; or .pth.gz, bfloat16
000000012.json       {"record": {"key", "turns", "extra"}}: what else is known
"""

import dataclasses
import io
import json
import tarfile
from typing import Any

import numpy as np

from fastvlm_jax.data.write.torch_file import packed
from fastvlm_jax.images.header import read_header

DTYPES = ("float32", "bfloat16")  # of stored embeddings
_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclasses.dataclass(frozen=True)
class Sample:
    """Holds a pair without its embeddings.

    Attributes:
      number: number of its record in the source, which names its members.
      picture: encoded picture, a JPEG, PNG or WebP that no EXIF turns.
      captions: its captions, one or several.
      synthetic: synthetic captions by key; {} if there are none, and no empty lists.
      entries: its augmentations, as `param_aug` lists them.
      record: what else is known of its record, a JSON object.
    """

    number: int
    picture: bytes
    captions: list[str]
    synthetic: dict[str, list[str]]
    entries: list[list]
    record: dict[str, Any]

    @property
    def texts(self) -> list[str]:
        """Returns the captions, the synthetic ones last."""
        return self.captions + [text for texts in self.synthetic.values() for text in texts]


def members(sample: Sample, images: np.ndarray, texts: np.ndarray, dtype: str) -> dict[str, bytes]:
    """Returns the members of a pair, contents by extension.

    Args:
      images: embeddings of its augmented views, float32 [augmentations, D].
      texts: embeddings of `sample.texts`, float32 [texts, D].
      dtype: "float32" or "bfloat16", of the stored embeddings.
    """
    several = len(sample.captions) > 1
    found = {_SUFFIXES[read_header(sample.picture).kind]: sample.picture}
    if not several:
        found["txt"] = sample.captions[0].encode()
    if sample.synthetic:
        found["syn.json"] = _json(sample.synthetic)
    found["paug.json"] = _json({"param_aug": sample.entries})
    arrays = {"image_emb": images, **_text_arrays(sample, texts)}
    found |= {"npz": _npz(arrays)} if dtype == "float32" else {"pth.gz": packed(arrays)}
    about = {"record": sample.record}
    return found | {"json": _json(about | ({"captions": sample.captions} if several else {}))}


def add(archive: tarfile.TarFile, number: int, contents: dict[str, bytes]) -> None:
    """Adds the members of a pair to a tar; equal contents give equal bytes."""
    for extension, data in contents.items():
        header = tarfile.TarInfo(f"{number:09d}.{extension}")
        header.size = len(data)
        archive.addfile(header, io.BytesIO(data))


def _text_arrays(sample: Sample, texts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the embeddings of the texts by name: with several lists of synthetic captions, each has its own."""
    if len(sample.synthetic) < 2:
        return {"text_emb": texts}
    counts = [len(sample.captions), *map(len, sample.synthetic.values())]
    parts = np.split(texts, np.cumsum(counts[:-1]))
    return dict(zip(["text_emb", *(f"{key}_emb" for key in sample.synthetic)], parts, strict=True))


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()
