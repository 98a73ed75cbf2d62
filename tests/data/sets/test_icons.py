"""Icons: names, drawings, splits and records, of small packages in the layouts of the real ones."""

import collections
import hashlib
import io
import json
import random
import shutil
import subprocess

import numpy as np
import PIL.Image
import pytest
from icon_packages import THINGS, colour, entry, packages, write_packages

from fastvlm_jax.data.captions import captions_of
from fastvlm_jax.data.sets.icons.concepts import code_of, read_concepts
from fastvlm_jax.data.sets.icons.drawings import draw, drawings_of, names_of
from fastvlm_jax.data.sets.icons.splits import SPLITS, split_of
from fastvlm_jax.data.sets.icons.write import write_icons
from fastvlm_jax.data.sources import read_shards
from fastvlm_jax.text.caption_tokenizer import load_caption_tokenizer

# What is held out, by the hashes of the code points; computed with hashlib alone in the test of split_of.
HELD_OUT = {
    "unseen_concept": {"boar": "fluent_3d", "red apple": "openmoji", "fox": "openmoji", "key": "fluent_3d",
                       "fire": "fluent_3d"},
    "unseen_style": {"comet": "fluent_3d", "anchor": "fluent_3d", "closed book": "openmoji", "astronaut": "openmoji",
                     "bicycle": "twemoji"},
    "validation": {"moai": "openmoji"},
}  # fmt: skip
COUNTS = {"train": 22, "validation": 1, "unseen_style": 5, "unseen_concept": 5}


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    write_packages(folder, unpacked=("noto",))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, fetched):
    folder = tmp_path_factory.mktemp("icons") / "set"
    assert write_icons(folder, 32, fetched, packages=packages()) == COUNTS
    return folder


def records(folder, split):
    source = read_shards(folder, split)
    return [source[number] for number in range(len(source))]


def pixels(picture):
    return np.asarray(PIL.Image.open(io.BytesIO(picture)))


def test_a_record_is_a_picture_with_its_name(folder):
    number = list(THINGS).index("2693")
    found = {record.key: record for record in records(folder, "train")}
    record = found["noto/2693"]
    assert record.turns == (("user", (0,)), ("assistant", ("anchor",)))
    assert record.extra == {
        "concept": "2693", "style": "noto", "licence": "CC0-1.0", "group": "objects",
        "captions": ["anchor", "anchor, ship, tool", "transport water, ship, tool"],
    }  # fmt: skip
    (picture,) = record.images
    assert picture[:4] + picture[8:16] == b"RIFFWEBPVP8L"  # lossless
    shown = pixels(picture)
    assert shown.shape == (32, 32, 3)
    assert (shown[8:24, 8:24] == colour(2, number)).all() and (shown[:7] == 255).all() and (shown[:, 25:] == 255).all()
    for style, at in (("openmoji", 0), ("twemoji", 1)):
        assert (pixels(found[f"{style}/2693"].images[0])[8:24, 8:24] == colour(at, number)).all()


def test_pictures_that_are_held_out_have_the_name_alone(folder):
    for split, wanted in HELD_OUT.items():
        found = records(folder, split)
        assert {captions_of(record)[0]: record.extra["style"] for record in found} == wanted
        assert all(captions_of(record) == [record.turns[1][1][0]] for record in found)
    held_out = {captions_of(record)[0]: record for record in records(folder, "unseen_style")}
    assert (pixels(held_out["comet"].images[0])[10:22, 10:22] == colour(3, 1)).all()  # shrunk, on white
    assert (pixels(held_out["comet"].images[0])[:7] == 255).all()


def test_a_drawing_of_two_concepts_is_the_first_ones(folder):
    """noto draws the key as the fox, so the key has no picture of noto, which would be the one held out."""
    assert HELD_OUT["unseen_concept"]["key"] != min(
        ("fluent_3d", "noto", "openmoji", "twemoji"), key=lambda style: number_of(f"1F511 {style}")
    )


def test_training_has_all_other_styles_of_concepts_that_are_not_unseen(folder):
    found = collections.defaultdict(set)
    for record in records(folder, "train"):
        found[record.turns[1][1][0]].add(record.extra["style"])
    styles = {"openmoji", "twemoji", "noto", "fluent_3d"}
    assert found == {"light bulb": styles} | {
        name: styles - {style} for split in ("unseen_style", "validation") for name, style in HELD_OUT[split].items()
    }


def test_the_tokenizer_knows_the_words_of_training_alone(folder):
    tokenizer = load_caption_tokenizer(folder)
    tokens = tokenizer(["astronaut", "ship, astronaut", "boar"], 12)
    assert tokens[0, 1] == tokens[1, 3] and tokens[0, 2] == tokenizer.end
    assert (tokens[2] > 0).sum() > 4  # in pieces: no caption of training has the word


def test_the_same_packages_give_the_same_bytes(folder, fetched, tmp_path):
    write_icons(tmp_path, 32, fetched, packages=packages())
    names = ["manifest.json", "tokenizer.model", "LICENCES.md", "icons.json"]
    assert [(tmp_path / name).read_bytes() for name in names] == [(folder / name).read_bytes() for name in names]


def test_a_finished_set_is_left_alone_and_an_unfinished_one_is_finished(folder, fetched, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    assert write_icons(copy, 32, "/nowhere/is/read", packages=packages()) == COUNTS
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["splits"]["unseen_style"]  # as if it had been killed
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert write_icons(copy, 32, fetched, packages=packages()) == COUNTS
    assert read_shards(copy, "train").fingerprint == read_shards(folder, "train").fingerprint


def test_another_set_in_the_folder_is_refused_before_anything_is_read(folder, easy_vqa, tmp_path):
    with pytest.raises(ValueError, match="already holds a set with size=32, not 64: choose another folder"):
        write_icons(folder, 64, "/nowhere", packages=packages())
    with pytest.raises(ValueError, match=r"already holds a set with packages=\{'openmoji@1.2.3': '.*choose another"):
        write_icons(folder, 32, "/nowhere", packages=packages()[:3])
    with pytest.raises(ValueError, match="already holds another data set: choose another folder"):
        write_icons(easy_vqa, 32, "/nowhere", packages=packages())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file: choose a folder"):
        write_icons(tmp_path / "file", 32, "/nowhere", packages=packages())


def test_licences_name_each_package_and_whose_it_is(folder):
    text = (folder / "LICENCES.md").read_text()
    assert "drawn at 32 x 32 pixels on white" in text
    for package in packages():
        assert f"| {package.style} | {package.spec} (npm) | CC0-1.0 | {package.style}'s: http://x.org |" in text


# Names.


def concepts_of(*entries):
    return {concept.code: concept for concept in read_concepts(json.dumps(entries).encode())}


def test_captions_are_the_name_and_what_tags_add_to_it():
    found = concepts_of(
        entry("1F34E", "Red\u00a0 Apple", "Fruit, apple, red, Mac\u2019s", "food-fruit", "food-drink"),
        entry("0023-FE0F-20E3", "keycap: #", "", "keycap", "symbols"),
        entry("26F2", "fountain", "fountain", "place-other", "travel-places"),
    )
    apple = ("red apple", "red apple, fruit, mac's", "food fruit, fruit, mac's")
    assert [concept.captions for concept in found.values()] == [apple, ("keycap: #",), ("fountain",)]
    assert found["0023-20E3"].group == "symbols"


def test_no_two_concepts_have_the_same_caption():
    found = concepts_of(
        entry("A0", "bull", "horn", "animal"), entry("A1", "cow", "horn", "animal"), entry("A2", "goat", "milk", "x"),
        entry("A3", "ox"), entry("A4", "OX"), entry("A5", "x, milk"), entry("A6", "duck"),
    )  # fmt: skip
    assert {code: concept.captions for code, concept in found.items()} == {
        "00A0": ("bull", "bull, horn"),
        "00A1": ("cow", "cow, horn"),
        "00A2": ("goat", "goat, milk"),
        "00A6": ("duck",),
    }


@pytest.mark.parametrize(
    "code, group, kept",
    [
        ("1F44B", "people-body", True),
        ("1F44B-1F3FD", "people-body", False),  # a skin tone
        ("1F469", "people-body", True),
        ("1F469-200D-1F680", "people-body", False),  # a woman astronaut
        ("1F9D1-200D-1F680", "people-body", True),
        ("1F6B6-200D-2642-FE0F", "people-body", False),  # a man walking
        ("1F6B6-200D-27A1-FE0F", "people-body", False),  # walking to the right
        ("2640-FE0F", "symbols", True),  # the sign itself
        ("27A1-FE0F", "symbols", True),
        ("1F1E9-1F1EA", "flags", False),
        ("E0A1", "extras-openmoji", False),
        ("1F9B0", "component", False),
    ],
)
def test_variants_and_flags_are_left_out(code, group, kept):
    assert list(concepts_of(entry(code, "any", group=group))) == [code_of(code)] * kept


def test_code_points_are_compared_without_case_zeros_and_the_mark_of_colour():
    assert code_of("0023-fe0f-20e3") == code_of("23-20E3") == "0023-20E3"


# Drawings.


def test_icons_are_taken_by_their_exact_names():
    listed = {
        "icons": {"boar": {"body": "<g/>"}, "pig": {"body": "<path/>", "hidden": True}},
        "aliases": {"water-pistol": {"parent": "boar"}},
        "width": 16, "height": 16,
    }  # fmt: skip
    names = names_of(b'{"1f417": "boar", "1f52b": "water-pistol", "1f416": "pig", "2604": "comet"}')
    found = drawings_of({"icons.json": json.dumps(listed).encode()}, names)
    assert sorted(found) == ["1F416", "1F417"]
    assert b'viewBox="0.0 0.0 16 16"' in found["1F417"] and found["1F417"].endswith(b"<g/></svg>")


def test_a_tall_icon_stands_in_the_middle():
    body = '<path fill="#f00" d="M0 0h8v16H0z"/>'
    listed = {"icons": {"tower": {"body": body, "width": 8}}, "width": 16, "height": 16}
    drawings = drawings_of({"icons.json": json.dumps(listed).encode()}, {"1F5FC": "tower"})
    shown = pixels(draw(drawings["1F5FC"], 16))
    assert (shown[:, 4:12] == (255, 0, 0)).all() and (shown[:, :4] == 255).all() and (shown[:, 12:] == 255).all()


def test_what_cannot_be_drawn_is_an_error():
    with pytest.raises(ValueError):
        draw(b"<svg", 16)
    with pytest.raises(ValueError, match="8 x 16 pixels, not square"):
        draw(b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 16"/>', 16)
    with pytest.raises(OSError):
        draw(b"RIFF", 16)


def test_a_drawing_that_fails_is_named(fetched, tmp_path):
    broken = packages()
    files = {"package.json": '{"version": "1.2.3"}', "icons.json": json.dumps(
        {"icons": {"comet": {"body": "<g>"}}, "width": 16, "height": 16})}  # fmt: skip
    shutil.copytree(fetched, tmp_path / "p")
    for name, text in files.items():
        (tmp_path / "p/@iconify-json/noto" / name).write_text(text)
    line = f"{hashlib.sha256(files['icons.json'].encode()).hexdigest()}  icons.json\n"
    broken[2] = broken[2]._replace(sha256=hashlib.sha256(line.encode()).hexdigest())
    with pytest.raises(ValueError, match=r"^2604 of @iconify-json/noto@1.2.3 cannot be drawn: "):
        write_icons(tmp_path / "out", 16, tmp_path / "p", packages=broken)
    assert not list((tmp_path / "out").glob("*.partial"))


# Splits.


def number_of(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def test_splits_follow_the_hash_of_the_concept_alone():
    rng = random.Random(0)
    styles = ["openmoji", "noto", "twemoji", "fluent_3d", "emojione"]
    counts = collections.Counter()
    for _ in range(1500):
        code = f"{rng.randrange(1 << 20):04X}"
        own = rng.sample(styles, rng.randint(0, 5))
        found = split_of(code, own)
        assert split_of(code, sorted(own)) == found and set(found) <= set(own)
        splits = collections.Counter(found.values())
        share, held_out = number_of(code), sum(splits.values()) - splits["train"]
        if not own:
            assert found == {}
            continue
        if share < 0.35:
            assert splits == {"unseen_concept": 1}
        elif share < 0.91 and len(own) > 1:
            assert held_out == 1 and splits["train"] == len(own) - 1
            assert splits["unseen_style" if share < 0.72 else "validation"] == 1
        else:
            assert splits == {"train": len(own)}
        if held_out:
            (style,) = [style for style, split in found.items() if split != "train"]
            assert style == min(own, key=lambda style: number_of(f"{code} {style}"))
        counts.update(found.values())
    assert set(counts) == set(SPLITS)


def test_one_more_style_changes_no_other_choice():
    """A concept keeps its split, and the style that is held out unless the new one is."""
    for number in range(200):
        code = f"{number:04X}"
        less, more = split_of(code, ["noto", "twemoji"]), split_of(code, ["noto", "twemoji", "openmoji"])
        if more.get("openmoji") in ("train", None):
            assert {style: split for style, split in more.items() if style != "openmoji"} == less
        assert {*less.values()} - {"train"} == {*more.values()} - {"train"}


# The real packages.


@pytest.mark.full
def test_the_real_packages_give_what_the_documentation_says(tmp_path):
    if not shutil.which("npm") or subprocess.run(["npm", "ping"], capture_output=True, timeout=60).returncode:
        pytest.skip("npm reaches no registry")
    assert write_icons(tmp_path) == {"train": 4801, "validation": 277, "unseen_style": 513, "unseen_concept": 518}
    found = {split: records(tmp_path, split) for split in SPLITS}
    names = {split: [record.turns[1][1][0] for record in own] for split, own in found.items()}
    assert not set(names["unseen_concept"]) & {*names["train"], *names["validation"], *names["unseen_style"]}
    assert set(names["unseen_style"]) | set(names["validation"]) <= set(names["train"])
    for split in ("unseen_style", "unseen_concept", "validation"):
        assert len(set(names[split])) == len(names[split])
    captions = collections.defaultdict(set)
    for record in found["train"]:
        for caption in captions_of(record):
            captions[caption].add(record.extra["concept"])
    assert all(len(concepts) == 1 for concepts in captions.values())
    pictures = [record.images[0] for own in found.values() for record in own]
    assert len(set(pictures)) == len(pictures)
