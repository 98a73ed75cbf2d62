"""Tests reinforced sets as they are published: DataCompDR-12M, 12M-bf16, 1B and DFNDR become records of pairs."""

import json
import time

import numpy as np
import pytest
from etils import epath
from reinforced import AUGMENTATIONS, WIDTH, members, npz, picture, pictured, pth_gz, rows, write_tar

from fastvlm_jax.data.captions import captions_of, synthetic_captions_of
from fastvlm_jax.data.load.pair_record import augmentations_of, features_of
from fastvlm_jax.data.readers import Options, recognise, webdataset
from fastvlm_jax.data.record import Record, Rejected, pack, unpack

TWO_LISTS = {"syn_text_coco": ["a", "b"], "coca_captions": ["no"], "syn_text_dfn": ["c", "d", "e"]}


def read_all(path, **options):
    options = Options(**options)
    parts = webdataset.parts(epath.Path(path), options)
    entries = [entry for part in parts for entry in webdataset.read(part, options)]
    assert all(unpack(pack(entry)) == entry for entry in entries if isinstance(entry, Record))
    return entries


def read_one(tmp_path, entry, **options):
    (found,) = read_all(write_tar(tmp_path / "0.tar", {"k": entry}), **options)
    return found


def second_column(record, name):
    """Returns the numbers by which the rows of a record's features are known, and checks the other columns."""
    count = record.extra["teacher"][name]["shape"][0]
    found = features_of(record, {name: range(count)}, {name: count}, (WIDTH,))[name]
    np.testing.assert_allclose(found[:, 2:], 1 / 3, atol=2e-3)
    assert len(set(found[:, 0])) == 1
    return found[:, 1].tolist()


# Layouts


@pytest.mark.parametrize("pack_arrays", [npz, pth_gz], ids=["float32", "bf16"])
@pytest.mark.parametrize("form", ["list", "text", "texts"])
def test_datacompdr_is_read(tmp_path, pack_arrays, form):
    texts = [json.dumps(entry) for entry in AUGMENTATIONS]
    param_aug = {"list": AUGMENTATIONS, "text": json.dumps(AUGMENTATIONS), "texts": texts}[form]
    record = read_one(tmp_path, members(7, pack=pack_arrays, param_aug=param_aug) | pictured(7))
    assert (record.key, record.images) == ("0.tar/k", (picture(7),))
    assert captions_of(record) == ["real 7"] and synthetic_captions_of(record) == ["made 0", "made 1", "made 2"]
    assert record.extra["synthetic_keys"] == [["syn_text", 3]]
    assert augmentations_of(record) == AUGMENTATIONS
    assert second_column(record, "image") == [0, 1, 2, 3]
    assert second_column(record, "text") == [100, 101, 102, 103]
    assert record.extra["teacher"]["image"]["dtype"] == ("float32" if pack_arrays is npz else "bfloat16")


@pytest.mark.parametrize("pack_arrays", [npz, pth_gz], ids=["float32", "bf16"])
def test_dfndr_with_several_lists_of_captions_is_read(tmp_path, pack_arrays):
    entry = members(7, TWO_LISTS, separate=True, pack=pack_arrays) | pictured(7)
    record = read_one(tmp_path, entry)
    assert synthetic_captions_of(record) == ["a", "b", "c", "d", "e"]
    assert record.extra["synthetic_keys"] == [["syn_text_coco", 2], ["syn_text_dfn", 3]]
    assert sorted(record.extra["teacher"]) == ["image", "text"]
    assert second_column(record, "text") == [100, 120, 121, 160, 161, 162]
    record = read_one(tmp_path, entry, synthetic_keys="^syn_text_dfn$")
    assert synthetic_captions_of(record) == ["c", "d", "e"]
    assert second_column(record, "text") == [100, 160, 161, 162]


def test_the_first_augmentations_and_captions_can_be_kept_alone(tmp_path):
    for entry in (members(7), members(7, param_aug=json.dumps(AUGMENTATIONS)), members(7, separate=True, pack=pth_gz)):
        record = read_one(tmp_path, entry | pictured(7), keep_augmentations=2, keep_captions=1)
        assert augmentations_of(record) == AUGMENTATIONS[:2] and synthetic_captions_of(record) == ["made 0"]
        assert second_column(record, "image") == [0, 1]
        assert second_column(record, "text") in ([100, 101], [100, 120])
    record = read_one(tmp_path, members(7, TWO_LISTS, separate=True) | pictured(7), keep_captions=3)
    assert record.extra["synthetic_keys"] == [["syn_text_coco", 2], ["syn_text_dfn", 1]]
    assert second_column(record, "text") == [100, 120, 121, 160]
    whole, part = (len(pack(read_one(tmp_path, members(7) | pictured(7), keep_augmentations=n))) for n in (9, 1))
    assert part < whole - 3 * WIDTH * 4


def test_empty_synthetic_captions_are_left_out_with_their_rows(tmp_path):
    for separate in (False, True):
        entry = members(7, {"syn_text": ["", "b", " \n", "d"]}, separate=separate) | pictured(7)
        record = read_one(tmp_path, entry, keep_captions=2)
        assert synthetic_captions_of(record) == ["b", "d"]
        assert second_column(record, "text") == ([100, 121, 123] if separate else [100, 102, 104])


def test_npz_is_taken_if_there_is_a_torch_file_too(tmp_path):
    record = read_one(tmp_path, members(7) | pictured(7) | {"pth.gz": b"cos\nsystem\n."})
    assert record.extra["teacher"]["text"]["dtype"] == "float32"


def without(entry, *extensions):
    return {extension: data for extension, data in entry.items() if extension not in extensions}


def arrays(**changes):
    found = {"image_emb": rows(0, 0, 4), "text_emb": rows(0, 100, 4)} | changes
    return {"npz": npz({name: array for name, array in found.items() if array is not None})}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"syn.json": b'{"text": ["a"]}'}, "syn.json has no key that --synthetic_keys '^syn_text.*$' finds: its keys"),
        ({"syn.json": b'{"syn_text": "a"}'}, "syn.json has 'a' for 'syn_text', not a list of captions"),
        ({"syn.json": b'{"syn_text": ["a", 1]}'}, "a synthetic caption is 1, not text"),
        ({"syn.json": b"[]"}, "syn.json is list, not an object of lists of captions"),
        ({"syn.json": b"null"}, "'k.syn.json' is null"),
        ({"syn.json": b'{"syn_text": ["a"]}'}, "text_emb has 4 rows for 1 captions and 1 synthetic ones"),
        ({"syn.json": b'{"syn_text_a": ["a"], "syn_text_b": ["b", "c"]}'}, "choose it by --synthetic_keys"),
        ({"paug.json": b'{"param_aug": '}, "'k.paug.json': it is not JSON (Expecting value: line 1 column 15"),
        ({"paug.json": b'{"param_aug": []}'}, "no augmentation (param_aug)"),
        ({"paug.json": b'{"param_aug": [%s0]}' % (b"0," * 10_000)}, "10,001 augmentations are more than 10,000"),
        ({"paug.json": b'{"param_aug": "[[1"}'}, "its augmentation is text that is not JSON: '[[1'"),
        ({"paug.json": json.dumps({"param_aug": AUGMENTATIONS[:3]}).encode()}, "image_emb has 4 rows for 3 augm"),
        (arrays(text_emb=rows(0, 0, 3)), "text_emb has 3 rows for 1 captions and 3 synthetic ones"),
        (arrays(text_emb=rows(0, 0, 1)), "there are no embeddings of 'syn_text'"),
        (arrays(text_emb=rows(0, 0, 1), syn_text_emb=rows(0, 0, 2)), "'syn_text' has 3 captions and 2 rows"),
        (arrays(text_emb=rows(0, 0, 1), syn_text_emb=rows(0, 0, 3)[:, 1:]), "not of the type and width of text_emb"),
        (arrays(text_emb=None, syn_text_emb=rows(0, 0, 3)), "text_emb is missing"),
        (arrays(text_emb=np.zeros(4, "f4")), "'text_emb' is float32 of the shape '[4]', not rows of"),
        (arrays(image_emb=np.zeros((4, 6))), "'image_emb' is float64 of the shape '[4, 6]'"),
        (arrays(image_emb=np.zeros((4, 0), "f4")), "'image_emb' is float32 of the shape '[4, 0]'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_reason(tmp_path, changes, reason):
    found = read_one(tmp_path, members(7) | pictured(7) | changes)
    assert isinstance(found, Rejected) and reason in found.reason and found.reason.isprintable(), found


def test_many_lists_of_captions_take_little_time(tmp_path):
    lists = json.dumps({f"syn_text{i}": ["a"] for i in range(30_000)}).encode()
    start = time.perf_counter()
    record = read_one(tmp_path, without(members(7), "npz") | pictured(7) | {"syn.json": lists})
    assert len(record.extra["synthetic_keys"]) == 30_000 and time.perf_counter() - start < 5


# Pictures in other tars


def test_tars_of_equal_names_are_joined_by_key(tmp_path):
    keys = "a", "b", "c"
    write_tar(tmp_path / "set" / "00000000.tar", {key: members(i) for i, key in enumerate(keys)})
    write_tar(tmp_path / "set" / "00000001.tar", {"d": members(3)})
    write_tar(tmp_path / "set" / "00000002.tar", {"e": members(4)})
    write_tar(
        tmp_path / "photos" / "00000000.tar",
        {"x": pictured(9), "c": without(pictured(2), "txt"), "a": pictured(0), "b": without(pictured(1), "jpg")},
    )
    write_tar(tmp_path / "photos" / "00000001.tar", {"d": pictured(3), "a": pictured(0)})
    write_tar(tmp_path / "photos" / "00000009.tar", {"z": pictured(0)})
    photos = str(tmp_path / "photos")
    entries = read_all(tmp_path / "set", pictures=photos)
    records = [entry for entry in entries if isinstance(entry, Record)]
    assert [(record.key, record.images, captions_of(record)) for record in records] == [
        ("00000000.tar/a", (picture(0),), ["real 0"]),
        ("00000000.tar/c", (picture(2),), ["real 2"]),  # the caption of its .json
        ("00000001.tar/d", (picture(3),), ["real 3"]),
    ]
    assert second_column(records[1], "text") == [100, 101, 102, 103]
    assert [entry[1:] for entry in entries if isinstance(entry, Rejected)] == [
        ("00000000.tar/b", f"no picture of this key in {photos}/00000000.tar"),
        ("00000000.tar/x", f"{photos}/00000000.tar has it, the source nothing of this key"),
        ("00000001.tar/a", f"{photos}/00000001.tar has it, the source nothing of this key"),
        ("00000002.tar/e", f"no picture of this key in {photos}/00000002.tar: there is no {photos}/00000002.tar"),
    ]


def test_tars_in_numbered_folders_are_read_and_joined(tmp_path):
    for folder in range(2):  # DataCompDR-1B has 66 folders, in each of which the numbers begin at 0
        write_tar(tmp_path / "set" / f"{folder:02d}" / "00000000.tar", {"k": members(folder)})
        write_tar(tmp_path / "photos" / f"{folder:02d}" / "00000000.tar", {"k": pictured(folder)})
    found = read_all(tmp_path / "set", pictures=str(tmp_path / "photos"))
    assert [(record.key, record.images) for record in found] == [
        ("00/00000000.tar/k", (picture(0),)),
        ("01/00000000.tar/k", (picture(1),)),
    ]


def test_a_caption_of_the_source_goes_before_and_a_second_picture_is_refused(tmp_path):
    write_tar(tmp_path / "photos" / "0.tar", {"k": pictured(1)})
    options = dict(pictures=str(tmp_path / "photos"))
    record = read_one(tmp_path, members(7) | {"txt": b"own"}, **options)
    assert captions_of(record) == ["own"] and record.images == (picture(1),)
    found = read_one(tmp_path, members(7) | pictured(7), **options)
    assert found.reason == f"a picture of this key in {tmp_path}/photos/0.tar, and another one in the source"


def test_damaged_tars_of_pictures_cost_their_entries_alone(tmp_path):
    source = write_tar(tmp_path / "0.tar", {key: members(i) for i, key in enumerate("abc")})
    whole = write_tar(tmp_path / "photos" / "0.tar", {key: pictured(i) for i, key in enumerate("abc")}).read_bytes()
    (tmp_path / "photos" / "0.tar").write_bytes(whole[: whole.index(b"c.jpg") + 600])
    entries = read_all(source, pictures=str(tmp_path / "photos"))
    assert [entry.key for entry in entries] == ["0.tar/a", "0.tar/b", "0.tar/c"]
    assert [isinstance(entry, Rejected) for entry in entries] == [False, False, True]
    assert "more than the tar holds: it is cut or damaged" in entries[2].reason
    (tmp_path / "photos" / "0.tar").write_bytes(b"x" * 5000)
    entries = read_all(source, pictures=str(tmp_path / "photos"))
    assert len(entries) == 4 and "this is no tar file" in entries[-1].reason


def test_folders_and_options_that_do_not_fit_are_told_at_once(tmp_path):
    source = write_tar(tmp_path / "0.tar", {"k": members(7)})
    (tmp_path / "empty").mkdir()
    for pictures, words in (("no", "there is no folder of pictures"), ("empty", "holds none of the tars 0.tar")):
        with pytest.raises(FileNotFoundError, match=words):
            read_all(source, pictures=str(tmp_path / pictures))
    with pytest.raises(ValueError, match=r"--synthetic_keys '\(' is no regular expression"):
        read_all(source, synthetic_keys="(")
    with pytest.raises(ValueError, match=r"--keep_captions is for tars of pairs .*, and this source is parquet"):
        recognise.check_options("parquet", Options(keep_captions=1))
