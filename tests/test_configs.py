import importlib.util
import math

import jax
import pytest
from paths import ROOT

from fastvlm_jax import config as config_lib
from fastvlm_jax import config_checks, config_values, optim, sharding
from fastvlm_jax.models import fastvlm, kinds
from fastvlm_jax.train_state import state_of

CONFIGS = ROOT / "configs"
CASES = [(p.stem, size) for p in CONFIGS.glob("stage[1-9]*.py") for size in ("0.5b", "1.5b", "7b")]
# The paper's comparisons: the language model of LLaVA-1.5, and other encoders.
CASES += [("stage1_align", "vicuna-7b,clip_vit_l_336"), ("stage2_instruct", "vicuna-7b,mci2")]
CASES += [("stage1_align", "0.5b,siglip_so400m_384"), ("stage2_instruct", "smollm2-135m,convnext_l")]
CASES += [("own_data", size) for size in ("tiny", "0.5b")]
CASES += [("quickstart", stage) for stage in ("stage1_align", "stage15_pretrain", "stage2_instruct")]
CASES += [("reading", f"learn,{encoder}") for encoder in ("tiny", "fastvit_tiny")]
CASES += [("reading", f"read,{encoder},{side}") for encoder in ("tiny", "fastvit_tiny") for side in (128, 320)]
# Qwen2's published counts, with the embedding counted once where it is tied.
QWEN2 = {"0.5b": 494_032_768, "1.5b": 1_543_714_304, "7b": 7_615_616_512}
# What the sets of stage 2 consist of (paper, appendix D).
ADDED = {
    "665k": ["llava_665k"],
    "1.1m": ["internvl_1.1m"],
    "6.5m": ["internvl_1.1m", "cambrian_5.4m"],
    "11.9m": ["internvl_1.1m", "cambrian_5.4m", "onevision_single_image"],
    "12.5m": ["internvl_1.1m", "cambrian_5.4m", "onevision_single_image", "docmatix_0.6m"],
}
WIDTH = {"0.5b": 896, "1.5b": 1536, "7b": 3584}


def get(name, argument):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)


def count(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name, argument", CASES, ids=str)
def test_config_builds_and_its_groups_are_total(name, argument):
    """The whole state, abstractly: every parameter falls to one group, every pattern takes one."""
    config = get(name, argument)
    model = fastvlm.build(**config.model.to_dict())
    params = kinds.abstract_variables(model)["params"]
    optimizer = optim.make_optimizer(
        params, config.groups, optim.Course(100, 0.03), beta1=0.9, beta2=0.999, epsilon=1e-8, clip_norm=1.0
    )
    mesh = sharding.make_mesh((1, 2, 2, 2))
    _, abstract = state_of(model, optimizer, config.groups, mesh)
    trainable, frozen = optim.split(params, config.groups)
    assert len(trainable) + len(frozen) == len(jax.tree.leaves(params))
    # Two slots a trainable parameter, and nothing for the frozen ones.
    assert abs(count(abstract.opt_state) - 2 * count(trainable)) < 100
    placeholders = config.data.images_per_group * model.tokens_per_image(config.data.image_size)
    assert placeholders <= config.data.rows_per_group * config.data.row_length


# Millions of parameters of the folded image tower, with its projection, and of the text tower, as published.
CLIP_MILLIONS = {"s0": (11.4, 63.4), "s1": (21.5, 63.4), "s2": (35.7, 63.4), "s3": (125.1, 123.7), "s4": (321.6, 123.7)}


@pytest.mark.parametrize(
    "argument",
    [*CLIP_MILLIONS, "s3/12m", "s2/pairs", "tiny", "tiny/icons", "mini", "convnext_l,768", "clip_vit_l_336,768"],
)
def test_stage_0_builds_with_both_towers_and_decays_what_open_clip_does(argument):
    config = get("stage0_clip", argument)
    config_checks.validate(config)
    params = kinds.abstract_variables(kinds.build(**config.model.to_dict()))["params"]
    if argument in CLIP_MILLIONS:
        folded = {**config.model.to_dict(), "vision": {**config.model.vision.to_dict(), "form": "folded"}}
        towers = kinds.abstract_variables(kinds.build(**folded))["params"]
        assert tuple(round(count(towers[part]) / 1e6, 1) for part in ("vision", "text")) == CLIP_MILLIONS[argument]
    trainable, frozen = optim.split(params, config.groups)
    assert all(path.startswith("vision/unused/") for path in frozen)
    batches = {"tiny": 64, "tiny/icons": 256, "mini": 256, "s3/12m": 8192, "s2/pairs": 8192}
    assert config.data.groups * config.data.images_per_group == batches.get(argument, 65536)
    kept = {path.split("/")[-1] for path in trainable} - set(config.decayed)
    one_dimension = {"layer_scale"} if "convnext" in argument else set()
    # Of layers, norms, a vision transformer and the logits.
    assert kept <= {"bias", "scale", "cls_token", "logit_scale"} | one_dimension


def test_every_text_of_stage_0_has_a_row():
    assert config_values.rows_of(get("stage0_clip", "s3")) == (2 * 256, 77)
    assert config_values.rows_of(get("stage0_clip", "s3/pairs")) == (256, 77)
    assert config_values.rows_of(get("stage1_align", "0.5b"))[0] == 1


def test_stage_0_of_unknown_sizes_or_data_is_refused():
    with pytest.raises(ValueError, match="unknown size 's9' of both towers: choose one of tiny, mini, s0"):
        get("stage0_clip", "s9")
    with pytest.raises(ValueError, match="unknown text tower '9': choose one of tiny, mini, 512"):
        get("stage0_clip", "mci2,9")
    with pytest.raises(ValueError, match=r"unknown data '2b': choose 1b, 12m, pairs or icons"):
        get("stage0_clip", "s3/2b")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("data.images_per_group", 0, "data.images_per_group=0 must be at least 1"),
        ("data.texts", 3, "data.texts=3 must be 1, the caption, or 2"),
        ("data.augment", "crop", "data.augment='crop' must be none, random or replay"),
        ("data.augment", "random", "data.augment='random': loss.teachers saw crops that the records store"),
        ("data.crop_area", (0.5, 0.1), "data.crop_area=.* must rise from above 0"),
        ("data.crop_area", (0.5, math.nan), "data.crop_area=.* must be two fractions"),
        ("data.operations", (2, 31), "data.operations=.* magnitude, 0 to 30"),
        ("loss.soft", 0.0, "loss.hard and loss.soft are both 0"),
        ("loss.soft", math.inf, "loss.soft=inf must be at least 0"),
        ("loss.teachers", (), "loss.soft=1.0 and loss.teachers=.* contradict each other"),
        ("loss.teachers", ((768,),), "loss.teachers=.* must be pairs of widths and factors"),
        ("loss.teachers", ((768, -1.0),), "loss.teachers=.* must be pairs of widths and factors"),
        ("loss.block", -1, "loss.block=-1 must be at least 0"),
        ("model.sigmoid", True, "model.sigmoid takes loss.hard=1 and no distillation"),
        ("model.vision.batch_norm_images", 0, "batch_norm_images=0 must be positive, or -1"),
        ("model.vision.batch_norm_images", 250, "batch_norm_images=250 does not divide the batch of 256 x 256 = 65536"),
        (
            "evaluate",
            (("qa", "", 5),),
            "evaluate names qa, which does not fit the model: the two towers of stage 0 take",
        ),
        ("warmup", "linear", "warmup='linear' must be transformers or open_clip"),
        ("final_rate", 2.0, "final_rate=2.0 must be from 0 to 1"),
        ("optimizer", "sgd", "optimizer='sgd' must be adamw, adafactor or lion"),
        ("ema", 1.0, "ema=1.0 must be at least 0 and below 1"),
        ("predictions_every", 5, "predictions_every=5: stage 0 answers no questions: set it to 0"),
        ("predictions_every", -1, "predictions_every=-1 must be at least 0"),
        ("num_predictions", 0, "num_predictions=0 must be at least 1"),
        ("layer_decay.vision", 0.0, "layer_decay.vision=0.0 must be above 0 and at most 1, which lowers no rate"),
        ("layer_decay.text", 1.1, "layer_decay.text=1.1 must be above 0 and at most 1"),
        ("layer_decay.llm", 0.5, "layer_decay.llm=0.5: this model has no part 'llm': leave it at 1"),
    ],
)
def test_settings_of_stage_0_that_contradict_each_other_are_named(key, value, message):
    config = get("stage0_clip", "s3")
    with config.ignore_type():
        config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        config_checks.validate(config)


def test_parts_of_a_batch_keep_the_groups_of_batch_norm_whole():
    config = get("stage0_clip", "s3")
    config.accumulate = 2
    config_checks.validate(config)
    for images, message in ((512, "takes the groups of a batch in turn"), (-1, "computes parts of a batch")):
        config.model.vision.batch_norm_images = images
        with pytest.raises(ValueError, match=rf"^accumulate=2 {message}.*data\.images_per_group=256"):
            config_checks.validate(config)


@pytest.mark.parametrize("size", QWEN2)
def test_parameter_counts_are_the_published_ones(size):
    config = get("stage2_instruct", size)
    params = kinds.abstract_variables(fastvlm.build(**config.model.to_dict()))["params"]
    assert count(params["llm"]) == QWEN2[size]
    assert round((count(params["vision"]) + 3072 * 768) / 1e6, 2) == 125.07
    width = WIDTH[size]
    assert count(params["projector"]) == 3072 * width + width + width * width + width


def test_stage_2_mixes_what_its_data_adds():
    folders = {data: [folder for folder, _ in get("stage2_instruct", f"0.5b/{data}").data.mixture] for data in ADDED}
    assert folders == ADDED
    assert get("stage2_instruct", "0.5b").data.mixture == (("internvl_1.1m", 0.0),)
    with pytest.raises(ValueError, match=r"unknown data '2m': choose 665k, 1\.1m"):
        get("stage2_instruct", "0.5b/2m")


def test_unknown_size_is_refused():
    with pytest.raises(ValueError, match="unknown model size '3b': choose one of tiny"):
        get("stage2_instruct", "3b")
    with pytest.raises(ValueError, match="unknown encoder 'resnet': choose one of tiny"):
        get("stage2_instruct", "0.5b,resnet")


def test_differences_name_the_dotted_key():
    assert config_lib.differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2}) == [("a.b", 1, 3)]


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("groups", 0, "data.groups=0 must be at least 1"),
        ("images_per_group", -1, "data.images_per_group=-1 must be at least 0"),
        ("max_substituted", math.nan, "data.max_substituted=nan must be at least 0"),
        ("resolutions", (512, 1024), "data.resolutions=.* must be pairs of sides and positive shares"),
        ("resolutions", ((512.0, 1),), "data.resolutions=.* must be pairs of sides"),
        ("resolutions", ((512, 0), (1024, 1)), "data.resolutions=.* must be pairs of sides"),
        ("resolutions", ((512, math.nan), (1024, 1)), "data.resolutions=.* must be pairs of sides"),
        ("resolutions", ((512, 1), (512, 2)), "data.resolutions=.* names a side twice"),
        ("aspects", (4, 3), "data.aspects=.* must be pairs of positive widths and heights"),
        ("aspects", (("a", "b"),), "data.aspects=.* must be pairs"),
        ("grids", (2, 2), "data.grids=.* must be pairs of rows and columns"),
        ("grids", ((2, 2.5),), "data.grids=.* must be pairs"),
    ],
)
def test_a_setting_of_the_data_that_means_nothing_is_named(key, value, message):
    config = config_lib.get_base("tiny")
    config_checks.validate(config)
    config.data[key] = value
    with pytest.raises(ValueError, match=message):
        config_checks.validate(config)


QA = (("qa", "", 50),)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(evaluate=("qa", "", 50)),
         r"evaluate=\('qa', '', 50\) must hold a name, a folder and .* \(\(.docvqa., .data/docvqa., 500\),\)"),
        (dict(evaluate=(("qa", "", None),)), "evaluate=.* with 0 for all questions"),
        (dict(evaluate=(("qa", "", -1),)), "evaluate=.* with 0 for all questions"),
        (dict(evaluate=(("docvqa", "", 50),)), "evaluate names no folder for docvqa: only qa asks about"),
        (dict(evaluate=(*QA, ("qa", "data/mine", 9))), "evaluate names qa twice"),
        (dict(keep_best="evaluate/docvqa", evaluate=QA),
         "keep_best='evaluate/docvqa' is not evaluated in this run: choose evaluate/qa or validation/loss"),
        (dict(keep_best="validation/loss", eval_batches=0), "keep_best=.* set `evaluate` or eval_batches too"),
        (dict(stop_after=2), "stop_after=2 needs a score to follow: set keep_best"),
        (dict(stop_after=-1), "stop_after=-1 must be at least 0"),
        (dict(eval_questions=9), r"there is no key 'eval_questions' any more: evaluate=\(\(.qa., .., N\),\) asks"),
        (dict(eval_max_tokens=9), "there is no key 'eval_max_tokens' any more"),
    ],
    ids=str,
)  # fmt: skip
def test_an_evaluation_that_means_nothing_is_named(changes, message):
    config = config_lib.get_base("tiny")
    for key, value in changes.items():
        config[key] = value
    with pytest.raises(ValueError, match=f"^{message}"):
        config_checks.validate(config)


def test_a_benchmark_and_the_best_checkpoint_by_it_are_fine():
    config = config_lib.get_base("tiny")
    config.evaluate, config.keep_best, config.stop_after = (*QA, ["docvqa", "data/docvqa", 0]), "evaluate/docvqa", 3
    config_checks.validate(config)


def test_both_encoders_of_the_embedded_sweep_have_the_same_number_of_parameters():
    counts = {}
    for encoder in ("tiny", "fastvit_tiny"):
        config = get("reading", f"learn,{encoder}")
        vision = {**config.model.vision.to_dict(), "form": "folded"}
        counts[encoder] = count(kinds.abstract_variables(fastvlm.build(vision))["params"])
    assert counts == {"tiny": 369_776, "fastvit_tiny": 367_536}


def test_stages_of_reading_have_room_for_a_page():
    for encoder, sides in (("tiny", {128: 4, 256: 16, 320: 25}), ("fastvit_tiny", {128: 16, 256: 64, 320: 100})):
        learn = get("reading", f"learn,{encoder}")
        assert (learn.data.image_size, learn.data.row_length) == (256, sides[256] + 24)
        for side, tokens in sides.items():
            read = get("reading", f"read,{encoder},{side}")
            assert read.data.image_size == side
            assert read.data.row_length >= tokens + 19 + 2  # a page's transcription: 16 digits and 3 ends of lines
    with pytest.raises(ValueError, match="unknown stage 'read,tiny'"):
        get("reading", "read,tiny")
