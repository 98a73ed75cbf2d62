"""Tests that columns mean the same in every container, and that no picture is overlooked: against literal records."""

import base64
import csv
import io
import json
import tarfile

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from fastvlm_jax.data.readers import Options, recognise
from fastvlm_jax.data.record import Record, Rejected


def png(colour: str) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


RED, LIME = png("red"), png("lime")
RED64 = base64.b64encode(RED).decode()


def entries(path) -> list[Record | Rejected]:
    module = recognise.reader(recognise.recognise(epath.Path(path)))
    try:
        return [found for part in module.parts(epath.Path(path), Options()) for found in module.read(part, Options())]
    except ValueError as error:
        return [Rejected(str(path), "", str(error))]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "lime.png").write_bytes(LIME)
    return tmp_path


# One row in each container, written by the libraries of the format, or by hand


def to_parquet(folder, row):
    pq.write_table(pa.Table.from_pylist([row]), folder / "a.parquet")
    return folder / "a.parquet"


def plain(value):
    """The value as JSON can hold it: bytes as base64."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def to_json(folder, row):
    (folder / "a.json").write_text(json.dumps([plain(row)]))
    return folder / "a.json"


def to_jsonl(folder, row):
    (folder / "a.jsonl").write_text(json.dumps(plain(row)) + "\n")
    return folder / "a.jsonl"


def to_csv(folder, row):
    cells = [value if isinstance(value, str) else json.dumps(value) for value in plain(row).values()]
    with (folder / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([list(row), cells])
    return folder / "a.csv"


def to_tar(folder, row):
    """The bytes of a picture become a member, all else the .json."""
    members = {"1.png" if isinstance(value, bytes) else "": value for value in row.values()}
    about = {key: plain(value) for key, value in row.items() if not isinstance(value, bytes)}
    members = {name: data for name, data in members.items() if name} | {"1.json": json.dumps(about).encode()}
    return tar_of(folder, members)


def tar_of(folder, members):
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return folder / "a.tar"


def to_tfds(folder, row):
    """A prepared data set in TFDS's layout; a tf.train.Example is written as protobuf defines it."""
    features, values = {}, {}

    def add(name, value, described, many=False):
        if isinstance(value, dict):
            inner = {}
            for key, item in value.items():
                add(f"{name}/{key}", item, inner, many)
            feature = {"pythonClassName": "x.FeaturesDict", "featuresDict": {"features": inner}}
        elif isinstance(value, list):
            keys = value[0] if isinstance(value[0], dict) else None
            add(name, {key: [item[key] for item in value] for key in keys} if keys else value[0], inner := {}, True)
            values[name] = value
            feature = {"pythonClassName": "x.Sequence", "sequence": {"feature": inner[name.rpartition("/")[2]]}}
        else:
            image = isinstance(value, bytes)
            feature = {"pythonClassName": "x.Image"} if image else {"pythonClassName": "x.Text"}
            values[name] = [value]
        described[name.rpartition("/")[2]] = feature

    for name, value in row.items():
        if isinstance(value, list) and isinstance(value[0], dict):
            inner = {key: {"pythonClassName": "x.Text"} for key in value[0]}
            features[name] = {
                "pythonClassName": "x.Sequence",
                "sequence": {"feature": {"pythonClassName": "x.FeaturesDict", "featuresDict": {"features": inner}}},
            }
            values |= {f"{name}/{key}": [item[key] for item in value] for key in value[0]}
        else:
            add(name, value, features)
    top = {"pythonClassName": "x.FeaturesDict", "featuresDict": {"features": features}}
    (folder / "features.json").write_text(json.dumps(top))
    info = {"name": "a", "fileFormat": "array_record", "splits": [{"name": "train", "shardLengths": ["1"]}]}
    (folder / "dataset_info.json").write_text(json.dumps(info))

    def field(number, data):
        size, length = len(data), b""
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + data

    raw = b""
    for name, items in values.items():
        data = [item if isinstance(item, bytes) else item.encode() for item in items]
        feature = field(1, b"".join(field(1, item) for item in data))
        raw += field(1, field(1, name.encode()) + field(2, feature))
    writer = ArrayRecordWriter(str(folder / "a-train.array_record-00000-of-00001"), "group_size:1")
    writer.write(field(1, raw))
    writer.close()
    return folder


CONTAINERS = {
    "parquet": to_parquet, "json": to_json, "jsonl": to_jsonl, "csv": to_csv, "tar": to_tar, "tfds": to_tfds,
}  # fmt: skip
PICTURES = {
    "none": {},
    "path": {"image": "red.png"},
    "path under another name": {"img_path": "red.png"},
    "bytes": {"image_data": RED},
    "struct": {"image": {"bytes": RED, "path": "elsewhere.png"}},
    "list": {"images": ["red.png", "lime.png"]},
    "data URL": {"image": f"data:image/png;base64,{RED64}"},
    "in the messages": {},
}
TALK = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "this"}]
TEXTS = {
    "conversations": {"conversations": TALK},
    "messages": {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "this"}]},
    "question and answer": {"question": "what?", "answer": "this"},
    "instruction": {"instruction": "what?", "input": "", "output": "this"},
    "pairs": {"qa": [{"question": "what?", "answer": "this"}]},
    "caption": {"caption": "this"},
    "JSON text": {"conversations": json.dumps(TALK)},
}
COUNT = {"none": 0, "list": 2}


def row_of(picture: str, text: str, container: str) -> dict:
    """The row of a cell of the table. Several pictures are marked where a conversation has to mark them."""
    row = {"id": "7"} | PICTURES[picture] | json.loads(json.dumps(TEXTS[text]))
    mark = {"list": "<image><image>", "in the messages": "<img>red.png</img>"}.get(picture, "")
    parts = picture == "in the messages" and text == "messages" and container != "tfds"
    if mark and text != "caption":
        row = json.loads(json.dumps(row).replace("what?", mark + "what?"))
    if parts:
        row["messages"][0]["content"] = [{"type": "image", "image": "red.png"}, {"type": "text", "text": "what?"}]
        row["messages"][1]["content"] = [{"type": "text", "text": "this"}]
    return row


def expected(picture: str, text: str) -> tuple | str:
    """The images and turns of a cell, or a part of the reason why it is refused."""
    count = COUNT.get(picture, 1)
    if text == "caption" and picture in ("none", "in the messages"):
        return "caption"
    if text == "caption" and count == 2:
        return "2 images have only a caption"
    question = () if text == "caption" else ("what?",)
    return (RED, LIME)[:count], (("user", (*range(count), *question)), ("assistant", ("this",)))


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("picture", PICTURES)
def test_columns_mean_the_same_in_every_container(picture, text, container, folder):
    (found,) = entries(CONTAINERS[container](folder, row_of(picture, text, container)))
    wanted = expected(picture, text)
    if isinstance(wanted, str):
        assert isinstance(found, Rejected) and wanted in found.reason
    else:
        assert isinstance(found, Record), found
        assert (found.images, found.turns) == wanted


QA = {"question": "what?", "answer": "this"}
NOT_READ = {  # columns: the name that the rejection must hold
    "a name under an unknown key": (QA | {"chart": "red.png"}, "'chart' holds 'red.png'"),
    "a name in a list": (QA | {"views": ["red.png"]}, "'views' holds 'red.png'"),
    "a name beside another": (QA | {"image": "red.png", "second": "lime.png"}, "'second' holds 'lime.png'"),
    "a base64 picture": (QA | {"blob": RED64}, "'blob' holds an encoded picture"),
    "an address": (QA | {"image": "https://example.org/a.png"}, "is an address, not a file"),
    "an address under an unknown key": (QA | {"link": "https://example.org/a.png?w=1"}, "'link' holds"),
    "an id that is a picture": ({"id": "red.png"} | QA, "'id' holds 'red.png'"),
    "a format that is not decoded": (QA | {"drawing": "a.svg"}, "'drawing' holds 'a.svg'"),
    "a film": (QA | {"clip": "a.mp4"}, "'clip' holds 'a.mp4'"),
    "the number of a video alone": (
        QA | {"video_id": "a7"},
        "it is about a video: only images are read, and 'video_id'",
    ),
    "a video beside an image": (QA | {"image": "red.png", "videos": "a"}, "it is about a video"),
    "a video's file beside an image": (QA | {"image": "red.png", "video_path": "a.mp4"}, "'video_path' holds 'a.mp4'"),
    "video": (QA | {"video": "a"}, "it is about a video: only images are read, and 'video'"),
    "audio": (QA | {"audio_path": "a.wav"}, "it is about a sound: only images are read, and 'audio_path'"),
    "a file without a suffix": (QA | {"path": "red"}, "'red' is not in"),
    "two pictures": (QA | {"image": "red.png", "images": ["red.png", "lime.png"]}, "'images' holds 'lime.png'"),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("case", NOT_READ)
def test_what_looks_like_a_picture_and_is_not_read_is_named(case, container, folder):
    row, reason = NOT_READ[case]
    (found,) = entries(CONTAINERS[container](folder, row))
    assert isinstance(found, Rejected), found
    assert reason in found.reason and found.reason.isprintable()


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    "beside",
    [
        {"file_name": "red.png"},
        {"source": "coco/train/red.png"},
        {"url": "https://example.org/whatever.jpg"},
        {"file": "main.py"},
        {"note": "see red.png for more"},
        {"size": "4 x 4"},
        {"video_id": "a7"},
    ],
)
def test_what_tells_of_the_same_picture_or_of_none_is_left_alone(beside, container, folder):
    (found,) = entries(CONTAINERS[container](folder, QA | {"image": "red.png"} | beside))
    assert isinstance(found, Record) and found.images == (RED,), found


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_file_that_is_no_picture_makes_no_picture(container, folder):
    (found,) = entries(CONTAINERS[container](folder, QA | {"file": "main.py"}))
    assert (found.images, found.turns) == ((), (("user", ("what?",)), ("assistant", ("this",)))), found


MARKS = [
    "<video>\nwhat?", "<Image> what?", "<|image|>what?", "<image_1> what?", "<image 2>", "<|image_1|>", "[IMG] what?",
    "<|vision_start|><|image_pad|><|vision_end|>what?", "<img>\nwhat?", "<im_patch>", "<audio>", "<ImageHere>what?",
    "see ![](data:image/png;base64,iVBORw0KGgoAAAANSUhEUg==)",
]  # fmt: skip
PROSE = [
    "the `<video>` tag", "<video src='a.mp4'></video>", "<Image>\n</Image> in XML",
    '<img src="a.png">', "the <img> tag",
    "an [image] of it", "a < b > c", "<image-rendering>", "look at a.jpg", "data:image/png;base64,... is a data URL",
]  # fmt: skip


@pytest.mark.parametrize("text", MARKS)
def test_marks_that_stand_for_no_image_are_named(text, folder):
    for row in (
        {"question": text, "answer": "this"},
        {"image": "red.png", "caption": text},
        {"conversations": [TALK[0], {"from": "gpt", "value": text}]},
    ):
        (found,) = entries(to_json(folder, row))
        assert isinstance(found, Rejected) and found.reason.startswith("a text holds '"), found


@pytest.mark.parametrize("text", PROSE)
def test_talk_about_marks_stays_text(text, folder):
    (found,) = entries(to_json(folder, {"question": text, "answer": text}))
    assert found.turns == (("user", (text,)), ("assistant", (text,)))


def said(*parts):
    return [{"role": "user", "content": [*parts]}, {"role": "assistant", "content": "this"}]


WHAT = {"type": "text", "text": "what?"}
ONE = ((RED,), (("user", (0, "what?")), ("assistant", ("this",))))
TWO = ((RED, LIME), (("user", (0, 1, "what?")), ("assistant", ("this",))))
IN_MESSAGES = {
    "a place": ({"images": ["red.png"], "messages": said({"type": "image"}, WHAT)}, ONE),
    "a place with nulls": (
        {"images": ["red.png"], "messages": said({"type": "image", "text": None, "index": 0}, WHAT)}, ONE,
    ),
    "image": ({"messages": said({"type": "image", "image": "red.png"}, WHAT)}, ONE),
    "path": ({"messages": said({"type": "image", "path": "red.png"}, WHAT)}, ONE),
    "without type": ({"messages": said({"image": "red.png"}, {"text": "what?"})}, ONE),
    "image_url": ({"messages": said(WHAT, {"type": "image_url", "image_url": "red.png"})}, ONE),
    "image_url.url": (
        {"messages": said(WHAT, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{RED64}"}})}, ONE,
    ),
    "input_image": (
        {"messages": said({"type": "input_image", "image_url": "red.png"}, {"type": "input_text", "text": "what?"})},
        ONE,
    ),
    "source": (
        {"messages": said({"type": "image", "source": {"type": "base64", "data": RED64}}, WHAT)}, ONE,
    ),
    "one listed, one held": (
        {"images": ["red.png"], "messages": said({"type": "image"}, {"type": "image", "image": "lime.png"}, WHAT)}, TWO,
    ),
    "held and listed once more": (
        {"images": ["red.png"], "messages": said({"type": "image", "image": "red.png"}, WHAT)}, ONE,
    ),
    "prompt and completion": (
        {"images": ["red.png"], "prompt": said({"type": "image"}, WHAT)[:1], "completion": said()[1:]}, ONE,
    ),
    "lists": ({"image": "red.png", "conversations": {"from": ["human", "gpt"], "value": ["what?", "this"]}}, ONE),
    "input": ({"image": "red.png", "instruction": "what?", "input": "now", "output": "this"},
              ((RED,), (("user", (0, "what?\nnow")), ("assistant", ("this",))))),
    "JSON of an entry": ({"json": json.dumps(QA | {"image": "red.png"})}, ONE),
    "JSON of pairs": ({"image": "red.png", "texts": '[{"user": "what?", "assistant": "this"}]'}, ONE),
    "Qwen-VL": (
        {"conversations": [{"from": "user", "value": "1: <img>red.png</img> 2: <img>lime.png</img> which?"},
                           {"from": "assistant", "value": "this"}]},
        ((RED, LIME), (("user", ("1:", 0, "2:", 1, "which?")), ("assistant", ("this",)))),
    ),
    "held twice": (
        {"images": ["lime.png"], "messages": said({"type": "image", "image": "red.png"}, WHAT)},
        "the messages hold 1 images and 0 marks for others, of which the entry lists 1",
    ),
    "another order": (
        {"images": ["red.png"], "messages": said({"type": "image", "index": 1}, WHAT)},
        "a message places image 1 where image 0 is the next",
    ),
    "an image beside the text": (
        {"messages": [{"role": "user", "content": "what?", "images": ["red.png"]}, *said()[1:]]},
        "'images of a message' holds 'red.png'",
    ),
    "an image in a text part": (
        {"messages": said({"type": "text", "text": "what?", "image": "red.png"})}, "a part of type text holds image",
    ),
    "a video part": ({"messages": said({"type": "video", "video": "a.mp4"}, WHAT)}, "a part of type 'video'"),
    "an address": (
        {"messages": said({"type": "image_url", "image_url": {"url": "https://example.org/a"}}, WHAT)},
        "is an address, not a file: download the images first",
    ),
    "an object that nests without end": (
        {"image": json.loads('{"url": ' * 400 + '"red.png"' + "}" * 400)} | QA, "'image' nests too deep",
    ),
    "base64 that is cut": ({"image": RED64[:41]} | QA, "'image' holds base64 text that is no picture, or cut"),
}  # fmt: skip


@pytest.mark.parametrize("case", IN_MESSAGES)
def test_pictures_in_messages_and_other_forms_of_text(case, folder):
    row, wanted = IN_MESSAGES[case]
    (found,) = entries(to_jsonl(folder, row))
    if isinstance(wanted, str):
        assert isinstance(found, Rejected) and wanted in found.reason, found
    else:
        assert isinstance(found, Record), found
        assert (found.images, found.turns) == wanted


@pytest.mark.parametrize("binary", [pa.binary(), pa.large_binary(), pa.binary(len(RED)), pa.binary_view()])
@pytest.mark.parametrize(
    "text", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
@pytest.mark.parametrize("name", ["photo_png", "some.column"])
def test_types_of_arrow_and_unknown_columns_of_pictures(binary, text, name, folder):
    columns = {
        name: pa.array([None, RED], binary),
        "question": pa.array(["why?", "what?"]).cast(text),
        "answer": pa.array(["so", "this"]).cast(text),
        "answers_raw": pa.array([b"\0\1", b"\2\3"], pa.binary()),
    }
    pq.write_table(pa.table(columns), folder / "a.parquet")
    alone, record = entries(folder / "a.parquet")
    assert (alone.images, alone.turns) == ((), (("user", ("why?",)), ("assistant", ("so",))))
    assert (record.images, record.turns) == ONE


def test_columns_of_lists_and_of_lists_of_structs(folder):
    talk = {"from": ["human", "gpt"], "value": ["<image><image>what?", "this"]}
    rows = [{"images": [{"bytes": RED, "path": None}, {"bytes": None, "path": "lime.png"}], "conversations": talk}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    (found,) = entries(folder / "a.parquet")
    assert (found.images, found.turns) == TWO


def test_a_name_in_a_later_row_of_an_unknown_column_is_found(folder):
    table = pa.table({"chart": ["none", "red.png"], "question": ["what?"] * 2, "answer": ["this"] * 2})
    pq.write_table(table, folder / "a.parquet")
    alone, chart = entries(folder / "a.parquet")
    assert isinstance(alone, Record) and "'chart' holds 'red.png'" in chart.reason


@pytest.mark.parametrize(
    ("value", "of"),
    [
        ([[["red.png"]]], pa.list_(pa.list_(pa.string()))),
        ([[("a", "red.png")]], pa.map_(pa.string(), pa.string())),
        ([{"inner": [{"raw": RED}]}], pa.struct({"inner": pa.list_(pa.struct({"raw": pa.binary()}))})),
        (["red.png"], pa.dictionary(pa.int8(), pa.string())),
        ([b"\0\0\0\x18ftypheic" + bytes(20)], pa.list_(pa.binary())),
    ],
)
def test_pictures_in_nested_types_of_unknown_columns_are_found(value, of, folder):
    value = [value] if pa.types.is_list(of) and not isinstance(value[0], list) else value
    pq.write_table(pa.table({"chart": pa.array(value, of)} | {k: [v] for k, v in QA.items()}), folder / "a.parquet")
    (found,) = entries(folder / "a.parquet")
    if pa.types.is_list(of) and pa.types.is_binary(of.value_type):
        assert found.images == (value[0][0],)  # whether it can be decoded is told when shards are written
    else:
        assert isinstance(found, Rejected) and "'chart' holds" in found.reason


def test_a_table_of_questions_may_tell_the_page_that_they_are_from(folder):
    (folder / "a.csv").write_text("url,question,answer\nhttps://example.org/page,what?,this\n")
    (found,) = entries(folder / "a.csv")
    assert (found.images, found.turns) == ((), (("user", ("what?",)), ("assistant", ("this",))))


def test_sounds_and_unread_columns_of_parquet_cost_only_their_rows(folder):
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({
        "audio": pa.array([None, {"bytes": b"RIFF", "path": "a.wav"}, None], struct),
        "chart": ["", "", "red.png"], "question": ["what?"] * 3, "answer": ["this"] * 3,
    })  # fmt: skip
    pq.write_table(table, folder / "a.parquet")
    alone, sound, chart = entries(folder / "a.parquet")
    assert isinstance(alone, Record)
    assert "it is about a sound" in sound.reason and "'chart' holds 'red.png'" in chart.reason


CAPTION = {"1.txt": b"this"}


@pytest.mark.parametrize(
    ("members", "wanted"),
    [
        ({"1.avif": RED} | CAPTION, 1),
        ({"1.jpg": RED, "1.seg.png": LIME, "1.depth.png": LIME} | CAPTION, 1),
        ({"1.jpg": RED, "1.cls": b"3", "1.url.txt": b"https://example.org/a.jpg"} | CAPTION, 1),
        ({"1.left.jpg": RED, "1.right.jpg": LIME} | CAPTION, "'1.left.jpg' is not read"),
        ({"1.jpg": RED, "1.left.jpg": LIME} | CAPTION, "'1.left.jpg' is not read"),
        ({"1.seg.png": RED} | CAPTION, "'1.seg.png' is not read"),
        ({"1.heic": RED} | CAPTION, "'1.heic' is not read"),
        ({"1.jxl": RED, "1.json": json.dumps(QA).encode()}, "'1.jxl' is not read"),
        ({"1.mp4": RED, "1.json": json.dumps(QA).encode()}, "'1.mp4' is not read"),
        ({"1.jpg": RED, "1.wav": RED} | CAPTION, "'1.wav' is not read"),
    ],
)
def test_members_of_a_tar_that_are_pictures_are_read_or_named(members, wanted, folder):
    (found,) = entries(tar_of(folder, members))
    if wanted == 1:
        assert (found.images, found.turns) == ((RED,), (("user", (0,)), ("assistant", ("this",))))
    else:
        assert wanted in found.reason
