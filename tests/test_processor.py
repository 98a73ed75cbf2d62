import dataclasses
import io
import json

import numpy as np
import PIL.Image
import pytest
import torch_reference  # noqa: F401 (makes torchvision importable)
import transformers
from pictures import photo
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from fastvlm_jax.processor import Processor, load_processor
from fastvlm_jax.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def processor(sentencepiece_file):
    return Processor(load_tokenizer(sentencepiece_file), "chatml", 64, 2)


def png(image):
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def test_two_questions_about_one_image(processor):
    batch = processor(photo(40, 60), ["is it red?", "no"])
    assert batch.images.shape == (1, 1, 64, 64, 3) and batch.images.dtype == np.uint8
    np.testing.assert_array_equal(batch.images[0, 0], processor.pixels(photo(40, 60)))
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


@pytest.mark.parametrize("transparency, ground", [("white", 255), ("drop", 0)])
def test_transparent_pictures_are_the_same_in_every_form_and_in_a_saved_processor(
    processor, tmp_path, transparency, ground
):
    drawn = np.zeros((64, 64, 4), np.uint8)
    drawn[20:40, 20:40] = 90, 60, 30, 255  # a square on a transparent ground, whose stored colour is black
    dataclasses.replace(processor, transparency=transparency).save(tmp_path)
    loaded = load_processor(tmp_path)
    assert loaded.transparency == transparency
    (tmp_path / "a.png").write_bytes(png(drawn))
    expected = np.full((64, 64, 3), ground, np.uint8)
    expected[20:40, 20:40] = 90, 60, 30
    forms = [tmp_path / "a.png", png(drawn), io.BytesIO(png(drawn)), PIL.Image.fromarray(drawn), drawn, drawn / 255]
    batch = loaded(forms, ["no"] * len(forms))
    np.testing.assert_array_equal(batch.images[0], np.stack([expected] * len(forms)))


def test_an_unknown_transparency_is_named(processor):
    with pytest.raises(ValueError, match=r"unknown data\.transparency 'black': choose one of white, drop"):
        dataclasses.replace(processor, transparency="black")


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
    with pytest.raises(ValueError, match=r"images\[0\]: an array of float64 must be in \[0, 1\], not from 0 to 255"):
        processor([np.linspace(0, 255, 48).reshape(4, 4, 3)], "no")


def test_images_and_texts_that_do_not_match_are_refused(processor):
    with pytest.raises(ValueError, match="2 images for 3 texts"):
        processor([photo(9, 9)] * 2, ["no"] * 3)
    with pytest.raises(ValueError, match="image_of must give each of 1 texts one of 2 images"):
        processor([photo(9, 9)] * 2, ["no"], image_of=[2])


def test_unknown_template_is_refused(processor):
    with pytest.raises(ValueError, match=r"unknown data\.template 'v1': choose one of qwen_2, vicuna_v1, plain"):
        Processor(processor.tokenizer, "v1", 64, 1)


# Each template with a tokenizer that has its special tokens.
PAIRS = [
    ("qwen_2", "sentencepiece_file"),
    ("qwen_2", "json_file"),
    ("chatml", "json_file"),
    ("plain", "json_file"),
    ("vicuna_v1", "llama_file"),
    ("plain", "llama_file"),
]
CLIP = dict(image_mean=(0.48145466, 0.4578275, 0.40821073), image_std=(0.26862954, 0.26130258, 0.27577711))


@pytest.mark.parametrize("template, kind", PAIRS)
@pytest.mark.parametrize(
    "settings", [dict(image_size=128, tokens_per_image=4, **CLIP), dict(image_size=0, tokens_per_image=0)]
)
def test_saved_and_loaded_is_the_same_processor(request, template, kind, settings, tmp_path):
    processor = Processor(load_tokenizer(request.getfixturevalue(kind)), template, **settings)
    processor.save(tmp_path)
    again = load_processor(tmp_path)
    for field in dataclasses.fields(Processor)[1:]:
        assert getattr(again, field.name) == getattr(processor, field.name)
    assert again.end_id == processor.end_id
    images = photo(9, 9) if processor.image_size else []
    if template == "plain" and not processor.image_size:
        for each in (processor, again):
            with pytest.raises(ValueError, match=r"prompts: this model's template reads images, no text"):
                each(images, "is it red?")
        return
    ours, theirs = processor(images, "is it red?"), again(images, "is it red?")
    for name in ("tokens", "images", "image_index"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    if not processor.image_size:
        assert not list(tmp_path.glob("*processor*"))


def test_a_chat_template_of_an_earlier_version_is_recognised(json_file, tmp_path):
    """It had a newline behind every image; a folder without image settings names its template nowhere else."""
    Processor(load_tokenizer(json_file), "chatml", 0, 0).save(tmp_path)
    file = tmp_path / "chat_template.jinja"
    lines = file.read_text().split("\n")
    (number,) = (i for i, line in enumerate(lines) if "'image'" in line)
    lines[number] = """{%- if part['type'] == 'image' %}{{- "<image>\\n" }}"""
    file.write_text("\n".join(lines))
    assert load_processor(tmp_path).template == "chatml"
    file.write_text("\n".join(lines[:-1]))
    assert load_processor(tmp_path).template == "qwen_2"  # another template: the default


def test_the_id_that_ends_an_answer(sentencepiece_file, llama_file):
    assert Processor(load_tokenizer(sentencepiece_file), "qwen_2", 0, 0).end_id == 3
    assert Processor(load_tokenizer(llama_file), "vicuna_v1", 0, 0).end_id == 2
    assert Processor(load_tokenizer(llama_file), "plain", 0, 0).end_id == 2


def test_a_model_of_text_alone_refuses_images(sentencepiece_file):
    with pytest.raises(ValueError, match="this model is text-only but was given an image"):
        Processor(load_tokenizer(sentencepiece_file), "chatml", 0, 0)(photo(9, 9), "no")


@pytest.mark.parametrize("settings", [{}, CLIP])
def test_saved_settings_give_transformers_the_same_pixels(processor, settings, tmp_path):
    processor = dataclasses.replace(processor, **settings)
    processor.save(tmp_path)
    theirs = LlavaImageProcessorPil.from_pretrained(tmp_path)
    for image in (photo(50, 90), photo(200, 64)):
        expected = theirs(PIL.Image.fromarray(image), return_tensors="np")["pixel_values"][0]
        ours = (processor.pixels(image) / 255 - processor.image_mean) / processor.image_std
        np.testing.assert_allclose(ours.transpose(2, 0, 1), expected, atol=1e-5)


@pytest.mark.parametrize("size, tokens", [(64, 16), (384, 729), (64, 5), (1024, 256)])
def test_transformers_processor_counts_the_same_placeholders(json_file, size, tokens, tmp_path):
    processor = Processor(load_tokenizer(json_file), "chatml", size, tokens)
    processor.save(tmp_path)
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(theirs).__name__ == "LlavaProcessor"
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is it red?"}]}
    text = theirs.apply_chat_template([message], add_generation_prompt=True)
    batch = theirs(images=PIL.Image.fromarray(photo(50, 90)), text=text, return_tensors="np")
    segment = processor.segment((("user", (0, "is it red?")),), True)
    assert batch["input_ids"][0].tolist() == segment.tokens.tolist()
    np.testing.assert_allclose(
        batch["pixel_values"][0].transpose(1, 2, 0), processor.pixels(photo(50, 90)) / 255, atol=1e-6
    )


def test_tokens_of_an_image_come_from_the_caller_where_given(processor, tmp_path):
    processor.save(tmp_path)
    assert load_processor(tmp_path, lambda size: size // 8).tokens_per_image == 8
    assert load_processor(tmp_path, template="plain", image_size=32).template == "chatml"
    assert load_processor(tmp_path, image_size=32).image_size == 64


@pytest.mark.parametrize("nested", [False, True])
def test_a_folder_as_transformers_publishes_fastvlm(json_file, nested, tmp_path):
    """As its conversion script writes it: CLIPImageProcessor, LlavaProcessor with patch_size 64, its chat template."""
    load_tokenizer(json_file).save(tmp_path)
    side = {"height": 256, "width": 256}
    image = CLIPImageProcessorPil(
        crop_size=side, size={"shortest_edge": 256}, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    joined = {"processor_class": "LlavaProcessor", "patch_size": 64, "vision_feature_select_strategy": "full"}
    if nested:
        joined["image_processor"] = image.to_dict()
    else:
        image.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps(joined))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    found = load_processor(tmp_path)
    assert (found.template, found.image_size, found.tokens_per_image) == ("qwen_2", 256, 16)
    assert (found.image_mean, found.image_std) == ((0, 0, 0), (1, 1, 1))
    found = load_processor(tmp_path, lambda size: size // 2, "chatml")
    assert (found.template, found.tokens_per_image) == ("chatml", 128)
    joined["vision_feature_select_strategy"] = "default"
    (tmp_path / "processor_config.json").write_text(json.dumps({**joined, "num_additional_image_tokens": 1}))
    assert load_processor(tmp_path).tokens_per_image == 16


def test_a_folder_with_a_tokenizer_alone(json_file, llama_file):
    found = load_processor(json_file.parent)
    assert (found.template, found.image_size, found.tokens_per_image) == ("qwen_2", 0, 0)
    assert load_processor(llama_file.parent).template == "vicuna_v1"
    assert load_processor(llama_file.parent, template="plain").template == "plain"
    found = load_processor(json_file.parent, lambda size: size // 2, "chatml", 64)
    assert (found.template, found.image_size, found.tokens_per_image) == ("chatml", 64, 32)
    with pytest.raises(ValueError, match="does not say how many tokens an image has: give tokens_per_image"):
        load_processor(json_file.parent, image_size=64)


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("preprocessor_config.json", "{", r"preprocessor_config\.json is not readable JSON"),
        ("preprocessor_config.json", "[]", r"preprocessor_config\.json holds no JSON object"),
        (
            "preprocessor_config.json",
            '{"crop_size": "x"}',
            r"preprocessor_config\.json: the image settings .* size 'x'",
        ),
        ("preprocessor_config.json", '{"size": {"height": 3, "width": 4}}', "must be one side of a square"),
        ("preprocessor_config.json", '{"size": 8, "image_mean": [0]}', "three numbers"),
        ("preprocessor_config.json", '{"size": 8, "image_mean": 0}', "cannot be read: TypeError"),
        ("preprocessor_config.json", '{"size": 8, "fastvlm_jax": {}}', "does not say how many tokens"),
        (
            "preprocessor_config.json",
            '{"size": 8, "fastvlm_jax": {"template": "plain"}}',
            "KeyError 'tokens_per_image'",
        ),
        ("preprocessor_config.json", '{"size": 8, "fastvlm_jax": 3}', "cannot be read"),
        (
            "processor_config.json",
            '{"image_processor": {"size": 8}, "patch_size": 0}',
            r"processor_config\.json: .*Zero",
        ),
    ],
)
def test_damaged_settings_are_named(json_file, tmp_path, name, text, words):
    load_tokenizer(json_file).save(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        load_processor(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        load_processor(tmp_path)


@pytest.mark.parametrize("template, kind", PAIRS)
@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize("system", [False, True])
def test_transformers_chat_template_gives_the_ids_of_render(
    request, tmp_path, template, kind, generation_prompt, system
):
    processor = Processor(load_tokenizer(request.getfixturevalue(kind)), template, 64, 1)
    processor.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    turns = [("user", (0, "is it red?")), ("assistant", (" no\n",)), ("user", ("what color\nis it? ",))]
    turns += [("assistant", ("red",)), ("user", (1,)), ("assistant", ("no",)), ("user", (2, 3))]
    turns = [("system", ("no",))] * system + turns
    part = {int: lambda _: {"type": "image"}, str: lambda text: {"type": "text", "text": text}}
    messages = [{"role": role, "content": [part[type(c)](c) for c in content]} for role, content in turns]
    as_text = [m if m["role"] == "user" else m | {"content": m["content"][-1]["text"]} for m in messages]
    ids = processor.segment(tuple(turns), generation_prompt).tokens.tolist()
    for written in (messages, as_text):
        found = theirs.apply_chat_template(written, add_generation_prompt=generation_prompt, return_dict=False)
        assert found == ids
