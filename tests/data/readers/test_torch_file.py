"""Tests the files of torch tensors: equal to what torch reads, and nothing that they hold is ever executed."""

import collections
import gzip
import io
import math
import struct
import zipfile

import pytest
import torch
from etils import epath
from reinforced import members, pictured, write_tar

from fastvlm_jax.data.readers import Options, torch_file, webdataset
from fastvlm_jax.data.record import Record

NUMBERS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
DICTS = {
    "one": {"a": NUMBERS.bfloat16()},
    "types": {"a": NUMBERS.bfloat16(), "b_emb": NUMBERS.half(), "c": NUMBERS},
    "views": {"a": NUMBERS.bfloat16().t(), "b": NUMBERS.bfloat16()[1:3, ::2], "c": NUMBERS[:, 2]},
    "shared": {"a": NUMBERS[:2], "b": NUMBERS[2:], "c": NUMBERS.reshape(2, 3, 4).permute(2, 0, 1)},
    "column": {"a": NUMBERS.bfloat16()[:1], "b": NUMBERS.bfloat16()[:, :1]},
    "ordered": collections.OrderedDict(b=NUMBERS.bfloat16(), a=NUMBERS.bfloat16()),
    "many": {f"{i}": torch.full((300,), float(i)).bfloat16() for i in range(16)},
    "gradient": {"a": NUMBERS.bfloat16().requires_grad_()},
}


def saved(value, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return gzip.compress(buffer.getvalue(), 1)


def changed(change, value=DICTS["one"], method=zipfile.ZIP_STORED) -> bytes:
    """Returns a saved value of which `change` has changed the members, {name: contents}; the checksums are right."""
    with zipfile.ZipFile(io.BytesIO(gzip.decompress(saved(value)))) as archive:
        held = {name.removeprefix("archive/"): archive.read(name) for name in archive.namelist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in (change(held) or held).items():
            archive.writestr(f"archive/{name}", data)
    return gzip.compress(buffer.getvalue(), 1)


def with_pickle(*changes, value=DICTS["one"]) -> bytes:
    """Returns a saved value in whose pickle the first of each pair of bytes is replaced by the second."""

    def change(held):
        for old, new in changes:
            assert old in held["data.pkl"], old
            held["data.pkl"] = held["data.pkl"].replace(old, new)

    return changed(change, value)


def pickled(data: bytes) -> bytes:
    return changed(lambda held: held | {"data.pkl": data})


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


@pytest.mark.parametrize("name", DICTS)
def test_tensors_are_those_that_torch_reads(name):
    data = saved(DICTS[name])
    expected = torch.load(io.BytesIO(gzip.decompress(data)))
    found = torch_file.embeddings(data)
    assert list(found) == [key.removesuffix("_emb") for key in expected]
    for stored, tensor in zip(found.values(), expected.values(), strict=True):
        assert stored["shape"] == list(tensor.shape) and stored["dtype"] == str(tensor.dtype).removeprefix("torch.")
        bits = torch.int16 if tensor.element_size() == 2 else torch.int32
        assert stored["data"] == tensor.detach().contiguous().view(bits).numpy().tobytes()


def test_a_stride_along_a_side_of_one_may_be_any_number():
    value = {"a": NUMBERS[:1]}
    found = torch_file.embeddings(with_pickle((b"K\6K\1\x86", number(2**31 - 1) + b"K\1\x86"), value=value))
    assert found == torch_file.embeddings(saved(value)) and found["a"]["data"] == NUMBERS[:1].numpy().tobytes()


class Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_in_a_torch_file_is_executed(tmp_path):
    for value in ({"a": NUMBERS, "b": Runs(tmp_path / "ran")}, Runs(tmp_path / "ran")):
        with pytest.raises(ValueError, match=r"its pickle names 'io\.open', which is no tensor: it is not read"):
            torch_file.embeddings(saved(value))
    evil = {"pth.gz": saved([Runs(tmp_path / "ran")])}
    for arrays, reason in ((evil | {"npz": members(7)["npz"]}, ""), (evil, "its pickle has the opcode EMPTY_LIST")):
        entry = {name: data for name, data in members(7).items() if name != "npz"} | pictured(7) | arrays
        write_tar(tmp_path / "0.tar", {"k": entry})
        (part,) = webdataset.parts(epath.Path(tmp_path / "0.tar"), Options())
        (found,) = webdataset.read(part, Options())
        assert isinstance(found, Record) if not reason else reason in found.reason
    assert not (tmp_path / "ran").exists()


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
DICT = b"ccollections\nOrderedDict\n"
CENTRAL = b"PK\1\2" + bytes(42)  # describes a member of a zip
REFUSED = {
    "empty": (lambda: b"", "the gzip is cut"),
    "no gzip": (lambda: b"cos\nsystem\n.", "its gzip is damaged"),
    "a cut gzip": (lambda: saved(DICTS["one"])[:-20], "the gzip is cut"),
    "bytes behind it": (lambda: saved(DICTS["one"]) * 2, "bytes follow the gzip"),
    "a bomb": (lambda: gzip.compress(bytes(65 << 20), 1), "it is over 64 MB"),
    "no zip": (lambda: saved(DICTS["one"], _use_new_zipfile_serialization=False), "BadZipFile"),
    "many members": (lambda: gzip.compress(CENTRAL * 101), "101 members are more than 100"),
    "no pickle": (lambda: changed(lambda held: {"data/0": held["data/0"]}), "it holds 0 pickles"),
    "two pickles": (lambda: zip_of("a/data.pkl", "b/data.pkl"), "it holds 2 pickles"),
    "deflated": (lambda: changed(lambda held: held, method=zipfile.ZIP_DEFLATED), "is compressed, which torch.save"),
    "bzip2": (lambda: changed(lambda held: held, method=zipfile.ZIP_BZIP2), "is packed by another method"),
    "a long pickle": (lambda: pickled(b"x" * 70_000), "'archive/data.pkl' is over 65,536 bytes"),
    "big-endian": (lambda: changed(lambda held: held | {"byteorder": b"big"}), "its numbers are not little-endian"),
    "short storage": (lambda: changed(lambda held: held | {"data/0": bytes(46)}), "holds 46 bytes for 24 numbers"),
    "no storage": (lambda: changed(lambda held: held.pop("data/0") and None), "'archive/data/0' is missing"),
    "os.system": (lambda: pickled(b"\x80\x02cos\nsystem\nX\4\0\0\0true\x85R."), "its pickle names 'os.system'"),
    "os.system for a dict": (lambda: with_pickle((DICT, b"cos\nsystem\n")), "its pickle names 'os.system'"),
    "os.system for a tensor": (lambda: with_pickle((TENSOR, b"cos\nsystem\n")), "its pickle names 'os.system'"),
    "a storage called": (lambda: pickled(b"\x80\x02ctorch\nHalfStorage\n)R."), "calls something else"),
    "a parameter": (lambda: saved({"a": torch.nn.Parameter(NUMBERS)}), "'torch._utils._rebuild_parameter'"),
    "sparse": (lambda: saved({"a": NUMBERS.to_sparse()}), "'torch._utils._rebuild_sparse_tensor'"),
    "double": (lambda: saved({"a": NUMBERS.double()}), "'torch.DoubleStorage'"),
    "a tensor alone": (lambda: saved(NUMBERS), "its pickle is not one dict of tensors"),
    "a number": (lambda: saved({"a": 1}), "its dict holds something else than names and tensors"),
    "a number for a name": (lambda: saved({1: NUMBERS}), "its dict holds something else than names and tensors"),
    "a dict in itself": (lambda: pickled(b"\x80\x02}q\0X\1\0\0\0ah\0s."), "its dict holds something else"),
    "17 tensors": (lambda: saved({f"{i}": NUMBERS for i in range(17)}), "more than 16 tensors"),
    "empty tensor": (lambda: saved({"a": torch.zeros(0, 6)}), "a storage of 0 numbers"),
    "repeated numbers": (lambda: saved({"a": NUMBERS[:1].expand(9, 6)}), "claims more numbers than the 24"),
    "large storage": (lambda: saved({"a": torch.zeros(2100, 2100)}), "a storage of 4410000 numbers: at most 16 MB"),
    "negative side": (lambda: with_pickle((b"K\4K\6\x86", number(-4) + number(-6) + b"\x86")), "is negative"),
    "huge shape": (lambda: with_pickle((b"K\4K\6\x86", number(2**31 - 1) * 2 + b"\x86")), "claims more numbers"),
    "negative stride": (lambda: with_pickle((b"K\6K\1\x86", number(-6) + b"K\1\x86")), "is negative"),
    "large stride": (lambda: with_pickle((b"K\6K\1\x86", b"K\7K\1\x86")), "claims more numbers than the 24"),
    "offset": (lambda: with_pickle((b"QK\0", b"QK\1")), "claims more numbers than the 24 of its storage"),
    "negative offset": (lambda: with_pickle((b"QK\0", b"Q" + number(-1))), "is negative"),
    "more strides": (lambda: with_pickle((b"K\6K\1\x86", b"K\6K\1K\1\x87")), "2 sides and 3 strides"),
    "a text for a side": (lambda: with_pickle((b"K\4K\6\x86", b"X\1\0\0\0aK\6\x86")), "is not numbers"),
    "another storage": (lambda: with_pickle((b"X\1\0\0\0000", b"X\1\0\0\0001")), "'archive/data/1' is missing"),
    "a path": (lambda: with_pickle((b"X\1\0\0\0000", b"X\4\0\0\0../0")), "names a storage without a number"),
    "deep": (lambda: pickled(b"\x80\x02)" + b"\x85" * 60_000 + b"."), "is not one dict of tensors"),
    "wide": (lambda: pickled(b"\x80\x02)q\0" + b"h\0h\0\x86q\0" * 5000 + b"}h\0h\0s."), "its dict holds something"),
    "a long text": (lambda: pickled(b"\x80\x02X\xff\xff\xff\x7fabc."), "the .pth.gz cannot be read"),
    "a long number": (lambda: pickled(b"\x80\x02L" + b"9" * 60_000 + b"L\n."), "the .pth.gz cannot be read"),
    "marks": (lambda: pickled(b"\x80\x02" + b"(" * 60_000 + b"."), "is not one dict of tensors"),
    "nothing to take": (lambda: pickled(b"\x80\x02\x86."), "takes more values than there are"),
    "cut": (lambda: pickled(b"\x80\x02}"), "pickle exhausted before seeing STOP"),
}  # fmt: skip


def zip_of(*names) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b".")
    return gzip.compress(buffer.getvalue())


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused_in_a_line(name):
    make, reason = REFUSED[name]
    with pytest.raises(ValueError) as caught:
        torch_file.embeddings(make())
    told = str(caught.value)
    assert reason in told and told.startswith("the .pth.gz cannot be read: ")
    assert told.isprintable() and len(told) <= 300


def test_any_changed_byte_of_the_pickle_gives_tensors_or_a_line():
    """Each byte gets values that are opcodes; what is read then has as many bytes as its shape tells."""
    (pickle,) = _pickles({"a": NUMBERS.bfloat16()[1:, ::2], "b": NUMBERS})
    read = refused = 0
    for at in range(len(pickle)):
        for value in (pickle[at] ^ 1, ord("R"), ord("h"), ord("0")):
            data = pickle[:at] + bytes([value]) + pickle[at + 1 :]
            try:
                tensors = torch_file._tensors(data)
            except Exception as error:  # of which embeddings() makes a line, as the test above shows
                assert not isinstance(error, SystemError | MemoryError)
                refused += 1
                continue
            read += 1
            for tensor in tensors.values():
                last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
                assert 0 <= last < tensor.storage.count >= math.prod(tensor.shape) > 0 and min(tensor.strides) >= 0
    assert read > 50 and refused > 500


def _pickles(value):
    with zipfile.ZipFile(io.BytesIO(gzip.decompress(saved(value)))) as archive:
        return [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
