"""Checks the arrays of a batch: tiles, buckets, mixtures, truncated texts, substitutes, and the loss on them."""

import io
import json
import time

import jax
import ml_collections
import numpy as np
import PIL.Image
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from small import ask, small_config

from fastvlm_jax.data.index import Counter, load_index
from fastvlm_jax.data.load.from_config import eval_batches, make_loader, open_sources
from fastvlm_jax.data.load.loader import set_names
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.images.sizes import make_sizes
from fastvlm_jax.losses import next_token
from fastvlm_jax.models import fastvlm
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.tokenizer import load_tokenizer, train_sentencepiece


def picture(width, height, seed=0):
    """Returns a smooth random picture as PNG."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(noise).resize((width, height), PIL.Image.Resampling.BICUBIC).save(buffer, format="PNG")
    return buffer.getvalue()


def config(folder, **changes):
    values = {
        "path": str(folder), "root": "", "mixture": (), "image_size": 64, "resolutions": (), "decode": "exact",
        "turns": "conversation", "overlong": "truncate", "max_substituted": 0.01, "groups": 1, "images_per_group": 8,
        "rows_per_group": 1, "row_length": 400, "cache_images": False, "num_threads": 1, "prefetch": 1,
    }  # fmt: skip
    return ml_collections.ConfigDict(values | changes)


def one_device():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    return NamedSharding(mesh, PartitionSpec("data"))


def read(folder, processor, **changes):
    loader = eval_batches(config(folder, **changes), processor, "train", sharding=one_device())
    batches = [jax.tree.map(np.asarray, batch) for batch in loader]
    loader.close()
    return batches


def test_tiles_follow_their_overview_and_placeholders_name_them_in_order(tmp_path, tokenizer):
    """A large picture takes 5 slots and a small one 2, of the 8 slots of a group, with 3 tokens a slot.

    slots           0          1   2   3   4      5          6          7
                    overview   its four tiles     overview   its tile   empty
    image_index     0 1 2      3 ... 14       \\n  15 16 17   18 19 20
    """
    pictures = (picture(130, 120), picture(40, 50, 1))
    write_shards(tmp_path, "train", [Record("x", pictures, ask(("what", "red"), images=2))])
    processor = Processor(tokenizer, "chatml", 64, 3, grids=((1, 1), (2, 2)))
    (batch,) = read(tmp_path, processor)
    assert batch.image_mask[0].tolist() == [True] * 7 + [False]
    large, small = (processor.decode(image) for image in pictures)
    expected = np.concatenate(
        [processor.views(large, processor.size, (2, 2)), processor.views(small, processor.size, (1, 1))]
    )
    np.testing.assert_array_equal(batch.images[0, :7], expected)
    assert not batch.images[0, 7:].any()
    index = batch.image_index[0, 0]
    assert index[index >= 0].tolist() == list(range(21))
    behind = np.flatnonzero(np.diff(np.flatnonzero(index >= 0)) > 1)  # placeholders with text behind them
    assert behind.tolist() == [14]


@pytest.mark.parametrize("decode", ["fast", "exact"])
@pytest.mark.parametrize("transparency, ground", [("white", 255), ("drop", 0)])
def test_training_shows_transparent_pictures_as_the_processor_does(tmp_path, tokenizer, decode, transparency, ground):
    drawn = np.zeros((64, 64, 4), np.uint8)
    drawn[20:40, 20:40] = 9, 6, 3, 255
    buffer = io.BytesIO()
    PIL.Image.fromarray(drawn).save(buffer, format="PNG")
    write_shards(tmp_path, "train", [Record("x", (buffer.getvalue(),), ask(("what", "red")))])
    (batch,) = read(tmp_path, Processor(tokenizer, "chatml", 64, 3, transparency=transparency), decode=decode)
    expected = np.full((64, 64, 3), ground, np.uint8)
    expected[20:40, 20:40] = 9, 6, 3
    np.testing.assert_array_equal(batch.images[0, 0], expected)


def test_the_prompt_of_generation_holds_the_views_that_training_saw(tmp_path, tokenizer):
    image = picture(130, 120)
    write_shards(tmp_path, "train", [Record("x", (image,), ask(("what", "red")))])
    processor = Processor(tokenizer, "chatml", 64, 3, grids=((1, 1), (2, 2)))
    (batch,) = read(tmp_path, processor)
    prompt = processor(image, "what")
    np.testing.assert_array_equal(prompt.images[0], batch.images[0, :5])
    count = int((prompt.segment_ids[0, 0] > 0).sum())
    for name in ("tokens", "image_index", "positions", "segment_ids"):
        np.testing.assert_array_equal(getattr(prompt, name)[0, 0, :count], getattr(batch, name)[0, 0, :count])


def test_an_image_goes_to_the_bucket_of_its_shape(tmp_path, tokenizer):
    shapes = [(100, 50), (50, 100), (80, 80)]
    records = [Record(str(i), (picture(*shape, i),), ask(("what", "red"))) for i, shape in enumerate(shapes)]
    write_shards(tmp_path, "train", records)
    sizes = make_sizes(64, ((1, 1), (2, 1), (1, 2)), 16, lambda h, w: h * w // 256)
    processor = Processor(tokenizer, "chatml", 64, 16, sizes=sizes)
    assert [(s.width, s.height, s.tokens) for s in sizes] == [(64, 64, 16), (80, 48, 15), (48, 80, 15)]
    batches = read(tmp_path, processor, images_per_group=2)
    found = {batch.images.shape[2:4]: batch for batch in batches}
    for (width, height), record in zip(shapes, records, strict=True):
        size = min(sizes, key=lambda s: abs(np.log(s.width / s.height * height / width)))
        batch = found[size.height, size.width]
        assert batch.images.shape[1] == 2 * 64 * 64 // (size.height * size.width)
        expected = processor.views(processor.decode(record.images[0]), size, (0, 0))[0]
        np.testing.assert_array_equal(batch.images[0, 0], expected)
        assert (batch.image_index >= 0).sum() == size.tokens
        np.testing.assert_array_equal(processor(record.images[0], "what").images[0, 0], expected)


def test_every_token_names_its_data_set(tmp_path, tokenizer):
    for name, answer, count in (("a", "red", 3), ("b", "green", 5)):
        write_shards(
            tmp_path / name, "train", [Record(f"{name}{i}", (), ask(("what", answer), images=0)) for i in range(count)]
        )
    settings = config("", root=str(tmp_path), mixture=(("a", 0), ("b", 0)), row_length=64)
    loader = eval_batches(settings, Processor(tokenizer, "chatml", 64, 3), "train", sharding=one_device())
    answers = {0: "red\n", 1: "green\n"}
    seen = []
    assert loader.names == ("a", "b")
    for batch in map(jax.device_get, loader):
        assert ((batch.source == -1) == (batch.segment_ids == 0)).all()
        for number in range(1, batch.segment_ids.max() + 1):
            own = batch.segment_ids == number
            (source,) = set(batch.source[own].tolist())
            assert tokenizer.decode(batch.targets[own & batch.loss_mask]) == answers[source]
            seen.append(source)
    assert sorted(seen) == [0, 0, 0, 1, 1, 1, 1, 1]
    flow = loader.flow()
    assert flow.records == (3, 5) and flow.images == 0 and flow.waited > 0
    loader.close()


def test_a_mixture_is_named_by_what_tells_its_folders_apart():
    assert set_names(["gs://b/x/one", "/data/two"]) == ("one", "two")
    assert set_names(["/a/train", "/b/train"]) == ("a/train", "b/train")
    assert set_names(["/a", "/a"]) == ("a#0", "a#1")


def test_the_oldest_questions_of_a_long_conversation_are_left_out_and_its_images_stay(tmp_path, tokenizer):
    talk = ask(("one " * 20, "red"), ("two " * 20, "green"), ("three", "blue"))
    write_shards(tmp_path, "train", [Record("x", (picture(9, 9),), talk)])
    (batch,) = read(tmp_path, Processor(tokenizer, "chatml", 64, 3), row_length=60)
    text = tokenizer.decode(batch.tokens[batch.segment_ids == 1])
    assert text.endswith("user\n\nthree\nassistant\nblue\n") and "two" not in text and "one" not in text
    assert batch.image_index[batch.image_index >= 0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="rows have 60"):
        read(tmp_path, Processor(tokenizer, "chatml", 64, 3), row_length=60, overlong="reject")


def test_a_record_with_a_bad_checksum_is_replaced_and_named(tmp_path, tokenizer, caplog):
    rng = np.random.default_rng(0)
    noise = [picture(8, 8, i) + rng.bytes(9000) for i in range(6)]  # decoders ignore bytes after the end of a PNG
    write_shards(tmp_path, "train", [Record(f"r{i}", (image,), ask(("what", "red"))) for i, image in enumerate(noise)])
    (shard,) = tmp_path.glob("*.array_record")
    data = bytearray(shard.read_bytes())
    data[data.index(noise[3][-4000:-3000])] ^= 1
    shard.write_bytes(data)
    (batch,) = read(tmp_path, Processor(tokenizer, "chatml", 64, 3), max_substituted=0.2)
    assert batch.image_mask.sum() == 6
    np.testing.assert_array_equal(batch.images[0, 3], batch.images[0, 4])
    assert "record 3 cannot be used, another record takes its place: " in caplog.text and "hash mismatch" in caplog.text


def test_an_index_of_other_records_is_refused(tmp_path, tokenizer):
    processor = Processor(tokenizer, "chatml", 64, 3)
    for name, answer in (("a", "red"), ("b", "red " * 9)):
        write_shards(tmp_path / name, "train", [Record("x", (), ask(("what", answer), images=0))])
        read(tmp_path / name, processor)
    for file in (tmp_path / "a" / "index").glob("*.tokens-*"):
        file.write_bytes((tmp_path / "b" / "index" / file.name).read_bytes())
    with pytest.raises(ValueError, match=r"the index of .*a does not match its records: delete .*index"):
        read(tmp_path / "a", processor)


def test_a_damaged_index_file_is_named(tmp_path, tokenizer):
    processor = Processor(tokenizer, "chatml", 64, 3)
    write_shards(tmp_path, "train", [Record("x", (), ask(("what", "red"), images=0))])
    read(tmp_path, processor)
    for file in (tmp_path / "index").iterdir():
        whole = file.read_bytes()
        file.write_bytes(whole[:-30])
        with pytest.raises(ValueError, match=f"{file.name} is damaged .*: delete the folder"):
            read(tmp_path, processor)
        file.write_bytes(whole)


def test_the_loss_of_packed_samples_is_that_of_each_alone(tmp_path, tokenizer):
    rng = np.random.default_rng(3)
    words = ["what", "is", "it", "red", "green", "blue", "one", "two", "three"]
    records = []
    for i in range(24):
        images = tuple(picture(40, 40, 9 * i + j) for j in range(rng.integers(0, 3)))
        pairs = [(" ".join(rng.choice(words, 4)), " ".join(rng.choice(words, rng.integers(1, 9)))) for _ in range(2)]
        records.append(Record(str(i), images, ask(*pairs, images=len(images))))
    write_shards(tmp_path, "train", records)
    settings = small_config(tmp_path)
    settings.model.llm.vocab_size = tokenizer.vocab_size
    model = fastvlm.build(**settings.model.to_dict())
    variables = jax.jit(lambda key: fastvlm.init_variables(model, key))(jax.random.key(0))
    variables = jax.tree.map(lambda x: x * 3, variables)
    processor = Processor(tokenizer, "chatml", 32, model.tokens_per_image(32))
    score = jax.jit(next_token(model).held_out)
    shape = {"image_size": 32, "images_per_group": 6, "row_length": 300}
    loader = make_loader(config(tmp_path, **shape), processor, "train", seed=1, sharding=one_device())
    packed = alone = segments = 0
    for _ in range(loader.batches_per_epoch):
        batch = jax.device_get(next(loader))
        packed += float(score(variables, batch)[0])
        for number in range(1, batch.segment_ids.max() + 1):
            segments += 1
            alone += float(score(variables, only(batch, number))[0])
    loader.close()
    assert segments == 24 and loader.batches_per_epoch <= 8
    assert abs(packed / alone - 1) < 1e-5


def only(batch, number):
    """Returns the batch with only one of its segments, moved to the start of the row."""
    at = np.flatnonzero(batch.segment_ids[0, 0] == number)
    padding = {"image_index": -1, "source": -1}
    moved = {}
    for name in ("tokens", "image_index", "targets", "loss_mask", "segment_ids", "positions", "source"):
        array = getattr(batch, name)
        moved[name] = np.full_like(array, padding.get(name, 0))
        moved[name][0, 0, : len(at)] = array[0, 0, at]
    return batch.replace(**moved)


def test_the_next_usable_record_stands_in_and_leaves_nothing_of_the_bad_one(tmp_path, tokenizer):
    good = [picture(40, 40, i) for i in range(4)]
    records = [
        Record("0", (good[0],), ask(("what", "red"))),
        Record("1", (good[1], good[0], picture(40, 40)[:90]), ask(("what", "green"), images=3)),
        Record("2", (good[2],), ask(("what", "blue"))),
        Record("3", (good[3],), ask(("what", "one"))),
    ]
    write_shards(tmp_path, "train", records)
    processor = Processor(tokenizer, "chatml", 64, 3)
    (batch,) = read(tmp_path, processor, max_substituted=0.5, images_per_group=6)
    assert batch.image_mask[0].tolist() == [True, True, False, False, True, True]
    for slot, number in ((0, 0), (1, 2), (4, 2), (5, 3)):
        np.testing.assert_array_equal(batch.images[0, slot], processor.pixels(good[number]))
    assert not batch.images[0, 2:4].any()
    assert set(batch.image_index[0, 0]) == {-1, *range(6), *range(12, 18)}


def test_the_index_names_what_cannot_be_used_in_every_shard(tmp_path, tokenizer):
    mute = (("user", ("what",)), ("assistant", (" ",)))
    talks = [ask(("what", "red"), images=0) if i not in (1, 4) else mute for i in range(6)]
    write_shards(tmp_path, "train", [Record(str(i), (), talk) for i, talk in enumerate(talks)], num_shards=2)
    index = load_index(read_shards(tmp_path, "train"), Counter(tokenizer, "chatml", "separate"))
    # Records are read shard after shard: 0 2 4 | 1 3 5
    assert index.unusable == {2: "an answer is empty", 3: "an answer is empty"}
    assert index.num_segments.tolist() == [1, 1, 0, 0, 1, 1]


def test_an_index_is_of_one_tokenizer_template_and_way_of_turns(tokenizer, tmp_path):
    train_sentencepiece(["another"], tmp_path / "tokenizer.model", 280)
    other = load_tokenizer(tmp_path)
    made = [(tokenizer, "chatml", "separate"), (other, "chatml", "separate"), (tokenizer, "plain", "separate")]
    made.append((tokenizer, "chatml", "conversation"))
    assert len({Counter(*settings).id for settings in made}) == 4


@pytest.mark.parametrize("setting, same", [({}, True), ({"legacy": True}, True), ({"legacy": False}, False)])
def test_an_index_is_of_the_settings_that_change_the_ids(setting, same, llama_file, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(llama_file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **setting}))
    made = [Counter(load_tokenizer(path), "vicuna_v1", "separate") for path in (llama_file, tmp_path)]
    assert (made[0].id == made[1].id) is same


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_in_an_index_is_not_opened(tmp_path, tokenizer):
    write_shards(tmp_path / "data", "train", [Record("x", (), ask(("what", "red"), images=0))])
    processor = Processor(tokenizer, "chatml", 64, 3)
    read(tmp_path / "data", processor)
    (file,) = (tmp_path / "data" / "index").glob("*.tokens-*")
    with np.load(file) as stored:
        arrays = dict(stored)
    np.savez(file, **arrays | {"text": np.array([Trap(tmp_path / "sprung")], object)}, allow_pickle=True)
    with pytest.raises(ValueError, match="is damaged"):
        read(tmp_path / "data", processor)
    assert not (tmp_path / "sprung").exists()


def test_batches_of_a_lower_resolution_hold_more_images(tmp_path, tokenizer):
    records = [Record(str(i), (picture(70, 70, i),), ask(("what", "red"))) for i in range(60)]
    write_shards(tmp_path, "train", records)
    sizes = tuple(size for side in (32, 64) for size in make_sizes(side, (), 16, lambda h, w: h * w // 256))
    processor = Processor(tokenizer, "chatml", 64, 16, sizes=sizes)
    settings = config(tmp_path, resolutions=((32, 0.5), (64, 0.5)), images_per_group=2, row_length=200)
    loader = make_loader(settings, processor, "train", seed=0, sharding=one_device())
    batches = [jax.device_get(next(loader)) for _ in range(loader.batches_per_epoch)]
    loader.close()
    assert {batch.images.shape[1:4] for batch in batches} == {(8, 32, 32), (2, 64, 64)}
    assert sum(int(batch.image_mask.sum()) for batch in batches) == 60
    assert all(
        (batch.image_index >= 0).sum() == batch.image_mask.sum() * {32: 4, 64: 16}[batch.images.shape[2]]
        for batch in batches
    )


def test_too_many_records_that_do_not_fit_are_told_before_the_first_batch(tmp_path, tokenizer):
    records = [Record(str(i), (), ask(("what " * (30 if i < 3 else 1), "red"), images=0)) for i in range(10)]
    write_shards(tmp_path, "train", records)
    processor = Processor(tokenizer, "chatml", 64, 3)
    with pytest.raises(ValueError, match=r"3 of 10 records cannot be used, .* rows have 40: raise data.row_length"):
        make_loader(config(tmp_path, row_length=40), processor, "train", seed=0, sharding=one_device())
    loader = make_loader(
        config(tmp_path, row_length=40, max_substituted=0.3), processor, "train", seed=0, sharding=one_device()
    )
    assert loader.substituted == 3
    loader.close()


def test_validation_takes_the_data_sets_that_have_one(tmp_path):
    record = Record("x", (), ask(("what", "red"), images=0))
    write_shards(tmp_path / "a", "train", [record])
    write_shards(tmp_path / "b", "train", [record])
    write_shards(tmp_path / "b", "validation", [record])
    settings = config("", root=str(tmp_path), mixture=(("a", 0), ("b", 0)))
    assert [source.folder.name for source in open_sources(settings, "train")] == ["a", "b"]
    assert [source.folder.name for source in open_sources(settings, "validation")] == ["b"]
    assert open_sources(config(tmp_path / "a"), "validation") == ()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"path": ""}, "data.path is empty: name the folder of shards with --config.data.path=DIR"),
        ({"path": "", "mixture": ("a", "b")}, "data.mixture must be pairs as"),
        ({"path": "", "mixture": (("a", 1.0), ("b", 0.0))}, "must all be positive, or all 0"),
        ({"path": "", "mixture": (("a", -1.0),)}, "must all be positive, or all 0"),
        ({"decode": "best"}, "unknown data.decode 'best': choose one of fast, exact"),
        ({"overlong": "cut"}, "unknown data.overlong 'cut': choose one of truncate, reject"),
    ],
)
def test_settings_that_make_no_sense_are_named(tmp_path, tokenizer, changes, message):
    write_shards(tmp_path, "train", [Record("x", (), ask(("what", "red"), images=0))])
    with pytest.raises(ValueError, match=message):
        read(tmp_path, Processor(tokenizer, "chatml", 64, 3), **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fit": "squeeze"}, "unknown data.fit 'squeeze': choose one of pad, crop"),
        ({"grids": ((2, 2, 2),)}, "must be pairs of rows and columns"),
        ({"grids": ((2, 2),), "sizes": make_sizes(64, ((2, 1),), 16, max)}, "exclude each other"),
    ],
)
def test_a_processor_refuses_what_it_cannot_do(tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        Processor(tokenizer, "chatml", 64, 3, **changes)


def test_generation_uses_the_resolution_of_the_model_not_one_of_its_training(tokenizer):
    sizes = tuple(
        s for side in (32, 64, 128) for s in make_sizes(side, ((1, 1), (2, 1)), 16, lambda h, w: h * w // 256)
    )
    prompt = Processor(tokenizer, "chatml", 64, 16, sizes=sizes)(picture(100, 51), "what")
    assert prompt.images.shape == (1, 1, 48, 80, 3) and (prompt.image_index >= 0).sum() == 15


def test_the_overview_beside_tiles_is_stretched_and_a_lone_view_is_padded(tokenizer):
    processor = Processor(tokenizer, "chatml", 64, 3, image_mean=(0.5, 0.5, 0.5), grids=((1, 1), (1, 2)))
    white = np.full((60, 128, 3), 255, np.uint8)
    overview, left, right = processor.views(white, processor.size, (1, 2))
    assert overview.min() == 255
    assert left[0].max() == right[-1].max() == 0 and left[32].min() == right[32].min() == 255
    overview, tile = processor.views(white, processor.size, (1, 1))
    assert overview.min() == 255 and tile[0].max() == 0 and tile[32].min() == 255
    (alone,) = processor.views(white, processor.size, (0, 0))
    assert alone[0].min() == alone[0].max() == 127 and alone[32].min() == 255


def test_a_place_that_no_record_fits_stays_empty_and_training_goes_on(tmp_path, tokenizer):
    bad = Record("bad", (picture(40, 40)[:90],), ask(("a", "b")))
    long = [Record(str(i), (picture(40, 40, i),), ask(("what is it " * 4, "red green blue"))) for i in range(5)]
    write_shards(tmp_path, "train", [long[0], bad, *long[1:]])
    batches = read(tmp_path, Processor(tokenizer, "chatml", 64, 3), max_substituted=0.2)
    assert sum(int(batch.image_mask.sum()) for batch in batches) == 5
    assert all((batch.segment_ids > 0).sum() > 0 and not batch.images[~batch.image_mask].any() for batch in batches)


def test_a_conversation_of_hundreds_of_questions_is_cut_in_no_time_and_counted(tmp_path, tokenizer):
    pairs = [(f"what is {i}", "red green") for i in range(400)]
    write_shards(
        tmp_path, "train", [Record("x", (), ask(*pairs, images=0)), Record("y", (), ask(("what", "red"), images=0))]
    )
    loader = eval_batches(
        config(tmp_path, row_length=200), Processor(tokenizer, "chatml", 64, 3), "train", sharding=one_device()
    )
    start = time.monotonic()
    batches = [jax.device_get(batch) for batch in loader]
    assert time.monotonic() - start < 20
    assert loader.flow().truncated == 1
    text = tokenizer.decode(batches[0].tokens[0, 0])
    assert "what is 399" in text and "what is 398" in text and "what is 380" not in text
    loader.close()


def test_validation_is_at_the_resolution_of_the_model(tmp_path, tokenizer):
    write_shards(tmp_path, "train", [Record(str(i), (picture(70, 70, i),), ask(("what", "red"))) for i in range(4)])
    sizes = tuple(size for side in (32, 64, 128) for size in make_sizes(side, (), 16, lambda h, w: h * w // 256))
    processor = Processor(tokenizer, "chatml", 64, 16, sizes=sizes)
    batches = read(tmp_path, processor, resolutions=((32, 0.2), (64, 0.2), (128, 0.6)))
    assert {batch.images.shape[2:4] for batch in batches} == {(64, 64)}
