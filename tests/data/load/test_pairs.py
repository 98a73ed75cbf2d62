"""Batches of stage 0: which records, which of their captions and augmentations, and that any mesh gets the same."""

import io
import itertools
import json
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import PIL.Image
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from loading import config, sharding, take
from small_pairs import draws_of

from fastvlm_jax.batch import PairBatch
from fastvlm_jax.data.load.from_config import eval_batches, make_builder, make_loader
from fastvlm_jax.data.load.pair_builder import _choice_of_lists
from fastvlm_jax.data.readers import datacompdr
from fastvlm_jax.data.record import Record, pack
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.faults import records_of
from fastvlm_jax.images.augment import Crop, at_side, augment_into, sample_crop, sample_ops, uniform
from fastvlm_jax.images.decode import decode, views_into
from fastvlm_jax.pair_processor import PairProcessor
from fastvlm_jax.text.caption_tokenizer import OwnCaptionTokenizer
from fastvlm_jax.text.tokenizer import load_tokenizer

COUNT, LENGTH, SIDE = 53, 24, 16
CAPTIONS, SYNTHETIC = 2, 3
# Hand-written parameters of the four augmentations of each record, in the forms in which published files have them.
PARAMETERS = [
    [[0, 0, 30, 40], [[0, 0.0], [12, 0.0]]],
    [[3, 5, 20, 30], [[8, 0.27], [3, -4.4]]],
    json.dumps([[10, 0, 16, 16], [[10, 7.0], [5, 9.0]]]),
    [None, [[11, 178.5]]],
]
READ = [
    (Crop(0, 0, 30, 40), [("Identity", 0.0), ("AutoContrast", 0.0)]),
    (Crop(3, 5, 20, 30), [("Contrast", 0.27), ("TranslateX", -4.4)]),
    (Crop(10, 0, 16, 16), [("Posterize", 7.0), ("Rotate", 9.0)]),
    (None, [("Solarize", 178.5)]),
]


def picture(number):
    """A PNG of 40 x 30 pixels that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def features(number):
    """Teachers of 3 + 2 features: of record 7, augmentation 1 is [7, 1, 0, 0, 0] and text row 4 is [-7, 4, 0, 0, 0]."""
    rows = {"image_emb": len(PARAMETERS), "text_emb": CAPTIONS + SYNTHETIC}
    found = {name: np.zeros((count, 5), np.float32) for name, count in rows.items()}
    for (name, array), sign in zip(found.items(), (1, -1), strict=True):
        array[:, 0], array[:, 1] = sign * number, np.arange(rows[name])
    return found


def extra_of(number):
    return {
        "captions": [f"{number} real {i}" for i in range(CAPTIONS)],
        "synthetic_captions": [f"{number} made {i}" for i in range(SYNTHETIC)],
        "augmentation": {"param_aug": json.dumps(PARAMETERS) if number % 2 else PARAMETERS},
        "teacher": datacompdr.embeddings(npz(**features(number))),
    }


def record(number, **changes):
    turns = (("user", (0, "Describe the image.")), ("assistant", (f"{number} real 0",)))
    given = {"key": f"train/{number}", "images": (picture(number),), "turns": turns, "extra": extra_of(number)}
    return Record(**given | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    in_turns = itertools.chain(*itertools.zip_longest(range(27), range(27, COUNT)))  # so that shards hold 0-26, 27-52
    write_shards(folder, "train", [record(i) for i in in_turns if i is not None], num_shards=2)
    plain = [record(i, extra={}) for i in range(COUNT)]
    write_shards(folder, "plain", plain)
    write_shards(folder, "few", plain[:23])
    return folder


@pytest.fixture(scope="module")
def tokenizer(sentencepiece_file):
    return OwnCaptionTokenizer(load_tokenizer(sentencepiece_file))


@pytest.fixture(scope="module")
def processor(tokenizer):
    return PairProcessor(tokenizer, LENGTH, SIDE, (0.5, 0.4, 0.3), teachers=(3, 2))


def settings(folder, **changes):
    """8 groups of 3 pairs, replayed as a run with teachers does it."""
    given = {"texts": 2, "augment": "replay", "crop_area": (0.08, 1.0), "operations": (2, 9), "decode": "exact"}
    return config(folder, **given | changes)


def loader_of(folder, processor, split="train", devices=1, **options):
    changes = {key: options.pop(key) for key in list(options) if key not in ("start", "num_batches", "passed_over")}
    return make_loader(settings(folder, **changes), processor, split, seed=3, sharding=sharding(devices), **options)


@pytest.fixture(scope="module")
def straight(folder, processor):
    return take(loader_of(folder, processor), 6)


def assert_same(batches, others):
    jax.tree.map(np.testing.assert_array_equal, batches, others)


def texts_of(batch, tokenizer):
    """The texts of each pair of a batch, in order: [(text, ...)]."""
    rows = batch.texts.reshape(-1, *batch.texts.shape[2:])
    return [tuple(tokenizer.tokenizer.decode([t for t in text if t < tokenizer.start]) for text in row) for row in rows]


def records_in(batch, tokenizer):
    return [int(texts[0].split()[0]) for texts in texts_of(batch, tokenizer)]


def test_fields_have_the_shapes_and_types_of_the_contract(straight):
    batch = straight[0]
    assert isinstance(batch, PairBatch)
    assert (batch.images.shape, batch.images.dtype) == ((8, 3, SIDE, SIDE, 3), np.uint8)
    assert (batch.texts.shape, batch.texts.dtype) == ((8, 3, 2, LENGTH), np.int32)
    assert (batch.teacher_images.shape, batch.teacher_images.dtype) == ((8, 3, 5), np.float32)
    assert (batch.teacher_texts.shape, batch.teacher_texts.dtype) == ((8, 3, 2, 5), np.float32)


def test_each_pair_has_the_pixels_and_features_of_one_augmentation_and_of_its_own_texts(straight, tokenizer):
    seen = set()
    for batch in straight:
        pixels, images, texts = (
            getattr(batch, name).reshape(-1, *getattr(batch, name).shape[2:])
            for name in ("images", "teacher_images", "teacher_texts")
        )
        for pair, (real, made) in enumerate(texts_of(batch, tokenizer)):
            number, word, caption = real.split()
            assert word == "real" and made.split()[:2] == [number, "made"]
            synthetic, augmentation = int(made.split()[2]), int(images[pair, 1])
            assert images[pair].tolist() == [int(number), augmentation, 0, 0, 0]
            assert texts[pair, 0].tolist() == [-int(number), int(caption), 0, 0, 0]
            assert texts[pair, 1].tolist() == [-int(number), CAPTIONS + synthetic, 0, 0, 0]
            shown = np.empty((SIDE, SIDE, 3), np.uint8)
            crop, changes = READ[augmentation]
            augment_into(decode(picture(int(number))), shown, crop, at_side(changes, SIDE), exact=True)
            np.testing.assert_array_equal(pixels[pair], shown)
            seen |= {("a", augmentation), ("c", int(caption)), ("s", synthetic)}
    assert seen == {*(("a", i) for i in range(4)), *(("c", i) for i in range(2)), *(("s", i) for i in range(3))}


@pytest.mark.parametrize("devices", [2, 4])
def test_batch_k_is_the_same_on_any_mesh(folder, processor, straight, devices):
    assert_same(take(loader_of(folder, processor, devices=devices), 6), straight)


def test_a_process_builds_its_groups_alone(folder, processor, straight):
    build = make_builder(settings(folder), processor, "train", 3)
    for groups in ([0], [1, 2], [7, 3]):
        arrays, _ = build(4, groups)
        assert_same(arrays, {name: array[groups] for name, array in vars(straight[4]).items()})


@pytest.mark.parametrize(
    "start, passed_over, given", [(1, [], [1, 2, 3, 4, 5]), (3, [], [3, 4, 5]), (2, [3, 4], [2, 5])]
)
def test_resuming_gives_exactly_the_next_batch(folder, processor, straight, start, passed_over, given):
    loader = loader_of(folder, processor, devices=2, start=start, passed_over=passed_over)
    assert_same(take(loader, len(given)), [straight[k] for k in given])
    assert loader.position == 6


@pytest.mark.parametrize("augment", ["none", "random", "replay"])
def test_cache_and_threads_change_nothing(folder, processor, augment):
    changes = [{}, {"cache_images": True, "num_threads": 4}]
    one, two = (take(loader_of(folder, processor, augment=augment, **change), 4) for change in changes)
    assert_same(one, two)


def test_an_epoch_has_no_record_twice_and_leaves_out_others_each_time(straight, tokenizer):
    epochs = [
        records_in(a, tokenizer) + records_in(b, tokenizer) for a, b in zip(straight[::2], straight[1::2], strict=True)
    ]
    assert [len(set(epoch)) for epoch in epochs] == [48, 48, 48]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({frozenset(epoch) for epoch in epochs}) == 3
    assert set().union(*epochs) == set(range(COUNT))


def test_a_record_is_drawn_anew_on_each_visit(straight, tokenizer):
    drawn = {}
    for batch in straight:
        images = batch.teacher_images.reshape(-1, 5)
        for pair, (real, made) in enumerate(texts_of(batch, tokenizer)):
            drawn.setdefault(real.split()[0], []).append((real[-1], made[-1], int(images[pair, 1])))
    assert sum(len(set(draws)) > 1 for draws in drawn.values() if len(draws) == 3) > 35


def write_lists(folder, lists):
    """A data set like `folder`, but for what its records tell of the lists of their synthetic captions."""
    write_shards(folder, "train", [record(i, extra=extra_of(i) | {"synthetic_keys": lists}) for i in range(COUNT)])


def test_one_list_of_synthetic_captions_is_drawn_from_as_captions_without_a_list_are(tmp_path, processor, straight):
    write_lists(tmp_path, [["syn_text", SYNTHETIC]])
    assert_same(take(loader_of(tmp_path, processor), 6), straight)


def test_of_several_lists_one_is_drawn_and_then_a_caption_of_it(tmp_path, processor, straight, tokenizer):
    """Of lists of 1, 0 and 2 captions, half of the range of number 1 is for the first, a quarter for each other."""
    write_lists(tmp_path, [["a", 1], ["empty", 0], ["b", 2]])
    counts = np.zeros(3, int)
    batches = take(loader_of(tmp_path, processor), 6)
    for k, batch in enumerate(batches):
        features = batch.teacher_texts.reshape(-1, 2, 5)
        for pair, (real, made) in enumerate(texts_of(batch, tokenizer)):
            number, drawn = int(real.split()[0]), int(made.split()[2])
            assert drawn == np.searchsorted([0.5, 0.75], uniform(3, k // 2, number, 2)[1], side="right")
            assert features[pair, 1].tolist() == [-number, CAPTIONS + drawn, 0, 0, 0]
            counts[drawn] += 1
    assert counts.sum() == 144 and 55 < counts[0] < 89
    for batch, other in zip(batches, straight, strict=True):  # nothing else is drawn in another way
        np.testing.assert_array_equal(batch.images, other.images)
        np.testing.assert_array_equal(batch.texts[:, :, 0], other.texts[:, :, 0])


@pytest.mark.parametrize(
    ("lengths", "ends"),
    [
        ([4], [0.25, 0.5, 0.75]),
        ([2, 3], [0.25, 0.5, 0.5 + 1 / 6, 0.5 + 1 / 3]),
        ([0, 1, 0, 1, 2, 0], [1 / 3, 2 / 3, 5 / 6]),
    ],
)
def test_each_caption_of_a_list_has_an_equal_part_of_its_range(lengths, ends):
    for expected, (low, high) in enumerate(itertools.pairwise([0, *ends, 1])):
        for number in (low + 1e-9, (low + high) / 2, high - 1e-9):
            assert _choice_of_lists(number, lengths) == expected
    assert _choice_of_lists(0.0, lengths) == 0
    for count in (*range(1, 60), 999, 65_537):  # the largest number below 1 chooses the last of any
        assert _choice_of_lists(1 - 2.0**-53, [count] * count) == count**2 - 1


def test_random_crops_follow_seed_visit_and_record(folder, processor, tokenizer):
    loader = loader_of(folder, processor, "plain", augment="random", texts=1, crop_area=(0.2, 0.5), operations=(1, 12))
    for k, batch in enumerate(take(loader, 3)):
        pixels = batch.images.reshape(-1, SIDE, SIDE, 3)
        for pair, number in enumerate(records_in(batch, tokenizer)):
            numbers = uniform(3, k // 2, number, 45)
            shown = np.empty((SIDE, SIDE, 3), np.uint8)
            crop = sample_crop(numbers[3:43], (30, 40), (0.2, 0.5))
            augment_into(
                decode(picture(number)), shown, crop, sample_ops(numbers[43:], (SIDE, SIDE), 1, 12), exact=True
            )
            np.testing.assert_array_equal(pixels[pair], shown)
        assert batch.teacher_images is None and batch.texts.shape == (8, 3, 1, LENGTH)


def test_evaluation_shows_whole_images_with_their_first_texts_in_order(folder, processor, tokenizer):
    loader = eval_batches(settings(folder), processor, "train", sharding=sharding(2))
    assert len(loader) == 2  # the 5 records that do not fill a batch are left out
    batches = [jax.tree.map(np.asarray, batch) for batch in loader]
    assert [x for batch in batches for x in texts_of(batch, tokenizer)] == [
        (f"{i} real 0", f"{i} made 0") for i in range(48)
    ]
    assert batches[0].teacher_images is None and batches[0].teacher_texts is None
    shown = np.empty((1, SIDE, SIDE, 3), np.uint8)
    views_into(picture(30), shown, mode="crop", exact=True)
    np.testing.assert_array_equal(batches[1].images[2, 0], shown[0])


def test_evaluation_needs_a_whole_batch(folder, processor):
    message = (
        r"groups=8 x data.images_per_group=3 = 24 pairs is larger than the 23 records .* lower data.groups to 7 or"
    )
    with pytest.raises(ValueError, match=message):
        eval_batches(settings(folder), processor, "few", sharding=sharding(1))


def test_the_loader_counts_what_it_gives_out(folder, processor):
    loader = loader_of(folder, processor)
    assert (loader.batches_per_epoch, loader.token_fill, loader.image_fill) == (2, 1.0, 1.0)
    take(loader, 2)
    flow = loader.flow()
    assert (flow.images, flow.tokens, flow.records) == (48, 48 * 2 * LENGTH, (48,))
    assert flow.sizes == {(SIDE, SIDE): 48}


def test_a_mixture_is_drawn_by_its_shares_in_training_alone(tmp_path, processor):
    for name, numbers in (("a", range(12)), ("b", range(12, 48))):
        for split in ("train", "validation"):
            write_shards(tmp_path / name, split, [record(i, extra={}) for i in numbers])
    changes = dict(path="", root=str(tmp_path), mixture=(("a", 0.5), ("b", 0.5)), texts=1, augment="none")
    loader = loader_of("", processor, **changes)
    take(loader, 2)
    assert loader.names == ("a", "b") and loader.flow().records == (24, 24)
    loader = eval_batches(settings("", **changes), processor, "validation", sharding=sharding(1))
    take(loader, 2)
    assert loader.flow().records == (12, 36)


def test_the_records_of_a_bad_step_are_those_of_its_batch(folder, processor, straight, tokenizer):
    found = list(records_of(make_builder(settings(folder), processor, "train", 3), 2))
    assert [item["key"] for item in found] == [f"train/{number}" for number in records_in(straight[2], tokenizer)]
    assert [item["group"] for item in found] == [g for g in range(8) for _ in range(3)]


# Records that cannot be used.


def teacher(**changes):
    """Stored features of record 0 with some arrays changed."""
    return {"teacher": datacompdr.embeddings(npz(**features(0) | changes))}


TURNS = record(0).turns
QUESTIONS = (*TURNS, ("user", ("why?",)), ("assistant", ("because",)))
BAD = [
    (dict(images=(picture(1), picture(2))), "2 images, a pair has one"),
    (dict(images=(), turns=(("user", ("hi",)), TURNS[1])), "0 images, a pair has one"),
    (dict(turns=QUESTIONS), "2 questions are no caption"),
    (dict(turns=TURNS[:1]), "the conversation has no answer"),
    (dict(turns=(TURNS[0], ("assistant", (" ",)))), "an answer is empty"),
    (dict(images=(picture(1)[:60],)), "the image"),
    (dict(images=(b"",)), "the image is empty"),
    (dict(captions=["a", ""]), "captions is not a list of texts"),
    (dict(synthetic_captions=[]), "no synthetic captions, which data.texts=2 asks for"),
    (dict(synthetic_captions="a"), "synthetic_captions is not a list of texts"),
    (dict(synthetic_keys=[["a", 2]]), "synthetic_keys does not tell of which lists its 3 synthetic captions are"),
    (dict(synthetic_keys=[["a", 4], ["b", -1]]), "synthetic_keys does not tell of which lists its 3 synthetic"),
    (dict(synthetic_keys=[["a", 3.0]]), "synthetic_keys does not tell of which lists its 3 synthetic captions are"),
    (dict(synthetic_keys=[["a"], 3]), "synthetic_keys does not tell of which lists its 3 synthetic captions are"),
    (dict(synthetic_keys=["a", "b"]), "synthetic_keys does not tell of which lists its 3 synthetic captions are"),
    (dict(synthetic_keys=3), "synthetic_keys does not tell of which lists its 3 synthetic captions are"),
    (dict(augmentation=None), "no augmentation (param_aug), which data.augment='replay' asks for"),
    (dict(augmentation={"param_aug": []}), "no augmentation (param_aug)"),
    (dict(augmentation={"param_aug": "[[1"}), "its augmentation is text that is not JSON: '[[1'"),
    (dict(augmentation={"param_aug": [[[0, 0, 31, 40], []]] * 4}), "is not inside the image of 40 x 30"),
    (dict(augmentation={"param_aug": [[[0, 0, 9, 9], [[99, 1]]]] * 4}), "param_aug must be [[top, left"),
    (dict(augmentation={"param_aug": PARAMETERS[:3]}), "4 rows of image features for 3 augmentations"),
    (dict(captions=["a"]), "5 rows of text features for 4 captions, synthetic ones included"),
    (dict(teacher={}), "no image features of teachers, which loss.teachers asks for"),
    (dict(teacher={"image": {"dtype": "float32"}}), "the image features of its teachers are not an array"),
    (teacher(image_emb=np.zeros((4, 5), np.int32)), "image features of type int32, not float16, float32 or bfloat16"),
    (teacher(image_emb=np.zeros(20, np.float32)), "image features of the shape [20] in 80 bytes"),
    (teacher(image_emb=np.full((4, 5), np.nan, np.float32)), "image features that are not finite"),
    (teacher(text_emb=np.zeros((5, 4), np.float32)), "teachers of 3 + 2 = 5 features, the record has 4: set loss."),
]  # fmt: skip


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory):
    """Every second record, 1, 3, 5 ..., cannot be used."""
    folder, records = tmp_path_factory.mktemp("bad"), []
    for i, (changes, _) in enumerate(BAD):
        own = {key: value for key, value in changes.items() if key in ("images", "turns")}
        extra = {key: value for key, value in changes.items() if key not in own}
        number = 2 * i + 1
        records += [record(2 * i), record(number, extra=extra_of(number) | extra, **own)]
    write_shards(folder, "train", records)
    return folder


def test_every_record_that_cannot_be_used_is_named_and_the_next_takes_its_place(
    bad_folder, processor, tokenizer, caplog
):
    total = 2 * len(BAD)
    changes = dict(groups=2, images_per_group=total // 2, max_substituted=1.0)
    options = dict(devices=1), dict(devices=2), dict(cache_images=True, num_threads=1)
    runs = [take(loader_of(bad_folder, processor, **changes, **option), 1) for option in options]
    for run in runs:
        assert_same(run, runs[0])
    for i, (_, reason) in enumerate(BAD):
        where = rf"record {2 * i + 1} \(train/{2 * i + 1}\) cannot be used, another record takes its place: .*"
        assert re.search(where + re.escape(reason), caplog.text), reason
    (batch,) = runs[0]
    # An unusable record 2i + 1 gives way to 2i + 2, the last one to record 0.
    assert sorted(records_in(batch, tokenizer)) == sorted(2 * list(range(0, total, 2)))
    for number in range(0, total, 2):  # a substitute is drawn as it is in its own place
        first, second = np.flatnonzero(np.equal(records_in(batch, tokenizer), number))
        for array in vars(batch).values():
            pairs = array.reshape(total, -1)
            np.testing.assert_array_equal(pairs[first], pairs[second])
    schedule = make_builder(settings(bad_folder, **changes), processor, "train", 3).schedule
    planned = [place.record for place in draws_of(schedule, 0)]
    assert records_in(batch, tokenizer) == [(number + number % 2) % total for number in planned]


def test_training_stops_with_the_reason_if_too_many_cannot_be_used(bad_folder, processor):
    with pytest.raises(
        ValueError, match=r"records cannot be used, more than data.max_substituted=0.1 allows.* The first:"
    ):
        take(loader_of(bad_folder, processor, max_substituted=0.1, groups=1), 12)


def test_training_stops_with_the_reason_if_the_teachers_are_others(folder, tokenizer):
    processor = PairProcessor(tokenizer, LENGTH, SIDE, teachers=(3, 3))
    with pytest.raises(
        ValueError, match=r"train.* cannot be used as a pair.*teachers of 3 \+ 3 = 6 features, the"
    ) as caught:
        take(loader_of(folder, processor), 1)
    assert "\n" not in str(caught.value)


def test_the_features_of_a_visit_alone_are_read(tmp_path, folder, processor, straight):
    """Of the files beside the shards, rows that batch 3 does not show are overwritten."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    build = make_builder(settings(tmp_path), processor, "train", 3)
    batch, kept = straight[3], 0
    shown = {tuple(row) for array in (batch.teacher_images, batch.teacher_texts) for row in array.reshape(-1, 5)}
    for shard in tmp_path.glob("train-*.features"):
        held = np.fromfile(shard, np.float32).reshape(-1, 5)
        assert len(held) in (27 * 9, 26 * 9)  # four augmentations and five captions each
        held[[tuple(row) not in shown for row in held]] = np.nan
        held.tofile(shard)
        kept += np.isfinite(held[:, 0]).sum()
    assert 60 <= kept <= 73
    arrays, substituted = build(3, range(8))
    assert not substituted
    assert_same(arrays, vars(straight[3]))


def test_data_sets_of_earlier_versions_have_their_features_in_their_records(tmp_path, processor, straight):
    write_shards(tmp_path, "train", [record(i, extra=extra_of(i) | {"teacher": {}}) for i in range(COUNT)])
    (shard,) = tmp_path.glob("train-*.array_record")
    writer = ArrayRecordWriter(str(shard), "group_size:1,uncompressed")
    for i in range(COUNT):
        writer.write(pack(record(i)))
    writer.close()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][shard.name]["bytes"] = shard.stat().st_size
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert_same(take(loader_of(tmp_path, processor), 6), straight)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_features_of_16_bits_are_read(tmp_path, processor, dtype):
    stored = {}
    for name, array in features(0).items():
        array = (array + 0.3).astype(dtype)
        stored[name.removesuffix("_emb")] = {
            "dtype": np.dtype(dtype).name,
            "shape": list(array.shape),
            "data": array.tobytes(),
        }
    write_shards(tmp_path, "train", [record(0, extra=extra_of(0) | {"teacher": stored})])
    build = make_builder(settings(tmp_path, groups=1, images_per_group=1), processor, "train", 0)
    arrays, substituted = build(0, [0])
    assert not substituted
    row = int(arrays["teacher_images"][0, 0, 1])
    assert arrays["teacher_images"][0, 0].tolist() == (features(0)["image_emb"][row] + 0.3).astype(dtype).tolist()
