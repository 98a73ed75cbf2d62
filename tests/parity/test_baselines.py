"""The baseline encoders against transformers (CLIP, SigLIP), timm and open_clip (ConvNeXt), live, random weights.

Bounds: ||ours - theirs|| / ||theirs|| <= 1e-5 for feature maps; for gradients 1e-4 of the larger of their own norm and
the median one. Full width; the default suite takes fewer layers, `--full` all of them.
"""

import gc
import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch_reference import jit, randomise, relative, stored, timm, to_nchw, transformers

from fastvlm_jax.convert.layouts import vit as vit_layout
from fastvlm_jax.convert.mapping import to_jax, to_torch
from fastvlm_jax.convert.tables import convnext as convnext_table
from fastvlm_jax.convert.tables import vit as vit_table
from fastvlm_jax.models.convnext import ConvNeXt
from fastvlm_jax.models.sizes import VISION_SIZES
from fastvlm_jax.models.vit import ViT

CLIP, SIGLIP = VISION_SIZES["clip_vit_l_336"], VISION_SIZES["siglip_so400m_384"]
# 37 px are 5 patches of 7 px and 2 px that nothing sees.
TINY_VIT = dict(image_size=37, patch_size=7, width=32, num_layers=3, num_heads=4, mlp_dim=48)
# timm's projection ends in a bias, open_clip's does not.
TINY_CONVNEXT = ConvNeXt((2, 1, 2, 1), (8, 16, 24, 32), projection=(40, 12), projection_bias=True)
OPEN_CLIP_TINY = ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768), projection=(1024,))


def build(size: dict, **changes):
    """The encoder of an entry of VISION_SIZES."""
    args = size | changes
    return {"vit": ViT, "convnext": ConvNeXt}[args.pop("family")](**args)


def shapes_of(model) -> dict[str, tuple[int, ...]]:
    """Path -> shape of a lone encoder, named as in FastVLM."""
    size = getattr(model, "image_size", 32)
    abstract = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, 3), np.float32))
    flat = flax.traverse_util.flatten_dict(abstract, sep="/")
    return {path.replace("/", "/vision/", 1): leaf.shape for path, leaf in flat.items()}


def variables_of(model, rows, tensors) -> dict:
    tree = to_jax(rows, tensors, shapes_of(model), "torch")
    return jax.tree.map(np.asarray, {"params": tree["params"]["vision"]})


def random_images(*shape):
    return np.random.default_rng(0).standard_normal((*shape, 3), np.float32)


def transformers_tower(model: ViT) -> torch.nn.Module:
    """A random CLIPVisionModel or SiglipVisionModel of the sizes of `model`, queries large enough to choose."""
    config = transformers.AutoConfig.for_model(**vit_layout.vision_config(model))
    tower = randomise(transformers.AutoModel.from_config(config), 0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in tower.encoder.layers:
            layer.self_attn.q_proj.weight *= 3
        tower.embeddings.position_embedding.weight.normal_(0, 0.5, generator=generator)
        if model.cls_token:
            tower.embeddings.class_embedding.normal_(0, 2, generator=generator)
    return tower


def transformers_features(model: ViT, tower, images) -> torch.Tensor:
    """The hidden state that `model` selects, without the class token, as a feature map."""
    with torch.set_grad_enabled(tower.training):
        states = tower(to_nchw(images), output_hidden_states=True).hidden_states
    assert len(states) == model.num_layers + 1
    return states[model.select_layer][:, int(model.cls_token) :].unflatten(1, model.grid(*images.shape[1:3]))


def assert_vit_equals_transformers(model: ViT):
    tower, images = transformers_tower(model), random_images(1, model.image_size, model.image_size)
    theirs = transformers_features(model, tower, images)
    ours = jit(model.apply)(variables_of(model, vit_table.tower_rows(model), stored(tower)), images)
    assert ours.shape == theirs.shape
    assert relative(ours, theirs) <= 1e-5, relative(ours, theirs)


@pytest.mark.parametrize("size", [CLIP, SIGLIP], ids=["CLIP ViT-L/14 336", "SigLIP-SO400M/14 384"])
def test_three_layers_of_a_vit_at_full_width_equal_transformers(size):
    assert_vit_equals_transformers(build(size, num_layers=3))


@pytest.mark.full
@pytest.mark.parametrize("size", [CLIP, SIGLIP], ids=["CLIP ViT-L/14 336", "SigLIP-SO400M/14 384"])
def test_a_whole_vit_equals_transformers_and_comes_back_from_a_round_trip(size):
    model = build(size, pooling_head=size is SIGLIP)
    assert_vit_equals_transformers(model)
    round_trip(model, vit_table.tower_rows(model), stored(transformers_tower(model)))


@pytest.mark.parametrize("select_layer", [-1, -3])
def test_a_vit_gives_the_selected_hidden_state(select_layer):
    """With an epsilon that shows: the published ones change less than the bound."""
    assert_vit_equals_transformers(ViT(**TINY_VIT, select_layer=select_layer, epsilon=0.1))


def randomly(make, *args, **kwargs) -> torch.nn.Module:
    """make(...) in eval mode with random weights; its own initialization, which is slow, is left out."""
    with torch.device("meta"):
        module = make(*args, **kwargs)
    return randomise(module.to_empty(device="cpu"), 0).eval()


def timm_convnext(model: ConvNeXt, name: str) -> torch.nn.Module:
    """A random timm ConvNeXt of the sizes of `model`, with its projection; all else as timm has it in `name`."""
    hidden, features = [None, 0, *model.projection][-2:]
    sizes = dict(depths=model.layers, dims=model.embed_dims)
    return randomly(timm.create_model, name, num_classes=features, head_hidden_size=hidden, **sizes)


def assert_convnext_equals_timm(model: ConvNeXt, name: str, images):
    tower = timm_convnext(model, name)
    with torch.no_grad():
        theirs = tower.forward_features(to_nchw(images)).permute(0, 2, 3, 1).numpy()
    variables = variables_of(model, convnext_table.tower_rows(model), stored(tower))
    del tower
    gc.collect()
    ours = jit(model.apply)(variables, images)
    assert relative(ours, theirs) <= 1e-5, relative(ours, theirs)


@pytest.mark.parametrize(
    ("size", "name"),
    [("convnext_l", "convnext_large"), ("convnext_xxl", "convnext_xxlarge")],
    ids=["ConvNeXt-L", "ConvNeXt-XXL"],
)
def test_a_shallow_convnext_at_full_width_equals_timm(size, name):
    assert_convnext_equals_timm(build(VISION_SIZES[size], layers=(1, 1, 2, 1)), name, random_images(1, 64, 96))


@pytest.mark.full
@pytest.mark.parametrize(
    ("size", "name", "side"),
    [("convnext_l", "convnext_large", 320), ("convnext_xxl", "convnext_xxlarge", 256)],
    ids=["ConvNeXt-L", "ConvNeXt-XXL"],
)
def test_a_whole_convnext_equals_timm(size, name, side):
    assert_convnext_equals_timm(build(VISION_SIZES[size]), name, random_images(1, side, side))


def open_clip_tower(config: str, proj: str | None = None) -> torch.nn.Module:
    """The image tower of an open_clip config, as open_clip's factory makes it; `proj` is another projection."""
    import open_clip

    config = open_clip.get_model_config(config)
    args = {key: config["vision_cfg"][f"timm_{key}"] for key in ("model_name", "pool", "proj")}
    return open_clip.timm_model.TimmModel(embed_dim=config["embed_dim"], **args | ({"proj": proj} if proj else {}))


def test_the_trunk_of_an_open_clip_tower_equals_ours():
    model = OPEN_CLIP_TINY
    tower, images = randomly(open_clip_tower, "convnext_tiny"), random_images(1, 32, 64)
    with torch.no_grad():
        theirs = tower.trunk.forward_features(to_nchw(images)).permute(0, 2, 3, 1)
    ours = jit(model.apply)(variables_of(model, convnext_table.openclip_rows(model, ""), stored(tower)), images)
    assert relative(ours, theirs) <= 1e-5


def round_trip(model, rows, tensors):
    shapes = shapes_of(model)
    back = to_torch(rows, to_jax(rows, tensors, shapes, "torch"), shapes)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert np.array_equal(np.asarray(back[name]), tensor[:]), name


@pytest.mark.parametrize(
    "kind",
    [{}, dict(cls_token=False, pre_norm=False, pooling_head=True, select_layer=-3)],
    ids=["CLIP", "SigLIP"],
)
def test_a_vit_comes_back_from_a_round_trip_bit_for_bit(kind):
    model = ViT(**TINY_VIT, **kind)
    tensors = {f"vision_model.{name}": x for name, x in stored(transformers_tower(model)).items()}
    round_trip(model, vit_table.tower_rows(model, "vision_model."), tensors)


@pytest.mark.parametrize("projection", [(), (12,), (40, 12)])
def test_a_timm_convnext_comes_back_from_a_round_trip_bit_for_bit(projection):
    model = TINY_CONVNEXT.clone(projection=projection)
    round_trip(model, convnext_table.tower_rows(model), stored(timm_convnext(model, "convnext_large")))


@pytest.mark.parametrize(("proj", "projection"), [("linear", (1024,)), ("mlp", (2048, 1024))])
def test_an_open_clip_convnext_comes_back_from_a_round_trip_bit_for_bit(proj, projection):
    model = OPEN_CLIP_TINY.clone(projection=projection)
    tensors = {f"visual.{name}": x for name, x in stored(randomly(open_clip_tower, "convnext_tiny", proj)).items()}
    round_trip(model, convnext_table.openclip_rows(model), tensors)


@pytest.mark.full
@pytest.mark.parametrize(
    ("size", "config", "projection"),
    [("convnext_l", "convnext_large_d_320", (1536, 768)), ("convnext_xxl", "convnext_xxlarge", (1024,))],
)
def test_a_whole_open_clip_convnext_comes_back_from_a_round_trip_bit_for_bit(size, config, projection):
    model = build(VISION_SIZES[size], projection=projection)
    tensors = {f"visual.{name}": x for name, x in stored(randomly(open_clip_tower, config)).items()}
    round_trip(model, convnext_table.openclip_rows(model), tensors)


def gradient_errors(model, rows, tower, their_features, images) -> dict[str, float]:
    """Errors of all gradients of a random projection of the features, by torch name, in units of the bound."""
    weights = np.random.default_rng(1).standard_normal(their_features.shape, np.float32)
    (their_features * torch.from_numpy(weights)).sum().backward()
    theirs = {name: p.grad for name, p in tower.named_parameters()}

    @jit
    @jax.grad
    def gradient(params):
        return jnp.sum(model.apply({"params": params}, images, train=True) * weights)

    grads = {"params": {"vision": gradient(variables_of(model, rows, stored(tower))["params"])}}
    ours = {name: np.asarray(x) for name, x in to_torch(rows, grads, shapes_of(model)).items()}
    assert ours.keys() == theirs.keys()
    median = np.median([g.norm() for g in theirs.values() if g is not None])
    for name, g in theirs.items():
        assert (g is None) == (not ours[name].any()), name
    return {
        name: np.linalg.norm(ours[name] - g.numpy()) / max(g.norm(), median) / 1e-4
        for name, g in theirs.items()
        if g is not None
    }


@pytest.mark.parametrize(
    "kind",
    [{}, dict(cls_token=False, pre_norm=False, activation="gelu_pytorch_tanh", epsilon=1e-6, pooling_head=True)],
    ids=["CLIP", "SigLIP"],
)
def test_gradients_of_a_vit_equal_transformers(kind):
    """Recomputed in the backward pass; those of the layer, norm and head behind the features are 0 here, None there."""
    model = ViT(**TINY_VIT, **kind, remat="full")
    tower, images = transformers_tower(model).train(), random_images(2, 37, 37)
    theirs = transformers_features(model, tower, images)
    errors = gradient_errors(model, vit_table.tower_rows(model), tower, theirs, images)
    assert max(errors.values()) <= 1, max(errors, key=errors.get)


def test_gradients_of_a_convnext_equal_timm():
    model = TINY_CONVNEXT.clone(remat="full")
    tower, images = timm_convnext(model, "convnext_large").train(), random_images(8, 32, 32)
    theirs = tower.forward_features(to_nchw(images)).permute(0, 2, 3, 1)
    errors = gradient_errors(model, convnext_table.tower_rows(model), tower, theirs, images)
    assert max(errors.values()) <= 1, max(errors, key=errors.get)


def count(shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


@pytest.mark.parametrize(
    ("size", "head", "millions", "published"),
    [
        ("clip_vit_l_336", {}, 303.507, None),
        ("siglip_so400m_384", {"pooling_head": True}, 428.226, None),
        ("convnext_l", {"projection": (1536, 768)}, 199.771, "convnext_large_d_320"),
        ("convnext_xxl", {"projection": (1024,)}, 846.544, "convnext_xxlarge"),
    ],
)
def test_parameter_counts_are_those_of_the_published_towers(size, head, millions, published):
    """The paper's 304 M, ..., 200 M and 846 M count the heads of contrastive pretraining, where there are any."""
    model = build(VISION_SIZES[size], **head)
    with torch.device("meta"):
        if published is not None:
            tower = open_clip_tower(published)
        else:
            config = transformers.AutoConfig.for_model(**vit_layout.vision_config(model))
            tower = transformers.AutoModel.from_config(config)
    ours = count(shapes_of(model).values())
    assert ours == count(p.shape for p in tower.parameters())
    assert round(ours / 1e6, 3) == millions


def test_published_config_files_are_read_with_the_defaults_they_leave_out(tmp_path):
    """SigLIP's published file names the sizes only, inside that of the whole model."""
    so400m = {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16},
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 384,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
        },
    }
    assert vit_layout.read_vision_config(tmp_path, so400m) == {**SIGLIP, "pooling_head": True}
    assert vit_layout.read_vision_config(tmp_path, vit_layout.vision_config(build(CLIP))) == {
        **CLIP,
        "pooling_head": False,
    }
    for name in ("clip_vision_model", "siglip_vision_model"):
        whole = transformers.AutoConfig.for_model(name).to_dict()
        args = vit_layout.read_vision_config(tmp_path, {"model_type": name})
        assert args == vit_layout.read_vision_config(tmp_path, whole)
        written = vit_layout.vision_config(build(args))
        assert written == {key: whole[key] for key in written}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "dinov2"}, "config.json: model_type is 'dinov2', it must be one of"),
        ({"hidden_act": "relu"}, "config.json: hidden_act is 'relu', this package computes quick_gelu,"),
        ({"hidden_act": ["gelu"]}, r"config.json: hidden_act is \['gelu'\]"),
        ({"image_size": [336, 448]}, r"config.json: image_size is \[336, 448\], it must be a positive whole number"),
        ({"num_hidden_layers": True}, "config.json: num_hidden_layers is True"),
        ({"layer_norm_eps": "1e-5"}, "config.json: layer_norm_eps is '1e-5'"),
        ({"num_channels": 4}, "config.json: num_channels is 4, this package computes 3 only"),
    ],
)
def test_a_config_of_another_computation_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        vit_layout.read_vision_config("config.json", vit_layout.vision_config(build(CLIP)) | change)


def test_a_tower_is_found_in_a_whole_clip_checkpoint_and_loads_alone_in_transformers(tmp_path):
    model = ViT(**TINY_VIT)
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    config = transformers.CLIPConfig(
        vision_config=vit_layout.vision_config(model), text_config=text, projection_dim=16
    ).to_dict()
    assert vit_layout.read_vision_config("config.json", config).items() >= TINY_VIT.items()
    whole = randomise(transformers.CLIPModel(transformers.CLIPConfig.from_dict(config)), 0).eval()
    names = stored(whole) | {"vision_model.embeddings.position_ids": None, "text_model.embeddings.position_ids": None}
    tensors = {name: x for name, x in names.items() if not vit_table.is_beside_tower(model, name)}
    prefix = vit_table.tower_prefix(names)
    assert prefix == "vision_model."
    round_trip(model, vit_table.tower_rows(model, prefix), tensors)

    save_file({name: torch.from_numpy(x[:].copy()) for name, x in tensors.items()}, tmp_path / "model.safetensors")
    transformers.CLIPVisionConfig(**vit_layout.vision_config(model)).save_pretrained(tmp_path)
    tower, info = transformers.CLIPVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(x, whole.vision_model.state_dict()[name]) for name, x in tower.state_dict().items())


def test_a_siglip_tower_without_its_head_leaves_the_head_aside():
    model = ViT(**TINY_VIT, cls_token=False, pre_norm=False)
    names = stored(transformers_tower(model.clone(pooling_head=True)))
    kept = {name: x for name, x in names.items() if not vit_table.is_beside_tower(model, name)}
    assert len(names) - len(kept) == 11
    round_trip(model, vit_table.tower_rows(model, vit_table.tower_prefix(names)), kept)


def test_image_sizes_that_a_tower_cannot_take_are_refused():
    assert build(CLIP).grid(336, 336) == (24, 24)
    assert build(SIGLIP).grid(384, 384) == (27, 27)
    assert build(VISION_SIZES["convnext_l"]).grid(320, 512) == (10, 16)
    with pytest.raises(ValueError, match="image size 336x672 must be 336x336"):
        build(CLIP).grid(336, 672)
    with pytest.raises(ValueError, match="image size 320x330 must be a multiple of 32 in both directions"):
        build(VISION_SIZES["convnext_l"]).grid(320, 330)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(activation="relu"), "activation='relu' must be one of quick_gelu"),
        (dict(select_layer=-4), "select_layer=-4 must lie between -3 and -1"),
        (dict(num_heads=5), "width=32 must be a multiple of num_heads=5"),
        (dict(patch_size=38), "patch_size=38 must lie between 1 and image_size=37"),
    ],
)
def test_sizes_that_make_no_vit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(ViT(**TINY_VIT | change))
