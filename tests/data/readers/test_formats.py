"""Tests Parquet, TFDS, PDF and our own shards as sources: what entries become, and what happens to broken ones."""

import io
import itertools
import json
import pathlib
import shutil
import time

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from fastvlm_jax.data.readers import Options, Part
from fastvlm_jax.data.readers.recognise import reader, recognise
from fastvlm_jax.data.record import Record, Rejected, pack
from fastvlm_jax.data.write import write_shards


def encoded(i, format="PNG"):
    file = io.BytesIO()
    PIL.Image.fromarray(np.full((8 + i, 10, 3), 20 * i % 256, np.uint8)).save(file, format)
    return file.getvalue()


def entries(path, format, options=None):
    options = options or Options()
    path = epath.Path(path)
    assert recognise(path) == format
    module = reader(format)
    return [entry for part in module.parts(path, options) for entry in module.read(part, options)]


def user(*content):
    return ("user", content)


def assistant(text):
    return ("assistant", (text,))


# ---- Parquet


def table(path, rows, schema=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, **options)
    return path


def stored(*numbers):
    return [{"bytes": encoded(i), "path": f"{i}.png"} for i in numbers]


LAYOUTS = {  # name: (row, turns, images, extra)
    "LLaVA-OneVision": (
        {"id": "a7", "image": stored(1)[0], "data_source": "x",
         "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "this"}]},
        (user(0, "what?"), assistant("this")), 1, {"id": "a7"},
    ),
    "text alone": (
        {"image": None, "conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]},
        (user("why?"), assistant("so")), 0, {},
    ),
    "The Cauldron": (
        {"images": stored(1), "texts": [{"user": "a?", "assistant": "b", "source": "s"},
                                        {"user": "c?", "assistant": "d", "source": "s"}]},
        (user(0, "a?"), assistant("b"), user("c?"), assistant("d")), 1, {},
    ),
    "DocMatix": (
        {"images": stored(1, 2), "texts": [{"user": "a?", "assistant": "b", "source": "s"}]},
        (user(0, 1, "a?"), assistant("b")), 2, {},
    ),
    "messages": (
        {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "left <image> <image>"},
                      {"role": "assistant", "content": "ok"}], "images": [encoded(1), encoded(2)]},
        (("system", ("be kind",)), user("left", 0, 1), assistant("ok")), 2, {},
    ),
    "messages as JSON": (
        {"jpg": encoded(1), "messages": json.dumps([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}])},
        (user(0, "a"), assistant("b")), 1, {},
    ),
    "one answer": (
        {"image": encoded(1), "question": "how many?", "answer": "2", "question_id": 17},
        (user(0, "how many?"), assistant("2")), 1, {"id": 17},
    ),
    "ten answers": (
        {"image": stored(1)[0], "question": "how many?", "answers": ["3", "2", "2"]},
        (user(0, "how many?"), assistant("2")), 1, {"answers": ["3", "2", "2"]},
    ),
    "lists of both": (
        {"image": stored(1)[0], "question": ["a?", "b?"], "answer": ["c", "d"]},
        (user(0, "a?"), assistant("c"), user("b?"), assistant("d")), 1, {},
    ),
    "caption": ({"Image": encoded(1), "TEXT": "a cat"}, (user(0), assistant("a cat")), 1, {}),
    "captions": (
        {"png": encoded(1), "caption": ["a cat", "one cat"]},
        (user(0), assistant("a cat")), 1, {"captions": ["a cat", "one cat"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_each_layout_become_records(layout, tmp_path):
    row, turns, images, extra = LAYOUTS[layout]
    schema = None
    if layout == "text alone":
        schema = pa.schema({"image": STRUCT, "conversations": pa.list_(pa.struct({"from": STRING, "value": STRING}))})
    table(tmp_path / "set" / "data.parquet", [row], schema)
    (record,) = entries(tmp_path / "set", "parquet")
    assert record == Record("set/data/0", tuple(encoded(i + 1) for i in range(images)), turns, extra)


STRING, STRUCT = pa.string(), pa.struct({"bytes": pa.binary(), "path": pa.string()})
CAPTIONED = pa.schema({"image": STRUCT, "caption": STRING})


def captioned(i, **changes):
    return {"image": stored(i % 20)[0], "caption": f"number {i}"} | changes


def test_a_generic_question_is_asked_about_a_caption(tmp_path):
    table(tmp_path / "a.parquet", [captioned(i) for i in range(30)])
    found = entries(tmp_path / "a.parquet", "parquet", Options(questions=("what?", "which?")))
    assert {record.turns[0] for record in found} == {user(0, "what?"), user(0, "which?")}
    assert [record.turns[1] for record in found] == [assistant(f"number {i}") for i in range(30)]


def test_rows_that_are_null_or_wrong_are_rejected_one_by_one(tmp_path):
    (tmp_path / "out.png").write_bytes(encoded(9))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "in.png").write_bytes(encoded(5))
    rows = [
        captioned(0),
        captioned(1, image=None),
        captioned(2, caption=None),
        captioned(3, image={"bytes": b"", "path": None}),
        captioned(4, image={"bytes": None, "path": "../out.png"}),
        captioned(5, image={"bytes": None, "path": "in.png"}),
        captioned(6, image={"bytes": None, "path": None}),
        captioned(7, caption=""),
    ]
    path = table(tmp_path / "set" / "data.parquet", rows, CAPTIONED)
    found = entries(path, "parquet")
    assert [entry.key for entry in found] == [f"set/data/{i}" for i in range(8)]
    assert found[5].images == (encoded(5),)
    reasons = {i: entry.reason for i, entry in enumerate(found) if isinstance(entry, Rejected)}
    assert reasons == {
        1: "image is null or empty",
        2: "caption is null",
        3: "'image' is empty (0 bytes)",
        4: "'../out.png' leads out of the images' folder: names must be relative to it",
        6: "image is null or empty",
        7: "caption is empty",
    }
    assert all(entry.file == str(path) for entry in found if isinstance(entry, Rejected))


def test_unknown_columns_are_named(tmp_path):
    path = table(tmp_path / "a.parquet", [{"pixels": [1, 2], "url": "x", "note": "y"}])
    with pytest.raises(ValueError, match=r"a\.parquet: the columns are pixels, url, note: expected are an image col"):
        reader("parquet").parts(epath.Path(path), Options())


def test_files_of_a_folder_belong_to_splits_by_name(tmp_path):
    for i, name in enumerate(("train-0", "train-1", "val-0", "test-0", "trainer")):
        table(tmp_path / "set" / "data" / f"{name}.parquet", [captioned(i)])
    for split, expected in (("train", [0, 1, 4]), ("validation", [4, 2]), ("val", [4, 2]), ("test", [3, 4])):
        found = entries(tmp_path, "parquet", Options(split=split))
        assert [int(entry.turns[1][1][0].split()[1]) for entry in found] == expected
    (tmp_path / "set" / "data" / "trainer.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="holds no split 'more': it holds test, train, validation"):
        reader("parquet").parts(epath.Path(tmp_path), Options(split="more"))


def test_two_files_of_one_name_are_told(tmp_path):
    for folder in "ab":
        table(tmp_path / folder / "data" / "train.parquet", [captioned(1)])
    with pytest.raises(ValueError, match=r"two files are called data/train\.parquet: write their folders one by one"):
        reader("parquet").parts(epath.Path(tmp_path), Options())


def test_parts_are_runs_of_row_groups_and_cover_every_row_once(tmp_path, monkeypatch):
    monkeypatch.setattr(reader("parquet"), "_PART_BYTES", 2000)
    path = table(tmp_path / "a.parquet", [captioned(i) for i in range(95)], row_group_size=10)
    parts = reader("parquet").parts(epath.Path(path), Options())
    assert len(parts) > 2 and parts[0].start == 0 and parts[-1].stop == 10
    assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
    found = [entry.turns[1][1][0] for part in parts for entry in reader("parquet").read(part, Options())]
    assert found == pq.read_table(path)["caption"].to_pylist()


def test_a_damaged_row_group_costs_only_its_own_rows(tmp_path):
    rows = [{"image": np.random.default_rng(i).bytes(3000), "caption": f"number {i}"} for i in range(40)]
    path = table(tmp_path / "a.parquet", rows, row_group_size=10, compression="snappy")
    group = pq.ParquetFile(path).metadata.row_group(2)
    data = bytearray(path.read_bytes())
    start = group.column(0).data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    found = entries(path, "parquet")
    (rejected,) = [entry for entry in found if isinstance(entry, Rejected)]
    assert rejected.reason.startswith("rows 20 to 29 of row group 2 cannot be read: ") and "\n" not in rejected.reason
    good = [entry.turns[1][1][0] for entry in found if isinstance(entry, Record)]
    assert good == [f"number {i}" for i in range(40) if not 20 <= i < 30]


def test_a_broken_file_does_not_cost_the_others(tmp_path):
    table(tmp_path / "a.parquet", [captioned(1)])
    (tmp_path / "b.parquet").write_bytes(b"PAR1 or not")
    good, bad = entries(tmp_path, "parquet")
    assert good.turns[1] == assistant("number 1")
    assert bad.file == str(tmp_path / "b.parquet") and bad.reason
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(ValueError, match=r"b\.parquet: "):
        reader("parquet").parts(epath.Path(tmp_path), Options())


# ---- TFDS


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Writes TFDS data sets with tensorflow_datasets, and returns their folder."""
    tfds = pytest.importorskip("tensorflow_datasets")
    features, folder = tfds.features, tmp_path_factory.mktemp("tfds")
    file = lambda i: io.BytesIO(encoded(i))  # noqa: E731
    talk = lambda i: [{"from": "human", "value": "<image> <image>?"}, {"from": "gpt", "value": f"{i}"}]  # noqa: E731
    sets = {
        "labelled": (
            {"image": features.Image(), "label": features.ClassLabel(names=["cat", "dog", "fox"])},
            lambda i: {"image": file(i), "label": i % 3},
        ),
        "asked": (
            {"image": features.Image(), "question_id": np.int64,
             "qa": features.Sequence({"question": features.Text(), "answer": features.Text()})},
            lambda i: {"image": file(i), "question_id": i,
                       "qa": [{"question": f"q{j}?", "answer": f"ä{i}"} for j in range(i % 3 + 1)]},
        ),
        "talks": (
            {"images": features.Sequence(features.Image()), "box": features.BBoxFeature(),
             "conversations": features.Sequence({"from": features.Text(), "value": features.Text()})},
            lambda i: {"images": [file(i), file(i + 1)], "conversations": talk(i),
                       "box": features.BBox(0.0, 0.0, 1.0, 1.0)},
        ),
    }  # fmt: skip
    for name, (described, example) in sets.items():
        body = {
            "VERSION": tfds.core.Version("1.0.0"),
            "_info": lambda self: tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(described)),
            "_split_generators": lambda self, _: {
                "train": self._generate_examples(7),
                "test": self._generate_examples(2),
            },
            "_generate_examples": lambda self, count: ((i, example(i)) for i in range(count)),
            "__module__": "sets",  # tfds looks for metadata beside a dotted module
        }
        builder = type(name.capitalize(), (tfds.core.GeneratorBasedBuilder,), body)
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def pixels(data):
    return np.asarray(PIL.Image.open(io.BytesIO(data))).tolist()


def test_tfds_examples_are_those_that_tfds_reads(prepared):
    import tensorflow_datasets as tfds

    for name, turns_of in {
        "labelled": lambda row: (user(0), assistant(("cat", "dog", "fox")[row["label"]])),
        "asked": lambda row: tuple(
            turn
            for j, (q, a) in enumerate(zip(row["qa"]["question"], row["qa"]["answer"], strict=True))
            for turn in (user(*([] if j else [0]), q.decode()), assistant(a.decode()))
        ),
        "talks": lambda row: (user(0, 1, "?"), assistant(row["conversations"]["value"][1].decode())),
    }.items():
        for split, count in (("train", 7), ("test", 2)):
            found = entries(prepared / name, "tfds", Options(split=split))
            rows = tfds.builder_from_directory(str(prepared / name / "1.0.0")).as_data_source(split)
            assert len(found) == len(rows) == count
            for record, row in zip(found, rows, strict=True):
                assert record.turns == turns_of(row)
                expected = row["images"] if name == "talks" else [row["image"]]
                assert [pixels(data) for data in record.images] == [image.tolist() for image in expected]
                assert record.extra == ({"id": int(row["question_id"])} if name == "asked" else {})


def test_tfds_images_are_the_stored_bytes(prepared):
    stored_images = {encoded(i) for i in range(7)}
    assert {record.images[0] for record in entries(prepared / "labelled", "tfds")} == stored_images


def test_labels_without_a_name_and_texts_that_are_none_are_rejected(prepared, tmp_path):
    shutil.copytree(prepared / "labelled" / "1.0.0", tmp_path / "a")
    (tmp_path / "a" / "label.labels.txt").write_text("cat\ndog\n")
    found = entries(tmp_path / "a", "tfds")
    reasons = [entry.reason for entry in found if isinstance(entry, Rejected)]
    assert len(found) == 7 and reasons == ["label is [2], but the 2 labels are numbered from 0"] * 2
    shutil.copytree(prepared / "asked" / "1.0.0", tmp_path / "b")
    file = tmp_path / "b" / "asked-train.array_record-00000-of-00001"
    example = ArrayRecordReader(str(file)).read_all()[0]
    writer = ArrayRecordWriter(str(file), "group_size:1")
    writer.write(example.replace("ä".encode(), b"\xff\xfe"))
    writer.close()
    (rejected,) = reader("tfds").read(Part(str(file), 0, 1), Options())
    assert rejected == Rejected(str(file), f"{file.name}/0", "answer is not text in UTF-8")


def test_what_a_tfds_folder_lacks_is_named(prepared, tmp_path):
    shutil.copytree(prepared / "labelled", tmp_path / "set")
    folder, module = tmp_path / "set" / "1.0.0", reader("tfds")
    info = json.loads((folder / "dataset_info.json").read_text())
    with pytest.raises(ValueError, match="no split 'more': it has test, train"):
        module.parts(epath.Path(folder), Options(split="more"))
    for change, words in (
        ({"fileFormat": "tfrecord"}, "stored as 'tfrecord', not as array_record"),
        ({"name": "../x/"}, "is not a file name"),
        ({"splits": 3}, "dataset_info.json"),
    ):
        (folder / "dataset_info.json").write_text(json.dumps(info | change))
        with pytest.raises(ValueError, match=words):
            module.parts(epath.Path(folder), Options())
    (folder / "dataset_info.json").write_text(json.dumps(info))
    next(folder.glob("*-train.*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"labelled-train\.array_record-00000-of-00001 is missing"):
        module.parts(epath.Path(folder), Options())
    (folder / "features.json").write_text('{"pythonClassName": "os.system"}')
    with pytest.raises(ValueError, match="the columns are"):
        module.parts(epath.Path(folder), Options())


# ---- our own shards


def noise(i):
    return Record(f"train/{i}", (np.random.default_rng(i).bytes(10_000),), (user(0, "?"), assistant("!")), {"n": i})


def test_shards_come_back_as_they_were_written(tmp_path):
    write_shards(tmp_path / "a", "train", [noise(i) for i in range(7)], num_shards=2)
    assert entries(tmp_path / "a", "shards") == [noise(i) for i in (0, 2, 4, 6, 1, 3, 5)]
    with pytest.raises(ValueError, match="no split 'more': it has train"):
        reader("shards").parts(epath.Path(tmp_path / "a"), Options(split="more"))


def test_entries_of_a_shard_that_are_no_records_are_rejected(tmp_path):
    write_shards(tmp_path, "train", [noise(0), noise(1)])
    shard = tmp_path / "train-00000-of-00001.array_record"
    writer = ArrayRecordWriter(str(shard), "group_size:1")
    for data in (b"junk", pack(noise(1))):
        writer.write(data)
    writer.close()
    rejected, record = entries(tmp_path, "shards")
    assert record == noise(1) and rejected.key == f"{shard.name}/0" and rejected.reason.startswith("not a record: ")


def test_a_bad_checksum_costs_one_record_and_a_cut_file_the_missing_ones(tmp_path):
    write_shards(tmp_path, "train", [noise(i) for i in range(7)])
    shard = tmp_path / "train-00000-of-00001.array_record"
    whole = bytearray(shard.read_bytes())
    damaged = whole.copy()
    damaged[35_000] ^= 1
    shard.write_bytes(damaged)
    found = entries(tmp_path, "shards")
    assert [entry for entry in found if isinstance(entry, Record)] == [noise(i) for i in (0, 1, 2, 4, 5, 6)]
    assert found[3].key == f"{shard.name}/3" and "the entry is damaged: " in found[3].reason
    assert "\n" not in found[3].reason
    shard.write_bytes(whole[:40_000])
    (cut,) = entries(tmp_path, "shards")
    assert cut.reason == "entries 0 to 6 are missing: the file is cut short or damaged"


# ---- PDF


def pdf(*pages, trailer=b"", box="0 0 612 792"):
    """Returns a PDF made by hand; each page is a list of (text, size, x, y) in Helvetica."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for page in pages:
        content = "".join(f"BT /F1 {size} Tf {x} {y} Td ({text}) Tj ET\n" for text, size, x, y in page).encode()
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [%s] /Contents %d 0 R /Resources << /Font << /F1 3 0 R >> >> >>"
            % (box.encode(), len(objects))
        )
        kids.append(b"%d 0 R" % len(objects))
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(kids), len(kids))
    data, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    count = len(objects) + 1
    end = b"trailer\n<< /Size %d /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF" % (count, trailer, len(data))
    return data + b"xref\n0 %d\n0000000000 65535 f \n%s" % (count, table) + end


LINES = [f"the {word} line of this page" for word in ("first", "second", "third", "fourth", "fifth")]


def page(*, heading=None, lines=LINES):
    shown = [(heading, 24, 72, 720)] if heading else []
    return shown + [(line, 12, 72, 680 - 20 * i) for i, line in enumerate(lines)]


PAGES = 20


@pytest.fixture(scope="module")
def manual(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pdf") / "manual"
    folder.mkdir()
    data = pdf(*[page(heading=f"Chapter {i}") if i % 2 else page() for i in range(PAGES)])
    (folder / "book.pdf").write_bytes(data)
    return entries(folder, "pdf")


def test_a_page_is_its_picture_and_a_question_with_its_own_text(manual):
    assert [record.key for record in manual] == [f"manual/book.pdf/{i + 1}" for i in range(PAGES)]
    kinds = set()
    for i, record in enumerate(manual):
        ((_, (image, question)), (_, (answer,))) = record.turns
        lines = ([f"Chapter {i}"] if i % 2 else []) + LINES
        assert image == 0
        if "'" in question:
            at = lines.index(question.split("'")[1])
            assert answer == lines[at + 1]
            kinds.add("next")
        elif "heading" in question:
            assert answer == f"Chapter {i}"
            kinds.add("heading")
        else:
            assert answer == "\n".join(lines)
            kinds.add("all")
    assert kinds == {"next", "heading", "all"}


def test_the_picture_shows_the_page_in_black_on_white(manual):
    record = manual[0]
    image = PIL.Image.open(io.BytesIO(record.images[0]))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (1224, 1584))
    dark = np.flatnonzero((np.asarray(image).min(2) < 128).any(1)) / 2  # rows of ink, points from the top
    expected = [792 - (680 - 20 * i) for i in range(5)]  # baselines, points from the top
    assert np.allclose([dark[(dark > y - 12) & (dark <= y + 0.5)].max() for y in expected], expected, atol=1)
    ink = [y for y in dark if min(abs(y - base) for base in expected) > 14]
    assert not ink


def test_a_word_that_goes_on_in_the_next_line_keeps_its_hyphen(tmp_path):
    (tmp_path / "a.pdf").write_bytes(pdf(page(lines=["it is about manip-", "ulation of text"])))
    (record,) = entries(tmp_path, "pdf")
    texts = [part for _, content in record.turns for part in content if isinstance(part, str)]
    assert "it is about manip-" in " ".join(texts).replace("\n", " ")
    assert not any("\x02" in text or "\ufffe" in text for text in texts)


@pytest.mark.parametrize(
    "pages, kinds",
    [
        ([page(lines=["twice the same"] * 6)], {"all"}),  # nothing to point at
        ([[*page(heading="one"), ("two", 24, 72, 500)]], {"all", "next"}),  # two lines as large
        (
            [[(LINES[0], 14, 72, 700), *((line, 12, 72, 680 - 20 * i) for i, line in enumerate(LINES[1:]))]],
            {"all", "next"},
        ),
        ([[("all of it is large", 24, 72, 700 - 30 * i) for i in range(6)]], {"all"}),
    ],
)
def test_questions_without_one_answer_are_not_asked(pages, kinds, tmp_path):
    from fastvlm_jax.data.readers import pdf as module

    (tmp_path / "a.pdf").write_bytes(pdf(*pages))
    document = module.pdfium.PdfDocument(tmp_path / "a.pdf")
    _, lines = module.shown_lines(document[0], 2.0)
    asked = {module._conversation(lines, f"{i}")[0] for i in range(60)}
    document.close()
    found = {"next" if "'" in q else "heading" if "heading" in q else "all" for q in asked}
    assert found == kinds


ENCRYPTED = b"/ID [<00><00>] /Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s> >>" % (
    b"ab" * 32,
    b"cd" * 32,
)
BAD_PDFS = {
    "encrypted": (pdf(page(), trailer=ENCRYPTED), "the file is encrypted: it needs a password"),
    "no pages": (pdf(), "it is no PDF, or damaged, or has no pages"),
    "empty": (b"", "it is no PDF"),
    "text": (b"hello", "it is no PDF"),
    "cut": (pdf(page())[:200], "it is no PDF"),
    "a page without text": (pdf([]), "the page has no text"),
    "a giant page": (pdf(page(), box="0 0 20000 20000"), "a page of 20000 x 20000 points cannot be drawn"),
    "a ribbon": (pdf(page(), box="0 0 14000 500"), "a page of 14000 x 500 points is too narrow to be read"),
    "too much text": (pdf([("x" * 30_000, 1, 0, 9)]), "the page has 30000 characters"),
}


@pytest.mark.parametrize("case", BAD_PDFS)
def test_pdfs_without_use_are_rejected(case, tmp_path):
    data, words = BAD_PDFS[case]
    (tmp_path / "a.pdf").write_bytes(data)
    (rejected,) = entries(tmp_path, "pdf")
    assert isinstance(rejected, Rejected) and rejected.reason.startswith(words), rejected


# ---- all of them, damaged


def damaged(data, draw):
    """Returns `data` with bytes flipped, overwritten, cut off, removed or inserted."""
    data, kind = bytearray(data), draw.integers(5)
    at = int(draw.integers(max(len(data), 1)))
    if kind == 0:
        for place in draw.integers(len(data), size=draw.integers(1, 8)):
            data[place] ^= 1 << draw.integers(8)
    elif kind == 1:
        data[at : at + int(draw.integers(1, 64))] = draw.bytes(int(draw.integers(1, 64)))
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at : at + int(draw.integers(1, 400))]
    else:
        data[at:at] = data[: int(draw.integers(1, 400))]
    return bytes(data)


def fuzz(target, format, folder, count, seed):
    """Checks that each entry of `count` damaged versions of the file `target` is a Record or a Rejected of one line."""
    whole, draw = target.read_bytes(), np.random.default_rng(seed)
    outcomes = {"records": 0, "rejected": 0, "refused": 0}
    for i in range(count):
        target.write_bytes(damaged(whole, draw))
        start = time.monotonic()
        try:
            parts = reader(format).parts(epath.Path(folder), Options())
            found = [entry for part in parts for entry in reader(format).read(part, Options())]
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error) and str(error), (i, error)
            outcomes["refused"] += 1
            continue
        assert time.monotonic() - start < 5, i
        assert all(isinstance(entry, Record | Rejected) for entry in found)
        rejected = [entry for entry in found if isinstance(entry, Rejected)]
        assert all(entry.reason and "\n" not in entry.reason and len(entry.reason) < 400 for entry in rejected), i
        outcomes["rejected"] += bool(rejected)
        outcomes["records"] += not rejected
    target.write_bytes(whole)
    return outcomes


def test_damaged_files_end_in_records_and_reasons(prepared, tmp_path):
    mixed = [row for row, *_ in (LAYOUTS["The Cauldron"], LAYOUTS["DocMatix"])] * 6
    targets = [
        (table(tmp_path / "p" / "a.parquet", mixed, row_group_size=3), "parquet", tmp_path / "p", 120),
        (tmp_path / "f" / "a.pdf", "pdf", tmp_path / "f", 30),
        (tmp_path / "s" / "train-00000-of-00001.array_record", "shards", tmp_path / "s", 100),
        (tmp_path / "s" / "manifest.json", "shards", tmp_path / "s", 60),
    ]
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.pdf").write_bytes(pdf(page(heading="One"), page()))
    write_shards(tmp_path / "s", "train", [noise(i) for i in range(5)])
    shutil.copytree(prepared / "asked" / "1.0.0", tmp_path / "t")
    for name in ("asked-train.array_record-00000-of-00001", "features.json", "dataset_info.json"):
        targets.append((tmp_path / "t" / name, "tfds", tmp_path / "t", 60))
    total = {}
    for seed, (target, format, folder, count) in enumerate(targets):
        for outcome, times in fuzz(target, format, folder, count, seed).items():
            total[outcome] = total.get(outcome, 0) + times
    assert sum(total.values()) == 490 and min(total.values()) > 20, total


def test_damaged_examples_inside_good_files_are_rejected(prepared, tmp_path):
    """The checksums are right and the entries are not, so that damage reaches the parser."""
    shutil.copytree(prepared / "asked" / "1.0.0", tmp_path / "t")
    file = tmp_path / "t" / "asked-train.array_record-00000-of-00001"
    examples, draw = ArrayRecordReader(str(file)).read_all(), np.random.default_rng(0)
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for i in range(300):
        writer.write(damaged(examples[i % 7], draw))
    writer.close()
    found = list(reader("tfds").read(Part(str(file), 0, 300), Options()))
    assert len(found) == 300 and all(isinstance(entry, Record | Rejected) for entry in found)
    reasons = [entry.reason for entry in found if isinstance(entry, Rejected)]
    assert len(reasons) > 100 and all(reason and "\n" not in reason for reason in reasons)
    assert pathlib.Path(found[0].file if isinstance(found[0], Rejected) else file) == file
