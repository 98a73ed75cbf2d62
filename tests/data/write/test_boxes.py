"""Tests how reinforced pairs are written: boxes follow the picture that is shrunk, and stage 0 reads the records."""

import dataclasses
import io
import json

import numpy as np
import PIL.Image
import pytest
from command import fastvlm
from loading import config
from reinforced import AUGMENTATIONS, WIDTH, members, picture, pictured, pth_gz, write_tar

from fastvlm_jax.data.load.from_config import make_builder
from fastvlm_jax.data.load.pair_record import augmentations_of
from fastvlm_jax.data.readers import Options
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.data.write import write
from fastvlm_jax.data.write.boxes import fitted
from fastvlm_jax.data.write.job import Settings
from fastvlm_jax.images.augment import Crop, augment_into, read_params, scale_crop
from fastvlm_jax.images.decode import decode, size_of
from fastvlm_jax.pair_processor import PairProcessor
from fastvlm_jax.text.caption_tokenizer import OwnCaptionTokenizer
from fastvlm_jax.text.tokenizer import load_tokenizer


def record_of(param_aug):
    turns = (("user", (0,)), ("assistant", ("a",)))
    return Record("k", (picture(0),), turns, {"augmentation": {"param_aug": param_aug, "seed": 1}})


@pytest.mark.parametrize(
    ("crop", "size", "new_size", "expected"),
    [
        (Crop(3, 5, 20, 30), (30, 40), (30, 40), Crop(3, 5, 20, 30)),
        (Crop(3, 5, 20, 30), (30, 40), (15, 20), Crop(2, 3, 10, 15)),
        (Crop(0, 0, 30, 40), (30, 40), (11, 15), Crop(0, 0, 11, 15)),
        (Crop(29, 39, 1, 1), (30, 40), (3, 4), Crop(2, 3, 1, 1)),
        (Crop(14, 0, 1, 40), (30, 40), (3, 4), Crop(1, 0, 1, 4)),
        (Crop(0, 0, 1, 1), (1000, 1000), (1, 1), Crop(0, 0, 1, 1)),
    ],
)
def test_a_box_shows_the_same_part_of_a_smaller_picture(crop, size, new_size, expected):
    assert scale_crop(crop, size, new_size) == expected


def test_scaled_boxes_lie_inside_to_half_a_pixel():
    draw = np.random.default_rng(0)
    for _ in range(500):
        size = draw.integers(1, 400, 2)
        new = np.maximum(1, np.round(size * draw.uniform(0.01, 1)).astype(int))
        first = draw.integers(0, size)
        sides = draw.integers(1, size - first + 1)
        crop = scale_crop(Crop(*map(int, first), *map(int, sides)), tuple(map(int, size)), tuple(map(int, new)))
        ends = np.add(crop[:2], crop[2:])
        assert (np.array(crop[:2]) >= 0).all() and (np.array(crop[2:]) >= 1).all() and (ends <= new).all()
        assert (np.abs(crop[:2] - first * new / size) <= 1).all()
        exact = np.abs(ends - (first + sides) * new / size)
        assert ((exact <= 0.5) | (np.array(crop[2:]) == 1)).all()


def test_boxes_outside_of_the_picture_and_unknown_operations_are_refused():
    kept = record_of(json.dumps(AUGMENTATIONS))
    assert fitted(kept, (40, 30), (40, 30)) is kept
    with pytest.raises(ValueError, match=r"box of augmentation 1 was drawn for another picture: .* not inside the im"):
        fitted(kept, (39, 30), (39, 30))
    with pytest.raises(ValueError, match=r"param_aug must be \[\[top, left"):
        fitted(record_of([[[0, 0, 9, 9], [[99, 1]]]]), (40, 30), (20, 15))
    with pytest.raises(ValueError, match="no augmentation"):
        fitted(record_of([]), (40, 30), (20, 15))
    plain = Record("k", (), (), {"augmentation": {"other": [1]}})
    assert fitted(plain, (40, 30), (20, 15)) is plain


def test_pictures_that_exif_turns_are_refused_if_they_have_boxes():
    buffer, exif = io.BytesIO(), PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (30, 40)).save(buffer, "JPEG", exif=exif)
    record = dataclasses.replace(record_of(AUGMENTATIONS), images=(buffer.getvalue(),))
    assert size_of(record.images[0]) == (40, 30)
    with pytest.raises(ValueError, match="its EXIF orientation 6 turns it, the boxes of its augmentations are those"):
        fitted(record, (40, 30), (40, 30))
    plain = dataclasses.replace(record, extra={})
    assert fitted(plain, (40, 30), (20, 15)) is plain


def written_boxes(monkeypatch, capsys, folder, pictures, *flags):
    """Writes entries of AUGMENTATIONS with pictures, {key: members}; returns boxes and reasons by key, and output."""
    write_tar(folder / "set" / "0.tar", {key: members(0) for key in pictures})
    write_tar(folder / "photos" / "0.tar", pictures)
    argv = [f"--source={folder / 'set'}", f"--pictures={folder / 'photos'}", f"--output={folder / 'out'}", *flags]
    status, out, err = fastvlm(monkeypatch, capsys, "data", "write", *argv, "--workers=1", "--overwrite")
    if status:
        return {}, {}, err
    source = read_shards(folder / "out", "train")
    kept = {source[i].key: [entry[0] for entry in augmentations_of(source[i])] for i in range(len(source))}
    rejected = [json.loads(line) for line in (folder / "out" / "rejected.jsonl").read_text().splitlines()]
    return kept, {entry["key"]: entry["reason"] for entry in rejected}, out


def img2dataset(size, **about):
    """The members that img2dataset writes of a picture, with the size that it downloaded."""
    return pictured(1, size) | {"json": json.dumps({"caption": "a", "status": "success"} | about).encode()}


BOXES = [entry[0] for entry in AUGMENTATIONS]


def test_a_picture_of_another_size_is_counted_and_named(tmp_path, monkeypatch, capsys):
    pictures = {"right": img2dataset((40, 30)), "shrunk": img2dataset((20, 15)), "wider": img2dataset((41, 30))}
    kept, rejected, out = written_boxes(monkeypatch, capsys, tmp_path, pictures)
    assert kept == {"0.tar/right": BOXES, "0.tar/wider": BOXES}  # that one is wider cannot be told
    assert rejected["0.tar/shrunk"].startswith("the box of augmentation 0 was drawn for another picture: ")
    assert "not inside the image of 20 x 15" in rejected["0.tar/shrunk"] and "--boxes" in rejected["0.tar/shrunk"]
    assert len(rejected) == 1 and "rejected: 1 entries, all named in" in out


def test_boxes_of_the_original_are_scaled_to_the_picture_that_was_resized(tmp_path, monkeypatch, capsys):
    large = {"original_width": 40, "original_height": 30}
    pictures = {
        "right": img2dataset((40, 30), **large), "half": img2dataset((20, 15), **large),
        "twice": img2dataset((80, 60), **large), "rounded": img2dataset((13, 9), **large),
        "cropped": img2dataset((20, 20), **large), "unknown": img2dataset((40, 30)),
        "strange": img2dataset((40, 30), original_width="40", original_height=30),
        "other": img2dataset((40, 30), original_width=20, original_height=15),
    }  # fmt: skip
    kept, rejected, _ = written_boxes(monkeypatch, capsys, tmp_path, pictures, "--boxes=original")
    assert kept == {
        "0.tar/right": [[3, 5, 20, 30], [0, 0, 30, 40], [10, 0, 16, 16], None],
        "0.tar/half": [[2, 3, 10, 15], [0, 0, 15, 20], [5, 0, 8, 8], None],
        "0.tar/twice": [[6, 10, 40, 60], [0, 0, 60, 80], [20, 0, 32, 32], None],
        "0.tar/rounded": [[1, 2, 6, 9], [0, 0, 9, 13], [3, 0, 5, 5], None],
    }
    assert "20 x 20 is the original of 40 x 30 cropped, padded or stretched" in rejected.pop("0.tar/cropped")
    assert "drawn for another picture" in rejected.pop("0.tar/other")
    assert rejected.keys() == {"0.tar/unknown", "0.tar/strange"}
    assert set(rejected.values()) == {
        "its .json has no original_width and original_height, which --boxes original asks for"
    }


def test_boxes_of_pictures_shrunk_to_a_side_are_scaled_to_larger_ones(tmp_path, monkeypatch, capsys):
    pictures = {"wide": img2dataset((160, 120)), "small": img2dataset((40, 30)), "high": img2dataset((120, 160))}
    pictures["tiny"] = img2dataset((20, 15))  # was not enlarged
    kept, rejected, _ = written_boxes(monkeypatch, capsys, tmp_path, pictures, "--boxes=40")
    assert kept == {
        "0.tar/wide": [[12, 20, 80, 120], [0, 0, 120, 160], [40, 0, 64, 64], None],
        "0.tar/small": BOXES,
    }
    assert "not inside the image of 30 x 40" in rejected["0.tar/high"]
    assert "not inside the image of 20 x 15" in rejected["0.tar/tiny"]
    kept, *_ = written_boxes(monkeypatch, capsys, tmp_path, pictures, "--boxes=40", "--max_side=80")
    assert kept["0.tar/wide"] == [[6, 10, 40, 60], [0, 0, 60, 80], [20, 0, 32, 32], None]


@pytest.mark.parametrize("value", ["0", "-5", "512px", "9999999", "\u0665"])
def test_another_picture_than_there_is_is_refused_in_a_line(value, tmp_path, monkeypatch, capsys):
    *_, err = written_boxes(monkeypatch, capsys, tmp_path, {"k": img2dataset((40, 30))}, f"--boxes={value}")
    assert err.count("\n") == 1 and "give 'original', or the longer side of the pictures, pixels" in err


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Writes a reinforced set of 24 entries in two tars, without pictures, and a folder of pictures of 160 x 120."""
    folder = tmp_path_factory.mktemp("reinforced")
    wide = [[None if crop is None else [4 * side for side in crop], ops] for crop, ops in AUGMENTATIONS]
    for tar in range(2):
        numbers = range(12 * tar, 12 * tar + 12)
        found = {}
        for number in numbers:
            options = {"pack": pth_gz} if number % 2 else {}
            found[f"{number:04d}"] = members(number, separate=bool(tar), param_aug=wide, **options)
        write_tar(folder / "set" / f"{tar:08d}.tar", found)
        photos = {f"{number:04d}": pictured(number) | {"jpg": smooth(number)} for number in numbers if number != 5}
        write_tar(folder / "photos" / f"{tar:08d}.tar", photos)
    return folder


def smooth(number):
    """Returns a JPEG of 160 x 120 whose parts can be told at a quarter of its size."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(coarse).resize((160, 120), PIL.Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def written(source):
    """Writes the set whole, and smaller in every way."""
    pictures = str(source / "photos")
    write(source / "set", source / "whole", options=Options((), pictures=pictures), workers=1)
    few = Options((), pictures=pictures, keep_augmentations=2, keep_captions=1)
    write(source / "set", source / "small", options=few, settings=Settings(max_side=80), workers=1)
    return source


def views_of(record):
    """Returns the crops of the first two augmentations, at 16 x 16."""
    views = np.empty((2, 16, 16, 3), np.uint8)
    for view, entry in zip(views, augmentations_of(record), strict=False):
        augment_into(decode(record.images[0]), view, read_params(entry)[0])
    return views.astype(int)


def test_shrunk_pictures_show_the_same_views(written):
    whole, small = (read_shards(written / name, "train") for name in ("whole", "small"))
    assert len(whole) == len(small) == 23
    for number in range(23):
        one, other = whole[number], small[number]
        assert (one.key, size_of(one.images[0]), size_of(other.images[0])) == (other.key, (160, 120), (80, 60))
        entries, scaled = augmentations_of(one), augmentations_of(other)
        assert len(entries) == 4 and [ops for _, ops in scaled] == [ops for _, ops in entries[:2]]
        assert [crop for crop, _ in scaled] == [[6, 10, 40, 60], [0, 0, 60, 80]]
        assert np.abs(views_of(one) - views_of(other)).mean() < 3 < np.abs(views_of(one)[0] - views_of(one)[1]).mean()
    (rejected,) = (json.loads(line) for line in (written / "whole" / "rejected.jsonl").read_text().splitlines())
    assert "no picture of this key in " in rejected["reason"] and rejected["key"] == "00000000.tar/0005"


@pytest.mark.parametrize("name", ["whole", "small"])
def test_stage_0_replays_what_was_written(written, name, sentencepiece_file):
    tokenizer = OwnCaptionTokenizer(load_tokenizer(sentencepiece_file))
    processor = PairProcessor(tokenizer, 24, 16, teachers=(4, WIDTH - 4))
    settings = config(
        written / name, groups=1, images_per_group=23, texts=2, augment="replay", crop_area=(0.08, 1.0),
        operations=(2, 9), decode="exact",
    )  # fmt: skip
    build = make_builder(settings, processor, "train", 0)
    arrays, substituted = build(0, [0])
    assert not substituted
    # Of each pair, the features name the entry, the augmentation and the caption of which they are.
    numbers = arrays["teacher_images"][0, :, 0]
    assert sorted(numbers) == [number for number in range(24) if number != 5]
    np.testing.assert_array_equal(arrays["teacher_texts"][0, :, :, 0], np.stack([numbers] * 2, 1))
    assert set(arrays["teacher_images"][0, :, 1]) <= (set(range(4)) if name == "whole" else {0, 1})
    made = set(zip(numbers >= 12, arrays["teacher_texts"][0, :, 1, 1], strict=True))
    few = {(False, 101), (True, 120)}
    assert made == few if name == "small" else made <= {(s, n + i) for s, n in few for i in range(3)} and len(made) > 3


def test_flags_say_the_same_and_changed_pictures_are_another_source(written, monkeypatch, capsys):
    argv = ["data", "write", f"--source={written / 'set'}", f"--pictures={written / 'photos'}", "--workers=1"]
    argv += [f"--output={written / 'small'}", "--max_side=80", "--keep_augmentations=2", "--keep_captions=1"]
    status, out, err = fastvlm(monkeypatch, capsys, *argv)
    assert status == 0 and "nothing to do" in out, (out, err)
    for changed in (["--keep_captions=2"], ["--synthetic_keys=^syn"]):
        status, _, err = fastvlm(monkeypatch, capsys, *argv, *changed)
        assert status and "of another source or of other settings" in err
    photos = written / "photos" / "00000001.tar"
    data = photos.read_bytes()
    photos.write_bytes(data + bytes(10240))
    status, _, err = fastvlm(monkeypatch, capsys, *argv)
    photos.write_bytes(data)
    assert status and "of another source or of other settings" in err
