"""Recognises the format of a source, and finds the module that reads it."""

import importlib
import types

from etils import epath

from fastvlm_jax.data.readers import Options

IMAGES = (".jpg", ".jpeg", ".png", ".webp")  # of a folder of images alone, which is often given as the source
# Format -> what it reads. Formats are tried in this order, the most reliably recognised first.
READERS = {
    "shards": "a folder that `fastvlm data write` wrote",
    "tfds": "a TFDS data set stored as ArrayRecord",
    "webdataset": ".tar files",
    "parquet": ".parquet files",
    "pdf": ".pdf files",
    "table": ".csv or .tsv of image and caption",
    "llava": ".json or .jsonl of conversations",
}


def reader(name: str) -> types.ModuleType:
    """Returns the module that reads the format `name`; raises ValueError if there is no such format."""
    if name not in READERS:
        raise ValueError(f"unknown format {name!r}: choose one of {', '.join(READERS)}")
    return importlib.import_module(f"fastvlm_jax.data.readers.{name}")


def check_options(name: str, options: Options) -> None:
    """Raises ValueError if options that concern the members of tars are given for another format."""
    for option in ("pictures", "synthetic_keys", "keep_augmentations", "keep_captions", "boxes"):
        if name != "webdataset" and getattr(options, option) != getattr(Options(), option):
            raise ValueError(f"--{option} is for tars of pairs (--format webdataset), and this source is {name}")


def recognise(path: epath.Path) -> str:
    """Returns the name of the format of `path`, a file or a folder.

    Raises:
      FileNotFoundError: `path` does not exist.
      ValueError: `path` holds images alone, or is in none of the known formats; the message lists them.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    for name in READERS:
        if reader(name).recognise(path):
            return name
    from fastvlm_jax.data.readers.files import looks_like  # not above: the flags of `data write` need this file alone

    if path.is_dir() and looks_like(path, IMAGES):
        raise ValueError(
            f"{path} holds images and no text about them: --source is the list of texts that names them, as a .json or "
            ".csv file, and --images their folder"
        )
    known = "; ".join(f"{name}: {what}" for name, what in READERS.items())
    raise ValueError(f"{path} is in no known format ({known}): choose one with --format")
