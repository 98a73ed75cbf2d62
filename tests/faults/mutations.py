"""Changes files as damage and as malice do: of the bytes alone, and behind checksums, compression and JSON.

`mutate` takes the files of a folder by name and returns what it did, in words. A name that begins with @ becomes a
symbolic link to what its content names.
"""

import base64
import gzip
import io
import json
import random
import struct
import tarfile
import zipfile
import zlib

import pyarrow as pa
from sentencepiece import sentencepiece_model_pb2 as spm

Files = dict[str, bytes]
NUMBERS = (0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1)
OUTSIDE = ("../outside/secret.png", "/etc/passwd", "../../outside/secret.png", "/proc/self/environ", "~/.ssh/id_rsa")
WEIRD = (
    None, True, False, -1, 0, 1, 7, 999, 10**6, 10**9, 2**31, 2**63, 10**30, 0.5, -5.5, 1e308, float("nan"),
    float("inf"), "", "x", "\ud800", "\0", "a" * 70_000, "(a+)+$", "{% for i in range(10**9) %}x{% endfor %}", [], [1],
    [-1], [[1]], [10**9], [1] * 5, [10**9] * 5, [None] * 3, {}, {"a": 1}, {"a": {"b": []}}, *OUTSIDE,
)  # fmt: skip


def mutate(rng: random.Random, files: Files, others: list[bytes]) -> str:
    """Changes one file, seldom two; `others` are whole files of its kind, parts of which may be put into it."""
    told = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice(sorted(files))
        inner = [change for fits, change in INNER if fits(name, files[name])]
        # What is behind a checksum is reached by these alone, so they are chosen as often as all others.
        change = rng.choice(inner if inner and rng.random() < 0.6 else BYTES)
        try:
            files[name] = change(rng, files[name], others)
        except Exception:
            files[name] = cut(rng, files[name], others)  # an earlier change left nothing that this one understands
        told.append(f"{name}: {change.__name__}")
    if rng.random() < 0.03:
        name = rng.choice(sorted(files))
        del files[name]
        told.append(f"{name}: deleted")
    return ", ".join(told)


# Of the bytes alone. Sizes, counts and tables stand at the beginning of most files, or at their end.


def _place(rng, data):
    size = len(data)
    return rng.choice((rng.randrange(size), rng.randrange(min(size, 200)), size - 1 - rng.randrange(min(size, 400))))


def flip(rng, data, others):
    changed = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 1, 2, 8, 64))):
        changed[_place(rng, changed)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def number(rng, data, others):
    """Writes a large number of 2, 4 or 8 bytes, of either order, somewhere."""
    changed, size = bytearray(data or b"\0"), rng.choice((2, 4, 8))
    at = _place(rng, changed)
    changed[at : at + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, rng.choice(("little", "big")))
    return bytes(changed)


def digits(rng, data, others):
    """Makes a number in a text enormous, and puts a bracket, quote or comma in another place."""
    changed = bytearray(data or b"\0")
    places = [i for i, byte in enumerate(changed[:100_000]) if 48 <= byte < 58]
    if places:
        at = rng.choice(places)
        changed[at : at + 1] = str(rng.choice(NUMBERS) * rng.choice((1, -1, 10**20))).encode()
    changed[_place(rng, changed)] = ord(rng.choice('"{}[]:,0 \n\t'))
    return bytes(changed)


def cut(rng, data, others):
    size = len(data)
    return rng.choice(
        (data[: rng.randrange(size + 1)], data[rng.randrange(size + 1) :], b"", data + b"\0", data + data)
    )


def splice(rng, data, others):
    """Puts a part of another file in, or takes a part out, doubles it or overwrites it with one byte."""
    size, other = len(data), rng.choice(others)
    start = rng.randrange(size + 1)
    stop = min(size, start + rng.choice((1, 8, 64, 512, size)))
    first = rng.randrange(len(other) + 1)
    piece = rng.choice((other[first : first + 512], b"", 2 * data[start:stop], bytes([rng.choice((0, 255, 65))]) * 99))
    return data[:start] + piece + data[stop:]


def head(rng, data, others):
    """Puts the beginning of another file before a part of this one."""
    other, size = rng.choice(others), rng.randrange(1, 64)
    return other[:size] + data[rng.choice((0, size)) :]


def many(rng, data, others):
    """Repeats a part until there are 128 kB of it."""
    start = rng.randrange(len(data) + 1)
    piece = data[start : start + rng.choice((1, 8, 64))] or b"["
    return data[:start] + piece * (2**17 // len(piece)) + data[start:]


BYTES = (flip, flip, number, number, digits, cut, splice, splice, head, many)


# Behind checksums, compression and syntax.


def json_value(rng, data, others):
    content = json.loads(data)
    place = rng.choice(list(_places(content)))
    value = rng.choice(WEIRD) if rng.random() < 0.9 else json.loads("[" * 900 + "]" * 900)
    if not place:
        return json.dumps(value).encode()
    inside = content
    for key in place[:-1]:
        inside = inside[key]
    if rng.random() < 0.15 and isinstance(inside, dict):
        del inside[place[-1]]
    elif rng.random() < 0.1 and isinstance(inside, dict):
        inside[rng.choice(("x", "", "../x", "\0", "size"))] = inside.pop(place[-1])
    else:
        inside[place[-1]] = value
    return json.dumps(content).encode()


def _places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def json_line(rng, data, others):
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json_value(rng, lines[at], others)
    return b"\n".join(lines) + b"\n"


def json_deep(rng, data, others):
    return rng.choice(
        (b"[" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"9" * 10_000, b"null", b"{}", b"[]")
    )


def safetensors_header(rng, data, others):
    size = int.from_bytes(data[:8], "little")
    header = json_value(rng, data[8 : 8 + size], others)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def in_gzip(rng, data, others):
    return gzip.compress(rng.choice(BYTES)(rng, gzip.decompress(data), others), 1)


def png_chunk(rng, data, others):
    """Changes what a chunk holds, its length or its name, and keeps the checksum right."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        chunks.append((name, data[at + 8 : at + 8 + size]))
        at += 12 + size
    i = rng.randrange(len(chunks))
    name, body = chunks[i]
    packed = name == b"IDAT" and rng.random() < 0.7
    body = rng.choice(BYTES)(rng, zlib.decompress(body) if packed else body, others)
    chunks[i] = (
        rng.choice((name, name, name, b"iCCP", b"zTXt", b"tRNS", b"PLTE")),
        zlib.compress(body) if packed else body,
    )
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def tar_member(rng, data, others):
    """Changes a header of a tar, its name, type, size or link, and keeps its checksum right."""
    file, members = io.BytesIO(), []
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive.getmembers() if member.isfile()]
    with tarfile.open(fileobj=file, mode="w", format=rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))) as archive:
        chosen = rng.randrange(len(members))
        for i, (member, content) in enumerate(members):
            if i == chosen:
                match rng.randrange(5):
                    case 0:
                        member.name = rng.choice((*OUTSIDE, "", "a" * 300, "\udcff.jpg", "x.jpg\0y", "a\nb.txt"))
                    case 1:
                        member.type, member.linkname = rng.choice(b"123456xgLKSV").to_bytes(), rng.choice(OUTSIDE)
                    case 2:
                        member.size = rng.choice(NUMBERS) % 2**33
                    case 3:
                        content = rng.choice(BYTES)(rng, content, others)
                        member.size = len(content)
                    case 4:
                        member.pax_headers = {rng.choice(("path", "size", "x")): str(rng.choice(NUMBERS))}
            archive.addfile(member, io.BytesIO(content.ljust(member.size % 2**20, b"\0")))
    return file.getvalue()


def zip_entry(rng, data, others):
    """Changes an entry of a zip, such as an .npz, and keeps its checksum right; or packs a bomb in its place."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        chosen = rng.choice(source.namelist())
        for name in source.namelist():
            body = source.read(name)
            if name == chosen and rng.random() < 0.2:
                body = body[: body.index(b"\n") + 1].ljust(128) + bytes(2**27)
            elif name == chosen:
                body = rng.choice(BYTES)(rng, body, others)
            target.writestr(rng.choice((name, name, name, "../x.npy")) if name == chosen else name, body)
    return file.getvalue()


def spm_field(rng, data, others):
    """Changes a field of a SentencePiece model."""
    model = spm.ModelProto.FromString(data)
    piece = model.pieces[rng.randrange(len(model.pieces))]
    match rng.randrange(8):
        case 0:
            piece.piece = rng.choice(("", "\0", "a" * 5000, "▁", "<s>", "<image>", model.pieces[-1].piece))
        case 1:
            piece.type = rng.randrange(1, 7)
        case 2:
            piece.score = rng.choice((float("nan"), float("inf"), -1e30))
        case 3:
            model.trainer_spec.model_type = rng.randrange(1, 5)
        case 4:
            name = rng.choice(("unk_id", "bos_id", "eos_id", "pad_id", "vocab_size"))
            setattr(model.trainer_spec, name, rng.choice((-1, 0, 10**6, 2**31 - 1, -(2**31))))
        case 5:
            model.normalizer_spec.precompiled_charsmap = rng.choice(
                (b"\0" * 8, b"\xff" * 1000, b"\0\1\0\0" + b"\x80" * 999)
            )
        case 6:
            name = rng.choice(("unk_piece", "bos_piece", "eos_piece", "pad_piece"))
            setattr(model.trainer_spec, name, rng.choice(("", "a", "</s>", "\0")))
        case 7:
            del model.pieces[rng.randrange(len(model.pieces)) :]
    return model.SerializeToString()


def base64_line(rng, data, others):
    """Changes a token or the rank in a line of a .tiktoken file."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    token, rank = lines[at].split()
    lines[at] = rng.choice((
        b"%s %d" % (token, rng.choice(NUMBERS)), b"%s %s" % (base64.b64encode(b"ab" * 4000), rank), token, b"= " + rank,
    ))  # fmt: skip
    return b"\n".join(lines) + b"\n"


def ocdbt_body(rng, data, others):
    """Changes the body of a manifest or node of OCDBT, which has a checksum, as it is or unpacked."""
    length = int.from_bytes(data[4:12], "little")  # of all but what follows in the file
    start, packed = 14, data[13] == 1  # behind magic, length, version and compression
    body = data[start : length - 4]
    if packed:
        with pa.CompressedInputStream(pa.py_buffer(body), "zstd") as stream:
            body = stream.read()
    body = rng.choice(BYTES)(rng, body, others) if rng.random() < 0.9 else body + bytes(2**28)
    body = pa.compress(body, "zstd", asbytes=True) if packed else body
    whole = data[:4] + (start + len(body) + 4).to_bytes(8, "little") + data[12:start] + body
    return whole + crc32c(whole).to_bytes(4, "little") + data[length:]


def crc32c(data: bytes) -> int:
    """Returns the CRC-32C (Castagnoli) of RFC 3720."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _crc_of(value: int) -> int:
    for _ in range(8):
        value = (value >> 1) ^ (0x82F63B78 * (value & 1))
    return value


_CRC = [_crc_of(value) for value in range(256)]
INNER = (
    (lambda name, data: data[:1] in (b"{", b"[") and not name.endswith(".jsonl"), json_value),
    (lambda name, data: data[:1] in (b"{", b"[") and not name.endswith(".jsonl"), json_value),
    (lambda name, data: data[:1] in (b"{", b"["), json_deep),
    (lambda name, data: name.endswith(".jsonl"), json_line),
    (lambda name, data: name.endswith(".safetensors"), safetensors_header),
    (lambda name, data: name.endswith(".gz"), in_gzip),
    (lambda name, data: data[:4] == b"\x89PNG", png_chunk),
    (lambda name, data: name.endswith(".tar"), tar_member),
    (lambda name, data: data[:2] == b"PK", zip_entry),
    (lambda name, data: name.endswith(".model"), spm_field),
    (lambda name, data: name.endswith(".tiktoken"), base64_line),
    (lambda name, data: data[:2] == b"\x0c\xdb", ocdbt_body),
)
