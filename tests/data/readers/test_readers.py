"""Tests the readers of LLaVA's JSON, tables and WebDataset tars against the formats' own libraries and literals."""

import csv
import gzip
import io
import json
import random
import tarfile

import numpy as np
import PIL.Image
import pytest
from etils import epath

from fastvlm_jax.data.readers import Options, Part, llava, recognise, table, tar, webdataset
from fastvlm_jax.data.readers.conversations import about_image, to_turns
from fastvlm_jax.data.readers.files import key_of, lines
from fastvlm_jax.data.record import Record, Rejected, check, pack, unpack

QUESTION = {"from": "human", "value": "<image>\nwhat color?"}
ANSWER = {"from": "gpt", "value": "red"}
DEFAULT = Options()
TURNS = (("user", (0, "what color?")), ("assistant", ("red",)))


def png(shade: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("L", (4, 3), shade).save(file, "PNG")
    return file.getvalue()


def tar_of(members: list[tuple[str, bytes]], layout: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=layout) as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return file.getvalue()


def read_all(path, options=DEFAULT) -> list[Record | Rejected]:
    module = recognise.reader(recognise.recognise(epath.Path(path)))
    return [entry for part in module.parts(epath.Path(path), options) for entry in module.read(part, options)]


@pytest.fixture
def folder(tmp_path) -> epath.Path:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    return epath.Path(tmp_path)


# Conversations


def test_one_mark_stands_first_in_its_turn_wherever_it_was():
    for value in ("<image>\nwhat color?", "what color?\n<image>", "<image> what color? ", "<image>what color?"):
        assert to_turns([{"from": "human", "value": value}, ANSWER], 1) == TURNS
    middle = to_turns([{"from": "human", "value": "look at <image> now"}, ANSWER], 1)
    assert middle[0] == ("user", (0, "look at  now"))  # preprocess_multimodal leaves both spaces too


def test_several_marks_keep_their_order_over_all_turns():
    messages = [
        {"from": "human", "value": "compare <image> and\n<image>, please"},
        {"from": "gpt", "value": "they differ"},
        {"from": "human", "value": "and this? <image>"},
        {"from": "gpt", "value": "no"},
        {"from": "human", "value": "<image> <image>\n or none"},
        {"from": "gpt", "value": "none"},
    ]
    assert to_turns(messages, 5) == (
        ("user", ("compare", 0, "and", 1, ", please")),
        ("assistant", ("they differ",)),
        ("user", (2, "and this?")),
        ("assistant", ("no",)),
        ("user", (3, 4, "or none")),
        ("assistant", ("none",)),
    )


def test_one_image_without_a_mark_opens_the_users_first_turn():
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what color?"},
        {"role": "assistant", "content": "red"},
    ]
    assert to_turns(messages, 1) == (("system", ("be brief",)), *TURNS)


def test_content_may_be_a_list_of_texts_and_images():
    content = [{"type": "image"}, {"type": "text", "text": "what color?"}]
    assert to_turns([{"role": "user", "content": content}, {"role": "assistant", "content": "red"}], 1) == TURNS


@pytest.mark.parametrize(
    ("messages", "images", "reason"),
    [
        (None, 0, "the conversation is None, not a list of messages"),
        ([], 0, "the conversation is empty"),
        ("hello", 0, "the conversation is 'hello', not a list of messages"),
        ([QUESTION, ANSWER], 0, "the conversation has 1 <image> marks for 0 images"),
        ([QUESTION, ANSWER], 2, "the conversation has 1 <image> marks for 2 images"),
        ([ANSWER], 2, "the conversation has 0 <image> marks for 2 images"),
        ([ANSWER], 1, "the conversation has an image but no turn of the user"),
        (
            [{"from": "dog", "value": ""}],
            0,
            "a message is from 'dog': the roles are human, user, gpt, assistant, system",
        ),
        (
            [{"from": ["human"], "value": ""}],
            0,
            "a message is from list: the roles are human, user, gpt, assistant, sys",
        ),
        ([{"from": "gpt", "value": float("nan")}], 0, "a message is nan, not text"),
        ([{"from": "gpt", "value": "\ud83d"}], 0, "a message holds half a surrogate pair, which is no text"),
        ([{"from": "gpt", "value": [{"type": "video"}]}], 0, "a message holds a part of type 'video'"),
        (["hello"], 0, "a message is 'hello', not an object with from and value"),
    ],
)
def test_what_is_wrong_with_a_conversation_is_told_in_a_line(messages, images, reason):
    with pytest.raises(ValueError) as error:
        to_turns(messages, images)
    assert str(error.value).startswith(reason)


def test_a_caption_answers_the_image_alone_or_a_question_picked_by_the_key():
    assert about_image("a dog", "k", ()) == (("user", (0,)), ("assistant", ("a dog",)))
    asked = [about_image("a dog", f"k{i}", ("what?", "describe"))[0][1] for i in range(200)]
    assert set(asked) == {(0, "what?"), (0, "describe")}
    assert 70 < asked.count((0, "what?")) < 130
    assert asked[7] == about_image("a cat", "k7", ("what?", "describe"))[0][1]


# LLaVA


def test_a_list_and_lines_give_the_same_records(folder):
    entries = [
        {"id": "a", "image": "0.png", "conversations": [QUESTION, ANSWER]},
        {"id": 7, "conversations": [{"from": "human", "value": "hi"}, ANSWER], "extra": float("nan")},
        {"images": ["1.png", "2.png"], "messages": [{"role": "user", "content": "<image><image>"}, ANSWER]},
        {
            "id": "\u00e9t\u00e9 \U0001f600",
            "image": None,
            "conversations": [{"from": "human", "value": "\u4f60\n"}, ANSWER],
        },
    ]
    expected = [
        ((png(0),), TURNS),
        ((), (("user", ("hi",)), ("assistant", ("red",)))),
        ((png(1), png(2)), (("user", (0, 1)), ("assistant", ("red",)))),
        ((), (("user", ("\u4f60\n",)), ("assistant", ("red",)))),
    ]
    (folder / "list.json").write_text(json.dumps(entries))
    (folder / "pretty.json").write_text("\ufeff" + json.dumps(entries, indent=4, ensure_ascii=False))
    (folder / "lines.jsonl").write_text("\n\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries))
    (folder / "lines.json").write_text("".join(json.dumps(entry) + "\r\n" for entry in entries))
    for name in ("list.json", "pretty.json", "lines.jsonl", "lines.json"):
        records = read_all(folder / name)
        assert [(record.images, record.turns) for record in records] == expected
        assert [record.key.split("#")[0] for record in records] == [
            "a",
            "7",
            name.split(".")[0],
            "\u00e9t\u00e9 \U0001f600",
        ]
        assert all(unpack(pack(record)) == record and check(record) is None for record in records)


@pytest.mark.parametrize("indent", [None, 1])
def test_parts_hold_each_entry_once_as_json_reads_them(folder, monkeypatch, indent):
    rng = random.Random(1)
    words = ["plain", 'a "quoted" \\ word', "br[ack]{ets},", "\u00e9\u4f60\U0001f600", "\n", "]", "\x7f"]
    entries = [
        {"id": f"{i}", "conversations": [QUESTION | {"value": " ".join(rng.choices(words, k=i % 40))}, ANSWER]}
        for i in range(500)
    ]
    path = folder / "list.json"
    for ascii_only in (True, False):
        path.write_text(json.dumps(entries, indent=indent, ensure_ascii=ascii_only) + "\n")
        monkeypatch.setattr(llava, "_CHUNK", 512)
        for limits in ({"PART_ENTRIES": 7}, {"PART_BYTES": 3000}):
            with monkeypatch.context() as context:
                for limit, value in limits.items():
                    context.setattr(llava, limit, value)
                parts = llava.parts(path, Options())
            assert len(parts) > 20
            data = path.read_bytes()
            read = [
                entry
                for part in parts
                for entry in json.loads(b"[" + data[part.start : part.stop].rstrip(b", \n") + b"]")
            ]
            assert read == json.loads(path.read_text())
            records = [record for part in parts for record in llava.read(part, Options())]
            assert [record.turns[0][1][0] for record in records] == [e["conversations"][0]["value"] for e in entries]


def test_parts_of_lines_hold_each_line_once_wherever_they_are_cut(folder):
    text = "".join(
        json.dumps({"id": str(i), "conversations": [QUESTION | {"value": "x" * i}, ANSWER]}) + "\n" for i in range(30)
    )
    path = folder / "lines.jsonl"
    path.write_text(text)
    for step in (1, 7, 50, 97, 1000):
        starts = range(0, len(text), step)
        records = [r for at in starts for r in llava.read(Part(str(path), at, min(at + step, len(text))), Options())]
        assert [record.key.split("#")[0] for record in records] == [str(i) for i in range(30)]


def test_the_same_id_with_another_conversation_is_another_record(folder):
    """The ids of the 665K set are COCO's image numbers: some 250,000 are repeated with other questions."""
    other = {"id": "a", "image": "0.png", "conversations": [QUESTION, ANSWER | {"value": "blue"}]}
    first = {"id": "a", "image": "0.png", "conversations": [QUESTION, ANSWER]}
    (folder / "list.json").write_text(json.dumps([first, other, first]))
    one, two, again = read_all(folder / "list.json")
    assert one.key != two.key
    assert again == Rejected(str(folder / "list.json"), one.key, "the same entry stands at byte 1")


def test_newlines_and_tabs_may_stand_in_strings_as_they_are(folder):
    entry = '{"id": "a", "conversations": [{"from": "human", "value": "a\tb%s"}, {"from": "gpt", "value": "red"}]}'
    (folder / "list.json").write_text("[" + entry % "\n" + "]")
    (folder / "lines.jsonl").write_text(entry % "")
    for name, text in (("list.json", "a\tb\n"), ("lines.jsonl", "a\tb")):
        assert read_all(folder / name)[0].turns[0] == ("user", (text,))


def test_images_start_from_the_folder_that_was_asked_for(folder):
    (folder / "texts").mkdir()
    entry = {"id": "a", "image": "0.png", "conversations": [QUESTION, ANSWER]}
    (folder / "texts" / "list.json").write_text(json.dumps([entry]))
    assert isinstance(read_all(folder / "texts")[0], Rejected)
    assert read_all(folder / "texts", Options(images=str(folder)))[0].images == (png(0),)
    with pytest.raises(FileNotFoundError, match=r"there is no folder of images .*/nowhere"):
        read_all(folder / "texts", Options(images=str(folder / "nowhere")))


def test_an_entry_over_the_limit_is_passed_over_without_being_held(folder, monkeypatch):
    monkeypatch.setattr(llava, "MAX_ENTRY", 1000)
    good = json.dumps({"id": "a", "conversations": [QUESTION | {"value": "hi"}, ANSWER]})
    (folder / "lines.jsonl").write_text("\n".join([good, "[" * 5000, '"' + "x" * 3_000_000, good + " "]))
    reasons = [entry.reason if isinstance(entry, Rejected) else entry.key for entry in read_all(folder / "lines.jsonl")]
    assert reasons == [reasons[0], "the line is over 0 MB", "the line is over 0 MB", "the same entry stands at byte 0"]


def test_lines_tell_their_length_and_end_anywhere():
    data = b"a\r\n\nlong line\nlast"
    assert list(lines(io.BytesIO(data), 4)) == [(3, b"a"), (1, b""), (10, None), (4, b"last")]
    assert sum(length for length, _ in lines(io.BytesIO(data), 2)) == len(data)


# Tables


def test_a_csv_gives_what_the_csv_module_reads(folder):
    rng = random.Random(2)
    words = ["a", "dog,", '"big"', '12"', "new\nline", "\u00e9", "'", ";", "\t"]
    rows = [(f"{i % 4}.png", " ".join(rng.choices(words, k=6)).strip() + f" {i}", "x") for i in range(300)]
    with (folder / "list.csv").open("w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["Image", "caption", "score"])
        writer.writerows(rows)
    with (folder / "list.csv").open("r") as file:
        expected = [(row["Image"], row["caption"]) for row in csv.DictReader(file)]
    records = read_all(folder / "list.csv")
    assert [(r.key.split("#")[0], r.turns[1][1][0]) for r in records] == expected == [row[:2] for row in rows]
    assert [record.images[0] for record in records] == [png(i % 4) for i in range(300)]


def test_rows_of_every_part_together_are_the_file(folder, monkeypatch):
    monkeypatch.setattr(table, "PART_ROWS", 7)
    monkeypatch.setattr(table, "PART_ROWS_GZ", 40)
    text = "".join(f'{i % 4}.png,"caption\n{i}"\n' for i in range(100))
    (folder / "list.csv").write_text("\n" + text)
    (folder / "list.csv.gz").write_bytes(gzip.compress(text.encode()))
    for name, count in (("list.csv", 15), ("list.csv.gz", 3)):
        assert len(table.parts(folder / name, Options())) == count
        captions = [record.turns[1][1][0] for record in read_all(folder / name)]
        assert captions == [f"caption\n{i}" for i in range(100)]


def test_quotes_in_a_tsv_are_text_unless_they_enclose_the_field(folder):
    (folder / "list.tsv").write_text('0.png\ta "red" dog\n1.png\t"open\n2.png\t"he said ""no"""\n3.png\t"\n')
    captions = [record.turns[1][1][0] for record in read_all(folder / "list.tsv")]
    assert captions == ['a "red" dog', '"open', 'he said "no"', '"']


def test_a_broken_row_costs_no_other(folder):
    (folder / "list.csv").write_bytes(
        b'\n\nimage,text\n0.png,a\n1.png,"open\n2.png,c\n3.png,d,e\n\n0.png,\xff\n3.png,f 12" tv\n0.png,a\n'
    )
    found = read_all(folder / "list.csv")
    assert [entry.turns[1][1][0] if isinstance(entry, Record) else entry.reason for entry in found] == [
        "a",
        "it is not a row of CSV (unexpected end of data)",
        "c",
        "the row has 3 columns in place of 2",
        "it is not UTF-8 (invalid start byte at byte 6 of the line)",
        'f 12" tv',
        "the same row stands at byte 13",
    ]


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("a,b,c", "has the columns 'a, b, c': it needs one of image, path,"),
        ("url,caption", "lists addresses, not files: download the images first"),
        ("a dog,https://example.org/1.jpg", "lists addresses, not files: download the images first"),
        ("image,score", "has the columns 'image, score'"),
    ],
)
def test_a_table_without_the_columns_is_refused_in_a_line(folder, head, message):
    (folder / "list.csv").write_text(head + "\n")
    with pytest.raises(ValueError) as error:
        table.parts(folder / "list.csv", Options())
    assert message in str(error.value) and "\n" not in str(error.value)


# WebDataset


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_gives_what_webdataset_gives(folder, layout):
    wds = pytest.importorskip("webdataset", reason="webdataset 1.0.2 is not installed")
    rng = np.random.default_rng(0)
    members = []
    for i in range(60):
        name = ["", "train/", "deep/er/"][i % 3] + ("x" * 80 if i % 7 == 0 else "") + f"{i:09d}"
        if i % 5 == 0 and layout != tarfile.USTAR_FORMAT:
            name += "\u00e9" + "y" * 120
        members += [
            (f"{name}.{['jpg', 'PNG', 'webp'][i % 3]}", rng.bytes(1 + 97 * i)),
            (f"{name}.txt", f"caption {i}".encode()),
        ]
        members += [(f"{name}.json", json.dumps({"caption": "other", "key": i}).encode())] * (i % 2)
    (folder / "a.tar").write_bytes(tar_of(members, layout))
    ours, theirs = read_all(folder / "a.tar"), list(wds.WebDataset(str(folder / "a.tar"), shardshuffle=False))
    assert len(ours) == len(theirs) == 60
    for record, sample in zip(ours, theirs, strict=True):
        key = sample["__key__"]
        assert record.key == f"a.tar/{key}" or record.key == f"a.tar/{key_of(key, key.encode())}"
        assert record.images == (next(sample[name] for name in ("jpg", "png", "webp") if name in sample),)
        assert record.turns == (("user", (0,)), ("assistant", (sample["txt"].decode(),)))


def test_members_of_a_tar_are_those_that_tarfile_lists(folder):
    members = [(f"{'d/' * (i % 40)}{'n' * (i * 5)}{i}.jpg", b"x" * (i * 40)) for i in range(50)]
    for layout in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        data = tar_of(members, layout)
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            expected = [(member.name, member.offset_data, member.size) for member in archive]
        assert [tuple(member)[:3] for member in tar.members(io.BytesIO(data), len(data))] == expected


def test_members_out_of_order_and_several_images_and_conversations(folder):
    pair = [{"from": "human", "value": "<image> or <image>?"}, ANSWER]
    members = [
        ("./b.txt", b" a dog\n"),
        ("a.json", json.dumps({"text": "a cat", "url": "http://x"}).encode()),
        ("c.1.png", png(1)),
        ("a.jpg", png(2)),
        ("c.json", json.dumps({"conversations": pair}).encode()),
        ("c.0.png", png(0)),
        ("b.JPEG", png(3)),
        ("d.json", json.dumps({"messages": [{"role": "user", "content": "hi"}, ANSWER], "caption": "no"}).encode()),
        ("__meta__", b"x"),
    ]
    (folder / "a.tar").write_bytes(tar_of(members))
    assert read_all(folder) == [
        Record("a.tar/b", (png(3),), (("user", (0,)), ("assistant", ("a dog",)))),
        Record("a.tar/a", (png(2),), (("user", (0,)), ("assistant", ("a cat",)))),
        Record("a.tar/c", (png(0), png(1)), (("user", (0, "or", 1, "?")), ("assistant", ("red",)))),
        Record("a.tar/d", (), (("user", ("hi",)), ("assistant", ("red",)))),
    ]


def test_entries_are_put_together_over_a_bounded_number_of_keys(folder, monkeypatch):
    monkeypatch.setattr(webdataset, "PENDING", 3)
    members = [(f"{i}.{extension}", png(i)) for i in range(10) for extension in ("jpg", "txt")]
    members = [(name, data if name.endswith("jpg") else b"x") for name, data in members]
    (folder / "a.tar").write_bytes(tar_of(members))
    assert [record.key for record in read_all(folder / "a.tar")] == [f"a.tar/{i}" for i in range(10)]


def test_datacompdr_members_become_extra(folder):
    image_emb = np.arange(12, dtype=np.float32).reshape(2, 6)
    text_emb = np.arange(18, dtype=">f2").reshape(3, 6, order="F")
    arrays = io.BytesIO()
    np.savez_compressed(arrays, image_emb=image_emb, text_emb=text_emb)
    views = {"param_aug": [[["RandomResizedCrop", [1, 2, 3, 4]]], [["Blur", 0.5]]], "seed": 10**30}
    members = [
        ("0.jpg", png(0)),
        ("0.json", b'{"caption": "no"}'),
        ("0.npz", arrays.getvalue()),
        ("0.paug.json", json.dumps(views).encode()),
        ("0.syn.json", json.dumps({"syn_text": ["a dog", "un \u00e9l\u00e9phant"]}).encode()),
        ("0.txt", b"original"),
        ("0.url.txt", b"http://x"),
    ]
    (folder / "a.tar").write_bytes(tar_of(members))
    (record,) = read_all(folder / "a.tar")
    assert record.turns == (("user", (0,)), ("assistant", ("original",)))
    assert sorted(record.extra) == ["augmentation", "synthetic_captions", "synthetic_keys", "teacher"]
    assert record.extra["synthetic_captions"] == ["a dog", "un \u00e9l\u00e9phant"]
    assert record.extra["augmentation"] == views | {"seed": str(10**30)}  # msgpack has no room for the number
    teacher = unpack(pack(record)).extra["teacher"]
    assert sorted(teacher) == ["image", "text"]
    for name, expected, dtype in (("image", image_emb, "float32"), ("text", text_emb, "float16")):
        stored = teacher[name]
        assert (stored["dtype"], stored["shape"]) == (dtype, list(expected.shape))
        np.testing.assert_array_equal(np.frombuffer(stored["data"], dtype).reshape(stored["shape"]), expected)


# All


def test_formats_are_recognised_by_their_files(folder):
    (folder / "a.tar").write_bytes(tar_of([("0.jpg", b"x")]))
    (folder / "a.csv").write_text("image,text\n")
    (folder / "a.json").write_text("[]")
    names = {name: recognise.recognise(folder / name) for name in ("a.tar", "a.csv", "a.json")}
    assert names == {"a.tar": "webdataset", "a.csv": "table", "a.json": "llava"}
    assert recognise.recognise(folder) == "webdataset"  # img2dataset writes .json beside its .tar
    with pytest.raises(ValueError, match=r"0\.png is in no known format \(shards: .*choose one with --format"):
        recognise.recognise(folder / "0.png")
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*/nowhere"):
        recognise.recognise(folder / "nowhere")
    with pytest.raises(ValueError, match="unknown format 'zip': choose one of shards, tfds"):
        recognise.reader("zip")
