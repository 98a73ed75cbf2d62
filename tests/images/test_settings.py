"""Tests of transformers' image settings: they are read as its processors compute them, and written so."""

import json

import numpy as np
import pytest
from torch_reference import transformers

from fastvlm_jax.images.settings import ImageSettings, image_settings, read_image_settings
from fastvlm_jax.processor import load_processor

SIDE = {"height": 24, "width": 24}
EDGE = {"shortest_edge": 24}
ZERO = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "resample": 3}
FOLDERS = {
    "clip": ({"image_processor_type": "CLIPImageProcessor", "size": EDGE, "crop_size": SIDE, **ZERO}, "crop"),
    "llava": ({"image_processor_type": "LlavaImageProcessor", "size": EDGE, "crop_size": SIDE, **ZERO}, "crop"),
    "padded": (
        {"image_processor_type": "LlavaImageProcessorFast", "do_pad": True, "size": EDGE, "crop_size": SIDE, **ZERO},
        "pad",
    ),
    "siglip": ({"image_processor_type": "SiglipImageProcessor", "size": SIDE, **ZERO}, "stretch"),
    "square": (
        {"image_processor_type": "CLIPImageProcessor", "size": SIDE, "do_center_crop": False, **ZERO},
        "stretch",
    ),
}


def folder_with(settings, tokenizer_file, folder):
    (folder / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return load_processor(folder, lambda size: 1, "chatml")


def pixels_of_transformers(folder, image):
    reference = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    return np.asarray(reference(image, return_tensors="np")["pixel_values"])[0].transpose(1, 2, 0) * 255


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("shape", [(40, 61), (70, 30)])
def test_pixels_equal_those_of_transformers(name, shape, sentencepiece_file, tmp_path):
    settings, fit = FOLDERS[name]
    processor = folder_with(settings, sentencepiece_file, tmp_path)
    assert (processor.fit, processor.image_size) == (fit, 24)
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    np.testing.assert_allclose(processor.pixels(image), pixels_of_transformers(tmp_path, image), atol=1e-3)


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_what_is_written_gives_the_same_pixels_in_transformers(fit, sentencepiece_file, tmp_path):
    written = image_settings(ImageSettings(24, (0.0,) * 3, (1.0,) * 3, fit))
    processor = folder_with(written, sentencepiece_file, tmp_path)
    assert processor.fit == fit
    image = np.random.default_rng(1).integers(0, 256, (33, 50, 3), np.uint8)
    np.testing.assert_allclose(processor.pixels(image), pixels_of_transformers(tmp_path, image), atol=1e-3)


@pytest.mark.parametrize(
    "change, unused",
    [
        ({"resample": 2}, "resample=2"),
        ({"do_rescale": False}, "do_rescale=False"),
        ({"rescale_factor": 1.0}, "rescale_factor=1.0"),
        ({"do_resize": False}, "do_resize=False"),
        ({"do_center_crop": False}, "do_center_crop=False"),
        ({"size": {"shortest_edge": 32}}, "size={'shortest_edge': 32} before crop_size=24"),
    ],
)
def test_settings_that_are_not_computed_are_named(change, unused, sentencepiece_file, tmp_path, caplog):
    settings = {**FOLDERS["clip"][0], **change}
    if change == {"do_center_crop": False}:
        del settings["crop_size"]
    folder_with(settings, sentencepiece_file, tmp_path)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{tmp_path / 'preprocessor_config.json'}: not computed here, so pixels may differ: {unused}"
    )


def test_do_normalize_false_leaves_the_pixels_as_they_are():
    settings = read_image_settings({"size": 8, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": False})
    assert (settings.mean, settings.std) == ((0.0,) * 3, (1.0,) * 3)
