"""Attention: `plain` against loops in NumPy, the kernels against `plain`, and the compiled programs."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastvlm_jax.kernels import attention as attention_module
from fastvlm_jax.kernels.attention import attention, cudnn_attention, plain
from fastvlm_jax.kernels.splash import splash_attention
from fastvlm_jax.sharding import make_mesh

interpreted = functools.partial(splash_attention, interpret=True)


def arrays(B, T, S, K, G, E, dtype=jnp.float32, seed=0):
    """Returns random queries, keys, values and gradient of the result."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = (B, T, K, G, E), (B, S, K, E), (B, S, K, E), (B, T, K, G, E)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def segments(*rows):
    """Returns the segment ids of rows given as (length of segment 1, length of segment 2, ..., length of padding)."""
    return jnp.array(
        [[i for i, n in zip([*range(1, len(row)), 0], row, strict=True) for _ in range(n)] for row in rows], jnp.int32
    )


def looped(q, k, v, q_segments, kv_segments, offset):
    """Computes softmax(q . k / sqrt(E)) v over the visible keys for one query of one head at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, head, g in np.ndindex(q.shape[:4]):
        seen = [s for s in range(offset + t + 1) if kv_segments[b, s] == q_segments[b, t]]
        weights = np.exp([q[b, t, head, g] @ k[b, s, head] / q.shape[-1] ** 0.5 for s in seen])
        out[b, t, head, g] = sum(w * v[b, s, head] for w, s in zip(weights / weights.sum(), seen, strict=True))
    return out


def with_gradients(form, q_segments, kv_segments, offset=0):
    """Returns a compiled function (q, k, v, d out) -> (out, dq, dk, dv)."""

    def run(q, k, v, dout):
        out, vjp = jax.vjp(lambda q, k, v: form(q, k, v, q_segments, kv_segments, offset), q, k, v)
        return out, *vjp(dout)

    return jax.jit(run)


@pytest.mark.parametrize("fitting, loops", [(2 * 2 * 3 * 81, 0), (2 * 3 * 81, 1)], ids=["at once", "by heads"])
def test_the_forms_of_prompts_on_tpu_equal_loops(fitting, loops, monkeypatch):
    """Scores of two rows of 9 tokens, two key-value heads and three queries each fit, or those of one such head."""
    monkeypatch.setattr(attention_module, "MAX_SCORES", fitting)
    q, k, v, _ = arrays(2, 9, 9, 2, 3, 8)
    ids = segments((9, 0), (5, 4))
    expected = looped(q, k, v, ids, ids, 0)
    form = jax.jit(lambda *args: attention_module._on_chip(*args))  # traced anew for each limit
    assert str(form.trace(q, k, v, ids, ids).jaxpr).count("scan[") == loops
    np.testing.assert_allclose(form(q, k, v, ids, ids), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(attention_module.prompt_attention)(q, k, v, ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens, form", [(640, "at once"), (1088, "at once"), (1280, "by heads"), (2048, "splash")])
def test_the_scores_of_a_device_choose_the_form_of_a_prompt_on_tpu(tokens, form):
    """14 heads on one device, and the same on each of two devices that share twice as many."""
    for heads, mesh in (
        (2, make_mesh((1, 1, 1, 1), jax.devices()[:1])),
        (4, make_mesh((1, 1, 1, 2), jax.devices()[:2])),
    ):
        shapes = [(1, tokens, heads, 7, 64), *[(1, tokens, heads, 64)] * 2]
        args = [*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes), segments((tokens, 0))]
        with jax.set_mesh(mesh):
            lowered = jax.jit(attention_module.prompt_attention).trace(*args).lower(lowering_platforms=("tpu",))
        text = lowered.as_text()
        found = "splash" if "tpu_custom_call" in text else "by heads" if "stablehlo.while" in text else "at once"
        assert found == form


def test_one_query_attends_to_the_allowed_slots_of_a_cache():
    q, k, v, _ = arrays(2, 1, 9, 2, 3, 8)
    ids, asking = segments((9, 0), (5, 4)), jnp.ones((2, 1), jnp.int32)
    k_BKES, v_BKES = (x.transpose(0, 2, 3, 1) for x in (k, v))
    got = jax.jit(attention_module.cached_attention)(q[:, 0], k_BKES, v_BKES, ids == asking)
    np.testing.assert_allclose(got, looped(q, k, v, asking, ids, 8)[:, 0], rtol=1e-5, atol=1e-5)


def check_same(form, inputs, ids, tolerance=1e-5):
    for name, got, expected in zip(
        ("out", "dq", "dk", "dv"),
        with_gradients(form, ids, ids)(*inputs),
        with_gradients(plain, ids, ids)(*inputs),
        strict=True,
    ):
        assert got.dtype == expected.dtype
        got, expected = (np.asarray(x, np.float32) for x in (got, expected))
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance, err_msg=name)


def test_plain_is_causal_within_segments_grouped_and_scaled():
    q, k, v, _ = arrays(2, 9, 9, 2, 3, 4)
    ids = segments((4, 3, 2), (9, 0))
    np.testing.assert_allclose(plain(q, k, v, ids, ids), looped(q, k, v, ids, ids, 0), atol=1e-6)


@pytest.mark.parametrize("form", [plain, interpreted], ids=["plain", "splash"])
def test_behind_a_cache_queries_count_from_the_offset(form):
    q, k, v, _ = arrays(1, 5, 140, 2, 2, 8)
    ids = segments((20, 113, 7))
    # queries 131 and 132 are the end of segment 2, the others are padding
    queries = ids[:, 131:136]
    got = jax.jit(form)(q, k, v, queries, ids, jnp.int32(131))
    np.testing.assert_allclose(got, looped(q, k, v, queries, ids, 131), atol=2e-6)


def test_the_splash_form_is_the_plain_one_with_its_gradients():
    # 600 slots become a block of 1024, in steps of 512 keys: a segment of row 2 crosses the steps, row 3 is all padding
    check_same(
        interpreted, arrays(3, 600, 600, 1, 2, 16), segments((130, 300, 150, 20), (600, 0, 0, 0), (0, 0, 0, 600))
    )


@pytest.mark.parametrize("form", [plain, interpreted], ids=["plain", "splash"])
def test_in_bfloat16_the_softmax_stays_in_float32(form):
    q, *others = arrays(1, 256, 256, 2, 2, 64, jnp.bfloat16)
    inputs = 8 * q, *others  # scores of about 8, which bfloat16 rounds by up to 0.03
    ids = segments((200, 56))
    exact = with_gradients(plain, ids, ids)(*(x.astype(jnp.float32) for x in inputs))
    for got, expected in zip(with_gradients(form, ids, ids)(*inputs), exact, strict=True):
        scale = float(jnp.max(jnp.abs(expected)))
        np.testing.assert_allclose(got.astype(jnp.float32), expected, rtol=0.02, atol=0.005 * scale)


@pytest.mark.parametrize("offset", [0, 5])
def test_the_mask_given_to_cudnn_is_the_plain_one(offset):
    # cuDNN needs a GPU, so this runs the XLA implementation of the same jax.nn call.
    q, k, v, _ = arrays(2, 24 - offset, 24, 2, 3, 8)
    ids = segments((10, 9, 5), (24, 0))
    form = functools.partial(cudnn_attention, offset=offset, implementation="xla")
    got = jax.jit(form)(q, k, v, ids[:, offset:], ids)
    np.testing.assert_allclose(got, plain(q, k, v, ids[:, offset:], ids, offset), atol=1e-6)


def test_cudnn_is_lowered_for_cuda_forward_and_backward(monkeypatch):
    # JAX asks cuDNN for its version, which fails without a GPU: this gives the answer.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    inputs = arrays(2, 256, 256, 2, 7, 64, jnp.bfloat16)
    ids = segments((200, 50, 6), (256, 0))
    text = with_gradients(cudnn_attention, ids, ids).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @__cudnn\$fmhaScaleBiasSoftmax\(", text)) == 1
    assert len(re.findall(r"custom_call @__cudnn\$fmhaScaleBiasSoftmaxBackward\(", text)) == 1
    assert "\\22mask_type\\22: \\22CAUSAL\\22" in text or '"mask_type": "CAUSAL"' in text


def test_without_a_gpu_cudnn_is_not_asked_for():
    q, k, *_ = arrays(1, 256, 256, 2, 2, 64, jnp.bfloat16)
    assert not attention_module.cudnn_supports(q, k)


def test_on_a_mesh_each_device_runs_the_kernel_on_its_rows_and_heads():
    inputs, ids = arrays(4, 128, 128, 2, 1, 8), segments(*[(60, 50, 18)] * 4)
    expected = with_gradients(plain, ids, ids)(*inputs)
    with jax.set_mesh(make_mesh((1, 2, 2, 2))):
        got = with_gradients(functools.partial(attention_module._on_shards, interpreted), ids, ids)(*inputs)
    assert got[0].addressable_shards[0].data.shape == (1, 128, 1, 1, 8)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_rows_that_do_not_divide_over_a_mesh_are_computed_by_all_devices():
    q, k, v, _ = arrays(3, 256, 256, 2, 1, 8)
    ids = segments(*[(100, 150, 6)] * 3)
    with jax.set_mesh(make_mesh((1, 2, 2, 2))):
        traced = jax.jit(attention).trace(q, k, v, ids, ids)
        kernel = traced.lower(lowering_platforms=("tpu",)).as_text()
        got = jax.jit(attention)(q, k, v, ids, ids)
    assert "tensor<3x256x1x1x8xf32>" in kernel  # all rows, one of the two heads
    np.testing.assert_allclose(got, plain(q, k, v, ids, ids), atol=1e-6)


@pytest.mark.parametrize(
    "T, S, platform, kernels", [(256, 256, "tpu", 1), (1, 512, "tpu", 0), (160, 160, "tpu", 0), (256, 256, "cpu", 0)]
)
def test_the_platform_lowered_for_and_the_lengths_choose_the_form(T, S, platform, kernels):
    q, k, v, _ = arrays(1, T, S, 1, 2, 64, jnp.bfloat16)
    ids = jnp.ones((1, S), jnp.int32)
    traced = jax.jit(attention).trace(q, k, v, ids[:, :T], ids, S - T)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert len(re.findall("custom_call @tpu_custom_call", text)) == kernels


def test_a_row_of_padding_has_finite_gradients_and_gives_others_none():
    q, k, v, dout = arrays(2, 256, 256, 1, 2, 8)
    ids = segments((0, 256), (250, 6))
    dout = dout * (ids > 0)[..., None, None, None]
    for x in with_gradients(interpreted, ids, ids)(q, k, v, dout):
        assert np.isfinite(x).all()
    _, dq, dk, dv = with_gradients(interpreted, ids, ids)(q, k, v, dout)
    assert not dq[0].any() and not dk[0].any() and not dv[0].any() and not dv[1, 250:].any()


V5E = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from fastvlm_jax.kernels.attention import attention
from fastvlm_jax.sharding import make_mesh, spec

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = make_mesh((1, 1, 2, 2), devices)
B, T, K, G, E = 4, 512, 2, 7, 64
array = lambda shape, dtype, axes: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(axes)))
heads = ("batch", None, "kv_heads")
q, k = array((B, T, K, G, E), jnp.bfloat16, heads), array((B, T, K, E), jnp.bfloat16, heads)

def run(q, k, v, ids, dout):
    out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, ids, ids), q, k, v)
    return out, *vjp(dout)

with jax.set_mesh(mesh):
    compiled = jax.jit(run).lower(q, k, k, array((B, T), jnp.int32, ("batch",)), q).compile()
text = compiled.as_text()
print(*sorted(set(re.findall("splash_mha_[a-z]+", text))))
print(*sorted(set(re.findall("all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", text))))
print(compiled.memory_analysis().temp_size_in_bytes)

single = NamedSharding(make_mesh((1, 1, 1, 1), devices[:1]), spec(()))
q, k, ids = (jax.ShapeDtypeStruct(*x, sharding=single) for x in (
    ((1, 256, 1, 1, 64), jnp.bfloat16), ((1, 256, 1, 64), jnp.bfloat16), ((1, 256), jnp.int32)))
for names in ("attention",), ():
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    layer = jax.checkpoint(lambda q, k, v, ids: attention(q, k, v, ids, ids), policy=policy)
    loss = lambda *args: jnp.sum(jnp.sin(layer(*args).astype(jnp.float32)))
    text = jax.jit(jax.grad(loss)).lower(q, k, k, ids).compile().as_text()
    print(len(re.findall("%splash_mha_fwd[^ ]* = ", text)))
"""


@pytest.fixture(scope="module")
def compiled_for_v5e():
    """The lines that V5E prints: kernels, collectives, bytes of temporaries, forward kernels under two policies."""
    pytest.importorskip("libtpu")
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    env |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    result = subprocess.run([sys.executable, "-c", V5E], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.split("\n")


def test_the_v5e_compiler_takes_the_kernels_on_a_mesh_without_moving_or_storing_scores(compiled_for_v5e):
    kernels, collectives, temp = compiled_for_v5e[:3]
    assert kernels == "splash_mha_dkv splash_mha_dq splash_mha_fwd"
    assert collectives == ""
    scores = 2 * 7 * 512 * 512 * 4  # bytes of float32 scores on one device: 2 rows, 7 heads
    assert int(temp) < scores


def test_a_policy_that_saves_attention_does_not_run_it_again(compiled_for_v5e):
    saved, unsaved = compiled_for_v5e[3:5]
    assert (saved, unsaved) == ("1", "2")
