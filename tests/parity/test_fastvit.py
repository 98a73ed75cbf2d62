"""The encoders of the FastViT family against timm and Apple's layout, live, with random weights and statistics.

Bounds: ||ours - theirs|| / ||theirs|| <= 1e-5 for outputs and statistics; for gradients 1e-4 of the larger of their own
norm and the median one (some vanish but for rounding, as the scale before a BatchNorm does).

By default the training form and its fold are compared at full width with one block a stage (MCi1, which differs from
MCi0 in depth alone, is then MCi0); timm's inference_mode and training steps in small towers of two stages that have
every part of their family. `--full` compares the published sizes.
"""

import functools
import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_reference import (
    calibrate,
    jit,
    relative,
    released,
    timm,
    timm_tower,
    to_nchw,
    tower_shapes,
    tower_variables,
)

from fastvlm_jax.convert.mapping import to_torch
from fastvlm_jax.convert.tables import apple
from fastvlm_jax.convert.tables import timm as timm_table
from fastvlm_jax.models.fastvit import FastViT, GridPool
from fastvlm_jax.models.fold import fold
from fastvlm_jax.models.sizes import VISION_SIZES

TIMM_SIZES = ("mci0", "mci1", "mci2", "mci3", "mci4")
SIZES = (*TIMM_SIZES, "fastvit_naive")
full = pytest.mark.full
TWO_STAGES = dict(layers=(2, 2), embed_dims=(16, 32), mixers=("repmixer", "attention"))
SMALL = {  # every part of FastViTHD and of MCi0 to MCi2
    "FastViTHD": TWO_STAGES,
    "MCi": {**VISION_SIZES["mci0"], **TWO_STAGES, "se_stages": (1,)},
}


def random_images(*shape):
    return np.random.default_rng(0).random((*shape, 3), np.float32)


def timm_name(size):
    return f"fastvit_{size}" if size in TIMM_SIZES else None


def inference(tower, images):
    with torch.no_grad():
        return tower.forward_features(to_nchw(images)).permute(0, 2, 3, 1).numpy()


def tensors(rows, variables, model):
    """The variables of a lone tower as torch tensors, by the table `rows`."""
    tree = {name: {"vision": variables[name]} for name in ("params", "batch_stats")}
    named = to_torch(rows(model), tree, tower_shapes(model))
    return {name: torch.from_numpy(np.array(x)) for name, x in named.items()}


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


# Outputs.


def check_outputs(model, tower, images):
    """A tower and, of the training form, its fold."""
    theirs, variables = inference(tower, images), tower_variables(model, tower)
    errors = {model.form: relative(jit(model.apply)(variables, images), theirs)}
    if model.form == "branched":
        errors["fold"] = relative(jit(model.clone(form="folded").apply)(fold(variables), images), theirs)
    print(errors)
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("size", [size for size in SIZES if size != "mci1"])
def test_outputs_of_the_training_form_and_its_fold_equal_timm(size):
    stages = len(VISION_SIZES[size]["layers"])
    model = FastViT(**{**VISION_SIZES[size], "layers": (1,) * stages})
    check_outputs(model, timm_tower(model, timm_name(size)), random_images(1, model.stride, 2 * model.stride))


@pytest.mark.parametrize("family", SMALL)
def test_outputs_of_the_folded_form_equal_timm(family):
    model, images = FastViT(**SMALL[family], form="folded"), random_images(2, 16, 48)
    tower = calibrate(timm_tower(model.clone(form="branched")), images[:, ::-1].copy())
    check_outputs(model, released(tower), images)


@full
@pytest.mark.parametrize("form", ["branched", "folded"])
@pytest.mark.parametrize("size", SIZES)
def test_outputs_at_full_depth_equal_timm(size, form):
    model = FastViT(**VISION_SIZES[size], form=form)
    resolution = (1024, 1024) if (size, form) == ("mci3", "folded") else (256, 320)
    tower, images = timm_tower(model.clone(form="branched"), timm_name(size)), random_images(1, *resolution)
    calibrate(tower, random_images(1, 256, 320)[:, ::-1].copy())
    check_outputs(model, released(tower) if form == "folded" else tower, images)


def test_embedding_equals_timms_full_forward():
    """The mean of the map, projected with timm's bias."""
    model = FastViT(**SMALL["MCi"], form="folded", head_features=24, head_bias=True)
    tower, images = timm_tower(model), random_images(2, 16, 24)
    with torch.no_grad():
        theirs = tower(to_nchw(images))
    ours = jit(functools.partial(model.apply, embed=True))(tower_variables(model, tower), images)
    assert relative(ours, theirs) <= 1e-5


# Multi-scale features.


@pytest.mark.parametrize("kind", ["average", "depthwise"])
def test_multiscale_features_are_torchs_pools_of_the_stages(kind):
    """Stages 0 and 1 at 4 and 2 times the last grid, in this order, then the final features."""
    plain = FastViT((1, 1, 1), (16, 32, 64), ("repmixer", "repmixer", "attention"), form="folded")
    model = plain.clone(multiscale=(1, 0), multiscale_pool=kind)
    assert model.features == 16 + 32 + 128 and model.grid(32, 48) == (2, 3)
    tower, images = timm_tower(plain), random_images(1, 32, 48)
    variables = tower_variables(plain, tower)
    outputs = {}
    for i in (0, 1):
        tower.stages[i].register_forward_hook(lambda module, args, y, i=i: outputs.update({i: y}))
    final = inference(tower, images)

    rng, theirs = np.random.default_rng(1), []
    for i, ratio in ((0, 4), (1, 2)):
        channels = outputs[i].shape[1]
        if kind == "average":
            pooled = torch.nn.functional.avg_pool2d(outputs[i], ratio)
        else:
            weight = rng.standard_normal((channels, 1, ratio, ratio), np.float32)
            pooled = torch.nn.functional.conv2d(outputs[i], torch.from_numpy(weight), stride=ratio, groups=channels)
            variables["params"][f"pool_{i}"] = {"kernel": weight.transpose(2, 3, 1, 0)}
        theirs.append(pooled.permute(0, 2, 3, 1).numpy())
    ours = np.asarray(jit(model.apply)(variables, images))
    for part, reference in zip(np.split(ours, [16, 48], axis=-1), [*theirs, final], strict=True):
        assert relative(part, reference) <= 1e-5


def test_learned_pools_start_as_the_mean():
    kernel = GridPool(4, learned=True).init(jax.random.key(0), jnp.zeros((1, 4, 8, 3)))["params"]["kernel"]
    np.testing.assert_array_equal(kernel, np.full((4, 4, 1, 3), 1 / 16, np.float32))


# Training.


def check_training_step(model, tower, images):
    """Loss, every gradient and every updated statistic; ours also sees an empty image slot, which must not count.

    timm computes in float64: in float32 its own gradients are up to 9.9e-5 off (FastViTHD, 128 px).
    """
    variables, batch = tower_variables(model, tower), len(images)
    target = np.random.default_rng(1).standard_normal((batch, *model.grid(*images.shape[1:3]), model.features))
    target = target.astype(np.float32)

    tower.double().train()
    their_loss = (tower.forward_features(to_nchw(images).double()) - to_nchw(target)).square().mean()
    their_loss.backward()
    gradients = {name: p.grad for name, p in tower.named_parameters()}
    statistics = {name: x for name, x in tower.named_buffers() if "running" in name}

    @jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, stats, images, mask):
        variables = {"params": params, "batch_stats": stats}
        y, updated = model.apply(variables, images, mask, train=True, mutable=["batch_stats"])
        return jnp.mean(jnp.square(y[:batch] - target)), updated["batch_stats"]

    padded, mask = np.concatenate([images, 100 * images[:1]]), np.arange(batch + 1) < batch
    (our_loss, our_stats), our_grads = loss(variables["params"], variables["batch_stats"], padded, mask)
    ours = tensors(timm_table.tower_rows, {"params": our_grads, "batch_stats": our_stats}, model)

    median = np.median([g.norm() for g in gradients.values()])
    grad_errors = {name: ((ours[name] - g).norm() / max(g.norm(), median)).item() for name, g in gradients.items()}
    stat_errors = {name: relative(ours[name], x) for name, x in statistics.items()}
    worst_grad, worst_stat = (max(errors, key=errors.get) for errors in (grad_errors, stat_errors))
    loss_error = abs(our_loss / their_loss.item() - 1)
    print(f"loss {loss_error:.1e}", f"{worst_grad} {grad_errors[worst_grad]:.1e}")
    print(f"{worst_stat} {stat_errors[worst_stat]:.1e}")
    assert loss_error <= 1e-5
    assert grad_errors[worst_grad] <= 1e-4, worst_grad
    assert stat_errors[worst_stat] <= 1e-5, worst_stat


@pytest.mark.parametrize("family", SMALL)
def test_training_step_equals_timm(family):
    model = FastViT(**SMALL[family], batch_norm="train")
    check_training_step(model, timm_tower(model), random_images(4, 16, 32))


@full
@pytest.mark.parametrize("size", ["mci3", "mci0"])
def test_training_step_at_full_size_equals_timm(size):
    model = FastViT(**VISION_SIZES[size], batch_norm="train")
    check_training_step(model, timm_tower(model, timm_name(size)), random_images(4, 128, 128))


# Sizes.


FORMS = [(size, "folded") for size in TIMM_SIZES] + [("mci0", "branched"), ("mci3", "branched")]


@pytest.mark.parametrize("size, form", FORMS)
def test_every_size_has_the_tensors_of_timms(size, form):
    """All names and shapes at full depth."""
    model = FastViT(**VISION_SIZES[size], form=form)
    with torch.device("meta"):
        theirs = timm.create_model(timm_name(size), inference_mode=form == "folded", num_classes=0).state_dict()
    shapes = tower_shapes(model)
    zeros = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    ours = to_torch(timm_table.tower_rows(model), flax.traverse_util.unflatten_dict(zeros, sep="/"), shapes)
    assert {name: x.shape for name, x in ours.items()} == {name: tuple(x.shape) for name, x in theirs.items()}


@pytest.mark.parametrize("size", ["mci0", "mci1", "mci2", "mci4"])
def test_images_are_normalised_as_timms_weights_want(size):
    """Not so MCi3: timm knows MobileCLIP2-S3's mean, FastVLM's FastViTHD takes images in [0, 1]."""
    theirs, ours = timm.get_pretrained_cfg(timm_name(size)), FastViT(**VISION_SIZES[size])
    assert (ours.image_mean, ours.image_std) == (theirs.mean, theirs.std)


@pytest.mark.parametrize(
    "size, projection, millions",
    [
        ("mci0", 512, 11.357),  # published: 11.4
        ("mci1", 512, 21.461),  # 21.5
        ("mci2", 512, 35.702),  # 35.7
        ("mci3", 768, 125.074),  # 125.1
        ("fastvithd", 0, 122.714),  # as FastVLM has it, without the projection
        ("mci4", 768, 321.569),  # 321.6
        ("fastvit_naive", 0, 113.623),  # computed: see sizes.VISION_SIZES
    ],
)
def test_parameter_counts_are_the_published_ones(size, projection, millions):
    """Folded form with Apple's projection, which has no bias; BatchNorm statistics do not count."""
    model = FastViT(**VISION_SIZES[size], form="folded")
    tower = sum(math.prod(shape) for path, shape in tower_shapes(model).items() if path.startswith("params/"))
    assert round((tower + model.features * projection) / 1e6, 3) == millions


# Layouts.


@pytest.mark.parametrize("form", ["branched", "folded"])
@pytest.mark.parametrize("family", SMALL)
def test_timm_to_jax_to_timm_is_the_identity(family, form):
    model = FastViT(**SMALL[family], form=form, head_features=24, head_bias=True)
    tower = timm_tower(model)
    back = tensors(timm_table.tower_rows, tower_variables(model, tower), model)
    assert_same_tensors(back, tower.state_dict())


@pytest.mark.parametrize("family", SMALL)
def test_timm_reads_apples_training_form_as_its_own(family):
    """timm's own filter of Apple's checkpoints gives back the tower that the tensors came from."""
    model = FastViT(**SMALL[family], head_features=24)
    tower = timm_tower(model)
    tower.head.fc.bias.data.zero_()  # what timm gives Apple's projection, which has none
    weights = {key: x for key, x in tower.state_dict().items() if key != "head.fc.bias"}
    variables = tower_variables(model, weights)
    ours = tensors(apple.tower_rows, variables, model)
    assert_same_tensors(timm.models.fastvit.checkpoint_filter_fn(ours, tower), tower.state_dict())
    back = tower_variables(model, ours, apple.tower_rows)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_folded_fastvithd_has_apples_names():
    """The released tower: 628 tensors, of which these are one block of each kind and all that stands outside blocks."""
    rows = apple.tower_rows(FastViT(form="folded", head_features=768))
    names = {name for row in rows for name in row.names()}
    block_names = [
        *("convffn.conv.conv.weight", "convffn.conv.bn.weight", "convffn.conv.bn.bias"),
        *("convffn.conv.bn.running_mean", "convffn.conv.bn.running_var", "convffn.conv.bn.num_batches_tracked"),
        *("convffn.fc1.weight", "convffn.fc1.bias", "convffn.fc2.weight", "convffn.fc2.bias"),
    ]
    rep_mixer = ["layer_scale", "token_mixer.reparam_conv.weight", "token_mixer.reparam_conv.bias", *block_names]
    attention = [
        *("layer_scale_1", "layer_scale_2", "norm.weight", "norm.bias", "token_mixer.qkv.weight"),
        *("token_mixer.proj.weight", "token_mixer.proj.bias", *block_names),
    ]
    expected = ["head.proj"]
    for place, depth, block in ((0, 2, rep_mixer), (2, 12, rep_mixer), (4, 24, rep_mixer), (7, 4, attention)):
        expected += [f"network.{place}.{i}.{name}" for i in range(depth) for name in block]
    expected += [f"network.10.{i}.{name}" for i in range(2) for name in attention]
    for conv in (
        *("patch_embed.0.reparam_conv", "patch_embed.1.reparam_conv", "patch_embed.2.reparam_conv"),
        *("network.1.proj.0.lkb_reparam", "network.1.proj.1.reparam_conv"),
        *("network.3.proj.0.lkb_reparam", "network.3.proj.1.reparam_conv"),
        *("network.5.proj.0.lkb_reparam", "network.5.proj.1.reparam_conv", "network.6.reparam_conv"),
        *("network.8.proj.0.lkb_reparam", "network.8.proj.1.reparam_conv", "network.9.reparam_conv"),
        *("conv_exp.reparam_conv", "conv_exp.se.reduce", "conv_exp.se.expand"),
    ):
        expected += [f"{conv}.weight", f"{conv}.bias"]
    assert names == set(expected) and len(names) == 628 + 1


def test_what_a_layout_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="no bias"):
        apple.tower_rows(FastViT(head_features=8, head_bias=True))
    with pytest.raises(ValueError, match="only the native layout"):
        timm_table.tower_rows(FastViT(multiscale=(1,), multiscale_pool="depthwise"))
