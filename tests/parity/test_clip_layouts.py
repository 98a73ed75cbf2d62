"""CLIPs of open_clip and of ml-mobileclip: read with both towers, written, and loaded strictly by open_clip again.

The image tower is MobileCLIP2-S0's at its size, which open_clip's names fix; the text tower is small.
"""

import dataclasses
import json
import math
import pathlib
from functools import partial

import numpy as np
import pytest
import torch
from absl import logging
from clip_vocabulary import open_clip_tokenizer
from round_trip import assert_same_tensors, assert_same_variables, write
from safetensors.numpy import load_file, save_file
from torch_reference import jit, randomise, relative, timm

import fastvlm_jax
from fastvlm_jax import model_io
from fastvlm_jax.convert.layouts import mobileclip
from fastvlm_jax.convert.tables import apple, text_tower
from fastvlm_jax.convert.tables import timm as timm_table
from fastvlm_jax.models import fastvlm, kinds
from fastvlm_jax.models.text_tower import TextTower

import open_clip  # isort: skip  after torch_reference, which makes torchvision importable
from open_clip.convert import convert_state_dict  # isort: skip

TEXT = {"width": 32, "heads": 2, "layers": 2, "vocab_size": 64}
TOKENS = torch.tensor([[62, 7, 9, 63] + 73 * [0], [62, 3, 63] + 74 * [0]])


def make(config, fold=False):
    """open_clip's CLIP of a config, strictly as it builds it; folded by timm."""
    model = open_clip.model.CustomTextCLIP(**{key: x for key, x in config.items() if key != "custom_text"}).eval()
    if fold:
        model.visual.trunk = timm.utils.reparameterize_model(model.visual.trunk)
    return model


def arrays(model):
    return {name: x.numpy().copy() for name, x in model.state_dict().items()}


def folder_of(folder, config, tensors, **images):
    """An open_clip directory."""
    folder.mkdir()
    save_file(tensors, folder / "open_clip_model.safetensors")
    settings = {"model_cfg": config, "preprocess_cfg": {"mean": [0.0] * 3, "std": [1.0] * 3, **images}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return folder


def config_of(name, **text):
    config = open_clip.get_model_config(name)
    config["text_cfg"] |= {**TEXT, **text}
    return config


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(config, model, its tensors, open_clip directory) of MobileCLIP2-S0 with a small text tower."""
    config = config_of("MobileCLIP2-S0")
    model = randomise(make(config), 3)
    with torch.no_grad():
        for parameter in model.text.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        model.logit_scale.fill_(2.5)
    tensors = arrays(model)
    return config, model, tensors, folder_of(tmp_path_factory.mktemp("clip") / "openclip", config, tensors)


def tensors_of(folder):
    return load_file(folder / "open_clip_model.safetensors")


def described(folder):
    return json.loads((folder / "open_clip_config.json").read_text())


def load_strictly(config, tensors, fold=False):
    """open_clip's CLIP of a config with these tensors, not one more or less."""
    with torch.device("meta"):  # initial weights would take longer than the rest
        model = make(config, fold)
    model.load_state_dict({name: torch.from_numpy(x) for name, x in tensors.items()}, strict=True, assign=True)
    return model


def check_round_trip(config, tensors, folder, out):
    """The same tensors and config come back, and open_clip takes them."""
    write(folder, out, "openclip")
    assert_same_tensors(tensors, tensors_of(out))
    ours = described(out)
    assert ours["model_cfg"] == config and ours["preprocess_cfg"]["mean"] == [0.0] * 3
    load_strictly(ours["model_cfg"], tensors_of(out))


def test_an_open_clip_directory_comes_back_bit_for_bit_and_loads_strictly(small, tmp_path):
    config, _, tensors, folder = small
    check_round_trip(config, tensors, folder, tmp_path / "out")


@pytest.mark.full
def test_the_full_size_of_s3_comes_back_bit_for_bit_and_loads_strictly(tmp_path):
    config = open_clip.get_model_config("MobileCLIP2-S3")
    tensors = arrays(randomise(make(config), 0))
    check_round_trip(config, tensors, folder_of(tmp_path / "openclip", config, tensors), tmp_path / "out")
    reloaded = open_clip.create_model(f"local-dir:{tmp_path / 'out'}", require_pretrained=True)
    assert_same_tensors(tensors, arrays(reloaded))


def test_a_loaded_clip_embeds_texts_as_open_clip_does(small):
    _, theirs, tensors, folder = small
    model, variables, processor = fastvlm_jax.load(folder)
    assert processor is None and model.llm_args is None
    ours = jit(partial(model.apply, method="embed_texts"))(variables, TOKENS.numpy().astype(np.int32))
    with torch.no_grad():
        assert relative(ours, theirs.encode_text(TOKENS, normalize=True)) <= 1e-5
    head = variables["params"]["vision"]["head"]
    np.testing.assert_array_equal(head["kernel"], tensors["visual.trunk.head.fc.weight"].T)
    assert variables["params"]["logit_scale"].shape == () and variables["params"]["logit_scale"] == 2.5


def test_the_folded_form_loads_strictly_in_open_clips_folded_model(small, tmp_path):
    config, _, tensors, folder = small
    out = write(folder, tmp_path / "out", "openclip", fold=True)
    load_strictly(config, tensors_of(out), fold=True)
    text = {name: x for name, x in tensors.items() if name.startswith(("text.", "logit_"))}
    assert_same_tensors(text, {name: x for name, x in tensors_of(out).items() if name in text})
    assert_same_tensors(tensors_of(out), tensors_of(write(out, tmp_path / "again", "openclip")))
    assert model_io.read(out).config["vision"]["form"] == "folded"


def test_old_names_names_of_ddp_and_a_factor_in_a_vector_are_read_alike(small, tmp_path):
    """A CLIP of older versions is one module, DDP adds `module.`, and some factors have one dimension."""
    config, _, tensors, folder = small
    expected = model_io.read(folder)
    old = {name.removeprefix("text."): x for name, x in tensors.items()}
    ddp = {f"module.{name}": x for name, x in old.items()} | {"module.logit_scale": tensors["logit_scale"].reshape(1)}
    for name, stored in (("old", old), ("ddp", ddp)):
        loaded = model_io.read(folder_of(tmp_path / name, config, stored))
        assert loaded.config == expected.config
        assert_same_variables(loaded.variables, expected.variables)


def test_a_bias_of_the_logits_makes_the_model_a_sigmoid_one_and_is_written_back(small, tmp_path):
    config, _, tensors, _ = small
    config = {**config, "init_logit_bias": -10.0, "init_logit_scale": math.log(10)}
    tensors = {**tensors, "logit_bias": np.array(-9.5, np.float32)}
    folder = folder_of(tmp_path / "sigmoid", config, tensors)
    loaded = model_io.read(folder)
    assert loaded.config["sigmoid"] and np.asarray(loaded.variables["params"]["logit_bias"]) == -9.5
    check_round_trip(config, tensors, folder, tmp_path / "out")


def test_image_statistics_and_sizes_of_the_text_tower_are_kept(small, tmp_path):
    config, _, tensors, _ = small
    statistics = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    text = {**config["text_cfg"], "norm_kwargs": {"eps": 1e-6}}
    folder = folder_of(tmp_path / "in", {**config, "text_cfg": text}, tensors, **statistics)
    loaded = model_io.read(folder)
    assert loaded.config["vision"]["image_mean"] == statistics["mean"]
    assert loaded.config["text"] == {
        "features": 512, "width": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 64, "context_length": 77,
        "epsilon": 1e-6,
    }  # fmt: skip
    for layout in ("native", "openclip"):
        write(folder, tmp_path / layout, layout)
        again = model_io.read(tmp_path / layout)
        # lists in both: the config that a native directory stores is JSON
        assert json.loads(json.dumps(again.config)) == json.loads(json.dumps(loaded.config))
        trees = (read.variables | {"counters": {}} for read in (again, loaded))
        assert_same_variables(*trees)
    ours = described(tmp_path / "openclip")
    assert ours["model_cfg"]["text_cfg"] == text
    assert ours["preprocess_cfg"] == {**statistics, "interpolation": "bilinear", "resize_mode": "shortest"}


def test_timm_gets_the_image_tower_and_other_layouts_refuse_a_clip(small, tmp_path):
    _, _, tensors, folder = small
    trunk = {name.removeprefix("visual.trunk."): x for name, x in tensors.items() if name.startswith("visual.trunk.")}
    assert_same_tensors(trunk, load_file(write(folder, tmp_path / "timm", "timm") / "model.safetensors"))
    for layout in ("hf", "llava"):
        with pytest.raises(ValueError, match=f"^the {layout} layout holds no CLIP: use --layout openclip or native"):
            write(folder, tmp_path / layout, layout)
        assert not (tmp_path / layout).exists()


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"text_cfg": {**TEXT}}, "text_cfg.no_causal_mask is False, this package computes True alone"),
        ({"quick_gelu": True}, "quick_gelu is True, which this package does not compute"),
        ({"text_cfg": {"no_causal_mask": True, "hf_model_name": "roberta"}}, "text_cfg.hf_model_name is 'roberta'"),
        ({"text_cfg": {**TEXT, "no_causal_mask": True, "mlp_ratio": 2.0}}, "text_cfg.mlp_ratio is 2.0"),
        ({"text_cfg": {**TEXT, "no_causal_mask": True, "rotary": True}}, "text_cfg.rotary is unknown to this package"),
        ({"text_cfg": None}, "text_cfg is missing or not an object"),
    ],
)  # fmt: skip
def test_the_image_tower_of_a_clip_with_another_text_tower_is_read_with_one_warning(
    small, change, reason, tmp_path, monkeypatch
):
    config, _, tensors, folder = small
    told = []
    monkeypatch.setattr(logging, "warning", lambda message, *args: told.append(message % args))
    other = folder_of(tmp_path / "other", {**config, **change}, tensors)
    loaded = model_io.read(other)
    assert set(loaded.config) == {"vision", "dtype"} and set(loaded.variables["params"]) == {"vision"}
    assert len(told) == 1 and told[0].startswith(f"{other / 'open_clip_config.json'}: the text tower is left out: ")
    assert reason in told[0]
    whole = model_io.read(folder)
    assert_same_variables(loaded.variables["params"]["vision"], whole.variables["params"]["vision"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c, t: c["text_cfg"].update(layers=1), r"tensor text\.transformer\.resblocks\.1\..* is not part"),
        (lambda c, t: c["text_cfg"].update(heads="x"), r"open_clip_config\.json does not describe a CLIP"),
        (lambda c, t: c.update(embed_dim=32), r"does not describe a CLIP: model\.vision\.head_features=512 must be 32"),
        (lambda c, t: t.pop("logit_scale"), r"tensor logit_scale is missing"),
        (lambda c, t: t.update(logit_scale=np.zeros(2, np.float32)), r"tensor logit_scale has shape \(2,\)"),
        (lambda c, t: t.update(more=np.zeros(2, np.float32)), r"tensor more is not part of this model"),
    ],
)  # fmt: skip
def test_what_contradicts_the_config_is_named_in_one_line(small, change, message, tmp_path):
    config, tensors = json.loads(json.dumps(small[0])), dict(small[2])
    change(config, tensors)
    with pytest.raises(ValueError, match=message) as error:
        model_io.read(folder_of(tmp_path / "wrong", config, tensors))
    assert str(tmp_path / "wrong") in str(error.value) and "\n" not in str(error.value)


# Tokenizers and image settings beside the weights.


@pytest.fixture(scope="module")
def worded(small, tmp_path_factory):
    """An open_clip directory like `small` with CLIP's vocabulary of 49,408 tokens beside the weights."""
    config, tensors = json.loads(json.dumps(small[0])), dict(small[2])
    config["text_cfg"]["vocab_size"] = 49_408
    tensors["text.token_embedding.weight"] = np.random.default_rng(0).normal(size=(49_408, 32)).astype(np.float32)
    colours = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]}
    folder = folder_of(tmp_path_factory.mktemp("worded") / "openclip", config, tensors, **colours)
    vocabulary = pathlib.Path(open_clip_tokenizer().default_bpe())
    (folder / vocabulary.name).write_bytes(vocabulary.read_bytes())
    return folder


def test_an_open_clip_directory_with_clips_vocabulary_has_a_processor(worded, tmp_path):
    """It is kept by the native layout and, but for the way to fit images, by open_clip's own again."""
    processor = model_io.read(worded).processor
    texts = ["a photo of a dog", "Two red boxes! on a table"]
    np.testing.assert_array_equal(processor.texts(texts), open_clip_tokenizer().tokenize(texts))
    assert (processor.image_size, processor.context_length, processor.fit) == (256, 77, "crop")
    assert (processor.image_mean, processor.image_std) == ((0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
    for layout in ("native", "openclip"):
        write(worded, tmp_path / layout, layout)
        again = model_io.read(tmp_path / layout).processor
        assert dataclasses.replace(again, tokenizer=processor.tokenizer) == processor
        np.testing.assert_array_equal(again.texts(texts), processor.texts(texts))


@pytest.mark.parametrize(
    "tower, images, expected",
    [
        ({"image_size": 64}, {}, (64, "crop")),
        ({"image_size": [96, 96]}, {"resize_mode": "squash"}, (96, "stretch")),
        ({"image_size": None}, {"resize_mode": "longest"}, (224, "pad")),
        ({"image_size": [96, 64]}, {}, r"config.json: model_cfg.vision_cfg.image_size is \[96, 64\], it must be"),
        ({"image_size": 0}, {}, "model_cfg.vision_cfg.image_size is 0, it must be the side of a square"),
        ({}, {"resize_mode": "wide"}, "resize_mode is 'wide', it must be one of shortest, longest, squash"),
    ],
)  # fmt: skip
def test_size_and_fit_are_open_clips(worded, tower, images, expected, tmp_path):
    """Without a size open_clip takes 224 pixels."""
    folder = tmp_path / "other"
    folder.mkdir()
    for path in worded.iterdir():
        (folder / path.name).symlink_to(path)
    settings = described(worded)
    settings["model_cfg"]["vision_cfg"] |= tower
    if settings["model_cfg"]["vision_cfg"]["image_size"] is None:
        del settings["model_cfg"]["vision_cfg"]["image_size"]
    settings["preprocess_cfg"] |= images
    (folder / "open_clip_config.json").unlink()
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            model_io.read(folder)
    else:
        processor = model_io.read(folder).processor
        assert (processor.image_size, processor.fit) == expected


def test_another_vocabulary_than_the_text_towers_is_refused(small, worded, tmp_path):
    config, _, tensors, _ = small
    folder = folder_of(tmp_path / "small", config, tensors)
    (vocabulary,) = worded.glob("*.gz")
    (folder / vocabulary.name).symlink_to(vocabulary)
    with pytest.raises(ValueError, match=r"bpe_simple_vocab_16e6.txt.gz has 49,408 ids and the model 64: its text"):
        model_io.read(folder)


# ml-mobileclip's own files.


def mobileclip_folder(folder, config, tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "mobileclip_own.json").write_text(json.dumps(config))
    return folder


def mobileclip_config(**text):
    """Its config of MCi0 with the text tower of its larger sizes, as small as TEXT."""
    sizes = {"context_length": 77, "vocab_size": 64, "dim": 32, "n_heads_per_layer": 2, "n_transformer_layers": 2}
    choices = {"ffn_multiplier_per_layer": 4.0, "norm_layer": "layer_norm_fp32", "causal_masking": False}
    text = {**sizes, **choices, "model_name": "base", **text}
    return {"embed_dim": 512, "image_cfg": {"image_size": 256, "model_name": "mci0"}, "text_cfg": text}


@pytest.fixture(scope="module")
def apples(small):
    """The tensors of `small` under ml-mobileclip's names, shaped as there; its projection has no bias."""
    _, _, tensors, folder = small
    model = kinds.build(**model_io.read(folder).config)
    vision, text = fastvlm.make_encoder(**model.vision_args).clone(head_bias=False), TextTower(**model.text_args)
    theirs = [*timm_table.tower_rows(vision, "visual.trunk."), *text_tower.tower_rows(text)]
    rows = [*apple.tower_rows(vision, "image_encoder.model."), *apple.text_rows(text)]
    found = {"logit_scale": tensors["logit_scale"]}
    for their_row, row in zip(theirs, rows, strict=True):
        found |= {name: tensors[their_name] for name, their_name in zip(row.names(), their_row.names(), strict=True)}
    head, positions = "image_encoder.model.head.proj", "text_encoder.positional_embedding.pos_embed.pos_embed"
    return found | {head: np.ascontiguousarray(found[head].T), positions: found[positions][None, None]}


def test_ml_mobileclips_own_file_is_read_as_open_clip_converts_it(small, apples, tmp_path):
    """open_clip renames Apple's tensors by its own list, and loads the result strictly; ours have DDP's prefix too."""
    config, model, tensors, _ = small
    assert apples["text_encoder.transformer.1.pre_norm_mha.1.qkv_proj.weight"].shape == (96, 32)
    assert apples["image_encoder.model.patch_embed.0.rbr_conv.0.conv.weight"].shape == (64, 3, 3, 3)
    assert apples["image_encoder.model.network.7.0.convffn.fc1.weight"].shape == (1536, 512, 1, 1)
    stored = {f"module.{name}": x for name, x in apples.items()}
    ours = model_io.read(mobileclip_folder(tmp_path / "apple", mobileclip_config(), stored))
    converted = convert_state_dict(model, {name: torch.from_numpy(x) for name, x in apples.items()})
    converted = {name: x.numpy().copy() for name, x in converted.items()}
    load_strictly(config, converted)
    assert_same_tensors(converted, tensors | {"visual.trunk.head.fc.bias": np.zeros(512, np.float32)})

    theirs = model_io.read(folder_of(tmp_path / "openclip", config, converted))
    assert ours.config["text"] == theirs.config["text"] and ours.config["sigmoid"] is False
    vision = {key: tuple(x) if isinstance(x, list) else x for key, x in ours.config["vision"].items()}
    assert vision["image_std"] == (1.0, 1.0, 1.0) and vision["head_bias"] is False
    assert ours.processor is None and mobileclip.image_settings(tmp_path / "apple") == (256, "crop")
    assert_same_tensors(tensors_of(write(tmp_path / "apple", tmp_path / "out", "openclip")), converted)


@pytest.mark.parametrize(
    "image, text, message",
    [
        ("mci0", {"model_name": "mct"}, "text_cfg.model_name is 'mct', .* use MobileCLIP2-S0"),
        ("vit_b16", {"causal_masking": True}, "image_cfg.model_name is 'vit_b16', this package has mci0, mci1"),
        ("mci0", {"causal_masking": True}, "text_cfg.causal_masking is True, this package computes False alone: use"),
        ("mci0", {"ffn_multiplier_per_layer": 2.0}, "text_cfg.ffn_multiplier_per_layer is 2.0"),
        ("mci0", {"rotary": True}, "text_cfg.rotary asks for a text tower"),
        (["mci0"], {}, "image_cfg.model_name is"),
    ],
)  # fmt: skip
def test_towers_of_ml_mobileclip_that_are_not_here_are_refused_by_name(apples, image, text, message, tmp_path):
    config = mobileclip_config(**text)
    config["image_cfg"]["model_name"] = image
    folder = mobileclip_folder(tmp_path / "apple", config, apples)
    with pytest.raises(ValueError, match=message) as error:
        model_io.read(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_ml_mobileclips_pickle_is_refused_with_the_mend(tmp_path):
    (tmp_path / "mobileclip_s2.json").write_text(json.dumps(mobileclip_config()))
    (tmp_path / "mobileclip_s2.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"mobileclip_s2\.pt is a pickle, .* convert it to safetensors first"):
        model_io.read(tmp_path)
