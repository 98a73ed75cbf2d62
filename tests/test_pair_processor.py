"""The processor of stage 0 in a folder."""

import dataclasses
import json

import numpy as np
import PIL.Image
import pytest

from fastvlm_jax.pair_processor import PairProcessor, load_pair_processor
from fastvlm_jax.text.caption_tokenizer import load_caption_tokenizer

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture
def processor(json_file):
    return PairProcessor(load_caption_tokenizer(json_file), 77, 32, MEAN, STD)


@pytest.mark.parametrize(
    "changes", [{}, {"fit": "pad", "transparency": "drop"}, {"fit": "stretch", "teachers": (768, 2)}]
)
def test_a_saved_processor_is_read_back(processor, tmp_path, changes):
    saved = dataclasses.replace(processor, **changes)
    saved.save(tmp_path / "processor")
    again = load_pair_processor(tmp_path / "processor")
    assert dataclasses.replace(again, tokenizer=saved.tokenizer) == saved
    texts = ["is it red?", ""]
    np.testing.assert_array_equal(again.tokenizer(texts, 77), saved.tokenizer(texts, 77))
    assert again.background == (122, 116, 104)


def test_images_and_texts_are_what_the_towers_read(processor, tmp_path):
    """A picture of 64 x 48, left half red: the crop of its centre keeps the border in the middle."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:, :32, 0] = 255
    PIL.Image.fromarray(picture).save(tmp_path / "a.png")
    found = processor.images([tmp_path / "a.png", picture])
    assert found.shape == (1, 2, 32, 32, 3) and found.dtype == np.uint8
    assert (found[0, 0, :, :14, 0] > 250).all() and (found[0, 0, :, 18:] < 5).all()
    np.testing.assert_array_equal(found[0, 0], found[0, 1])
    assert processor.texts(["is it red?"]).shape == (1, 77)
    with pytest.raises(FileNotFoundError):
        processor.images([tmp_path / "none.png"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fastvlm_jax": {}}, "preprocessor_config.json has no context_length of a text tower: it is not of a run of"),
        ({"image_std": [0, 1, 1]}, "preprocessor_config.json: the image settings cannot be read: image_mean"),
        ({"fastvlm_jax": {"context_length": 77}}, "the image settings cannot be read: KeyError 'transparency'"),
        ({"fastvlm_jax": {"context_length": 1, "transparency": "white", "teachers": []}}, "context_length=1 must hold"),
    ],
)
def test_damaged_settings_are_refused_in_one_line(processor, tmp_path, change, message):
    processor.save(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        load_pair_processor(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, message", [({"fit": "wide"}, "data.fit 'wide'"), ({"transparency": "x"}, "data.transparency 'x'")]
)
def test_unknown_settings_are_refused(processor, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(processor, **change)
