"""A CLIP as a model, as parts and as a parent: what each stage takes from it, and what the commands say to it."""

import dataclasses
import json
import math
from functools import partial

import jax
import numpy as np
import pytest
from random_model import random_variables
from torch_reference import jit

import fastvlm_jax
from fastvlm_jax import checkpoint, convert, guard, model_io, optim, sharding
from fastvlm_jax.adapt import adapt
from fastvlm_jax.bench import ttft_model
from fastvlm_jax.bench.first_token import questions
from fastvlm_jax.evaluate.run import check_answers
from fastvlm_jax.generate import generate
from fastvlm_jax.models import fastvlm, kinds
from fastvlm_jax.pair_processor import PairProcessor
from fastvlm_jax.parent import open_base
from fastvlm_jax.text.caption_tokenizer import load_caption_tokenizer
from fastvlm_jax.train_state import TrainState, state_of

MEAN, STD = [0.5, 0.25, 0.125], [0.5, 0.5, 0.25]
VISION = dict(
    layers=[1, 1], embed_dims=[8, 16], mixers=["repmixer"] * 2, form="branched", head_features=12, head_bias=True,
    image_mean=MEAN, image_std=STD,
)  # fmt: skip
TEXT = dict(features=12, width=16, num_layers=2, num_heads=2, vocab_size=50, context_length=5)
CLIP = {"vision": VISION, "text": TEXT, "sigmoid": False, "dtype": "float32"}
LLM = dict(vocab_size=320, width=8, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=8)
VIT = dict(family="vit", image_size=8, patch_size=4, width=8, num_layers=2, num_heads=2, mlp_dim=16)
TOKENS = np.array([[48, 7, 9, 49, 0], [48, 3, 49, 0, 0]], np.int32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Native folders of a CLIP, of encoders with and without a projection, and of a language model."""
    root = tmp_path_factory.mktemp("clip")
    configs = {
        "clip": CLIP,
        "vision": {"vision": VISION},
        "headless": {"vision": {**VISION, "head_features": 0, "head_bias": False}},
        "unbiased": {"vision": {**VISION, "head_bias": False}},
        "vit": {"vision": VIT},
        "lm": {"llm": LLM},
    }
    for name, config in configs.items():
        convert.write(root / name, "native", random_variables(config)[1], config, None, {"stage": name})
    return root


def arrays(tree):
    return jax.tree.map(np.asarray, tree)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, arrays(a), arrays(b))


def refused(message):
    return pytest.raises(ValueError, match=message)


def test_a_native_clip_is_kept_bit_for_bit_and_embeds(folders, tmp_path):
    loaded = model_io.read(folders / "clip")
    assert json.loads(json.dumps(loaded.config)) == CLIP and loaded.lineage == {"stage": "clip"}
    convert.write(tmp_path / "again", "native", loaded.variables, loaded.config, None, loaded.lineage)
    assert_same(model_io.read(tmp_path / "again").variables, random_variables(CLIP)[1])
    convert.write(tmp_path / "folded", "native", loaded.variables, loaded.config, None, {}, fold=True)
    images = np.random.default_rng(0).integers(0, 256, (1, 1, 8, 8, 3), np.uint8)
    embedded = []
    for name in ("again", "folded"):
        model, variables, processor = fastvlm_jax.load(tmp_path / name)
        assert processor is None
        embedded.append(jit(partial(model.apply, method="embed_images"))(variables, images))
    assert model.vision_args["form"] == "folded"
    np.testing.assert_allclose(*embedded, rtol=0, atol=1e-5)


def test_a_workdir_of_a_clip_is_read_with_both_towers(folders, json_file, tmp_path):
    expected = arrays(model_io.read(folders / "clip").variables)
    checkpointer = checkpoint.open_checkpointer(tmp_path, checkpoint.Retention(1))
    state = TrainState(np.int32(3), expected["params"], expected["batch_stats"], (), guard.begin())
    checkpoint.save(checkpointer, jax.device_put(state), 3, lineage={"stage": "stage0_clip"})
    checkpointer.close()
    model = {**CLIP, "text": {**TEXT, "remat": "none"}}
    run = {"format": "fastvlm_jax workdir", "config": {"model": model}, "lineage": {"stage": "stage0_clip"}}
    (tmp_path / "config.json").write_text(json.dumps(run))
    PairProcessor(load_caption_tokenizer(json_file), 5, 16).save(tmp_path / "processor")
    loaded = model_io.read(tmp_path)
    assert (loaded.processor.image_size, loaded.processor.context_length) == (16, 5)
    assert loaded.config == CLIP and loaded.lineage == {"stage": "stage0_clip", "step": 3}
    assert_same(loaded.variables, expected)


def test_two_towers_make_a_clip_with_an_initial_factor_of_the_logits(folders):
    source = f"vision={folders / 'vision'},text={folders / 'clip'}"
    loaded = model_io.read(source)
    assert loaded.config == {"dtype": "float32", "vision": VISION, "text": TEXT, "sigmoid": False}
    assert_same(loaded.variables["params"]["text"], model_io.read(folders / "clip").variables["params"]["text"])
    assert set(loaded.variables["params"]) == {"vision", "text", "logit_scale"}
    model, variables, _ = model_io.load(source)
    assert math.isclose(variables["params"]["logit_scale"], math.log(1 / 0.07), rel_tol=1e-6)
    assert model.apply(variables, TOKENS, method="embed_texts").shape == (2, 12)


@pytest.mark.parametrize(
    "source, message",
    [
        ("text={clip}", "a text tower needs an encoder beside it, and nothing else; write vision=DIR,llm=DIR"),
        ("vision={clip},llm={lm},text={clip}", "a text tower needs an encoder beside it, and nothing else"),
        ("vision={vision},text={lm}", "{lm} has no text: it holds llm"),
    ],
)
def test_other_parts_beside_a_text_tower_are_refused(folders, source, message):
    names = {name: folders / name for name in ("clip", "vision", "lm")}
    with pytest.raises(ValueError) as error:
        model_io.read(source.format(**names))
    assert message.format(**names) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("encoder", ["headless", "vit"])
def test_towers_without_a_projection_are_neither_loaded_nor_written(folders, encoder, tmp_path):
    loaded = model_io.read(f"vision={folders / encoder},text={folders / 'clip'}")
    message = "has no CLIP projection to 12, the width of its texts' embeddings: train one with it as --config.parent"
    with refused(f"^the encoder of vision=.*,text=.* {message}"):
        model_io.put(loaded)
    with refused(f"^the encoder of this CLIP {message}"):
        convert.write(tmp_path / "out", "native", loaded.variables, loaded.config, None, {})


def test_the_encoder_of_a_clip_joins_a_language_model(folders):
    loaded = model_io.read(f"vision={folders / 'clip'},llm={folders / 'lm'}")
    assert set(loaded.variables["params"]) == {"vision", "llm"} and loaded.config["vision"]["image_mean"] == MEAN


def test_commands_that_ask_a_language_model_refuse_a_clip_in_one_line(folders):
    model, variables, processor = fastvlm_jax.load(folders / "clip")
    with refused("^this model has no language model or no tokenizer: load it with both"):
        generate(model, variables, processor, [np.zeros((8, 8, 3), np.uint8)], ["what?"])
    with refused("^this model has no language model or no tokenizer, so it answers nothing"):
        check_answers(model, processor)
    for shapes_only in (False, True):
        subject = ttft_model.of_source(str(folders / "clip"), "float32", shapes_only)
        with refused("^this model has no language model, and a first token about an image needs one"):
            questions(subject.model, "16", subject.sizes, 8, 1)


# As a parent.


def vlm(**vision):
    own = {key: x for key, x in VISION.items() if not key.startswith("head")}
    return fastvlm.build({**own, "form": "folded", **vision}, LLM)


def clip_stage(text=(), sigmoid=False, **vision):
    return kinds.build(vision={**VISION, **vision}, text={**TEXT, **dict(text)}, sigmoid=sigmoid)


def test_a_vlm_stage_takes_the_folded_encoder_of_a_clip_without_its_projection(folders):
    given = adapt(model_io.read(folders / "clip"), vlm())
    assert set(given["params"]) == {"vision"} and "head" not in given["params"]["vision"]
    assert "folded" in given["params"]["vision"]["stem_0"]
    config = open_base(f"0.5b,parent=vision={folders / 'clip'}")
    vision = config.model.vision
    assert (vision.image_mean, vision.image_std, vision.embed_dims) == (tuple(MEAN), tuple(STD), (8, 16))
    assert "head_features" not in vision and "text" not in config.model
    assert open_base(f"0.5b,parent={folders / 'clip'}").model.vision == vision


def test_a_clip_stage_takes_all_of_a_clip(folders):
    parent = model_io.read(folders / "clip")
    assert_same(adapt(parent, clip_stage()), parent.variables)
    assert "folded" in adapt(parent, clip_stage(form="folded"))["params"]["vision"]["stem_0"]
    # another loss starts with its own factor and bias of the logits
    assert set(adapt(parent, clip_stage(sigmoid=True))["params"]) == {"vision", "text"}


def test_a_clip_stage_takes_an_encoder_and_its_projection_if_that_fits(folders):
    whole = adapt(model_io.read(folders / "vision"), clip_stage())["params"]
    assert set(whole) == {"vision"} and whole["vision"]["head"]["kernel"].shape == (32, 12)
    unbiased = adapt(model_io.read(folders / "unbiased"), clip_stage())["params"]["vision"]["head"]
    assert not np.any(unbiased["bias"])
    for other in (adapt(model_io.read(folders / "headless"), clip_stage()),
                  adapt(model_io.read(folders / "vision"), clip_stage({"features": 8}, head_features=8))):  # fmt: skip
        assert set(other["params"]) == {"vision"} and "head" not in other["params"]["vision"]


def test_what_an_encoder_lacks_is_initialized_beside_it(folders):
    model, parent = clip_stage(), model_io.read(folders / "headless")
    mesh, groups = sharding.make_mesh((1, 1, 2, 1), jax.devices()[:2]), ((".*", 1e-3, 0.0),)
    optimizer = optim.make_optimizer(
        kinds.abstract_variables(model)["params"], groups, optim.Course(4, 0.5), beta1=0.9, beta2=0.999,
        epsilon=1e-8, clip_norm=1.0,
    )  # fmt: skip
    with jax.set_mesh(mesh):
        make_state, abstract = state_of(model, optimizer, groups, mesh)
        state = make_state(jax.random.key(1), adapt(parent, model))
    assert jax.tree.map(lambda x: x.sharding, state.params) == jax.tree.map(lambda x: x.sharding, abstract.params)
    kept = {name: tree for name, tree in state.params["vision"].items() if name != "head"}
    assert_same(kept, parent.variables["params"]["vision"])
    assert_same(state.batch_stats, parent.variables["batch_stats"])
    assert 0.1 < np.std(state.params["vision"]["head"]["kernel"]) < 0.3  # normal, of 32 ** -0.5
    assert math.isclose(state.params["logit_scale"], math.log(1 / 0.07), rel_tol=1e-6)


def test_a_clip_of_another_size_is_refused_with_all_differences(folders):
    parent = model_io.read(folders / "clip")
    stage = clip_stage({"num_layers": 3, "context_length": 7}, embed_dims=[8, 24])
    with pytest.raises(ValueError) as error:
        adapt(parent, stage, "runs/clip")
    assert str(error.value) == (
        "the parent runs/clip does not fit this config (key: config, parent): model.vision.embed_dims: [8, 24], "
        "[8, 16]; model.text.num_layers: 3, 2; model.text.context_length: 7, 5. set these keys to the parent's"
    )
    with refused(r"model\.vision\.head_bias: False, True\. set these keys to the parent's$"):
        adapt(parent, clip_stage(head_bias=False), "runs/clip")
    folded = dataclasses.replace(parent, config={**CLIP, "vision": {**VISION, "form": "folded"}})
    with refused("^the parent's encoder is folded and cannot be unfolded: set --config.model.vision.form=folded"):
        adapt(folded, clip_stage())
    with refused("^the parent runs/lm holds llm, of which this stage has nothing: give one with text or vision"):
        adapt(model_io.read(folders / "lm"), clip_stage(), "runs/lm")
    with refused("^model.vision.head_features=0 must be 12, the width of the text tower's embeddings: set it so"):
        adapt(parent, clip_stage(head_features=0, head_bias=False))
