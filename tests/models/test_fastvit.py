"""FastViT: drop path, BatchNorm with empty slots, grids, invalid arguments and the CLIP projection."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fastvlm_jax import sharding
from fastvlm_jax.kernels.gelu import gelu
from fastvlm_jax.models import fastvit
from fastvlm_jax.models.blocks import Block
from fastvlm_jax.models.fastvit import FastViT
from fastvlm_jax.models.layers import BatchNorm, conv, drop_path
from fastvlm_jax.models.stage_weights import stage_weights
from fastvlm_jax.preflight import topology


def test_drop_path_drops_whole_images_and_rescales_the_rest():
    x = jnp.ones((64, 2, 2, 3))
    y = np.asarray(drop_path(x, jnp.float32(0.25), jax.random.key(0)))
    kept = y.reshape(64, -1)
    assert {tuple(np.unique(row)) for row in kept} == {(0.0,), (np.float32(1 / 0.75),)}
    assert 36 <= (kept[:, 0] > 0).sum() <= 58  # 48 expected; the bounds are three standard deviations
    assert drop_path(x, jnp.float32(0.25), None) is x


def test_drop_path_acts_in_the_last_block_only_with_its_rng():
    """The rate grows linearly from 0 at the first block: with two stages of one block, only the second block drops."""
    tower = FastViT((1, 1), (8, 32), ("repmixer", "repmixer"), layer_scale_init=1.0, drop_path=0.5, form="folded")
    x = jnp.linspace(0, 1, 4 * 16 * 16 * 3).reshape(4, 16, 16, 3)
    variables = jax.jit(tower.init)(jax.random.key(0), x)
    still = jax.jit(tower.apply)(variables, x)
    moved = jax.jit(lambda rngs: tower.apply(variables, x, rngs=rngs))({"drop_path": jax.random.key(1)})
    assert not np.allclose(still, moved)


def test_an_empty_slot_counts_in_no_statistic():
    """Two images of values 1 and 3 and an empty slot: mean 2, variance 1 (stored unbiased over 8 values: 8/7)."""
    x = jnp.stack([jnp.full((2, 2, 1), 1.0), jnp.full((2, 2, 1), 3.0), jnp.full((2, 2, 1), 99.0)])
    norm = BatchNorm(batch_stats=-1)
    variables = norm.init(jax.random.key(0), x)
    y, updated = norm.apply(variables, x, jnp.array([True, True, False]), mutable=["batch_stats"])
    np.testing.assert_allclose(y[:2, 0, 0, 0], [-1, 1], atol=1e-4)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], [0.1 * 2], rtol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["var"], [0.9 + 0.1 * 8 / 7], rtol=1e-5)
    _, untouched = norm.apply(variables, x, jnp.zeros(3, bool), mutable=["batch_stats"])
    np.testing.assert_array_equal(untouched["batch_stats"]["var"], variables["batch_stats"]["var"])


def grouped(x, variables, images, mask=None, **pixels):
    """Output, new statistics, and gradients of the input and of the weights, of the sum of the output's cubes."""
    norm = BatchNorm(batch_stats=images)

    def cubes(x, params):
        y, updated = norm.apply({**variables, "params": params}, x, mask, mutable=["batch_stats"], **pixels)
        return jnp.sum(y**3), (y, updated["batch_stats"])

    gradients, (y, stats) = jax.grad(cubes, argnums=(0, 1), has_aux=True)(x, variables["params"])
    return y, stats, gradients


@pytest.mark.parametrize("mesh", [None, (1, 2, 1, 1), (1, 2, 2, 1)], ids=str)
def test_groups_of_batch_norm_are_the_replicas_of_pytorch(mesh):
    """Two groups of four images are two replicas of four: the stored statistics move to the mean of theirs."""
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(2, 3, (8, 3, 2, 5)).astype(np.float32)
    variables = {"params": {"scale": jnp.linspace(0.5, 2, 5), "bias": jnp.linspace(-1, 1, 5)}}
    variables["batch_stats"] = {"mean": jnp.full(5, 0.5), "var": jnp.full(5, 2.0)}
    outputs, means, variances, input_gradients, totals = [], [], [], [], {"scale": 0, "bias": 0}
    for part in x[:4], x[4:]:
        theirs = torch.nn.BatchNorm2d(5)
        with torch.no_grad():
            for ours, name in (("scale", "weight"), ("bias", "bias")):
                getattr(theirs, name).copy_(torch.tensor(np.asarray(variables["params"][ours])))
            theirs.running_mean.fill_(0.5), theirs.running_var.fill_(2.0)
        inputs = torch.tensor(part.transpose(0, 3, 1, 2), requires_grad=True)
        y = theirs(inputs)
        gradient, *more = torch.autograd.grad((y**3).sum(), (inputs, theirs.weight, theirs.bias))
        outputs.append(y.detach().numpy()), input_gradients.append(gradient.numpy())
        means.append(theirs.running_mean.numpy()), variances.append(theirs.running_var.numpy())
        totals = {name: total + x.numpy() for (name, total), x in zip(totals.items(), more, strict=True)}
    run = jax.jit(lambda x: grouped(x, variables, 4))
    if mesh:
        devices = sharding.make_mesh(mesh, jax.devices()[: np.prod(mesh)])
        with jax.set_mesh(devices):
            x = jax.device_put(x, sharding.batch_sharding(devices))
            got = jax.tree.map(np.asarray, run(x))
    else:
        got = run(x)
    y, stats, (input_gradient, weight_gradients) = got
    for ours, theirs in ((y, outputs), (input_gradient, input_gradients)):
        np.testing.assert_allclose(ours, np.concatenate(theirs).transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
    for name, total in totals.items():
        np.testing.assert_allclose(weight_gradients[name], total, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(stats["mean"], np.mean(means, 0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], np.mean(variances, 0), rtol=1e-5)


def test_groups_that_lie_in_a_shard_are_normalised_without_an_exchange_between_devices():
    mesh = sharding.make_mesh((1, 2, 1, 1), jax.devices()[:2])
    x = jax.ShapeDtypeStruct((8, 3, 2, 5), jnp.float32, sharding=sharding.batch_sharding(mesh))
    variables = {"params": {"scale": jnp.ones(5), "bias": jnp.zeros(5)}}
    variables["batch_stats"] = {"mean": jnp.zeros(5), "var": jnp.ones(5)}

    def exchanges(images):
        def normalise(x):
            return BatchNorm(batch_stats=images).apply(variables, x, mutable=["batch_stats"])[0]

        with jax.set_mesh(mesh):
            return re.findall("all-reduce|all-gather|all-to-all", jax.jit(normalise).lower(x).compile().as_text())

    assert exchanges(4) == exchanges(2) == [] and exchanges(-1)


def test_an_empty_slot_counts_in_no_statistic_of_its_group():
    """Groups (1, 3) and (7, empty): means 2 and 7; a group of empty slots moves nothing."""
    x = jnp.stack([jnp.full((2, 2, 1), value) for value in (1.0, 3.0, 7.0, 99.0)])
    variables = {"params": {"scale": jnp.ones(1), "bias": jnp.zeros(1)}}
    variables["batch_stats"] = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
    norm = BatchNorm(batch_stats=2)
    y, updated = norm.apply(variables, x, jnp.array([True, True, True, False]), mutable=["batch_stats"])
    np.testing.assert_allclose(y[:3, 0, 0, 0], [-1, 1, 0], atol=1e-4)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], [0.1 * (2 + 7) / 2], rtol=1e-5)
    _, updated = norm.apply(variables, x, jnp.array([True, True, False, False]), mutable=["batch_stats"])
    np.testing.assert_allclose(updated["batch_stats"]["mean"], [0.1 * 2], rtol=1e-5)


@pytest.mark.parametrize("images", [0, -1, 2])
def test_batch_norm_of_pixels_in_the_channels_is_that_of_the_map(images):
    """Parameters and statistics are the map's: the pixels of a channel are counted together, wherever they stand."""
    x = np.random.default_rng(0).normal(2, 3, (4, 4, 6, 5)).astype(np.float32)
    stats = {"mean": jnp.full(5, 0.5), "var": jnp.full(5, 2.0)}
    variables = {"params": {"scale": jnp.linspace(0.5, 2, 5), "bias": jnp.linspace(-1, 1, 5)}, "batch_stats": stats}
    mask = jnp.array([True, True, False, True])

    def in_channels(x):
        return x.reshape(4, 2, 2, 3, 2, 5).transpose(0, 1, 3, 2, 4, 5).reshape(4, 2, 3, 20)

    y, stats, (dx, weights) = grouped(jnp.asarray(x), variables, images, mask)
    expected = in_channels(y), stats, (in_channels(dx), weights)
    actual = grouped(in_channels(x), variables, images, mask, pixels=4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), actual, expected)


def test_groups_that_do_not_divide_the_batch_are_refused():
    norm = BatchNorm(batch_stats=3)
    variables = norm.init(jax.random.key(0), jnp.zeros((1, 2, 2, 1)))
    with pytest.raises(ValueError, match=r"^groups of 3 images for BatchNorm do not divide a batch of 4"):
        norm.apply(variables, jnp.zeros((4, 2, 2, 1)), mutable=["batch_stats"])


class Stem(nn.Module):
    settings: dict
    kernels: str

    @nn.compact
    def __call__(self, x, mask):
        return fastvit._stem(self, x, mask, dim=8, settings=dict(init_std=0.5, **self.settings))


@pytest.mark.parametrize(
    "settings",
    [
        dict(form="folded", batch_stats=0, use_scale=False),
        dict(form="branched", batch_stats=0, use_scale=False),
        dict(form="branched", batch_stats=2, use_scale=True),
    ],
    ids=["folded", "branched", "statistics"],
)
def test_the_stem_on_tpu_is_the_usual_one(settings):
    """Outputs, statistics and gradients of all parameters and of the image."""
    x = jnp.asarray(np.random.default_rng(0).random((4, 16, 24, 3), np.float32))
    mask = jnp.array([True, True, False, True])
    variables = jax.jit(Stem(settings, "none").init)(jax.random.key(0), x, mask)

    def run(kernels):
        def step(params, x):
            stem = Stem(settings, kernels)
            y, updated = stem.apply({**variables, "params": params}, x, mask, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), (y, updated)

        step = jax.jit(jax.grad(step, argnums=(0, 1), has_aux=True))
        assert ("f32[2,2,32,8]" in step.lower(variables["params"], x).compile().as_text()) == (kernels == "interpret")
        gradients, found = step(variables["params"], x)
        return found, gradients

    (actual, gradients), (expected, reference) = run("interpret"), run("none")
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), actual, expected)
    size = max(float(np.abs(x).max()) for x in jax.tree.leaves(reference))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6 * size), gradients, reference)


@pytest.mark.parametrize("form", ["folded", "branched"])
def test_a_stage_has_the_weights_of_its_blocks(form):
    """The blocks in plain JAX, with the weights that the kernels get, are the tower's stage."""
    tower = FastViT((1, 3), (8, 16), ("repmixer", "repmixer"), form=form, init_std=0.3, layer_scale_init=0.5)
    block = Block("repmixer", form=form, init_std=0.3)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 16)).astype(np.float32)
    variables = jax.jit(tower.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    keys = iter(jax.random.split(jax.random.key(1), 200))
    variables = jax.tree.map(lambda a: a + 0.2 * jax.random.uniform(next(keys), a.shape), variables)
    params, stats = (variables[name]["stage_1"] for name in ("params", "batch_stats"))
    weights = stage_weights(params, stats, jnp.float32)
    expected = found = x
    for layer in range(3):
        at = functools.partial(jax.tree.map, lambda a: a[layer])
        expected = block.apply({"params": at(params), "batch_stats": at(stats)}, expected, 0.0)
        w = at(weights)
        mixed = conv(found, w.mixer, 1, True) + w.mixer_bias
        hidden = gelu((conv(mixed, w.conv, 1, True) + w.conv_bias) @ w.kernel1 + w.bias1)
        found = mixed + hidden @ w.kernel2 + w.bias2
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_stage_as_one_updates_the_statistics_of_its_blocks():
    tower = FastViT((2,), (96,), ("repmixer",), batch_norm="train")
    x = jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.bfloat16)
    variables = jax.eval_shape(tower.init, jax.random.key(0), x)

    def updated(kernels):
        def run(variables, x):
            return tower.clone(kernels=kernels).apply(variables, x, train=True, mutable=["batch_stats"])[1]

        return jax.eval_shape(run, variables, x), "stacked_write" in str(jax.make_jaxpr(run)(variables, x))

    (plain, _), (kernels, as_one) = updated("none"), updated("interpret")
    assert as_one and plain == kernels == {"batch_stats": variables["batch_stats"]}


def kernels_of(devices, **settings):
    """Names of the Pallas kernels in the program of a tower's gradient on some devices."""
    sizes = dict(layers=(2, 1, 1), embed_dims=(96, 192, 384), mixers=("repmixer", "repmixer", "attention"))
    tower = FastViT(**sizes, **settings)
    x = jax.ShapeDtypeStruct((4, 256, 256, 3), jnp.bfloat16)

    with topology.compiler(), jax.set_mesh(sharding.make_mesh((1, -1, 1, 1), devices)):
        variables = jax.eval_shape(lambda: tower.init(jax.random.key(0), jnp.zeros(x.shape)))

        def loss(params, stats, x):
            variables = {"params": params, "batch_stats": stats}
            y = tower.apply(variables, x, train=True, mutable=["batch_stats"])[0]
            return jnp.sum(y.astype(jnp.float32))

        found = str(jax.jit(jax.grad(loss)).trace(variables["params"], variables["batch_stats"], x).jaxpr)
    return set(re.findall(r"name=((?:depthwise|pointwise|stacked)_\w+|moments|products|weighted_sum)\n", found))


def test_the_mesh_and_a_key_choose_the_kernels():
    forward = {f"depthwise_{size}{stride}" for size in ("3x3", "7x7") for stride in ("", "_stride2")}
    depthwise = forward | {f"{name}_backward" for name in forward}
    products = {"pointwise_block", "pointwise_block_gradients"}
    tpu = topology.devices(topology.parse("v5e:2x2"))
    assert kernels_of(tpu) == depthwise | products | {"stacked_write"}
    sums = {"moments", "products", "weighted_sum"}
    assert kernels_of(tpu, batch_norm="train") == depthwise | products | {"stacked_write"} | sums
    assert kernels_of(tpu, kernels="none") == set()
    assert kernels_of(jax.devices()[:1]) == set()


@pytest.mark.parametrize("size", [(96, 64), (64, 100)], ids=str)
def test_sizes_that_the_strides_do_not_divide_are_refused(size):
    tower = FastViT((1, 1, 1, 1, 1), (8, 16, 32, 64, 64))
    message = f"image size {size[0]}x{size[1]} must be a multiple of 64"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, *size, 3)))
    with pytest.raises(ValueError, match=message):
        tower.grid(*size)


def test_non_square_images_give_their_grid_row_by_row():
    tower = FastViT((1, 1), (8, 32), ("repmixer", "attention"))
    shape = jax.eval_shape(lambda: nn.unbox(tower.init_with_output(jax.random.key(0), jnp.zeros((2, 16, 32, 3)))[0]))
    assert shape.shape == (2, *tower.grid(16, 32), tower.features) == (2, 2, 4, 64)


@pytest.mark.parametrize(
    "args, message",
    [
        ({"form": "fused"}, "form='fused' must be one of"),
        ({"attention_norm": "group"}, "attention_norm='group' must be one of"),
        ({"multiscale": (1,)}, r"multiscale=\(1,\) must name stages from \(0,\)"),
        ({"multiscale": (0, 0)}, "each once"),
        ({"se_stages": (0,)}, r"se_stages=\(0,\) must name stages with a patch embed: \(1,\)"),
    ],
    ids=str,
)
def test_arguments_that_describe_no_tower_are_refused(args, message):
    tower = FastViT((1, 1), (8, 32), ("repmixer", "attention"), **args)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize("mixers, at", [(("repmixer", "attention"), 1), (("attention", "repmixer"), 0)])
def test_an_attention_stage_that_heads_of_32_channels_do_not_divide_is_refused(mixers, at):
    dims = (24, 48)
    with pytest.raises(ValueError, match=rf"embed_dims\[{at}\]={dims[at]} must be a multiple of 32, the width of"):
        jax.eval_shape(FastViT((1, 1), dims, mixers).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_the_projection_exists_before_it_is_used():
    tower = FastViT((1, 1), (8, 32), ("repmixer", "attention"), head_features=5)
    x = jnp.zeros((2, 16, 16, 3))
    variables = jax.eval_shape(lambda: tower.init(jax.random.key(0), jnp.zeros(x.shape)))
    assert {name: leaf.shape for name, leaf in variables["params"]["head"].items()} == {"kernel": (64, 5)}
    assert jax.eval_shape(tower.apply, variables, x).shape == (2, 2, 2, 64)
    assert jax.eval_shape(lambda v, x: tower.apply(v, x, embed=True), variables, x).shape == (2, 5)
    with pytest.raises(ValueError, match="head_features"):
        jax.eval_shape(lambda v, x: tower.clone(head_features=0).apply(v, x, embed=True), variables, x)
