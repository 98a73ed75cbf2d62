"""Writes arrays as torch.save does a dict of bfloat16 tensors, gzipped, for readers/torch_file.py; without torch."""

import gzip
import io
import pickle
import struct
import zipfile
from collections.abc import Mapping

import ml_dtypes
import numpy as np

_LEVEL = 1  # of gzip: higher ones save no more of such numbers, and take longer


def packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Returns the bytes of a KEY.pth.gz that holds arrays by name, rounded to bfloat16; equal arrays, equal bytes."""
    arrays = {name: np.ascontiguousarray(array, ml_dtypes.bfloat16) for name, array in arrays.items()}
    members = {"data.pkl": _pickled({name: array.shape for name, array in arrays.items()}), "byteorder": b"little"}
    members |= {f"data/{number}": array.tobytes() for number, array in enumerate(arrays.values())}
    members["version"] = b"3\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)  # dated 1980, as torch does
    return gzip.compress(buffer.getvalue(), _LEVEL, mtime=0)


def _pickled(shapes: Mapping[str, tuple[int, int]]) -> bytes:
    """Returns the pickle of a dict of contiguous tensors [rows, columns], each of a storage of its own."""
    opcodes = [pickle.PROTO, b"\2", pickle.EMPTY_DICT, pickle.MARK]
    for number, (name, (rows, columns)) in enumerate(shapes.items()):
        # _rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)
        opcodes += [_text(name), _global("torch._utils", "_rebuild_tensor_v2"), pickle.MARK]
        opcodes += [pickle.MARK, _text("storage"), _global("torch", "BFloat16Storage"), _text(str(number))]
        opcodes += [_text("cpu"), _number(rows * columns), pickle.TUPLE, pickle.BINPERSID, _number(0)]
        opcodes += [_number(rows), _number(columns), pickle.TUPLE2, _number(columns), _number(1), pickle.TUPLE2]
        opcodes += [pickle.NEWFALSE, _global("collections", "OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE]
        opcodes += [pickle.TUPLE, pickle.REDUCE]
    return b"".join([*opcodes, pickle.SETITEMS, pickle.STOP])


def _text(text: str) -> bytes:
    data = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _number(number: int) -> bytes:
    return pickle.BININT + struct.pack("<i", number)


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
