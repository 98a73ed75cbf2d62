"""Self-attention of an image: by heads and by rows, values and gradients, against torch; who gets which form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fastvlm_jax import sharding
from fastvlm_jax.kernels import self_attention
from fastvlm_jax.kernels.self_attention import by_heads, by_rows

HEAD = 8


def example(B, N, heads):
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((B, N, 3 * heads * HEAD)).astype(np.float32)
    return qkv, rng.standard_normal((B, N, heads * HEAD)).astype(np.float32)


def torch_attention(qkv, dy):
    """Returns torch's (y, gradient of qkv)."""
    B, N, _ = qkv.shape
    qkv = torch.tensor(qkv, requires_grad=True)
    q, k, v = qkv.reshape(B, N, 3, -1, HEAD).permute(2, 0, 3, 1, 4)
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, -1)
    y.backward(torch.tensor(dy))
    return y.detach().numpy(), qkv.grad.numpy()


def attention(qkv):
    return self_attention.self_attention(qkv, HEAD)


@pytest.mark.parametrize("N, blocks", [(64, 2), (67, 1), (36, 1), (1, 1)])  # 67 is prime; half of 36 is too few rows
def test_equals_torch_forward_and_backward(N, blocks, monkeypatch):
    monkeypatch.setattr(self_attention, "CPU_SCORES", 2 * N * N // 2)
    qkv, dy = example(2, N, 3)
    scores = f"f32[2,{N // blocks},{N}]"
    assert scores in str(jax.make_jaxpr(lambda qkv: by_rows(qkv, HEAD))(qkv))
    y, gradient = torch_attention(qkv, dy)
    np.testing.assert_allclose(jax.jit(attention)(qkv), y, rtol=1e-5, atol=1e-5)
    again, vjp = jax.vjp(attention, qkv)
    np.testing.assert_allclose(again, y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(vjp(dy)[0], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("summed_at_once", [1024, 16], ids=["short", "long"])
@pytest.mark.parametrize("maps, heads", [(6, 3), (2, 3), (1, 3), (0, 3), (1, 1)])
def test_groups_of_heads_and_images_equal_torch(maps, heads, summed_at_once, monkeypatch):
    """Room for scores of all heads of two images, of one head of both, of one of one, of none: then it is one too."""
    monkeypatch.setattr(self_attention, "SUMMED_AT_ONCE", summed_at_once)
    for limit in ("SCORES_AT_ONCE", "ON_CHIP"):
        monkeypatch.setattr(self_attention, limit, maps * 36 * 36)
    jax.clear_caches()  # JAX remembers what it traced with other limits
    qkv, dy = example(2, 36, heads)
    y, gradient = torch_attention(qkv, dy)
    form = jax.jit(lambda qkv: by_heads(qkv, HEAD))
    assert ("concatenate" in str(form.trace(qkv).jaxpr)) == (summed_at_once == 16 and maps > 0)  # values and ones
    found, vjp = jax.vjp(form, qkv)
    np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(vjp(dy)[0], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form, summed_at_once", [(by_rows, 32), (by_heads, 16)])
def test_large_scores_do_not_overflow(form, summed_at_once, monkeypatch):
    monkeypatch.setattr(self_attention, "SUMMED_AT_ONCE", summed_at_once)
    jax.clear_caches()
    qkv, dy = example(1, 32, 1)
    np.testing.assert_allclose(form(40 * qkv, HEAD), torch_attention(40 * qkv, dy)[0], rtol=1e-4, atol=1e-4)


def test_bfloat16_by_rows_is_as_near_as_by_heads():
    qkv, dy = example(2, 64, 3)
    rounded = jnp.asarray(qkv, jnp.bfloat16)
    exact, _ = torch_attention(np.asarray(rounded, np.float32), dy)
    ours, plain = (form(rounded, HEAD) for form in (by_rows, by_heads))
    assert ours.dtype == jnp.bfloat16
    errors = [np.linalg.norm(np.asarray(y, np.float32) - exact) for y in (ours, plain)]
    assert 0 < errors[0] <= 1.25 * errors[1]


def test_bfloat16_over_many_positions_is_as_near_as_the_usual_softmax_with_its_gradient(monkeypatch):
    qkv, dy = (jnp.asarray(x, jnp.bfloat16) for x in example(2, 64, 3))
    exact = torch_attention(*(np.asarray(x, np.float32) for x in (qkv, dy)))
    errors = []
    for summed_at_once in (16, 64):
        monkeypatch.setattr(self_attention, "SUMMED_AT_ONCE", summed_at_once)
        jax.clear_caches()
        y, vjp = jax.vjp(lambda qkv: by_heads(qkv, HEAD), qkv)
        assert y.dtype == jnp.bfloat16
        errors.append(
            [np.linalg.norm(np.asarray(a, np.float32) - b) for a, b in zip((y, *vjp(dy)), exact, strict=True)]
        )
    for ours, usual in zip(*errors, strict=True):
        assert 0 < ours <= 1.1 * usual


def test_the_images_of_a_device_decide_how_many_heads_go_together(monkeypatch):
    """Scores of 2 images x 6 heads may exist: all heads for an image a device, three for two images."""
    monkeypatch.setattr(self_attention, "SCORES_AT_ONCE", 6 * 16 * 16)
    qkv, _ = example(2, 16, 6)
    traced = jax.jit(lambda qkv: by_heads(qkv, HEAD)).trace(qkv).jaxpr
    assert "f32[2,3,16,16]" in str(traced) and "f32[2,6,16,16]" not in str(traced)
    mesh = sharding.make_mesh((1, 2, 1, 1), jax.devices()[:2])
    with jax.set_mesh(mesh):
        split = jax.jit(lambda qkv: by_heads(qkv, HEAD)).trace(qkv).jaxpr
    assert "f32[2,6,16,16]" in str(split)


def test_a_group_has_as_many_images_of_every_device_and_none_moves(monkeypatch):
    """Four images on two devices, with room for the scores of one: two groups, each of an image of each device."""
    monkeypatch.setattr(self_attention, "ON_CHIP", 16 * 16)
    qkv, dy = example(4, 16, 2)
    mesh = sharding.make_mesh((1, 2, 1, 1), jax.devices()[:2])
    with jax.set_mesh(mesh):
        images = sharding.batch_sharding(mesh)
        qkv, dy = (jax.device_put(x, images) for x in (qkv, dy))
        both = jax.jit(lambda qkv, dy: (by_heads(qkv, HEAD), *jax.vjp(lambda x: by_heads(x, HEAD), qkv)[1](dy)))
        traced = both.trace(qkv, dy)
        assert "f32[2,1,16,16]" in str(traced.jaxpr) and "f32[4,1,16,16]" not in str(traced.jaxpr)
        compiled = traced.lower().compile()
        found = compiled(qkv, dy)
    moves = ("all-gather", "all-to-all", "collective-permute", "all-reduce", "reduce-scatter")
    assert not [move for move in moves if move in compiled.as_text()]
    for ours, theirs in zip(found, torch_attention(np.asarray(qkv), np.asarray(dy)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_only_the_forward_pass_on_a_cpu_goes_by_rows():
    qkv, _ = example(1, 64, 3)
    forward = jax.jit(attention).trace(qkv)
    backward = jax.jit(jax.grad(lambda qkv: attention(qkv).sum())).trace(qkv)
    assert "stablehlo.while" in forward.lower(lowering_platforms=("cpu",)).as_text()
    for traced, platform in [(forward, "tpu"), (forward, "cuda"), (backward, "cpu"), (backward, "tpu")]:
        assert "stablehlo.while" not in traced.lower(lowering_platforms=(platform,)).as_text()
