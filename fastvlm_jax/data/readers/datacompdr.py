"""Reads what DataCompDR and DFNDR add to each image: synthetic captions, augmentations and teachers' embeddings.

    KEY.syn.json    {"syn_text": [caption, ...]}, or several such lists: {"syn_text_a": [...], "syn_text_b": [...]}
    KEY.paug.json   {"param_aug": one entry for each augmented view of the image}
    KEY.npz         image_emb [views, D], and either text_emb [captions + synthetic captions, D]
                    or text_emb [captions, D] with syn_text_a_emb, syn_text_b_emb [synthetic captions, D] beside it
    KEY.pth.gz      the same arrays in bfloat16, see torch_file.py

Source: github.com/apple/ml-mobileclip, training/, and github.com/apple/ml-mobileclip-dr.
"""

import collections
import io
import json
import math
import re
import zipfile
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np

from fastvlm_jax.data.features import DTYPES
from fastvlm_jax.data.readers import Options
from fastvlm_jax.data.readers.conversations import shown, text_of

MAX_ARRAYS = 16
MAX_ARRAY_BYTES = 16 << 20  # bytes of one array, unpacked
MAX_MEMBERS = 100  # of a zip: the arrays, and the small members that torch adds
MAX_AUGMENTATIONS = 10_000  # of a picture; published sets have up to 30
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_MEMBER = b"PK\1\2"  # begins the description of each member of a zip


def extra_of(synthetic: Any, augmented: Any, arrays: dict[str, Any], captions: int, options: Options) -> dict[str, Any]:
    """Returns the `extra` of a record: synthetic captions, augmentations and embeddings, as many as the options keep.

    The rows of the embeddings are those of the augmentations, and of the captions with the synthetic ones behind them.

    Args:
      synthetic: parsed `syn.json`; None if there is none.
      augmented: parsed `paug.json`; None if there is none.
      arrays: embeddings by name, see `embeddings`; {} if there are none.
      captions: number of captions of the record.
      options: which synthetic captions are taken, and how many of these and of the augmentations are kept.

    Raises:
      ValueError: something is not as it is published, or numbers of rows do not fit; the message is a short line.
    """
    extra: dict[str, Any] = {}
    lists = {} if synthetic is None else _synthetic_lists(synthetic, options.synthetic_keys)
    places = [(key, row) for key, texts in lists.items() for row, text in enumerate(texts) if text.strip()]
    places = places[: options.keep_captions or None]
    if synthetic is not None:
        extra["synthetic_captions"] = [lists[key][row] for key, row in places]
        counts = collections.Counter(key for key, _ in places)
        extra["synthetic_keys"] = [[key, counts[key]] for key in lists]
    if augmented is not None:
        extra["augmentation"] = _kept_augmentation(augmented, options.keep_augmentations)
    if arrays:
        teacher = dict(arrays)
        text, own = teacher.pop("text", None), {key: teacher.pop(key) for key in lists if key in teacher}
        for key in [name for name in teacher if isinstance(synthetic, dict) and name in synthetic]:
            del teacher[key]  # of synthetic captions that are not taken
        if text is not None or own:
            teacher["text"] = _text_rows(text, own, lists, places, captions)
        if "image" in teacher and augmented is not None:
            teacher["image"] = _image_rows(teacher["image"], augmented, options.keep_augmentations)
        extra["teacher"] = teacher
    return extra


def _synthetic_lists(value: Any, pattern: str) -> dict[str, list[str]]:
    """Returns the lists of captions in a parsed `syn.json` whose keys `pattern` finds, in the file's order."""
    if not isinstance(value, dict):
        raise ValueError(f"syn.json is {shown(value)}, not an object of lists of captions")
    lists = {}
    for key in value:
        if not re.search(pattern, key):
            continue
        if not isinstance(value[key], list):
            raise ValueError(f"syn.json has {shown(value[key])} for {shown(key)}, not a list of captions")
        lists[text_of(key, "a key of syn.json")] = [text_of(text, "a synthetic caption") for text in value[key]]
    if not lists:
        keys = ", ".join(map(repr, value))
        raise ValueError(f"syn.json has no key that --synthetic_keys {pattern!r} finds: its keys are {shown(keys)}")
    return lists


def _kept_augmentation(value: Any, keep: int) -> Any:
    """Returns a parsed `paug.json`, with its first `keep` augmentations alone unless that is 0."""
    if keep:
        value = value | {"param_aug": augmentations(value)[:keep]} if isinstance(value, dict) else augmentations(value)
    try:
        msgpack.packb(value)
    except (ValueError, OverflowError, TypeError, RecursionError) as error:
        raise ValueError(f"paug.json cannot be stored ({error})") from error
    return value


def augmentations(value: Any) -> list[Any]:
    """Returns the entries of `param_aug` in a `paug.json`, for `images.augment.read_params`.

    They are a list, or the JSON of one; an entry may be JSON again.

    Raises:
      ValueError: there are none, or more than MAX_AUGMENTATIONS.
    """
    stored = _parsed(value)
    entries = _parsed(stored.get("param_aug")) if isinstance(stored, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError("no augmentation (param_aug)")
    if len(entries) > MAX_AUGMENTATIONS:
        raise ValueError(f"{len(entries):,} augmentations are more than {MAX_AUGMENTATIONS:,}")
    return [_parsed(entry) for entry in entries]


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)  # `read_params` refuses large numbers; a hook for each would slow every draw
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its augmentation is text that is not JSON: {value[:80]!r}") from error


def _image_rows(image: dict[str, Any], augmented: Any, keep: int) -> dict[str, Any]:
    count = len(augmentations(augmented))
    _check_rows(image, "image_emb")
    if image["shape"][0] != count:
        raise ValueError(f"image_emb has {image['shape'][0]} rows for {count} augmentations")
    return _rows(image, range(min(keep, count) if keep else count))


def _text_rows(text, own: dict[str, Any], lists: dict[str, list[str]], places, captions: int) -> dict[str, Any]:
    """Returns the embeddings of the captions, and behind them those of the synthetic captions at `places`."""
    if text is None:
        raise ValueError("text_emb is missing beside the embeddings of synthetic captions")
    _check_rows(text, "text_emb")
    rows, wanted = text["shape"][0], sum(map(len, lists.values()))
    if rows > captions or not lists:
        if rows != captions + wanted:
            raise ValueError(f"text_emb has {rows} rows for {captions} captions and {wanted} synthetic ones")
        if len(lists) > 1:
            raise ValueError("text_emb holds the rows of one list of synthetic captions: choose it by --synthetic_keys")
        return _rows(text, [*range(captions), *(captions + row for _, row in places)])
    if rows != captions:
        raise ValueError(f"text_emb has {rows} rows for {captions} captions")
    joined = text
    for key, texts in lists.items():
        if key not in own:
            raise ValueError(f"there are no embeddings of {shown(key)}: leave it out with --synthetic_keys")
        found = own[key]
        _check_rows(found, f"{key}_emb")
        if found["shape"][0] != len(texts):
            raise ValueError(f"{shown(key)} has {len(texts)} captions and {found['shape'][0]} rows of embeddings")
        if (found["dtype"], found["shape"][1]) != (text["dtype"], text["shape"][1]):
            raise ValueError(f"the embeddings of {shown(key)} are not of the type and width of text_emb")
        kept = _rows(found, [row for name, row in places if name == key])
        shape = [joined["shape"][0] + kept["shape"][0], text["shape"][1]]
        joined = {"dtype": text["dtype"], "shape": shape, "data": joined["data"] + kept["data"]}
    return joined


def _check_rows(array: dict[str, Any], name: str) -> None:
    if array["dtype"] not in DTYPES or len(array["shape"]) != 2 or not all(array["shape"]):
        shape = shown(str(array["shape"]))
        raise ValueError(f"{shown(name)} is {array['dtype']} of the shape {shape}, not rows of {' or '.join(DTYPES)}")


def _rows(array: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Returns some rows of an array that a record stores."""
    count, width = array["shape"]
    if list(rows) == list(range(count)):
        return array
    size = len(array["data"]) // count
    data = b"".join(array["data"][row * size : (row + 1) * size] for row in rows)
    return {"dtype": array["dtype"], "shape": [len(rows), width], "data": data}


def embeddings(data: bytes) -> dict[str, dict[str, Any]]:
    """Returns the arrays of an `.npz` by name; the array `X_emb` is called X.

    Each is {"dtype": "float32", "shape": [...], "data": bytes}, little-endian and in C order. Nothing is unpickled, and
    the sizes that the file claims are not trusted: memory is allocated only for bytes that are there.

    Raises:
      ValueError: the file is damaged, too large or holds anything but numbers; the message is a short line.
    """
    try:
        with opened_zip(data) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_ARRAYS:
                raise ValueError(f"{len(entries)} arrays are more than {MAX_ARRAYS}")
            arrays = {}
            for entry in entries:
                with archive.open(entry) as file:
                    content = file.read(MAX_ARRAY_BYTES + 1)
                arrays[base_name(entry.filename.removesuffix(".npy"))] = _array(content, entry.filename)
            return arrays
    except Exception as error:  # zipfile and numpy raise a dozen kinds of exception for bad bytes
        raise ValueError(unread(".npz", error)) from error


def opened_zip(data: bytes) -> zipfile.ZipFile:
    """Opens a zip of few members, none of them packed in a way that may take gigabytes to unpack.

    Raises:
      ValueError: it is another one.
      zipfile.BadZipFile: it is damaged.
    """
    if (members := data.count(_MEMBER)) > MAX_MEMBERS:
        raise ValueError(f"{members} members are more than {MAX_MEMBERS}")
    archive = zipfile.ZipFile(io.BytesIO(data))
    for entry in archive.infolist():
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{shown(entry.filename)} is packed by another method than deflate")
    return archive


def unread(what: str, error: Exception) -> str:
    """Returns in one short line why a file of embeddings cannot be read."""
    kind = "" if type(error) is ValueError else f"{type(error).__name__} "
    return f"the {what} cannot be read: {kind}{error}".splitlines()[0][:300]


def base_name(name: str) -> str:
    """Returns the name by which a record stores the array `name`: "image" for "image_emb"."""
    return name.removesuffix("_emb")


def array_of(dtype: str, array: np.ndarray) -> dict[str, Any]:
    """Returns an array of little-endian numbers as a record stores it."""
    return {"dtype": dtype, "shape": list(array.shape), "data": array.tobytes()}


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
    return array_of(dtype.name, array.astype(dtype.newbyteorder("<"), copy=False))
