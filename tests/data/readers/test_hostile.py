"""Tests broken and hostile sources: each entry that cannot be read is one line, and costs no other entry."""

import gzip
import io
import json
import os
import random
import re
import tarfile
import time
import zipfile

import numpy as np
import pytest
from etils import epath

from fastvlm_jax.data.readers import Options, datacompdr, files, llava, recognise, table, webdataset
from fastvlm_jax.data.record import Record, Rejected, pack, unpack

TALK = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
OPTIONS = Options()
# Readers do not look inside images, so any bytes will do.
PHOTO = bytes(range(1, 250))


def read_all(path) -> list[Record | Rejected]:
    """Returns all entries of a source, and checks that each is a storable record or a Rejected of one line."""
    module = recognise.reader(recognise.recognise(epath.Path(path)))
    entries = []
    for part in module.parts(epath.Path(path), OPTIONS):
        for entry in module.read(part, OPTIONS):
            if isinstance(entry, Record):
                assert unpack(pack(entry)) == entry or "nan" in repr(entry.extra)
                assert entry.key.isprintable() and all(entry.images)
            else:
                assert isinstance(entry, Rejected) and entry.key.isprintable() and len(entry.key) < 400
                assert entry.reason.isprintable() and 5 < len(entry.reason) < 600, entry
            entries.append(entry)
    return entries


def reason(path) -> str:
    (entry,) = read_all(path)
    return entry.reason


@pytest.fixture
def folder(tmp_path) -> epath.Path:
    inside = tmp_path / "data"
    inside.mkdir()
    (tmp_path / "secret.png").write_bytes(PHOTO)
    for number in range(4):
        (inside / f"{number}.png").write_bytes(PHOTO)
    return epath.Path(inside)


def tar_of(*members, layout: int = tarfile.GNU_FORMAT) -> bytes:
    """Returns a tar of members (name, bytes) or (name, type of member)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=layout) as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.linkname = "/etc/passwd"
            header.size = len(data) if len(data) > 1 else 0
            header.type = data if len(data) == 1 else tarfile.REGTYPE
            archive.addfile(header, io.BytesIO(data))
    return file.getvalue()


def told(entries) -> list[str]:
    """Returns the keys of the entries, with an exclamation mark after those of rejected entries."""
    return [re.sub("#.*", "", entry.key) + "!" * isinstance(entry, Rejected) for entry in entries]


# Files


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("../secret.png", "leads out of the images' folder"),
        ("a/../../secret.png", "leads out of the images' folder"),
        ("a\\..\\..\\secret.png", "leads out of the images' folder"),
        ("/etc/passwd", "leads out of the images' folder"),
        ("~/secret.png", "leads out of the images' folder"),
        ("link.png", "'link.png' is a link out of the images' folder"),
        ("linked/secret.png", "'linked/secret.png' is a link out of the images' folder"),
        ("sibling.png", "'sibling.png' is a link out of the images' folder"),
        ("loop.png", "'loop.png' "),
        ("pipe.png", "'pipe.png' is not a regular file"),
        ("folder", "'folder' is not a regular file"),
        ("folder/", "'folder/' is not the name of a file"),
        ("0.png/x", "'0.png/x' cannot be read (Not a directory)"),
        (" ", "' ' is not the name of a file"),
        ("0.png\0", r"'0.png\x00' is not the name of a file"),
        ("no.png", "'no.png' is not in "),
        ("x" * 5000, "cannot be read (File name too long)"),
        ("\ud83d.png", "half a surrogate pair"),
        ("empty.png", "'empty.png' is empty (0 bytes)"),
        ("huge.png", "'huge.png' is over 256 MB"),
        ("http://example.org/0.png", "is an address, not a file: download the images first"),
        ("file:///etc/passwd", "leads out of the images' folder"),
        ("data:image/png;base64,AAAA", "'image' holds base64 text that is no picture"),
        ("data:image/svg+xml,%3Csvg", "is an address, not a file"),
        ("film.mp4", "'film.mp4' is a video"),
    ],
)
def test_only_files_in_the_folder_are_opened(folder, name, expected):
    (folder / "folder").mkdir()
    os.symlink(folder.parent / "secret.png", folder / "link.png")
    os.symlink(folder.parent, folder / "linked")
    (folder.parent / "data2").mkdir()
    (folder.parent / "data2" / "0.png").write_bytes(PHOTO)
    os.symlink("../data2/0.png", folder / "sibling.png")
    os.symlink("loop.png", folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "empty.png").touch()
    with open(folder / "huge.png", "wb") as file:
        file.truncate(files.MAX_IMAGE_BYTES + 1)
    (folder / "list.json").write_text(json.dumps([{"id": "a", "image": name, "conversations": TALK}]))
    assert expected in reason(folder / "list.json")


def test_links_inside_the_folder_are_followed(folder):
    os.symlink("0.png", folder / "link.png")
    assert files.read_image(files.ImagesFolder((folder,)), "link.png") == PHOTO


# LLaVA


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("null", "an entry is None, not an object"),
        ("[]", "an entry is list, not an object"),
        ("NaN", "an entry is nan, not an object"),
        ('{"id": NaN}', "the id is nan, not text or a whole number"),
        ('{"id": {}}', "the id is dict, not text or a whole number"),
        ('{"id": "\\ud83d"}', "the id holds half a surrogate pair"),
        ('{"id": "a"}', "the keys are 'id': expected are an image column and one of: conversations"),
        ('{"image": 3, "conversations": []}', "the name of an image is 3, not text"),
        ('{"image": {"bytes": ""}}', "'image' is empty (0 bytes)"),
        ('{"image": {"pixels": []}}', "'image' is an object of 'pixels'"),
        ('{"image": ["0.png", null]}', "the name of an image is None, not text"),
        ('{"video": "a.mp4", "conversations": []}', "it is about a video: only images are read"),
        ('{"conversations": []}', "the conversation is empty"),
        ('{"conversations": {"from": "human"}}', "the conversation is dict, not a list of messages"),
        ('{"conversations": [[]]}', "a message is list, not an object with from and value"),
        ('{"conversations": [{"from": "gpt", "value": 1e999}]}', "a message is inf, not text"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "it nests too deep"),
        ('{"id": ' + "9" * 6000 + ', "conversations": 1}', "the conversation is 1, not a list of messages"),
        ('{"id": "a\xff"}'.encode("latin-1"), "it is not UTF-8 (invalid start byte at its byte 9)"),
    ],
)
def test_a_broken_entry_costs_no_other(folder, entry, expected):
    entry = entry if isinstance(entry, bytes) else entry.encode()
    good = json.dumps({"id": "a", "image": "0.png", "conversations": TALK}).encode()
    for name, data in (
        ("list.json", b"[%b, %b,\n%b]" % (good, entry, good[:-1] + b" }")),
        ("l.jsonl", good + b"\n" + entry + b"\n" + good[:-1] + b" }"),
    ):
        (folder / name).write_bytes(data)
        before, broken, after = read_all(folder / name)
        assert isinstance(before, Record) and isinstance(after, Record)
        assert broken.reason.startswith(expected)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b'"[1]"',
        b'{"a": 1',
        b'{\n"a": 1}',
        b"\xff\xfe[\0",
        b"[",
        b"[1",
        b"[{}",
        b"[{},",
        b"[{}{}]",
        b"[{},]",
        b'[{"a": "',
        b"[{}] [{}]",
        b"[nul]",
        b"[" * 9999,
    ],
)
def test_json_that_is_no_list_of_entries_is_refused_in_a_line(folder, data):
    (folder / "list.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"list\.json") as error:
        llava.parts(folder / "list.json", OPTIONS)
    assert str(error.value).isprintable()


def test_an_entry_that_nests_too_deep_may_be_the_last(folder):
    (folder / "list.json").write_text("[1," + "[" * 5000 + "]" * 5000 + "]")
    assert [entry.reason for entry in read_all(folder / "list.json")] == [
        "an entry is 1, not an object",
        "it nests too deep",
    ]


def test_a_pipe_as_a_source_is_refused(folder):
    os.mkfifo(folder / "list.json")
    for module in (llava, table, webdataset):
        with pytest.raises(FileNotFoundError, match=r"list\.json is neither a file nor a folder"):
            module.parts(folder / "list.json", OPTIONS)
    with pytest.raises(FileNotFoundError, match="holds no"):
        llava.parts(folder, OPTIONS)


def test_a_list_is_read_in_bounded_steps(folder, monkeypatch):
    monkeypatch.setattr(llava, "_CHUNK", 512)
    (folder / "list.json").write_text(json.dumps([12345] * 1000))
    assert {entry.reason for entry in read_all(folder / "list.json")} == {"an entry is 12345, not an object"}
    assert len(read_all(folder / "list.json")) == 1000
    monkeypatch.setattr(llava, "MAX_ENTRY", 2000)
    (folder / "list.json").write_text(json.dumps(["x" * 1900, "x" * 50_000]))
    with pytest.raises(ValueError, match=r"list\.json is cut or broken at byte 1905"):
        llava.parts(folder / "list.json", OPTIONS)


def test_a_huge_line_is_passed_over_in_little_memory(folder):
    good = json.dumps({"id": "a", "image": "0.png", "conversations": TALK}).encode() + b"\n"
    with open(folder / "lines.jsonl", "wb") as file:
        file.write(good)
        file.truncate(1 << 27)  # zeros
        file.seek(0, 2)
        file.write(b"\n" + good[:-2] + b" }\n")
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert told(read_all(folder / "lines.jsonl")) == ["a", f"byte {len(good)}!", "a"]
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10 < 150  # MB


def test_a_file_that_changed_or_went_between_parts_and_read_is_told(folder):
    path = folder / "list.json"
    path.write_text(json.dumps([{"id": str(i), "image": "0.png", "conversations": TALK} for i in range(5)]))
    (part,) = llava.parts(path, OPTIONS)
    path.write_text("[" + path.read_text()[4:])
    (entry,) = llava.read(part, OPTIONS)
    assert entry.reason.startswith("the file has changed")
    for module, name, text in ((llava, "list.json", "[{}]"), (table, "a.csv", "0.png,a\n"), (webdataset, "a.tar", "x")):
        (folder / name).write_text(text)
        (part,) = module.parts(folder / name, OPTIONS)
        (folder / name).unlink()
        (entry,) = module.read(part, OPTIONS)
        assert "cannot be read" in entry.reason and str(folder / name) in entry.reason


# Tables


def test_a_gz_that_is_cut_gives_its_rows_and_one_line(folder):
    data = gzip.compress(b"".join(b"%d.png,caption %d\n" % (i % 4, i) for i in range(5000)))
    for cut in (len(data) // 2, len(data) - 8):
        (folder / "list.csv.gz").write_bytes(data[:cut])
        entries = read_all(folder / "list.csv.gz")
        assert (
            len(entries) > 1000 and [isinstance(entry, Rejected) for entry in entries].index(True) == len(entries) - 1
        )
        assert entries[-1].reason.startswith("the file is cut or broken here")


def test_a_quote_that_is_never_closed_swallows_one_row(folder):
    rows = [b'%d.png,"caption %d"\n' % (i % 4, i) for i in range(200)]
    rows[20] = b'0.png,"caption\n'
    (folder / "list.csv").write_bytes(b"".join(rows))
    assert [entry.reason for entry in read_all(folder / "list.csv") if isinstance(entry, Rejected)] == [
        "it is not a row of CSV (',' expected after '\"')"
    ]
    (folder / "list.csv").write_bytes(
        b"0.png,a\n1.png," + b"x" * 3_000_000 + b'\n2.png,"' + b"x" * 200_000 + b'"\n3.png,b\n'
    )
    reasons = [entry.reason for entry in read_all(folder / "list.csv") if isinstance(entry, Rejected)]
    assert reasons == ["the line is over 1 MB", "it is not a row of CSV (field larger than field limit (131072))"]


# WebDataset


def test_names_links_and_kinds_of_members_that_are_no_files_are_rejected(folder):
    members = [
        ("/1.jpg", PHOTO),
        ("../2.jpg", PHOTO),
        ("a/../3.jpg", PHOTO),
        ("4.jpg", tarfile.SYMTYPE),
        ("5.jpg", tarfile.LNKTYPE),
        ("6.jpg", tarfile.FIFOTYPE),
        ("7.jpg", tarfile.CHRTYPE),
        ("8.jpg", tarfile.GNUTYPE_SPARSE),
        ("9", tarfile.DIRTYPE),
        ("README", PHOTO),
        (".hidden.jpg", PHOTO),
        ("10.jpg", b""),
        ("11.jpg", PHOTO),
        ("12.svg", PHOTO),
        ("13.jpg", PHOTO),
        ("14.jpg", PHOTO),
    ]
    texts = [(f"{i}.txt", b"a dog") for i in (4, 5, 6, 7, 8, 10, 12, 14)] + [("13.txt", b"\xff\xff")]
    (folder / "a.tar").write_bytes(
        tar_of(*(member if member[1] else (member[0], tarfile.AREGTYPE) for member in members + texts))
    )
    found = dict(zip(told(entries := read_all(folder / "a.tar")), entries, strict=True))
    assert [name for name in found if not name.endswith("!")] == ["a.tar/14"]
    expected = {
        "a.tar//1.jpg!": "leads out of its folder",
        "a.tar/../2.jpg!": "leads out of its folder",
        "a.tar/a/../3.jpg!": "leads out of its folder",
        "a.tar/4!": "is a link",
        "a.tar/5!": "is a link",
        "a.tar/6!": "is not a regular file",
        "a.tar/7!": "is not a regular file",
        "a.tar/8!": "is not a regular file",
        "a.tar/README!": "no name of the form KEY.EXTENSION",
        "a.tar/.hidden.jpg!": "no name of the form KEY.EXTENSION",
        "a.tar/10!": "is empty (0 bytes)",
        "a.tar/11!": "no caption and no conversation among its members 'jpg'",
        "a.tar/12!": "'12.svg' is not read",
        "a.tar/13!": "is not UTF-8",
    }
    assert expected.keys() == found.keys() - {"a.tar/14"}
    assert all(text in found[name].reason for name, text in expected.items())


def test_a_member_twice_leaves_the_first(folder):
    (folder / "a.tar").write_bytes(
        tar_of(("0.jpg", PHOTO), ("0.txt", b"first"), ("0.txt", b"second"), ("0.jpg", b"xx"))
    )
    entries = read_all(folder / "a.tar")
    assert told(entries) == ["a.tar/0.txt!", "a.tar/0.jpg!", "a.tar/0"]
    assert entries[2].images == (PHOTO,) and entries[2].turns[1] == ("assistant", ("first",))


def test_a_tar_that_is_cut_anywhere_gives_what_is_before_and_one_line(folder):
    whole = tar_of(
        *((f"{i}.{ext}", bytes([i + 65]) * size) for i in range(4) for ext, size in (("jpg", 700), ("txt", 100)))
    )
    member = {"jpg": 512 + 1024, "txt": 512 + 512}
    entry = sum(member.values())
    for cut in range(0, 4 * entry + 1, 128):
        (folder / "a.tar").write_bytes(whole[:cut])
        entries = read_all(folder / "a.tar")
        records = [entry for entry in entries if isinstance(entry, Record)]
        # The last member's bytes are all there before its padding is.
        complete = sum(i * entry + member["jpg"] + 512 + 100 <= cut for i in range(4))
        assert [record.key for record in records] == [f"a.tar/{i}" for i in range(complete)]
        assert len(entries) == complete + 1 and "cut" in entries[-1].reason


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_cut_in_an_extended_header_is_told(folder, layout):
    members = [(f"{'long' * 50}{i}.{extension}", b"text") for i in range(2) for extension in ("jpg", "txt")]
    whole = tar_of(*members, layout=layout)
    end = len(whole.rstrip(b"\0"))
    for cut in range(0, end, 64):
        (folder / "a.tar").write_bytes(whole[:cut])
        entries = read_all(folder / "a.tar")
        assert len(entries) <= 2 and isinstance(entries[-1], Rejected) and "cut" in entries[-1].reason


def test_a_damaged_header_costs_its_entry_alone(folder):
    whole = bytearray(tar_of(*((f"{i}.{ext}", b"text") for i in range(4) for ext in ("jpg", "txt"))))
    for at in (1024 * 2, 1024 * 3):
        data = bytearray(whole)
        data[at + 3] ^= 1
        (folder / "a.tar").write_bytes(data)
        assert told(read_all(folder / "a.tar")) == [f"byte {at}!", "a.tar/0", "a.tar/1!", "a.tar/2", "a.tar/3"]


def test_sizes_that_a_header_claims_are_not_believed(folder):
    for size in (1 << 20, 1 << 33, 1 << 62):
        header = tarfile.TarInfo("1.jpg")
        header.size = size
        for layout in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            data = tar_of(("0.jpg", PHOTO), ("0.txt", b"text"))[: 4 * 512]
            data += header.tobuf(layout) + tar_of(("2.jpg", PHOTO), ("2.txt", b"text"))
            (folder / "a.tar").write_bytes(data)
            entries = read_all(folder / "a.tar")
            assert told(entries) == ["a.tar/0", "a.tar/1!", "a.tar/2"]
            assert f"claims {size} bytes, more than the tar holds" in entries[1].reason
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 1 << 60
    (folder / "a.tar").write_bytes(long.tobuf(tarfile.GNU_FORMAT) + tar_of(("2.jpg", PHOTO), ("2.txt", b"text")))
    assert read_all(folder / "a.tar")[-1].key == "a.tar/2"


def test_tars_put_behind_each_other_are_read_on_and_files_that_are_none_are_told(folder):
    one, two = (tar_of((f"{i}.jpg", PHOTO), (f"{i}.txt", b"text")) for i in range(2))
    (folder / "a.tar").write_bytes(one + two)
    assert told(read_all(folder / "a.tar")) == ["a.tar/0", "a.tar/1"]
    for data in (b"x" * 5000, gzip.compress(one) * 9):
        (folder / "a.tar").write_bytes(data)
        assert "this is no tar file" in reason(folder / "a.tar")


def test_members_without_a_name_are_told_each(folder):
    members = [("", PHOTO), ("", PHOTO), ("0.jpg", PHOTO), ("0.txt", b"text"), ("", PHOTO)]
    (folder / "a.tar").write_bytes(tar_of(*members))
    entries = read_all(folder / "a.tar")
    assert told(entries) == ["byte 512!", "byte 1536!", "a.tar/0", "byte 4608!"]
    assert entries[0].reason == "a file without a name"


def test_pickles_are_named_and_not_opened(folder):
    for extension in ("pt.gz", "pth", "pkl"):
        (folder / "a.tar").write_bytes(
            tar_of(("0.jpg", PHOTO), (f"0.{extension}", b"cos\nsystem\n."), ("0.txt", b"x" * 2))
        )
        assert f"'0.{extension}' is a Python pickle, which can run code" in reason(folder / "a.tar")


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def npz(method: int = zipfile.ZIP_DEFLATED, **arrays: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in arrays.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (lambda: b"", "BadZipFile"),
        (lambda: npz(a=npy(np.zeros(3)))[:-30], "BadZipFile"),
        (lambda: npz(a=npy(np.array([{}], object))), "holds object, not numbers: pickled objects are never read"),
        (lambda: npz(a=npy(np.zeros(3, "i4,f4"))), "not numbers"),
        (lambda: npz(a=b"\0" * (20 << 20)), "'a.npy' is over 16 MB"),
        (lambda: npz(a=npy(np.zeros(3)).replace(b"(3,)", b"(9,)")), "claims the shape '(9,)' and holds 24 bytes"),
        (lambda: npz(a=npy(np.zeros(30)).replace(b"(30,)", b"(-1,)")), "claims the shape"),
        (lambda: npz(a=npy(np.zeros(3)).replace(b"False", b"F('')")), "the .npz cannot be read"),
        (lambda: npz(a=npy(np.zeros(3))[:40]), "the .npz cannot be read"),
        (lambda: npz(**{f"a{i}": npy(np.zeros(1)) for i in range(17)}), "17 arrays are more than 16"),
        (lambda: npz(**{f"a{i}": b"" for i in range(101)}), "101 members are more than 100"),
        (lambda: npz(zipfile.ZIP_LZMA, a=npy(np.zeros(1))), "'a.npy' is packed by another method than deflate"),
    ],
)
def test_teacher_embeddings_are_numbers_of_the_claimed_size_or_rejected(folder, data, expected):
    with pytest.raises(ValueError) as error:
        datacompdr.embeddings(data())
    assert expected in str(error.value) and str(error.value).isprintable()


# Mutations


def sources() -> dict[str, bytes]:
    """Returns a small intact source in each format; they name the images `data/0.png` ..."""
    two = [{"from": "human", "value": "<image> <image>"}, {"from": "gpt", "value": "\u00e9 \U0001f600"}]
    entries = [{"id": f"id{i}", "image": f"{i % 4}.png", "conversations": [*TALK, *TALK[1:]]} for i in range(6)]
    entries += [{"id": 9, "images": ["0.png", "1.png"], "conversations": two}, {"id": "t", "messages": TALK[1:]}]
    text = "image,caption\n" + "".join(f'{i % 4}.png,"caption, ""{i}"""\n' for i in range(8))
    members = [(f"{i}.{ext}", data) for i in range(3) for ext, data in (("jpg", PHOTO), ("txt", b"a dog"))]
    members += [("x" * 150 + ".jpg", PHOTO), ("x" * 150 + ".json", json.dumps({"conversations": TALK}).encode())]
    members += [("r.jpg", PHOTO), ("r.json", b'{"caption": "a"}'), ("r.npz", npz(image_emb=npy(np.ones((2, 3), "f4"))))]
    members += [("r.syn.json", b'{"syn_text": ["a", "b"]}'), ("r.paug.json", b'{"param_aug": [[1, {"a": 0.5}], null]}')]
    return {
        "list.json": json.dumps(entries).encode(),
        "pretty.json": json.dumps(entries, indent=1, ensure_ascii=False).encode(),
        "lines.jsonl": "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries).encode(),
        "list.csv": text.encode(),
        "list.tsv": text.replace(",", "\t", 8).encode(),
        "list.csv.gz": gzip.compress(text.encode()),
        "gnu.tar": tar_of(*members),
        "pax.tar": tar_of(*members, layout=tarfile.PAX_FORMAT),
    }


def mutated(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, other, length = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1), rng.choice([1, 4, 100, 600])
        data = rng.choice(
            [
                data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if at < len(data) else data,
                data[:at] + rng.randbytes(length) + data[at + length :],
                data[:at],
                data[:at] + data[at + length :],
                data[:at] + data[other : other + length] + data[at:],
                data[:at]
                + rng.choice([b"\0", b"\n", b'"', b"[", b"{", b"}", b"]", b"\xff", b"\\", b"\\ud800", b"9" * 99])
                + data[at:],
            ]
        )
        data = data or b"x"
    return data


@pytest.mark.parametrize("name", list(sources()))
def test_mutations_of_bytes_are_records_or_lines(folder, name):
    data, rng = sources()[name], random.Random(name)
    outcomes = {"records": 0, "rejected": 0, "refused": 0}
    for _ in range(200):
        (folder / name).write_bytes(mutated(data, rng))
        start = time.perf_counter()
        try:
            entries = read_all(folder / name)
            outcomes["records"] += sum(isinstance(entry, Record) for entry in entries)
            outcomes["rejected"] += sum(isinstance(entry, Rejected) for entry in entries)
        except ValueError as error:
            assert name in str(error) and str(error).isprintable() and len(str(error)) < 800, repr(error)
            outcomes["refused"] += 1
        assert time.perf_counter() - start < 5
    assert outcomes["records"] > 100 and outcomes["rejected"] + outcomes["refused"] > 50, outcomes


WRONG = [
    None,
    True,
    0,
    -1.5,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    "../../etc/passwd",
    [],
    [None],
    {},
    {"from": 1},
]


def places(value, path=()):
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def put(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(value[path[0]], path[1:], new)
    return copy


def test_fields_of_a_wrong_type_cost_their_entry_alone(folder):
    good = {"id": "good", "image": "0.png", "conversations": TALK}
    entry = {"id": "a", "image": "1.png", "images": ["1.png"], "video": None, "conversations": TALK}
    entry |= {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}
    changed = [put(entry, path, wrong) for path in places(entry) for wrong in WRONG]
    changed += [{key: value for key, value in entry.items() if key != left_out} for left_out in entry]
    assert len(changed) > 200
    (folder / "list.json").write_text(json.dumps([e for i, c in enumerate(changed) for e in (c, good | {"n": i})]))
    entries = read_all(folder / "list.json")
    assert len(entries) == 2 * len(changed)
    assert all(isinstance(entry, Record) and entry.images == (PHOTO,) for entry in entries[1::2])
    assert sum(isinstance(entry, Rejected) for entry in entries[::2]) > 100


def test_fields_of_a_wrong_type_in_a_tar_cost_their_entry_alone(folder):
    sound = {"json": {"conversations": TALK, "caption": "a"}, "syn.json": {"syn_text": ["a"]}, "paug.json": {"a": [1]}}
    members = []
    for extension, value in sound.items():
        for path in places(value):
            for wrong in WRONG:
                contents = sound | {extension: put(value, path, wrong)}
                key = f"{len(members):05d}"
                members += [(f"{key}.jpg", PHOTO)]
                members += [
                    (f"{key}.{name}", json.dumps(content).encode() + b" ") for name, content in contents.items()
                ]
                members += [(f"{key}g.jpg", PHOTO), (f"{key}g.txt", b"a dog")]
    (folder / "a.tar").write_bytes(tar_of(*members))
    entries = read_all(folder / "a.tar")
    assert len(entries) == 2 * len(members) // 6 > 300
    assert all(isinstance(entry, Record) for entry in entries[1::2])
    assert sum(isinstance(entry, Rejected) for entry in entries[::2]) > 50
