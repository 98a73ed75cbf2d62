"""Tests what is drawn of a record: augmentations, views, captions, and what else is kept."""

import json

import numpy as np
import PIL.Image
import pytest
from pictures import FORMATS, encode, photo

from fastvlm_jax.data.record import Record
from fastvlm_jax.images.decode import decode
from fastvlm_jax.reinforce.draw import make_sample, views_of
from fastvlm_jax.reinforce.plan import Settings, make_plan
from fastvlm_jax.reinforce.teachers import Teacher

PICTURE = encode(PIL.Image.fromarray(photo(48, 64)), format="PNG")


def record(caption="a red car", picture=PICTURE, key="k", **extra):
    return Record(key, (picture,), (("user", (0,)), ("assistant", (caption,))), extra)


def drawn(number=0, count=4, seed=0, **given):
    return make_sample(record(**given), number, Settings(augmentations=count, seed=seed))[0]


def test_augmentations_depend_on_seed_number_and_place_alone():
    entries = drawn(7, 4, 3).entries
    assert drawn(7, 2, 3).entries == entries[:2] and drawn(7, 4, 3, caption="b", key="x").entries == entries
    others = [drawn(7, 4, 2).entries, drawn(8, 4, 3).entries, entries]
    assert len({json.dumps(entry) for found in others for entry in found}) == 12
    # The random numbers of `sample(1, 2, 3, ...)` in test_augment.py, whose picture is ten times as large.
    assert drawn(3, 3, 1).entries[2] == [[5, 35, 27, 23], [[12, 0.0], [8, -0.27]]]


def test_milder_crops_and_operations_are_drawn_as_told():
    settings = Settings(augmentations=50, crop_area=(0.6, 0.9), operations=(1, 6))
    entries = make_sample(record(), 0, settings)[0].entries
    areas = [height * width / (48 * 64) for (_, _, height, width), _ in entries]
    assert 0.57 < min(areas) < 0.65 and 0.85 < max(areas) < 0.93
    # Of magnitude 6 of 30: shears by 0.3, rotations by 30 degrees, enhancements by 0.9, each times 6 / 30.
    most = {1: 0.06, 2: 0.06, 5: 6.0, 6: 0.18, 7: 0.18, 8: 0.18, 9: 0.18}
    assert all(len(ops) == 1 for _, ops in entries)
    found = {number: abs(value) for _, ((number, value),) in entries if number in most}
    assert len(found) > 5 and found == pytest.approx({number: most[number] for number in found})
    assert make_sample(record(), 0, Settings(augmentations=2, operations=(0, 9)))[0].entries[0][1] == []


def test_crops_cover_the_areas_and_operations_of_the_published_sets():
    entries = [entry for number in range(300) for entry in drawn(number, 5).entries]
    crops = np.array([crop for crop, _ in entries])
    areas = crops[:, 2] * crops[:, 3] / (48 * 64)
    assert 0.07 < areas.min() < 0.1 and 0.95 < areas.max() <= 1
    assert (crops[:, :2] >= 0).all() and (crops[:, :2] + crops[:, 2:] <= [48, 64]).all()
    ops = [op for _, found in entries for op in found]
    assert len(ops) == 2 * len(entries) and {number for number, _ in ops} == set(range(14))
    assert {abs(round(value, 4)) for number, value in ops if number in (3, 4)} == {30.4532}  # 150 / 331 * 224 * 0.3


@pytest.mark.parametrize("side, shift", [(112, 15), (224, 30), (256, 30)])
def test_a_view_shifts_as_far_as_its_replay_does(side, shift):
    """Translations are told for 224 pixels; a smaller view shifts less, a larger one as far."""
    image = np.full((side, side, 3), 200, np.uint8)
    views = views_of(image, [[[0, 0, side, side], [[3, 30.45]]], [None, None]], side, [side])
    assert (views[side][0][:, :shift] == 0).all() and (views[side][0][:, shift:] == 200).all()
    assert (views[side][1] == 200).all()


def test_teachers_of_other_sizes_get_the_resized_view():
    image = photo(48, 64)
    entries = drawn(5).entries
    views = views_of(image, entries, 32, [32, 24, 48, 24])
    assert {size: array.shape for size, array in views.items()} == {n: (4, n, n, 3) for n in (24, 32, 48)}
    view = PIL.Image.fromarray(views[32][1])
    for size in (24, 48):
        resized = view.resize((size, size), PIL.Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(views[size][1], np.asarray(resized))
    assert views_of(image, entries, 32, [48]).keys() == {48}


def test_the_picture_is_stored_upright_and_its_boxes_count_its_pixels():
    # Of 60 x 40 pixels, turned to 40 x 60.
    sample, image = make_sample(record(picture=FORMATS["jpeg"]), 0, Settings(augmentations=60))
    assert image.shape == (60, 40, 3) and sample.picture != FORMATS["jpeg"]
    np.testing.assert_array_equal(image, decode(sample.picture))
    ends = np.array([[top + height, left + width] for (top, left, height, width), _ in sample.entries])
    assert ends.max(0).tolist()[0] > 50 and (ends <= [60, 40]).all()


def test_captions_are_kept_as_a_reader_of_tars_finds_them():
    assert drawn(caption=" a\n").captions == ["a"] and drawn(captions=["x"]).captions == ["x"]
    assert drawn(captions=["x ", "y"]).captions == ["x ", "y"]
    found = drawn(synthetic_captions=["a", "b", "c"], synthetic_keys=[["k", 2], ["none", 0], ["l", 1]])
    assert found.synthetic == {"k": ["a", "b"], "l": ["c"]} and found.texts == ["a red car", "a", "b", "c"]
    assert drawn(synthetic_captions=["a"]).synthetic == {"syn_text": ["a"]}
    assert drawn(synthetic_captions=[], synthetic_keys=[["syn_text", 0]]).synthetic == {}


def test_what_json_cannot_hold_or_a_reader_would_take_for_a_picture_is_left_out():
    picture = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ"
    extra = {"url": "http://a/1.jpg", "id": 3, "bytes": b"x", "thumb": [picture], "augmentation": {}, "captions": ["a"]}
    kept = drawn(key="a/b", **extra).record
    assert kept["key"] == "a/b" and kept["extra"] == {"url": "http://a/1.jpg", "id": 3}
    assert json.loads(json.dumps(kept["turns"])) == [["user", [0]], ["assistant", ["a red car"]]]


@pytest.mark.parametrize(
    "given, reason",
    [
        ({"caption": "see <image>"}, "the caption holds <image>"),
        ({"caption": "<video>"}, "a text holds '<video>'"),
        ({"caption": " "}, "an answer is empty"),
        ({"captions": ["\ud800"]}, "a caption holds half a surrogate pair"),
        ({"captions": ["a", ""]}, "captions is not a list of texts"),
        ({"synthetic_captions": ["\ud800"]}, "a synthetic caption holds half a surrogate pair"),
        ({"synthetic_captions": "a"}, "synthetic_captions is not a list of texts"),
        ({"synthetic_captions": ["a"], "synthetic_keys": [["k", 2]]}, "do not count its 1 synthetic captions"),
        ({"synthetic_captions": ["a", "b"], "synthetic_keys": [["k", 1]]}, "do not count its 2 synthetic captions"),
        ({"synthetic_captions": ["a", "b"], "synthetic_keys": [["k", 1], ["k", 1]]}, "do not count its 2"),
        ({"synthetic_captions": ["a"], "synthetic_keys": [["k", 2], ["l", -1]]}, "do not count its 1"),
        ({"synthetic_captions": ["a"], "synthetic_keys": [["k", 1.0]]}, "[['k', 1.0]]\" do not count its 1"),
        ({"synthetic_captions": ["a"], "synthetic_keys": 3}, "synthetic_keys '3' do not count"),
        ({"synthetic_captions": ["a"], "synthetic_keys": [[["x"], 1]]}, "do not count its 1"),
        ({"synthetic_captions": ["a", "b"], "synthetic_keys": [["k", 1], ["text", 1]]}, "none called image or text"),
        ({"synthetic_captions": ["a"] * 15, "synthetic_keys": [[f"{i}", 1] for i in range(15)]}, "15 lists of synth"),
        ({"synthetic_captions": ["a"], "synthetic_keys": [["k\0", 1]]}, "is called 'k\\x00', which names no array"),
        ({"synthetic_captions": ["a"], "synthetic_keys": [["k" * 81, 1]]}, "kkk..., which names no array"),
        ({"picture": PICTURE[:500]}, "the image cannot be read"),
        ({"picture": b""}, "the image is empty"),
    ],
)  # fmt: skip
def test_a_record_that_is_no_pair_is_refused_with_the_reason(given, reason):
    with pytest.raises(ValueError) as error:
        drawn(**given)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_embeddings_that_no_reader_takes_are_refused_at_once():
    class Wide(Teacher):
        features, factor = 1536, 100.0

    class Source(list):
        folder, fingerprint = "pairs", "0"

    wide = Wide("wide", None, {}, None, "1")
    make_plan(Source([0]), [wide], Settings(augmentations=2730))
    with pytest.raises(ValueError, match="--augmentations 2731: the embeddings of a picture would be over 16 MB"):
        make_plan(Source([0]), [wide], Settings(augmentations=2731))
    with pytest.raises(ValueError, match="--augmentations 1366"):
        make_plan(Source([0]), [wide, wide], Settings(augmentations=1366))
