"""Tests of every layout: torch -> jax -> torch bit for bit, and strict loading in the library the layout comes from.

The encoder is FastViTHD at its full size, which ml-fastvlm's layout requires; language models are small.
"""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from round_trip import assert_same_tensors, assert_same_variables, write
from safetensors.numpy import load_file, save_file
from torch_reference import jit, randomise, relative, timm, to_nchw, transformers

import fastvlm_jax
from fastvlm_jax import convert, model_io
from fastvlm_jax.convert.layouts import llava as llava_layout
from fastvlm_jax.generate import generate_tokens
from fastvlm_jax.models import fastvlm, kinds
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.bpe import byte_spelling
from fastvlm_jax.text.tokenizer import bpe_tokenizer, load_tokenizer, train_sentencepiece

BFLOAT16 = ml_dtypes.bfloat16
TEXT = dict(
    vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, eos_token_id=3, bos_token_id=0, pad_token_id=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(["what is in the picture? a red circle, a blue square"], path, TEXT["vocab_size"])
    return path


def random_tensor(name, shape, rng):
    """Returns random weights of unit gain; factors, variances and layer scales lie in [0.5, 1.5].

    As in a real encoder, images determine the features: biases are small, mixers near the identity.
    """
    if "vision_tower" in name and name.endswith(("bias", "mean")):
        return (rng.standard_normal(shape, np.float32) * 0.02).astype(np.float32)
    if "reparam_conv.weight" in name and ("mixer" in name or "pos_emb" in name):
        kernel = (rng.standard_normal(shape, np.float32) * 0.1).astype(np.float32)
        kernel[:, :, shape[-1] // 2, shape[-1] // 2] += 1
        return kernel
    if (len(shape) == 1 and name.endswith(("weight", "var"))) or name.endswith("gamma"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return (rng.standard_normal(shape, np.float32) * (2 / max(np.prod(shape[1:]), 10)) ** 0.5).astype(np.float32)


@pytest.fixture(scope="module")
def published(tokenizer_file, tmp_path_factory):
    """Folder of a FastVLM in transformers' layout: bfloat16, in shards, untied, with the processor's files."""
    folder = tmp_path_factory.mktemp("published") / "fastvlm"
    image = load_tokenizer(tokenizer_file).special_id("<image>")
    config = transformers.FastVlmConfig(
        text_config={**TEXT, "model_type": "qwen2"}, image_token_index=image, tie_word_embeddings=False
    )
    config.save_pretrained(folder)
    with torch.device("meta"):  # names and shapes only: random weights of its own would take half a minute
        expected = transformers.FastVlmForConditionalGeneration(config).state_dict()
    rng = np.random.default_rng(0)
    tensors = {
        name: random_tensor(name, x.shape, rng).astype(BFLOAT16) if x.is_floating_point() else np.array(0)
        for name, x in expected.items()
    }
    names, weight_map = list(tensors), {}
    for i in range(3):
        shard = f"model-{i + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[i::3]}, folder / shard)
        weight_map |= dict.fromkeys(names[i::3], shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    load_tokenizer(tokenizer_file).save(folder)
    settings = {
        "image_processor_type": "LlavaImageProcessor",
        "do_pad": True,
        "crop_size": {"height": 256, "width": 256},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def tensors_of(folder):
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def test_fastvlm_of_transformers_comes_back_bit_for_bit_and_answers_the_same(published, tmp_path):
    """Our 32 greedy tokens about an image equal those of transformers, which loads the directory that we wrote."""
    out = write(published, tmp_path / "out", "hf")
    assert_same_tensors(tensors_of(published), tensors_of(out))

    load = transformers.FastVlmForConditionalGeneration.from_pretrained
    theirs, info = load(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    model, variables, processor = fastvlm_jax.load(published)
    picture = np.random.default_rng(0).integers(0, 256, (200, 256, 3), np.uint8)
    batch = processor([picture], ["what is in the picture?"])
    end = 10**6  # an id that never occurs, so that all 32 tokens are compared
    decode = jit(
        lambda variables, batch: generate_tokens(model, variables, batch, jax.random.key(0), max_tokens=32, end=end)
    )
    ours, of_another = (
        decode(variables, batch),
        decode(variables, processor([picture[:, ::-1] // 2], ["what is in the picture?"])),
    )
    length = int((batch.segment_ids > 0).sum())
    with torch.no_grad():
        answer = theirs.generate(
            input_ids=torch.from_numpy(batch.tokens[0, :, :length]).long(),
            pixel_values=to_nchw(batch.images[0].astype(np.float32) / 255),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=end,
        )
    assert answer[0, length:].tolist() == ours[0].tolist()
    assert ours[0].tolist() != of_another[0].tolist()  # the answer depends on the image


@pytest.fixture(scope="module")
def llava(published, tmp_path_factory):
    """Folder of the same model in ml-fastvlm's layout, with a CLIP projection that is not zero."""
    folder = write(published, tmp_path_factory.mktemp("llava") / "llava-fastvithd", "llava")
    tensors = load_file(folder / "model.safetensors")
    name = "model.vision_tower.vision_tower.model.head.proj"
    assert tensors[name].shape == (3072, 768) and not tensors[name].any()
    tensors[name] = np.random.default_rng(0).standard_normal((3072, 768)).astype(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_ml_fastvlm_layout_comes_back_bit_for_bit(llava, tmp_path):
    out = write(llava, tmp_path / "out", "llava")
    assert_same_tensors(tensors_of(llava), tensors_of(out))
    assert json.loads((out / "config.json").read_text()) == json.loads((llava / "config.json").read_text())


def test_ml_fastvlm_layout_is_described_as_its_code_reads_it(llava):
    config = json.loads((llava / "config.json").read_text())
    assert config["architectures"] == ["LlavaQwen2ForCausalLM"] and config["model_type"] == "llava_qwen2"
    assert config["mm_vision_tower"] == "mobileclip_l_256" and config["mm_hidden_size"] == 3072
    assert config["mm_projector_type"] == "mlp2x_gelu" and config["image_aspect_ratio"] == "pad"
    assert config["unfreeze_mm_vision_tower"] is True and config["mm_use_im_start_end"] is False
    names = set(load_file(llava / "model.safetensors"))
    assert {name for name in names if "mm_projector" in name} == {
        "model.mm_projector.0.weight",
        "model.mm_projector.0.bias",
        "model.mm_projector.2.weight",
        "model.mm_projector.2.bias",
    }
    assert {"model.layers.1.self_attn.q_proj.bias", "model.norm.weight", "lm_head.weight"} <= names
    assert "model.vision_tower.vision_tower.model.network.6.reparam_conv.weight" in names


def test_ml_fastvlm_layout_holds_what_the_exporters_to_core_ml_and_mlx_read(llava):
    """Keys and names that export_vision_encoder.py, ml-fastvlm's patch of mlx-vlm, its app and mlx-vlm itself read."""
    config, settings, added = (
        json.loads((llava / name).read_text())
        for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json")
    )
    assert "llava" in llava.name  # by which ml-fastvlm's loader knows the kind of model
    # mlx-vlm's processor writes -200 for an image, as LLaVA's code does, and its model looks for image_token_index.
    assert config["image_token_index"] == -200
    # The exporter replaces it by the id behind the added tokens, <image> aside: so that must be the id of <image>.
    ids = {token["content"]: int(i) for i, token in added["added_tokens_decoder"].items()}
    assert max(i for name, i in ids.items() if name != "<image>") + 1 == ids["<image>"] == 4
    sizes = (
        "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "max_position_embeddings", "mm_hidden_size",
    )  # fmt: skip
    assert all(type(config[key]) is int for key in sizes) and config.get("rope_scaling") is None
    assert config["rope_theta"] == 1e4 and config["rms_norm_eps"] == 1e-6  # without the key they take 1e6
    names = set(load_file(llava / "model.safetensors"))
    assert config["tie_word_embeddings"] is ("lm_head.weight" not in names)
    assert settings["size"] == {"shortest_edge": 256} and settings["crop_size"] == {"height": 256, "width": 256}
    assert settings["processor_class"] == "LlavaProcessor"
    assert (settings["image_mean"], settings["image_std"]) == ([0.0] * 3, [1.0] * 3)
    # What is neither tower nor projector becomes `language_model.` + its name in MLX.
    rest = {name for name in names if "vision_tower" not in name and "mm_projector" not in name}
    assert {name.split(".")[0] for name in rest} == {"model", "lm_head"}
    assert not any(".rbr_" in name for name in names)  # folded, as the MLX tower is


def test_an_exporter_that_will_guess_another_image_token_is_named(caplog):
    """In a vocabulary without a spare row `<image>` takes the id of <|endoftext|>, which is not behind the others."""
    special = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    vocab = {letter: byte for byte, letter in enumerate(byte_spelling())}
    tokenizer = bpe_tokenizer(vocab, [], special, "qwen2", "tokenizer.json")
    for rows, words in ((260, ""), (259, "will write image_token_index 259 into config.json, but <image> is 256 here")):
        llava_layout.warn_of_exporter(Processor(tokenizer.with_image(rows), "qwen_2", 256, 16))
        assert words in caplog.text and bool(words) == bool(caplog.text)


def test_transformers_layout_has_what_vllms_transformers_backend_asks_for(published, tmp_path):
    """vLLM has no class for FastVLM; this backend runs classes of transformers that fulfil these conditions."""
    out = write(published, tmp_path / "out", "hf")
    config, processor = (x.from_pretrained(out) for x in (transformers.AutoConfig, transformers.AutoProcessor))
    kind = getattr(transformers, config.architectures[0])
    assert kind.is_backend_compatible() and config.get_text_config().model_type == "qwen2"
    ours = model_io.read(published).processor
    counts = processor._get_num_multimodal_tokens(image_sizes=[(480, 640), (1000, 10)])
    assert counts["num_image_tokens"] == [ours.tokens_per_image] * 2 == [16, 16]
    picture = np.zeros((48, 64, 3), np.uint8)
    inputs = processor(images=picture, text="<image>what", return_tensors="np", return_text_replacement_offsets=True)
    assert (inputs["input_ids"] == config.image_token_id).sum() == 16 and inputs["pixel_values"].shape[-2:] == (
        256,
        256,
    )
    assert [x["replacement"] for x in inputs["text_replacement_offsets"][0]] == ["<image>" * 16]


def test_ml_fastvlm_layout_holds_the_model_that_transformers_layout_holds(published, llava, tmp_path):
    """The tensors are equal without the CLIP projection, which transformers does not store."""
    assert_same_tensors(tensors_of(published), tensors_of(write(llava, tmp_path / "out", "hf")))


def test_training_form_in_ml_fastvlm_layout_is_read(llava, tmp_path):
    """Reads a fine-tuned tower with its branches, as LLaVA's trainer saves it."""
    from fastvlm_jax.convert.layouts import llava as layout

    loaded = model_io.read(llava)
    config = {**loaded.config, "vision": {**loaded.config["vision"], "form": "branched"}}
    model = fastvlm.build(**config)
    shapes = layout.shapes_of(model)
    rows = layout.rows(fastvlm.make_encoder(**model.vision_args), fastvlm.Decoder(**model.llm_args))
    rng, tensors = np.random.default_rng(0), {}
    for row in rows:
        for name in row.names():
            shape = () if row.path is None else row.transform.torch_order(shapes[row.path][row.depth is not None :])
            ones = (1,) * row.transform.ones
            tensors[name] = np.array(7) if row.path is None else rng.random(shape + ones, np.float32)
    folder = tmp_path / "branched"
    folder.mkdir()
    for file in llava.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(tensors, folder / "model.safetensors")
    read = model_io.read(folder)
    assert read.config["vision"]["form"] == "branched" and read.config["vision"]["head_features"] == 768
    stem = np.asarray(read.variables["params"]["vision"]["stem_0"]["conv"]["kernel"])
    stored = tensors["model.vision_tower.vision_tower.model.patch_embed.0.rbr_conv.0.conv.weight"]
    np.testing.assert_array_equal(stem, stored.transpose(2, 3, 1, 0))


@pytest.mark.parametrize("form", ["branched", "folded"])
def test_timm_directory_comes_back_bit_for_bit_and_loads_in_timm(form, tmp_path):
    """Two stages of MCi0 with a projection; the counters of a training run keep their values."""
    sizes = dict(layers=(1, 1), embed_dims=(16, 32), mlp_ratios=(3, 3), se_downsamples=(False, True))
    tower = randomise(timm.create_model("fastvit_mci0", num_classes=24, inference_mode=form == "folded", **sizes), 0)
    for name, counter in tower.named_buffers():
        if "num_batches_tracked" in name:
            counter += 11
    args = {**sizes, "inference_mode": form == "folded"}
    timm.models.save_for_hf(tower.eval(), tmp_path / "timm", model_args=args, safe_serialization=True)
    out = write(tmp_path / "timm", tmp_path / "out", "timm")
    assert_same_tensors(tensors_of(tmp_path / "timm"), tensors_of(out))

    if form == "branched":
        reloaded = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=24).eval()
    else:  # timm 1.0.31 mistakes a folded tower with a projection for Apple's own file and renames head.fc
        reloaded = timm.create_model("fastvit_mci0", num_classes=24, **args).eval()
        reloaded.load_state_dict({name: torch.from_numpy(x) for name, x in tensors_of(out).items()}, strict=True)
    images = np.random.default_rng(0).random((1, 32, 64, 3), np.float32)
    with torch.no_grad():
        theirs, again = tower(to_nchw(images)), reloaded(to_nchw(images))
    np.testing.assert_array_equal(theirs.numpy(), again.numpy())
    model, variables, processor = fastvlm_jax.load(tmp_path / "timm")
    assert processor is None
    tower_variables = {name: tree["vision"] for name, tree in variables.items()}
    ours = jit(fastvlm.make_encoder(**model.vision_args).apply, static_argnames="embed")(
        tower_variables, images, embed=True
    )
    assert relative(ours, theirs) <= 1e-5


def test_projection_of_ml_fastvlm_gets_a_bias_of_zeros_in_timm(llava, tmp_path):
    """timm itself reads Apple's file so: its head is a linear layer with a bias."""
    tensors, stored = tensors_of(write(llava, tmp_path / "out", "timm")), load_file(llava / "model.safetensors")
    projection = stored["model.vision_tower.vision_tower.model.head.proj"]
    assert tensors["head.fc.weight"].tobytes() == np.ascontiguousarray(projection.T).tobytes()
    assert tensors["head.fc.bias"].shape == (768,) and not tensors["head.fc.bias"].any()
    with torch.device("meta"):
        expected = timm.create_model("fastvit_mci3", num_classes=768, inference_mode=True).state_dict()
    assert {name: x.shape for name, x in tensors.items()} == {name: tuple(x.shape) for name, x in expected.items()}


def test_timm_convnext_directory_comes_back_bit_for_bit_and_loads_in_timm(tmp_path):
    sizes = dict(depths=(1, 1, 1, 1), dims=(8, 16, 32, 64))
    tower = randomise(timm.create_model("convnext_large", num_classes=24, **sizes), 0).eval()
    timm.models.save_for_hf(tower, tmp_path / "timm", model_args=sizes, safe_serialization=True)
    out = write(tmp_path / "timm", tmp_path / "out", "timm")
    assert_same_tensors(tensors_of(tmp_path / "timm"), tensors_of(out))
    reloaded = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=24).eval()
    images = torch.from_numpy(np.random.default_rng(0).random((1, 3, 32, 64), np.float32))
    with torch.no_grad():
        np.testing.assert_array_equal(tower(images).numpy(), reloaded(images).numpy())


@pytest.mark.parametrize(
    "name", ["MobileCLIP2-S0", *(pytest.param(f"MobileCLIP2-S{i}", marks=pytest.mark.full) for i in (3, 4))]
)
def test_open_clip_image_tower_comes_back_bit_for_bit_and_loads_in_open_clip(name, tmp_path):
    """The directory holds no text tower, so it is an encoder alone; MobileCLIP has the same architecture."""
    import open_clip  # after torch_reference, which makes torchvision importable

    config = open_clip.get_model_config(name)
    config["text_cfg"] |= {"width": 32, "heads": 2, "layers": 1, "vocab_size": 64}
    whole = open_clip.model.CustomTextCLIP(**{k: x for k, x in config.items() if k != "custom_text"})
    stored = {key: x.contiguous() for key, x in randomise(whole, 0).eval().state_dict().items()}
    folder = tmp_path / "openclip"
    folder.mkdir()
    image_tower = {key: x.numpy() for key, x in stored.items() if key.startswith("visual.")}
    save_file(image_tower, folder / "open_clip_model.safetensors")
    settings = {"model_cfg": config, "preprocess_cfg": {"mean": [0.0] * 3, "std": [1.0] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))

    assert set(model_io.read(folder).config) == {"vision", "dtype"}
    out = write(folder, tmp_path / "out", "openclip")
    assert_same_tensors(image_tower, tensors_of(out))
    tensors = {key: torch.from_numpy(x) for key, x in tensors_of(out).items()}
    missing, unexpected = whole.load_state_dict(tensors, strict=False)
    assert not unexpected and all(key.startswith(("text.", "logit_")) for key in missing)
    assert json.loads((out / "open_clip_config.json").read_text())["model_cfg"]["vision_cfg"] == config["vision_cfg"]


def small(cls, **sizes):
    config = cls.config_class(**sizes)
    return randomise(cls(config), 0).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "LlamaForCausalLM"])
def test_language_model_directory_comes_back_bit_for_bit(name, tied, dtype, tokenizer_file, tmp_path):
    reference = small(getattr(transformers, name), **TEXT, tie_word_embeddings=tied).to(dtype)
    reference.save_pretrained(tmp_path / "lm")
    load_tokenizer(tokenizer_file).save(tmp_path / "lm")
    out = write(tmp_path / "lm", tmp_path / "out", "hf")
    assert_same_tensors(tensors_of(tmp_path / "lm"), tensors_of(out))
    reloaded, info = getattr(transformers, name).from_pretrained(out, output_loading_info=True)
    assert not any(info.values()) and reloaded.dtype == dtype


@pytest.mark.parametrize("name", ["CLIPVisionModel", "SiglipVisionModel"])
def test_vit_layout_comes_back_bit_for_bit(name, tmp_path):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    small(getattr(transformers, name), **sizes, image_size=56, patch_size=14).save_pretrained(tmp_path / "vit")
    out = write(tmp_path / "vit", tmp_path / "out", "hf")
    # transformers 5 writes a tower alone without the prefix that published files have, and reads both.
    prefixed = {
        f"vision_model.{key.removeprefix('vision_model.')}": x for key, x in tensors_of(tmp_path / "vit").items()
    }
    assert_same_tensors(prefixed, tensors_of(out))
    _, info = getattr(transformers, name).from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info


def test_native_directory_keeps_every_bit(published, tmp_path):
    out = write(published, tmp_path / "out", "native")
    assert_same_variables(model_io.read(out).variables, model_io.read(published).variables)


def test_encoder_and_language_model_come_from_two_places(published, tokenizer_file, tmp_path):
    """The tower comes from one model, the language model from another; stage 1 would train the projector."""
    language_model = small(transformers.LlamaForCausalLM, **TEXT, tie_word_embeddings=True)
    language_model.save_pretrained(tmp_path / "lm")
    load_tokenizer(tokenizer_file).save(tmp_path / "lm")
    loaded = model_io.read(f"vision={published},llm={tmp_path / 'lm'}")
    assert set(loaded.variables["params"]) == {"vision", "llm"} and loaded.config["llm"]["qkv_bias"] is False
    assert_same_variables(loaded.variables["params"]["vision"], model_io.read(published).variables["params"]["vision"])
    assert (loaded.processor.image_size, loaded.processor.tokens_per_image) == (256, 16)  # the encoder's
    with pytest.raises(ValueError, match=r"^vision=.*,llm=.* has no projector: train one"):
        fastvlm_jax.load(f"vision={published},llm={tmp_path / 'lm'}")
    with pytest.raises(ValueError, match="has no projector: train one"):
        write(f"vision={published},llm={tmp_path / 'lm'}", tmp_path / "out", "hf")


def test_llava_layout_of_another_tower_is_refused(tmp_path):
    config = {"vision": dict(layers=[1], embed_dims=[8], mixers=["repmixer"], form="folded"), "llm": dict(
        vocab_size=64, width=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=16)}  # fmt: skip
    variables = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), kinds.abstract_variables(fastvlm.build(**config)))
    with pytest.raises(ValueError, match="the llava layout holds FastViTHD alone"):
        convert.write(tmp_path / "out", "llava", variables, config, object(), {})
    assert not (tmp_path / "out").exists()
