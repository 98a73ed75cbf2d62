"""Writes pictures of icons with their names as shards, held out by concept and by style.

    packages ──> concepts: code, name, captions ──┐
       └───────> drawings of each style ──────────┴──> splits ──128 px on white──> shards

OUTPUT/                  the splits of splits.py, and the tokenizer of the captions in `train`
OUTPUT/icons.json        what the pictures are drawn from: the size, the packages, the versions of what draws them
OUTPUT/LICENCES.md       whose pictures these are, and under which licences
"""

import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sets.described import describe, is_described, is_there
from fastvlm_jax.data.sets.icons.concepts import Concept, read_concepts
from fastvlm_jax.data.sets.icons.drawings import draw, drawings_of, names_of, versions
from fastvlm_jax.data.sets.icons.packages import PACKAGES, Files, Package, fetch, read
from fastvlm_jax.data.sets.icons.splits import SPLITS, split_of
from fastvlm_jax.data.sources import read_manifest
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.data.write.tokenizer import FILE
from fastvlm_jax.files import write_whole
from fastvlm_jax.text.tokenizer import train_sentencepiece

DESCRIBED, LICENCES = "icons.json", "LICENCES.md"
VOCAB_SIZE = 2048
LEAST, MOST = 16, 1024  # pixels of a side
Progress = Callable[[str, int, int], Any]


class Icon(NamedTuple):
    """Describes a picture of the set: what it shows, in which style, the package's drawing of it, and its split."""

    concept: Concept
    package: Package
    drawing: bytes
    split: str


def write_icons(
    output: str | os.PathLike,
    size: int = 128,
    folder: str | os.PathLike | None = None,
    *,
    packages: Sequence[Package] = PACKAGES,
    progress: Progress = lambda *_: None,
) -> dict[str, int]:
    """Writes the splits of splits.py and a `tokenizer.model` to the folder `output`.

    A record is a picture with the name of what it shows. Records of `train` hold further captions, of which training
    draws one; the others hold the name alone. `extra` tells "concept", "style", "licence" and "group".

    Args:
      output: local folder. A complete data set in it is left as it is.
      size: side of the pictures, pixels.
      folder: folder that holds the packages, see packages.py; None fetches them with npm.
      packages: styles to draw; one of them has OpenMoji's list of concepts, one a list of Iconify's names.
      progress: function that is called with what is being done, how many are done and how many there are.

    Returns:
      Number of records in each split.

    Raises:
      ValueError: npm, a package or resvg-py is missing, a package is not the published one, `size` is out of range, or
        `output` is a file or holds another set.
      OSError: `output` cannot be written to.
    """
    if not LEAST <= size <= MOST:
        raise ValueError(f"size {size}: pictures of {LEAST} to {MOST} pixels are drawn")
    output = pathlib.Path(output).expanduser()
    described: dict[str, Any] = {"size": size, "packages": {one.spec: one.sha256 for one in packages}}
    is_described(output / DESCRIBED, described)
    if not all(is_there(output, split) for split in SPLITS):
        described["versions"] = versions()
        icons = list(_icons(packages, _files(packages, folder, progress)))
        describe(output / DESCRIBED, described)
        write_whole(output / LICENCES, _licences(packages, size).encode())
        trained = {icon.concept: None for icon in icons if icon.split == "train"}
        texts = [text for concept in trained for text in concept.captions]
        train_sentencepiece(texts, output / FILE, VOCAB_SIZE, word_start=True)
        for split in SPLITS:
            write_shards(output, split, _records([icon for icon in icons if icon.split == split], size, progress))
    return {split: read_manifest(output)["splits"][split]["records"] for split in SPLITS}


def _files(packages: Sequence[Package], folder: str | os.PathLike | None, progress: Progress) -> list[Files]:
    """Returns the files of each package, from a folder or fetched with npm."""
    if folder is not None and not pathlib.Path(folder).is_dir():
        raise ValueError(f"--packages {folder} is not a folder")
    files = []
    with tempfile.TemporaryDirectory() as fetched:
        for number, package in enumerate(packages):
            progress(f"read {package.spec}", number, len(packages))
            if folder is None:
                fetch(package, pathlib.Path(fetched))
            files.append(read(package, pathlib.Path(folder or fetched)))
    return files


def _icons(packages: Sequence[Package], files: Sequence[Files]) -> Iterator[Icon]:
    """Yields the pictures of the set by concept, in Unicode's order, and style."""
    concepts = read_concepts(_only(files, "data/openmoji.json"))
    names = names_of(_only(files, "chars.json"))
    drawings = [_of_one_concept(concepts, drawings_of(held, names)) for held in files]
    for concept in concepts:
        found = {one: own[concept.code] for one, own in zip(packages, drawings, strict=True) if concept.code in own}
        split = split_of(concept.code, [package.style for package in found])
        for package, drawing in found.items():
            if package.style in split:
                yield Icon(concept, package, drawing, split[package.style])


def _only(files: Sequence[Files], name: str) -> bytes:
    """Returns the file that one package alone has."""
    (found,) = (held[name] for held in files if name in held)
    return found


def _of_one_concept(concepts: Sequence[Concept], drawings: dict[str, bytes]) -> dict[str, bytes]:
    """Returns code -> drawing of the concepts; a drawing that a style has for two concepts is the first one's."""
    first: dict[bytes, str] = {}
    for concept in concepts:
        if concept.code in drawings:
            first.setdefault(drawings[concept.code], concept.code)
    return {code: drawing for drawing, code in first.items()}


def _records(icons: Sequence[Icon], size: int, progress: Progress) -> Iterator[Record]:
    for number, (concept, package, drawing, split) in enumerate(icons):
        progress(f"draw {split}", number, len(icons))
        try:
            picture = draw(drawing, size)
        except (ValueError, OSError) as error:
            raise ValueError(f"{concept.code} of {package.spec} cannot be drawn: {error}") from error
        extra: dict[str, Any] = {"concept": concept.code, "style": package.style, "licence": package.licence}
        extra["group"] = concept.group
        if split == "train":
            extra["captions"] = list(concept.captions)
        turns = (("user", (0,)), ("assistant", (concept.name,)))
        yield Record(f"{package.style}/{concept.code}", (picture,), turns, extra)


def _licences(packages: Sequence[Package], size: int) -> str:
    rows = [f"| {one.style} | {one.spec} (npm) | {one.licence} | {one.credit}: {one.home} |" for one in packages]
    return "\n".join(
        [
            "# Whose pictures these are",
            "",
            f"They are icons of the packages below, drawn at {size} x {size} pixels on white, and otherwise unchanged.",
            "Each record names its style and its licence in `extra`. Names, tags and groups are those of OpenMoji.",
            "Pass the pictures on with this file, under the licence of each: CC-BY-SA-4.0 asks for the same licence.",
            "",
            "| style | package | licence | made by |",
            "|---|---|---|---|",
            *rows,
            "",
            "CC-BY-4.0: https://creativecommons.org/licenses/by/4.0/",
            "CC-BY-SA-4.0: https://creativecommons.org/licenses/by-sa/4.0/",
            "Apache-2.0: https://www.apache.org/licenses/LICENSE-2.0",
            "MIT: https://opensource.org/license/mit",
            "",
        ]
    )
