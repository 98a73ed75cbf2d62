"""The encoder's TPU optimizations do not change its results: the parts against torch, and the lowered program."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fastvlm_jax.kernels import self_attention
from fastvlm_jax.kernels.gelu import gelu
from fastvlm_jax.models.blocks import Block, PatchEmbed, SelfAttention
from fastvlm_jax.models.fastvit import FastViT
from fastvlm_jax.models.layers import ConvBN, Dense
from fastvlm_jax.models.remat import rematted, saved


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_gelu_is_the_exact_one():
    x = np.linspace(-10, 10, 2001, dtype=np.float32)
    t = torch.tensor(x, requires_grad=True)
    torch.nn.functional.gelu(t).sum().backward()
    y, vjp = jax.vjp(gelu, x)
    np.testing.assert_allclose(y, torch.nn.functional.gelu(t).detach(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(vjp(jnp.ones_like(y))[0], t.grad, rtol=1e-6, atol=1e-6)


def test_gelu_rounds_a_bfloat16_once():
    x = jnp.linspace(-6, 6, 1001, dtype=jnp.bfloat16)
    t = torch.tensor(np.asarray(x, np.float64), requires_grad=True)
    expected = torch.nn.functional.gelu(t)
    expected.sum().backward()
    y, vjp = jax.vjp(gelu, x)
    for ours, theirs in ((y, expected.detach()), (vjp(jnp.ones_like(y))[0], t.grad)):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=2**-8, atol=1e-6)


def test_a_scaled_product_is_the_product_times_the_scale():
    x, kernel, bias, scale, dy = normal(0, 5, 3), normal(1, 3, 4), normal(2, 4), normal(3, 4), normal(4, 5, 4)
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, kernel, bias, scale)]
    expected = (tensors[0] @ tensors[1] + tensors[2]) * tensors[3]
    expected.backward(torch.tensor(dy))

    def ours(x, kernel, bias, scale):
        return Dense(4).apply({"params": {"kernel": kernel, "bias": bias}}, x, scale)

    y, vjp = jax.vjp(ours, x, kernel, bias, scale)
    np.testing.assert_allclose(y, expected.detach(), rtol=1e-5, atol=1e-5)
    for gradient, tensor in zip(vjp(dy), tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k, depthwise", [(7, True), (1, True), (3, False)])
def test_frozen_batch_norm_on_the_kernel_is_batch_norm_of_the_result(k, depthwise):
    x, kernel, dy = normal(0, 2, 6, 5, 4), normal(1, k, k, 1 if depthwise else 4, 4), normal(2, 2, 6, 5, 4)
    scale, bias, mean, var = normal(3, 4), normal(4, 4), normal(5, 4), np.abs(normal(6, 4)) + 0.1
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, kernel, scale, bias)]
    y = torch.nn.functional.conv2d(
        tensors[0].permute(0, 3, 1, 2), tensors[1].permute(3, 2, 0, 1), padding=k // 2, groups=4 if depthwise else 1
    )
    expected = torch.nn.functional.batch_norm(y, torch.tensor(mean), torch.tensor(var), *tensors[2:], eps=1e-5)
    expected.backward(torch.tensor(dy).permute(0, 3, 1, 2))

    def ours(x, kernel, scale, bias):
        variables = {
            "params": {"kernel": kernel, "bn": {"scale": scale, "bias": bias}},
            "batch_stats": {"bn": {"mean": mean, "var": var}},
        }
        return ConvBN(4, k, depthwise=depthwise).apply(variables, x)

    y, vjp = jax.vjp(ours, x, kernel, scale, bias)
    np.testing.assert_allclose(y, expected.detach().permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
    for gradient, tensor in zip(vjp(dy), tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at_once, groups", [(1, 4), (2 * 2 * 12 * 12, 2), (2 * 4 * 12 * 12, 1)])
def test_attention_by_groups_of_heads_is_attention(at_once, groups, monkeypatch):
    monkeypatch.setattr(self_attention, "SCORES_AT_ONCE", at_once)
    C = 4 * 32
    arrays = normal(0, 2, 3, 4, C), 0.2 * normal(1, C, 3 * C), 0.2 * normal(2, C, C), normal(3, C)
    dy = normal(4, 2, 3, 4, C)
    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    q, k, v = (tensors[0].reshape(2, 12, C) @ tensors[1]).reshape(2, 12, 3, 4, 32).permute(2, 0, 3, 1, 4)
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 3, 4, C)
    expected = mixed @ tensors[2] * tensors[3]
    expected.backward(torch.tensor(dy))

    def ours(x, qkv, proj, scale):
        params = {"qkv": {"kernel": qkv}, "proj": {"kernel": proj, "bias": 0 * scale}}
        return SelfAttention().apply({"params": params}, x, scale)

    assert f"f32[2,{4 // groups},12,12]" in str(jax.make_jaxpr(ours)(*arrays))
    y, vjp = jax.vjp(ours, *arrays)
    np.testing.assert_allclose(y, expected.detach(), rtol=1e-4, atol=1e-4)
    for gradient, tensor in zip(vjp(dy), tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad, rtol=1e-3, atol=1e-3)


def gradients(tower, variables, x, dy):
    def loss(params):
        y, updates = tower.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
        return jnp.sum(y * dy), updates

    return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])


def test_what_is_kept_changes_no_gradient_and_no_statistic():
    x, dy = normal(0, 2, 8, 8, 3), normal(1, 2, 2, 2, 64)
    tower = FastViT((1,), (32,), ("attention",), layer_scale_init=0.5, attention_norm="batch", batch_norm="train")
    variables = tower.init(jax.random.key(0), x)
    expected = gradients(tower, variables, x, dy)
    actual = gradients(tower.clone(remat="depthwise"), variables, x, dy)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4), actual, expected)


def lowered(policy, *, mixer="repmixer", form="folded", batch_stats=0):
    """Returns the StableHLO for TPU of the forward and backward pass of one block."""
    block = rematted(Block, policy)(mixer, layer_scale_init=1.0, form=form, batch_stats=batch_stats)
    x = jax.ShapeDtypeStruct((2, 8, 8, 64), jnp.bfloat16)
    variables = jax.eval_shape(Block(mixer, form=form).init, jax.random.key(0), x, 0.0)

    def loss(variables, x):
        return block.apply(variables, x, 0.0, mutable=["batch_stats"])[0].astype(jnp.float32).sum()

    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    return jax.jit(gradient).trace(variables, x).lower(lowering_platforms=("tpu",)).as_text()


def counts(text):
    """Returns the number of (forward 7x7 convolutions, matrix products) in a program."""
    return len(re.findall(r"convolution.*tensor<7x7x1x64xbf16>\) -> ", text)), text.count("stablehlo.dot_general")


def test_the_backward_pass_repeats_neither_the_7x7_convolution_nor_the_last_product():
    """Two products forward (fc1 and fc2), four backward; only fc1 is recomputed, because GELU's gradient reads it."""
    assert counts(lowered("none")) == (1, 6)
    assert counts(lowered("full")) == (2, 7)
    assert counts(lowered("depthwise")) == (1, 7)


def test_the_backward_pass_repeats_the_product_of_a_patch_embed_but_not_its_convolution():
    """The 7x7 in two convolutions, for two outputs a channel; one product forward, two backward."""

    def lowered(policy, batch_stats=0):
        setting = dict(form="folded", batch_stats=batch_stats, kernels="none")
        embed = rematted(PatchEmbed, policy, scanned=False)(128, **setting)
        x = jax.ShapeDtypeStruct((2, 8, 8, 64), jnp.bfloat16)
        variables = jax.eval_shape(embed.init, jax.random.key(0), x)
        gradient = jax.value_and_grad(lambda v, x: embed.apply(v, x).astype(jnp.float32).sum(), argnums=(0, 1))
        return counts(jax.jit(gradient).trace(variables, x).lower(lowering_platforms=("tpu",)).as_text())

    assert lowered("none") == (2, 3)
    assert lowered("full") == (4, 4)
    assert lowered("depthwise") == lowered("depthwise", batch_stats=-1) == (2, 4)


def test_maps_that_leave_lanes_empty_are_computed_again():
    assert saved("depthwise", 96) == () and saved("depthwise", 128) == ("depthwise",)
    assert saved("none", 96) == ("mixed", "depthwise") and saved("full", 384) == saved("dots", 384) == ()


def test_training_batch_norm_is_not_measured_again():
    none, full, depthwise = (
        len(re.findall(r"stablehlo.reduce\(.*tensor<2x8x8x64x", lowered(policy, form="branched", batch_stats=-1)))
        for policy in ("none", "full", "depthwise")
    )
    assert depthwise == none < full


def test_the_stem_is_computed_again_and_the_compiler_cannot_merge_it_with_the_first_time():
    tower = FastViT((1,), (32,), ("repmixer",), form="folded", remat="depthwise")
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(tower.init, jax.random.key(0), x)
    traced = jax.jit(jax.grad(lambda variables, x: tower.apply(variables, x).sum())).trace(variables, x)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    images = re.findall(r"convolution.*tensor<2x8x8x3xf32>, tensor<3x3x3x32xf32>\) -> ", text)
    assert len(images) == 2 and "stablehlo.optimization_barrier" in text
