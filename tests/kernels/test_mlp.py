"""The two-layer perceptron: in blocks of rows and plain, values and gradients, against torch; who gets which form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fastvlm_jax.kernels import mlp


def example(shape, hidden, outputs):
    rng = np.random.default_rng(0)
    sizes = [shape, (shape[3], hidden), (hidden,), (hidden, outputs), (outputs,), (*shape[:3], outputs)]
    return [rng.standard_normal(size).astype(np.float32) for size in sizes]


def torch_mlp(*arrays):
    """Returns torch's (y, gradients of all arguments)."""
    *args, dy = (torch.tensor(a) for a in arrays)
    x, kernel1, bias1, kernel2, bias2 = (a.requires_grad_() for a in args)
    hidden = torch.nn.functional.gelu(torch.nn.functional.linear(x, kernel1.T, bias1))
    y = torch.nn.functional.linear(hidden, kernel2.T, bias2)
    y.backward(dy)
    return [y.detach().numpy(), *(a.grad.numpy() for a in args)]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(mlp, "MAX_HIDDEN", 2**9)
    monkeypatch.setattr(mlp, "MIN_POSITIONS", 4)


@pytest.mark.parametrize("shape", [(2, 6, 5, 8), (1, 7, 9, 8)])  # blocks of one row; of one row of a prime number
def test_equals_torch_forward_and_backward(shape, small_blocks):
    *args, dy = example(shape, 24, 12)
    assert mlp.rows_at_once(shape, 24) == 1 + (shape[0] == 2)
    assert "while" in jax.jit(mlp.mlp).lower(*args).as_text()
    y = jax.jit(mlp.mlp)(*args)
    again, vjp = jax.vjp(lambda *args: mlp.mlp(*args), *args)
    expected = torch_mlp(*args, dy)
    for ours, theirs in zip((y, again, *vjp(dy)), (expected[0], *expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_only_the_forward_pass_on_a_cpu_runs_in_blocks(small_blocks):
    *args, _ = example((2, 6, 5, 8), 24, 12)
    forward = jax.jit(lambda *args: mlp.mlp(*args)).trace(*args)
    backward = jax.jit(jax.grad(lambda *args: mlp.mlp(*args).sum())).trace(*args)
    assert "stablehlo.while" in forward.lower(lowering_platforms=("cpu",)).as_text()
    for traced, platform in [(forward, "tpu"), (forward, "cuda"), (backward, "cpu"), (backward, "tpu")]:
        assert "stablehlo.while" not in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    "shape, hidden, rows",
    [
        ((1, 128, 128, 192), 768, 8),  # 2^20 hidden values are 10.7 rows
        ((1, 32, 32, 384), 1536, 32),  # 6 MB in all: one block
        ((1, 1, 4096, 384), 1536, 1),  # one row is more than a block may be
        ((1, 127, 64, 384), 1536, 127),  # a prime number of rows: blocks of 64 positions are too small
    ],
)
def test_rows_of_a_block(shape, hidden, rows):
    assert mlp.rows_at_once(shape, hidden) == rows


def test_bfloat16_stays_bfloat16():
    *args, _ = (jnp.asarray(a, jnp.bfloat16) for a in example((1, 4, 4, 8), 16, 8))
    assert mlp.mlp(*args).dtype == jnp.bfloat16
