"""What a config takes from a parent, of every layout, and what a parent that does not fit is told."""

import importlib.util
import json

import jax
import numpy as np
import pytest
from meeting import adopt_and_meet
from paths import ROOT
from torch_reference import timm, transformers

from fastvlm_jax import convert, model_io
from fastvlm_jax.adapt import adapt
from fastvlm_jax.config import get_base
from fastvlm_jax.models import fastvlm, kinds
from fastvlm_jax.parent import open_base
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.tokenizer import load_tokenizer

# A small FastVLM that every layout but Apple's can hold: MCi0's make, four stages.
VISION = dict(
    layers=(1, 1, 1, 1), embed_dims=(8, 16, 32, 64), mixers=("repmixer",) * 3 + ("attention",), mlp_ratio=3.0,
    stem_scale=True, se_stages=(2, 3), attention_norm="batch", form="folded", head_features=24, head_bias=True,
)  # fmt: skip
LLM = dict(
    width=24, num_layers=2, num_heads=3, num_kv_heads=1, mlp_dim=40, vocab_size=448, rope_theta=5e4, epsilon=1e-5,
    qkv_bias=True, tie_embeddings=False, context_length=512,
)  # fmt: skip
STAGES = ("stage1_align", "stage15_pretrain", "stage2_instruct", "stage3_reason", "own_data")


@pytest.fixture(scope="module")
def folders(json_file, tmp_path_factory):
    """Folders of the model in several layouts, of its encoder and of a language model alone."""
    root, rng = tmp_path_factory.mktemp("parents"), np.random.default_rng(0)
    config = {"vision": VISION, "llm": LLM, "dtype": "float32"}
    abstract = kinds.abstract_variables(fastvlm.build(**config))
    variables = jax.tree.map(lambda x: rng.uniform(0.5, 1, x.shape).astype(np.float32), abstract)
    processor = Processor(load_tokenizer(json_file), "chatml", 96, 9)
    for layout in ("native", "hf", "timm"):
        convert.write(root / layout, layout, variables, config, processor, {})
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=320)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(root / "lm")
    load_tokenizer(json_file).save(root / "lm")
    vit = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=8
    )
    transformers.CLIPVisionModel(vit).save_pretrained(root / "vit")
    return root


def stage(name, argument):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("layout", ["native", "hf"])
def test_every_stage_file_takes_a_parents_sizes_and_then_its_weights(folders, layout, name):
    config = stage(name, f"parent={folders / layout}")
    assert config.parent == str(folders / layout)
    text = transformers.AutoConfig.from_pretrained(folders / "hf").text_config
    llm = config.model.llm
    assert (llm.width, llm.num_layers, llm.mlp_dim, llm.vocab_size, llm.epsilon, llm.context_length) == (
        text.hidden_size, text.num_hidden_layers, text.intermediate_size, text.vocab_size, text.rms_norm_eps,
        text.max_position_embeddings,
    )  # fmt: skip
    vision = config.model.vision
    assert (vision.embed_dims, vision.mlp_ratio, vision.se_stages) == ((8, 16, 32, 64), 3.0, (2, 3))
    assert (vision.form, vision.batch_norm, vision.remat) == ("folded", "frozen", "depthwise")
    if layout == "native":
        assert config.data.template == ("plain" if name == "stage1_align" else "chatml")
    assert config.data.image_size == (256 if name == "stage1_align" else 96)
    given = adapt(model_io.read(config.parent), fastvlm.build(**config.model.to_dict()))
    assert set(given["params"]) == {"vision", "projector", "llm"} and "head" not in given["params"]["vision"]


def test_parts_and_parts_alone_fill_what_they_hold(folders):
    config = open_base(f"parent=vision={folders / 'vit'},llm={folders / 'lm'}")
    assert (config.model.vision.family, config.model.vision.width, config.data.image_size) == ("vit", 16, 48)
    assert (config.model.llm.width, config.model.llm.qkv_bias, config.data.template) == (16, False, "qwen_2")
    timm_args = json.loads((folders / "timm/config.json").read_text())
    assert timm.is_model(timm_args["architecture"])
    alone = open_base(f"1.5b,parent={folders / 'timm'}")
    assert (alone.model.vision.embed_dims, alone.model.llm.width) == ((8, 16, 32, 64), 1536)
    assert open_base(f"parent={folders / 'lm'}").model.vision.embed_dims == get_base("0.5b").model.vision.embed_dims


def test_stage_2_takes_its_data_beside_a_parent(folders):
    config = stage("stage2_instruct", f"/665k,parent={folders / 'hf'}")
    assert config.data.mixture == (("llava_665k", 0.0),) and config.model.llm.width == 24
    assert len(stage("stage2_instruct", f"parent={folders / 'hf'}").data.mixture) == 1


def test_a_size_beside_a_whole_parent_and_a_missing_parent_are_refused(folders):
    with pytest.raises(ValueError, match="has an encoder and a language model: leave out '7b'"):
        open_base(f"7b,parent={folders / 'hf'}")
    with pytest.raises(FileNotFoundError, match="there is no model at /nowhere"):
        open_base("parent=/nowhere")


def test_a_parent_trained_with_statistics_of_other_groups_fits(folders):
    config = open_base(f"parent={folders / 'hf'}")
    parent = model_io.read(config.parent)
    parent.config["vision"]["batch_norm_images"] = 256
    assert "vision" in adapt(parent, fastvlm.build(**config.model.to_dict()))["params"]


def test_all_differences_stand_in_one_message(folders):
    config = open_base(f"parent={folders / 'hf'}")
    config.model.vision.mlp_ratio, config.model.llm.num_layers, config.model.llm.rope_theta = 4.0, 7, 1e6
    config.model.vision.form = "branched"
    with pytest.raises(ValueError) as error:
        adapt(model_io.read(config.parent), fastvlm.build(**config.model.to_dict()), "parents/hf")
    assert str(error.value) == (
        "the parent parents/hf does not fit this config (key: config, parent): model.vision.mlp_ratio: 4.0, 3.0; "
        "model.llm.num_layers: 7, 2; model.llm.rope_theta: 1000000.0, 50000.0. --config FILE.py:parent=parents/hf "
        "takes the parent's; and the parent's encoder is folded and cannot be unfolded: set "
        "--config.model.vision.form=folded"
    )
    with pytest.raises(ValueError, match=r"\(key: config, parent\): model.vision.family: 'fastvit', 'vit'; model.llm"):
        both = model_io.read(f"vision={folders / 'vit'},llm={folders / 'lm'}")
        adapt(both, fastvlm.build(**get_base("0.5b").model.to_dict()))


def test_a_run_of_several_processes_reads_its_parent_before_they_meet(folders):
    parts = (f"parent=vision={folders / vision},llm={folders / 'lm'}" for vision in ("timm", "vit"))
    adopt_and_meet("0.5b", *(f"parent={folders / layout}" for layout in ("native", "hf")), *parts)
