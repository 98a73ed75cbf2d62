"""What DataCompDR adds to each image of DataComp: synthetic captions, augmentations, and embeddings of its teachers.

    KEY.syn.json    {"syn_text": [caption, ...]}
    KEY.paug.json   {"param_aug": one entry an augmented view of the image}
    KEY.npz         image_emb [views, D], text_emb [1 + synthetic captions, D]

(github.com/apple/ml-mobileclip, training/; the bfloat16 edition has torch pickles, KEY.pth.gz, in place of KEY.npz.)
"""

import io
import math
import zipfile
from typing import Any

import msgpack
import numpy as np

from fastvlm_jax.data.readers.conversations import shown, text_of

MAX_ARRAYS = 16
MAX_ARRAY_BYTES = 16 << 20
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def synthetic_captions(value: Any) -> list[str]:
    """Returns the captions of a parsed `syn.json`; ValueError if it holds none."""
    captions = value.get("syn_text") if isinstance(value, dict) else None
    if not isinstance(captions, list):
        raise ValueError(f"syn.json has {shown(captions)} for syn_text, not a list of captions")
    return [text_of(caption, "a synthetic caption") for caption in captions]


def augmentation(value: Any) -> Any:
    """Returns a parsed `paug.json` as it is; ValueError for one that a record cannot hold."""
    try:
        msgpack.packb(value)
    except (ValueError, OverflowError, TypeError, RecursionError) as error:
        raise ValueError(f"paug.json cannot be kept ({error})") from error
    return value


def embeddings(data: bytes) -> dict[str, dict[str, Any]]:
    """Returns the arrays of an `.npz`, `X_emb` under the name X.

    Each is {"dtype": "float32", "shape": [...], "data": bytes}, little-endian and in C order. Nothing is unpickled, and
    no claimed size is allocated.

    Raises:
      ValueError: in a short line, what is wrong with the file.
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
    except Exception as error:  # zipfile and numpy raise a dozen kinds on bad bytes
        raise ValueError(f"the .npz cannot be read: {type(error).__name__} {error}".splitlines()[0]) from error


def _array(content: bytes, name: str) -> dict[str, Any]:
    if len(content) > MAX_ARRAY_BYTES:
        raise ValueError(f"{shown(name)} is over {MAX_ARRAY_BYTES >> 20} MB")
    text_of(name, "the name of an array")
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"{shown(name)} is of version {version}")
    shape, fortran_order, dtype = _HEADERS[version](file)
    if dtype.kind not in "fiu":
        raise ValueError(f"{shown(name)} holds {dtype}, not numbers: pickled objects are never read")
    raw = content[file.tell() :]
    if any(side < 0 for side in shape) or math.prod(shape) * dtype.itemsize != len(raw):
        raise ValueError(f"{shown(name)} claims the shape {shown(str(shape))} and holds {len(raw)} bytes")
    array = np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran_order else "C")
    little = np.ascontiguousarray(array, dtype.newbyteorder("<"))
    return {"dtype": dtype.name, "shape": list(shape), "data": little.tobytes()}
