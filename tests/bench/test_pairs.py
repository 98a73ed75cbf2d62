"""`fastvlm bench input` of stage 0: what is timed, and that torchvision's DataLoader shows the same views."""

import importlib.util
import io
import json

import numpy as np
import PIL.Image
import pytest
from command import fastvlm
from paths import HELPERS

from fastvlm_jax.bench import input as bench
from fastvlm_jax.bench import pairs
from fastvlm_jax.data.load.pair_record import augmentations_of
from fastvlm_jax.data.record import Record
from fastvlm_jax.data.write import write_shards
from fastvlm_jax.images.augment import at_side, augment_into, read_params
from fastvlm_jax.images.decode import decode
from fastvlm_jax.text.tokenizer import train_sentencepiece

ENTRIES = [
    [[3, 5, 20, 30], [[8, 0.27], [3, -30.45]]],
    [[0, 0, 30, 40], [[13, 0.0], [12, 0.0]]],
    [None, [[11, 178.5], [5, 9.0]]],
]


def record(number):
    pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), np.uint8)
    image = io.BytesIO()
    PIL.Image.fromarray(pixels).save(image, "PNG")
    turns = (("user", (0,)), ("assistant", (f"number {number}",)))
    return Record(str(number), (image.getvalue(),), turns, {"augmentation": {"param_aug": ENTRIES}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_shards(folder, "train", [record(number) for number in range(40)])
    train_sentencepiece(["user assistant number"] + [str(i) for i in range(40)], folder / "tokenizer.model", 300)
    return folder


def run(monkeypatch, capsys, folder, *more):
    flags = (f"--config={HELPERS / 'small_pairs.py'}:{folder}", "--config.data.augment=replay", "--seconds=0.2")
    return fastvlm(monkeypatch, capsys, "bench", "input", *flags, *more)


def test_without_torch_the_command_prints_the_parts_of_the_pipeline(folder, tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "torch" else find_spec(name, *a))
    status, out, err = run(monkeypatch, capsys, folder, f"--output={tmp_path / 'bench.json'}")
    assert status == 0, err
    found = json.loads((tmp_path / "bench.json").read_text())
    assert set(found["rates"]) == {"pipeline"} and not found["ratios"]
    assert found["left_out"] == {"dataloader_crops": "torch is not installed"}
    assert list(found["parts"]) == [*pairs.PARTS, "total"] and min(found["parts"].values()) > 0
    assert found["parts"]["total"] == pytest.approx(sum(found["parts"][name] for name in pairs.PARTS))
    rate = found["rates"]["pipeline"]
    assert 0 < rate["min"] <= rate["median"] <= rate["max"] and found["image_size"] == 8
    assert f"{folder}, 8 px, batches of 8 groups, 2 threads" in out
    assert "PyTorch DataLoader, crops by torchvision" in out and "read 0." in out


def test_whole_images_are_compared_as_far_as_torchvision_shows_them(folder, monkeypatch, capsys):
    flags = ("--config.data.augment=none", "--config.data.fit=pad")
    status, out, err = run(monkeypatch, capsys, folder, *flags)
    assert status == 0 and "left out: it shows whole images with data.fit='crop' alone" in out, err


def test_the_dataloader_shows_the_views_that_are_replayed(folder, tmp_path):
    pytest.importorskip("torch")
    from fastvlm_jax.bench.dataloader_torch import register_missing_operators

    _kept = register_missing_operators()
    import argparse

    from fastvlm_jax.bench.dataloader_crops import Crops

    (tmp_path / "0.png").write_bytes(record(0).images[0])
    (tmp_path / "pictures.json").write_text(json.dumps([{"name": "0.png", "param_aug": augmentations_of(record(0))}]))
    args = argparse.Namespace(
        folder=tmp_path, augment="replay", size=16, mean=[0.5, 0.4, 0.3], std=[0.3, 0.3, 0.2], crop_area=(0.1, 1.0),
        operations=(2, 9),
    )  # fmt: skip
    crops = Crops(args)
    image = PIL.Image.open(tmp_path / "0.png")
    for entry in ENTRIES:
        shown = np.empty((16, 16, 3), np.uint8)
        crop, changes = read_params(entry)
        augment_into(decode(record(0).images[0]), shown, crop, at_side(changes, 16), exact=True)
        np.testing.assert_array_equal(np.asarray(crops.replayed(image, entry)), shown)
    found = crops[0]["images"].numpy().transpose(1, 2, 0) * [0.3, 0.3, 0.2] + [0.5, 0.4, 0.3]
    views = [np.asarray(crops.replayed(image, entry)) / 255 for entry in ENTRIES]
    assert min(np.abs(found - view).max() for view in views) < 1e-6


@pytest.mark.full
@pytest.mark.parametrize("augment", ["replay", "random", "none"])
def test_the_dataloader_takes_part(folder, tmp_path, monkeypatch, capsys, augment):
    pytest.importorskip("torch")
    output = f"--output={tmp_path / 'bench.json'}"
    status, _, err = run(monkeypatch, capsys, folder, output, f"--config.data.augment={augment}")
    assert status == 0, err
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["left_out"] == {} and found["ratios"]["dataloader_crops"]["min"] > 0
    assert found["rounds"] == bench.ROUNDS
