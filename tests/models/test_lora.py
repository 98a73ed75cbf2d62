"""Adapters of low rank: every dense kernel of every tower takes one, and computes what the merged kernel does."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from fastvlm_jax.models import fastvlm, lora
from fastvlm_jax.models.lora import Lora

LLM = dict(
    vocab_size=48, width=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=64, tie_embeddings=False, init_std=0.2
)
FASTVIT = dict(
    layers=(1, 2), embed_dims=(8, 32), mixers=("repmixer", "attention"), se_stages=(1,), init_std=0.2,
    layer_scale_init=0.5,
)  # fmt: skip
TOWERS = {
    "folded": dict(FASTVIT, form="folded"),
    "branched": FASTVIT,
    "vit": dict(
        family="vit", image_size=16, patch_size=8, width=32, num_layers=3, num_heads=4, mlp_dim=64, init_std=0.2
    ),
    "convnext": dict(family="convnext", layers=(1, 1), embed_dims=(8, 16), layer_scale_init=0.5, init_std=0.2),
}


def inputs(images=2, tokens=12):
    rng = np.random.default_rng(0)
    index = np.full((1, 1, tokens), -1, np.int32)
    index[..., 1:5] = range(4)
    return dict(
        images=rng.integers(0, 256, (1, images, 16, 16, 3)).astype(np.uint8),
        tokens=rng.integers(0, 48, (1, 1, tokens)).astype(np.int32),
        image_index=index,
        positions=np.arange(tokens, dtype=np.int32)[None, None],
        segment_ids=np.ones((1, 1, tokens), np.int32),
    )


def adapted_model(vision, settings, llm=LLM):
    """A model, its parameters with adapters whose `b` is not 0 any more, and its statistics."""
    model = fastvlm.build(vision, llm)
    variables = nn.unbox(jax.jit(lambda: fastvlm.init_variables(model, jax.random.key(0)))())
    params = lora.with_adapters(variables["params"], settings, jax.random.key(1))
    draw = iter(jax.random.split(jax.random.key(2), 1000))
    params["lora"] = jax.tree.map(lambda x: 0.3 * jax.random.normal(next(draw), x.shape), params["lora"])
    return model, params, variables.get("batch_stats", {})


@pytest.mark.parametrize("tower", TOWERS)
def test_a_model_with_adapters_computes_what_one_with_merged_kernels_does(tower):
    settings = Lora(rank=2, alpha=3.0, targets=".*")
    model, params, stats = adapted_model(TOWERS[tower], settings)

    @jax.jit
    def apart(params):
        return model.apply(lora.variables_of(params, stats, settings), **inputs())

    @jax.jit
    def at_once(params):
        flat, adapters = flatten_dict(params, sep="/"), flatten_dict(params["lora"], sep="/")
        kernels = {
            path.removesuffix("/a"): x @ adapters[f"{path[:-1]}b"] * 1.5
            for path, x in adapters.items()
            if path.endswith("/a")
        }
        base = {path: x + kernels.get(path, 0) for path, x in flat.items() if not path.startswith("lora/")}
        nested = {}
        for path, x in base.items():
            *folders, name = path.split("/")
            inner = nested
            for folder in folders:
                inner = inner.setdefault(folder, {})
            inner[name] = x
        return model.apply({"params": nested, "batch_stats": stats}, **inputs())

    found, expected = apart(params), at_once(params)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()))
    moved = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(apart(params)))))(params)["lora"]
    idle = [path for path, x in flatten_dict(moved, sep="/").items() if not np.any(x)]
    assert idle == []
