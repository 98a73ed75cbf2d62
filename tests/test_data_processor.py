import io
import json

import jinja2
import numpy as np
import PIL.Image
import pytest
from test_data_image import photo
from test_data_tokenizer import json_file, sentencepiece_file  # noqa: F401 (fixtures)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from fastvlm_jax.data.conversation import TEMPLATES
from fastvlm_jax.data.image import pad_to_square
from fastvlm_jax.data.processor import Processor, chat_template, load_processor
from fastvlm_jax.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def processor(sentencepiece_file):  # noqa: F811
    return Processor(load_tokenizer(sentencepiece_file), "chatml", 64, 2)


def png(image):
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def test_two_questions_about_one_image(processor):
    batch = processor(photo(40, 60), ["is it red?", "no"])
    assert batch.images.shape == (1, 1, 64, 64, 3) and batch.images.dtype == np.uint8
    np.testing.assert_array_equal(batch.images[0, 0], pad_to_square(photo(40, 60), 64))
    assert batch.image_mask.tolist() == [[True]]
    for name in ("tokens", "image_index", "targets", "segment_ids", "positions", "loss_mask"):
        array = getattr(batch, name)
        assert array.shape == (1, 2, 16) and array.dtype == (bool if name == "loss_mask" else np.int32)
    # <|im_start|> user \n I I \n is it red ? <|im_end|> \n <|im_start|> assistant \n   |   ... no ...
    assert batch.image_index[0].tolist() == [[-1, -1, -1, 0, 1] + [-1] * 11] * 2
    assert batch.segment_ids[0].tolist() == [[1] * 15 + [0], [1] * 12 + [0] * 4]
    assert batch.positions[0].tolist() == [[*range(15), 0], [*range(12), 0, 0, 0, 0]]
    assert processor.tokenizer.decode(batch.tokens[0, 1, :12]) == "user\n\nno\nassistant\n"
    assert not batch.targets.any() and not batch.loss_mask.any()


def test_each_text_reads_its_own_image(processor):
    images = [photo(64, 64, seed) for seed in range(3)]
    assert processor(images, ["no"] * 3).image_index.max(axis=-1).tolist() == [[1, 3, 5]]
    assert processor(images, ["no"] * 2, image_of=[2, 0]).image_index.max(axis=-1).tolist() == [[5, 1]]


def test_text_alone_needs_no_image(processor):
    batch = processor([], "is it red?")
    assert batch.images.shape == (1, 0, 64, 64, 3) and batch.image_index.max() == -1


def test_files_bytes_and_arrays_are_the_same_image(processor, tmp_path):
    image = photo(50, 30)
    (tmp_path / "a.png").write_bytes(png(image))
    batch = processor([tmp_path / "a.png", str(tmp_path / "a.png"), png(image), image], ["no"] * 4)
    assert (batch.images == batch.images[:, :1]).all()


def test_length_is_a_multiple_of_16_or_as_given(processor):
    assert processor([], "no" + " red" * 8).tokens.shape[-1] == 32
    assert processor([], "no", length=40).tokens.shape[-1] == 40


@pytest.mark.parametrize("limit", [{"max_length": 11}, {"length": 11}, {"length": 16, "max_length": 11}])
def test_a_prompt_too_long_is_refused_with_both_lengths(processor, limit):
    assert processor(photo(9, 9), "no", max_length=12).tokens.shape[-1] == 16
    with pytest.raises(ValueError, match="the prompt is 12 tokens long, more than the 11 allowed: shorten it"):
        processor(photo(9, 9), "no", **limit)


def test_bad_images_are_named(processor, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.png: the image is empty"):
        processor(tmp_path / "empty.png", "no")
    with pytest.raises(FileNotFoundError, match=r"there is no image .*absent\.png"):
        processor([str(tmp_path / "absent.png")], "no")
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\], not float64 \[4, 4, 3\]"):
        processor([np.zeros((4, 4, 3))], "no")


def test_images_and_texts_that_do_not_match_are_refused(processor):
    with pytest.raises(ValueError, match="2 images for 3 texts"):
        processor([photo(9, 9)] * 2, ["no"] * 3)
    with pytest.raises(ValueError, match="image_of must give each of 1 texts one of 2 images"):
        processor([photo(9, 9)] * 2, ["no"], image_of=[2])


def test_unknown_template_is_refused(processor):
    with pytest.raises(ValueError, match=r"unknown data\.template 'v1': choose one of qwen_2, chatml, plain"):
        Processor(processor.tokenizer, "v1", 64, 1)


@pytest.mark.parametrize("kind", ["sentencepiece_file", "json_file"])
def test_saved_and_loaded_gives_the_same_batch(request, kind, tmp_path):
    processor = Processor(load_tokenizer(request.getfixturevalue(kind)), "qwen_2", 128, 4)
    processor.save(tmp_path)
    again = load_processor(tmp_path)
    assert (again.template, again.image_size, again.tokens_per_image) == ("qwen_2", 128, 4)
    ours, theirs = processor(photo(9, 9), "is it red?"), again(photo(9, 9), "is it red?")
    for name in ("tokens", "images", "image_index"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_saved_settings_give_transformers_the_same_pixels(processor, tmp_path):
    processor.save(tmp_path)
    theirs = LlavaImageProcessorPil.from_pretrained(tmp_path)
    for image in (photo(50, 90), photo(200, 64)):
        expected = theirs(PIL.Image.fromarray(image), return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(processor.pixels(image).transpose(2, 0, 1) / 255, expected, atol=1e-6)


def test_settings_that_are_not_ours_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no processor in .*preprocessor_config\.json is missing"):
        load_processor(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"crop_size": 3}))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is not a processor of fastvlm_jax"):
        load_processor(tmp_path)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize("system", [False, True])
def test_chat_template_writes_what_render_does(json_file, template, generation_prompt, system):  # noqa: F811
    processor = Processor(load_tokenizer(json_file), template, 64, 1)
    turns = [("user", (0, "is it red?")), ("assistant", ("no",)), ("user", ("what color\nis it?",))]
    turns = [("system", ("no",))] * system + turns
    part = {int: lambda _: {"type": "image"}, str: lambda text: {"type": "text", "text": text}}
    messages = [{"role": role, "content": [part[type(c)](c) for c in content]} for role, content in turns]
    text = jinja2.Template(chat_template(TEMPLATES[template])).render(
        messages=messages, add_generation_prompt=generation_prompt
    )
    # Read the special tokens back from the text: what transformers does.
    import tokenizers

    plain = tokenizers.Tokenizer.from_file(str(json_file))
    plain.add_special_tokens(["<image>"])
    ids = processor.segment(tuple(turns), generation_prompt).tokens
    assert plain.encode(text).ids == ids.tolist()
    as_text = [m | {"content": m["content"][-1]["text"]} if m["role"] != "user" else m for m in messages]
    assert (
        jinja2.Template(chat_template(TEMPLATES[template])).render(
            messages=as_text, add_generation_prompt=generation_prompt
        )
        == text
    )
