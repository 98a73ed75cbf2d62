"""Reads what DataCompDR adds to each image of DataComp: synthetic captions, augmentations and teacher embeddings.

    KEY.syn.json    {"syn_text": [caption, ...]}
    KEY.paug.json   {"param_aug": one entry for each augmented view of the image}
    KEY.npz         image_emb [views, D], text_emb [1 + synthetic captions, D]

Source: github.com/apple/ml-mobileclip, training/. The bfloat16 edition has torch pickles, KEY.pth.gz, and no KEY.npz.
"""

import io
import math
import zipfile
from typing import Any

import msgpack
import numpy as np

from fastvlm_jax.data.readers.conversations import shown, text_of

MAX_ARRAYS = 16
MAX_ARRAY_BYTES = 16 << 20  # bytes of one array, unpacked
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def synthetic_captions(value: Any) -> list[str]:
    """Returns the captions of a parsed `syn.json`; raises ValueError if it has no list of captions."""
    captions = value.get("syn_text") if isinstance(value, dict) else None
    if not isinstance(captions, list):
        raise ValueError(f"syn.json has {shown(captions)} for syn_text, not a list of captions")
    return [text_of(caption, "a synthetic caption") for caption in captions]


def augmentation(value: Any) -> Any:
    """Returns a parsed `paug.json` unchanged; raises ValueError if a record cannot hold it."""
    try:
        msgpack.packb(value)
    except (ValueError, OverflowError, TypeError, RecursionError) as error:
        raise ValueError(f"paug.json cannot be stored ({error})") from error
    return value


def embeddings(data: bytes) -> dict[str, dict[str, Any]]:
    """Returns the arrays of an `.npz` by name; the array `X_emb` is called X.

    Each is {"dtype": "float32", "shape": [...], "data": bytes}, little-endian and in C order. Nothing is unpickled, and
    the sizes that the file claims are not trusted: memory is allocated only for bytes that are there.

    Raises:
      ValueError: the file is damaged, too large or holds anything but numbers; the message is a short line.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_ARRAYS:
                raise ValueError(f"{len(entries)} arrays are more than {MAX_ARRAYS}")
            arrays = {}
            for entry in entries:
                with archive.open(entry) as file:
                    content = file.read(MAX_ARRAY_BYTES + 1)
                arrays[entry.filename.removesuffix(".npy").removesuffix("_emb")] = _array(content, entry.filename)
            return arrays
    except Exception as error:  # zipfile and numpy raise a dozen kinds of exception for bad bytes
        raise ValueError(f"the .npz cannot be read: {type(error).__name__} {error}".splitlines()[0]) from error


def _array(content: bytes, name: str) -> dict[str, Any]:
    if len(content) > MAX_ARRAY_BYTES:
        raise ValueError(f"{shown(name)} is over {MAX_ARRAY_BYTES >> 20} MB")
    text_of(name, "the name of an array")
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"{shown(name)} has the unknown .npy version {version}")
    shape, fortran_order, dtype = _HEADERS[version](file)
    if dtype.kind not in "fiu":
        raise ValueError(f"{shown(name)} holds {dtype}, not numbers: pickled objects are never read")
    raw = content[file.tell() :]
    if any(side < 0 for side in shape) or math.prod(shape) * dtype.itemsize != len(raw):
        raise ValueError(f"{shown(name)} claims the shape {shown(str(shape))} and holds {len(raw)} bytes")
    array = np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran_order else "C")
    little = np.ascontiguousarray(array, dtype.newbyteorder("<"))
    return {"dtype": dtype.name, "shape": list(shape), "data": little.tobytes()}
