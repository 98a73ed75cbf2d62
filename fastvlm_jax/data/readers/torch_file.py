"""Reads the tensors in a gzipped torch file, such as KEY.pth.gz, without torch and without unpickling anything.

Behind gzip, `torch.save` has written a zip of uncompressed members:

    archive/data.pkl     pickle of the dict: of each tensor its storage, offset, shape and strides
    archive/data/0       numbers of storage 0, one after the other
    archive/byteorder    little

The pickle's opcodes are listed (pickletools.genops), and those that torch.save writes for a dict of tensors move values
on a stack of our own. A name such as `torch._utils._rebuild_tensor_v2` is compared with the few known ones: nothing is
imported or called. Any other opcode or name, and anything that is not where torch.save puts it, refuses the file.
"""

import dataclasses
import math
import pickletools
import zipfile
from typing import Any

import numpy as np

from fastvlm_jax.data.readers.conversations import shown, text_of
from fastvlm_jax.data.readers.datacompdr import MAX_ARRAY_BYTES, MAX_ARRAYS, array_of, base_name, opened_zip, unread
from fastvlm_jax.files import gunzip

MAX_UNPACKED = 64 << 20  # bytes behind gzip
MAX_PICKLE = 64 << 10  # bytes
MAX_SIDES = 8  # dimensions of a tensor
# Type of a storage -> name of its numbers, and a type of NumPy with as many bytes.
_STORAGES = {
    "torch BFloat16Storage": ("bfloat16", "<u2"),
    "torch HalfStorage": ("float16", "<f2"),
    "torch FloatStorage": ("float32", "<f4"),
}
_TENSOR, _DICT = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"
_VALUES = ("BINUNICODE", "BININT", "BININT1", "BININT2")
_CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclasses.dataclass(frozen=True, eq=False)
class _Name:
    """Holds a name that a pickle would import."""

    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    """Describes `count` numbers in the member data/`key`."""

    dtype: str
    numbers: np.dtype
    key: str
    count: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Tensor:
    """Describes a tensor in a storage; all of its numbers lie in it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def embeddings(data: bytes) -> dict[str, dict[str, Any]]:
    """Returns the tensors of a gzipped torch file by name, as datacompdr.embeddings does those of an `.npz`.

    Raises:
      ValueError: the file is damaged, too large or holds anything but a dict of tensors of floating-point numbers of 16
        or 32 bits; the message is a short line.
    """
    try:
        with opened_zip(gunzip(data, MAX_UNPACKED)) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            found = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(found) != 1:
                raise ValueError(f"it holds {len(found)} pickles FOLDER/data.pkl, not one as torch.save writes it")
            folder = found[0].removesuffix("data.pkl")
            if f"{folder}byteorder" in entries and _stored(archive, entries[f"{folder}byteorder"], 16) != b"little":
                raise ValueError("its numbers are not little-endian")
            tensors = _tensors(_stored(archive, entries[found[0]], MAX_PICKLE))
            return {base_name(name): _array(archive, entries, folder, tensor) for name, tensor in tensors.items()}
    except Exception as error:  # zipfile and pickletools raise a dozen kinds of exception for bad bytes
        raise ValueError(unread(".pth.gz", error)) from error


def _stored(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: int) -> bytes:
    """Returns a member of the zip, which torch never compresses."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{shown(entry.filename)} is compressed, which torch.save does not do")
    if entry.file_size > limit:
        raise ValueError(f"{shown(entry.filename)} is over {limit:,} bytes")
    with archive.open(entry) as file:
        return file.read(limit + 1)


def _array(archive: zipfile.ZipFile, entries: dict, folder: str, tensor: _Tensor) -> dict[str, Any]:
    """Returns a tensor as a record stores it, its numbers one after the other."""
    storage = tensor.storage
    name = f"{folder}data/{storage.key}"
    if name not in entries:
        raise ValueError(f"{shown(name)} is missing")
    raw = _stored(archive, entries[name], MAX_ARRAY_BYTES)
    if len(raw) != storage.count * storage.numbers.itemsize:
        raise ValueError(f"{shown(name)} holds {len(raw)} bytes for {storage.count} numbers")
    numbers = np.frombuffer(raw, storage.numbers)[tensor.offset :]
    strides = [stride * numbers.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(numbers, tensor.shape, strides, writeable=False)
    return array_of(storage.dtype, view)


def _tensors(pickle: bytes) -> dict[str, _Tensor]:
    """Returns the tensors that a pickle describes."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(pickle):
        name = opcode.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(_popped(stack, marks.pop())))
        elif name in _TUPLES:
            stack.append(tuple(_popped(stack, len(stack) - _TUPLES[name])))
        elif name == "GLOBAL":
            stack.append(_known(argument))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments, made = stack.pop(), stack.pop()
            stack.append(_made(made, arguments))
        elif name in ("SETITEM", "SETITEMS"):
            items = _popped(stack, len(stack) - 2 if name == "SETITEM" else marks.pop())
            _set(stack[-1], items)
        elif name == "STOP":
            return _whole(stack, marks)
        elif name != "PROTO":
            raise ValueError(f"its pickle has the opcode {name}, which torch.save does not write for tensors")
    raise ValueError("its pickle is cut")


def _popped(stack: list[Any], start: int) -> list[Any]:
    """Removes the values from `start` on from a stack, and returns them."""
    if not 0 <= start <= len(stack):
        raise ValueError("its pickle takes more values than there are")
    values = stack[start:]
    del stack[start:]
    return values


def _known(name: str) -> _Name:
    if name not in (_TENSOR, _DICT, *_STORAGES):
        raise ValueError(f"its pickle names {shown(name.replace(' ', '.'))}, which is no tensor: it is not read")
    return _Name(name)


def _storage(told: Any) -> _Storage:
    """Returns the storage that a persistent id tells of: ("storage", its type, its key, its device, its numbers)."""
    if type(told) is not tuple or len(told) != 5:
        raise ValueError("its pickle names a storage that is none")
    kind, made, key, device, count = told
    if type(kind) is not str or kind != "storage" or type(made) is not _Name or made.text not in _STORAGES:
        raise ValueError("its pickle names a storage of numbers other than bfloat16, float16 or float32")
    if type(key) is not str or type(device) is not str or not (key.isascii() and key.isdigit() and len(key) < 10):
        raise ValueError("its pickle names a storage without a number")
    dtype, numbers = _STORAGES[made.text]
    numbers = np.dtype(numbers)
    if type(count) is not int or not 0 < count * numbers.itemsize <= MAX_ARRAY_BYTES:
        raise ValueError(f"its pickle names a storage of {shown(count)} numbers: at most {MAX_ARRAY_BYTES >> 20} MB")
    return _Storage(dtype, numbers, key, count)


def _made(made: Any, arguments: Any) -> Any:
    """Returns what a call in the pickle would: an empty dict, or a tensor."""
    if type(made) is not _Name or type(arguments) is not tuple or made.text not in (_TENSOR, _DICT):
        raise ValueError("its pickle calls something else than what makes a tensor")
    if made.text == _DICT:
        if arguments:
            raise ValueError("its pickle makes a dict of something")
        return {}
    if len(arguments) != 6:
        raise ValueError(f"a tensor is made of {len(arguments)} values, not 6")
    storage, offset, shape, strides, gradient, hooks = arguments
    if type(storage) is not _Storage or type(gradient) is not bool or type(hooks) is not dict or hooks:
        raise ValueError("a tensor is made of something else than a storage")
    sides = (shape, strides)
    if any(type(side) is not tuple or any(type(n) is not int for n in side) for side in sides):
        raise ValueError("the shape of a tensor is not numbers")
    if type(offset) is not int or not len(shape) == len(strides) <= MAX_SIDES:
        raise ValueError(f"the shape of a tensor has {len(shape)} sides and {len(strides)} strides")
    if min((offset, *strides)) < 0 or min(shape, default=1) < 1:
        raise ValueError("a side, stride or offset of a tensor is negative, or it is empty")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if last >= storage.count or math.prod(shape) > storage.count:
        raise ValueError(f"a tensor claims more numbers than the {storage.count} of its storage")
    return _Tensor(storage, offset, shape, strides)


def _set(target: Any, items: list[Any]) -> None:
    """Puts names and tensors into the dict that the pickle makes."""
    if type(target) is not dict or len(items) % 2:
        raise ValueError("its pickle fills something else than a dict")
    for name, value in zip(items[::2], items[1::2], strict=True):
        if type(name) is not str or type(value) is not _Tensor:
            raise ValueError("its dict holds something else than names and tensors")
        target[text_of(name, "the name of a tensor")] = value
    if len(target) > MAX_ARRAYS:
        raise ValueError(f"more than {MAX_ARRAYS} tensors")


def _whole(stack: list[Any], marks: list[int]) -> dict[str, _Tensor]:
    if len(stack) != 1 or marks or type(stack[0]) is not dict:
        raise ValueError("its pickle is not one dict of tensors")
    return stack[0]
