"""Tests `fastvlm data reinforce` against torch, torchvision and Pillow, through to a batch of stage 0."""

import contextlib
import gzip
import io
import json
import pathlib
import tarfile

import jax
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from array_record.python.array_record_module import ArrayRecordReader
from clip_vocabulary import open_clip_tokenizer
from loading import config
from pictures import FORMATS, encode, exif, photo
from tiny_clip import LENGTH, TinyClip
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import _apply_op

from fastvlm_jax.data.load.from_config import make_builder
from fastvlm_jax.data.record import Record, unpack
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.data.write import write, write_shards
from fastvlm_jax.images.operations import OPS
from fastvlm_jax.pair_processor import PairProcessor
from fastvlm_jax.reinforce import Settings, reinforce
from fastvlm_jax.text.caption_tokenizer import load_caption_tokenizer

SIDE, AUGMENTATIONS = 32, 3
WIDTHS, SIZES = (12, 8), (SIDE, 48)
SETTINGS = Settings(augmentations=AUGMENTATIONS, image_size=SIDE, seed=5, tar_records=6, batch_size=7, workers=2)
ALPHA = PIL.Image.fromarray(np.dstack([photo(30, 50, 3), photo(30, 50, 4)[..., 0]]))
# Pictures of every kind that is kept as it is or written anew, by name.
PICTURES = {
    "a/b.jpeg": encode(PIL.Image.fromarray(photo(60, 90, 1)), format="JPEG"),
    "turned jpeg": FORMATS["jpeg"],
    "turned png": FORMATS["png"],
    "turned webp": FORMATS["webp"],
    "webp": FORMATS["webp lossless"],
    "alpha": encode(ALPHA, format="PNG"),
    "turned alpha": encode(ALPHA, format="PNG", exif=exif(5)),
    "gif": FORMATS["gif"],
    "tiff": FORMATS["tiff lzw"],
    "bmp": FORMATS["bmp"],
    "grey": encode(PIL.Image.fromarray(photo(40, 30, 5)).convert("L"), format="JPEG", exif=exif(6)),
    "small": encode(PIL.Image.fromarray(photo(1, 3, 6)), format="PNG"),
    "photo": encode(PIL.Image.fromarray(photo(120, 80, 7)), format="JPEG", quality=80),
}
LOSSLESS = {"turned png", "webp", "alpha", "turned alpha", "gif", "tiff", "bmp", "small"}
EXTRA = {
    "turned jpeg": {"captions": ["one car", "  a red\tcar ", "ein Auto, naïve"]},
    "webp": {"synthetic_captions": ["made 0", "made 1"]},
    "gif": {"synthetic_captions": ["x", "y", "z"], "synthetic_keys": [["syn_text_b", 1], ["syn_text_a", 2]]},
    "bmp": {"id": 7, "thumb": b"\xff\xd8\xff", "note": {"licence": "CC0"}, "teacher": {"image": 1}},
}
DAMAGED = {"damaged": FORMATS["jpeg"][:300], "question": FORMATS["png"]}


def records():
    found = []
    for number, (name, data) in enumerate({**PICTURES, **DAMAGED}.items()):
        turns = (("user", (0, "Describe it.")), ("assistant", (f"Caption no. {number} of {name}",)))
        turns = turns * 2 if name == "question" else turns
        found.append(Record(name, (data,), turns, EXTRA.get(name, {})))
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "pairs"
    write_shards(folder, "train", records(), num_shards=2)
    return folder


@pytest.fixture(scope="module")
def order(source):
    """The keys of the source's records, in the order of their numbers."""
    shards = read_shards(source, "train")
    return [shards[i].key for i in range(len(shards))]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, sentencepiece_file):
    """[(model of torch, its directory, captions to tokens)]: one with open_clip's tokens, one with ours."""
    root = tmp_path_factory.mktemp("teachers")
    theirs, own = open_clip_tokenizer(), load_caption_tokenizer(sentencepiece_file)
    made = [TinyClip(WIDTHS[0], 49_408, 1), TinyClip(WIDTHS[1], own.vocab_size, 2)]
    folders = [
        made[0].write(root / "clip", load_caption_tokenizer(theirs.default_bpe()), SIZES[0]),
        made[1].write(root / "own", own, SIZES[1]),
    ]
    tokens = [lambda texts: theirs.tokenize(texts, LENGTH), lambda texts: own(texts, LENGTH)]
    return list(zip(made, folders, tokens, strict=True))


def run(source, teachers, output, settings=SETTINGS):
    """On two devices, so that batches of 7 become batches of 8."""
    return reinforce(source, [str(folder) for _, folder, _ in teachers], output, settings, devices=jax.devices()[:2])


@pytest.fixture(scope="module")
def straight(source, teachers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "out"
    return folder, run(source, teachers, folder)


def members_of(folder):
    """{number of a pair: {extension: contents}} of all tars, as Python's tarfile reads them."""
    found = {}
    for path in sorted(pathlib.Path(folder).glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive.getmembers():
                key, _, extension = member.name.partition(".")
                found.setdefault(int(key), {})[extension] = archive.extractfile(member).read()
    return found


def picture_of(entry):
    return next(data for extension, data in entry.items() if extension in ("jpg", "png", "webp"))


def opened(data):
    """A picture as Pillow opens it, over white if a pixel shows through."""
    image = PIL.Image.open(io.BytesIO(data))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def views_of(entry):
    """What torchvision makes of a stored picture with each of its stored augmentations."""
    views = []
    for crop, ops in json.loads(entry["paug.json"])["param_aug"]:
        view = F.resized_crop(opened(picture_of(entry)), *crop, [SIDE, SIDE], InterpolationMode.BICUBIC)
        for number, magnitude in ops:
            # Translations are told for views of 224 pixels.
            magnitude = magnitude * SIDE / 224 if OPS[number].startswith("Translate") else magnitude
            view = _apply_op(view, OPS[number], magnitude, InterpolationMode.NEAREST, [0, 0, 0])
        views.append(view)
    return views


def expected_features(teachers, entry, texts):
    """image_emb and the embeddings of the texts, by torch."""
    views, images, captions = views_of(entry), [], []
    for (model, _, tokens), size in zip(teachers, SIZES, strict=True):
        own = [view.resize((size, size), PIL.Image.Resampling.BICUBIC) for view in views]
        images.append(model.images(np.stack([np.asarray(view) for view in own])))
        captions.append(model.texts(tokens(texts)))
    return np.concatenate(images, 1), np.concatenate(captions, 1)


def captions_in(entry):
    own = [entry["txt"].decode()] if "txt" in entry else json.loads(entry["json"])["captions"]
    return own, list(json.loads(entry.get("syn.json", b"{}")).items())


def test_features_are_those_of_torch_on_views_of_torchvision(straight, teachers):
    entries = members_of(straight[0])
    assert len(entries) == len(PICTURES)
    for entry in entries.values():
        own, synthetic = captions_in(entry)
        texts = own + [text for _, found in synthetic for text in found]
        images, captions = expected_features(teachers, entry, texts)
        stored = np.load(io.BytesIO(entry["npz"]))
        several = [f"{key}_emb" for key, _ in synthetic] if len(synthetic) > 1 else []
        assert sorted(stored) == sorted(["image_emb", "text_emb", *several])
        assert {array.dtype for array in stored.values()} == {np.dtype("float32")}
        np.testing.assert_allclose(stored["image_emb"], images, rtol=0, atol=1e-4)
        found = np.concatenate([stored[name] for name in ("text_emb", *several)])
        np.testing.assert_allclose(found, captions, rtol=0, atol=1e-4)


def test_members_are_those_of_the_layout(straight, order):
    for number, entry in members_of(straight[0]).items():
        name = order[number]
        extra, about = EXTRA.get(name, {}), json.loads(entry["json"])
        one, kept = name != "turned jpeg", ("jpg", "png", "webp")
        extensions = {"json", "npz", "paug.json"} | ({"txt"} if one else set())
        extensions |= {"syn.json"} if "synthetic_captions" in extra else set()
        assert entry.keys() - {*kept} == extensions
        assert about["record"]["key"] == name and about["record"]["turns"][0] == ["user", [0, "Describe it."]]
        texts = [f"Caption no. {list(PICTURES).index(name)} of {name}"] if one else extra["captions"]
        assert captions_in(entry)[0] == texts
        assert about["record"]["extra"] == ({"id": 7, "note": {"licence": "CC0"}} if name == "bmp" else {})
    entries = {order[number]: entry for number, entry in members_of(straight[0]).items()}
    assert json.loads(entries["webp"]["syn.json"]) == {"syn_text": ["made 0", "made 1"]}
    assert list(json.loads(entries["gif"]["syn.json"]).items()) == [("syn_text_b", ["x"]), ("syn_text_a", ["y", "z"])]


def test_pictures_are_upright_and_kept_as_they_are_where_they_can_be(straight, order):
    for number, entry in members_of(straight[0]).items():
        name, data = order[number], picture_of(entry)
        if "turned" not in name and name not in ("grey", "gif", "tiff", "bmp"):
            assert data == PICTURES[name]
            continue
        before, after = PIL.Image.open(io.BytesIO(PICTURES[name])), PIL.Image.open(io.BytesIO(data))
        assert after.getexif().get(0x0112, 1) == 1 and after.format == ("PNG" if name in LOSSLESS else "JPEG")
        assert after.mode == ("L" if name == "grey" else "RGBA" if "alpha" in name else "RGB")
        expected = PIL.ImageOps.exif_transpose(before).convert(after.mode)
        difference = np.abs(np.asarray(expected, int) - np.asarray(after, int))
        assert difference.max() == 0 if name in LOSSLESS else difference.mean() < 3


def test_what_is_no_pair_is_listed_with_its_place(straight):
    folder, summary = straight
    listed = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert (summary.pairs, summary.rejected) == (len(PICTURES), 2) == (len(PICTURES), len(listed))
    assert {line["key"]: line["reason"][:26] for line in listed} == {
        "damaged": "the image cannot be read: ",
        "question": "2 questions are no caption",
    }
    for line in listed:
        name, _, number = line["file"].rpartition(" record ")
        with contextlib.closing(ArrayRecordReader(name)) as shard:
            assert unpack(shard.read([int(number)])[0]).key == line["key"]
        assert line["split"] == "train"


@pytest.fixture(scope="module")
def chain(straight, tmp_path_factory):
    """What `data write` makes of the tars."""
    folder = tmp_path_factory.mktemp("chain") / "data"
    write(straight[0], folder, workers=1)
    return folder


def batches(data, tokenizer, count, texts=1):
    """Pairs of the batches of stage 0: (tokens of the texts, pixels, features of the view, features of the texts)."""
    settings = {"texts": texts, "augment": "replay", "crop_area": (0.08, 1.0), "operations": (2, 9), "decode": "exact"}
    processor = PairProcessor(tokenizer, LENGTH, SIDE, teachers=WIDTHS)
    build = make_builder(config(data, groups=1, images_per_group=13, **settings), processor, "train", 0)
    for k in range(count):
        batch, _ = build(k, [0])
        names = ("texts", "images", "teacher_images", "teacher_texts")
        yield from zip(*(batch[name][0] for name in names), strict=True)


def test_a_batch_of_stage_0_has_the_views_that_the_teachers_saw_and_their_features(straight, chain, sentencepiece_file):
    """All 13 pairs, several times: pixels by torchvision, rows of features by the tar."""
    tokenizer, entries, seen = load_caption_tokenizer(sentencepiece_file), members_of(straight[0]), set()
    by_tokens = {
        tokenizer([text], LENGTH).tobytes(): (number, row)
        for number, entry in entries.items()
        for row, text in enumerate(captions_in(entry)[0])
    }
    views = {number: views_of(entry) for number, entry in entries.items()}
    stored = {number: np.load(io.BytesIO(entry["npz"])) for number, entry in entries.items()}
    for tokens, pixels, image, texts in batches(chain, tokenizer, 12):
        number, row = by_tokens[tokens.tobytes()]
        np.testing.assert_array_equal(texts[0], stored[number]["text_emb"][row])
        rows = np.flatnonzero((stored[number]["image_emb"] == image).all(1))
        np.testing.assert_array_equal(pixels, views[number][rows[0]])
        seen.add((number, rows[0]))
    assert len(seen) > 30 and {number for number, _ in seen} == entries.keys()


def test_synthetic_captions_reach_a_batch_with_their_features(straight, chain, order, sentencepiece_file):
    """Of the pairs with synthetic captions; pairs without any are replaced by them."""
    tokenizer, rows = load_caption_tokenizer(sentencepiece_file), {}
    for number, entry in members_of(straight[0]).items():
        stored, (_, lists) = np.load(io.BytesIO(entry["npz"])), captions_in(entry)
        synthetic = [text for _, texts in lists for text in texts]
        several = ["syn_text_b_emb", "syn_text_a_emb"] if order[number] == "gif" else []
        found = np.concatenate([stored[name] for name in ("text_emb", *several)])
        rows |= {tokenizer([text], LENGTH).tobytes(): row for text, row in zip(synthetic, found[1:], strict=False)}
    seen = set()
    for tokens, _, _, texts in batches(chain, tokenizer, 18, texts=2):
        np.testing.assert_array_equal(texts[1], rows[tokens[1].tobytes()])
        seen.add(tokens[1].tobytes())
    assert seen == rows.keys() and len(seen) == 5


def test_bfloat16_is_what_torch_rounds_to_and_torch_loads(source, teachers, straight, tmp_path, sentencepiece_file):
    run(source, teachers, tmp_path / "out", Settings(**{**vars(SETTINGS), "dtype": "bfloat16"}))
    exact = members_of(straight[0])
    for number, entry in members_of(tmp_path / "out").items():
        assert "npz" not in entry
        found = torch.load(io.BytesIO(gzip.decompress(entry["pth.gz"])), weights_only=True)
        stored = np.load(io.BytesIO(exact[number]["npz"]))
        assert list(found) == list(stored)
        for name, tensor in found.items():
            assert torch.equal(tensor, torch.tensor(stored[name]).bfloat16())
    write(tmp_path / "out", tmp_path / "data", workers=1)
    tokenizer = load_caption_tokenizer(sentencepiece_file)
    rounded = {row.tobytes() for entry in exact.values() for row in rows_of(entry)}
    for _, _, image, texts in batches(tmp_path / "data", tokenizer, 1):
        assert image.tobytes() in rounded and texts[0].tobytes() in rounded


def rows_of(entry):
    """The embeddings of a pair, as torch rounds them to bfloat16, in float32."""
    stored = np.load(io.BytesIO(entry["npz"]))
    return np.concatenate([torch.tensor(array).bfloat16().float().numpy() for array in stored.values()])
