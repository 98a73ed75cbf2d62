"""Adapters of low rank: every dense kernel of every tower takes one, and computes what the merged kernel does."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from fastvlm_jax.models import fastvlm, lora
from fastvlm_jax.models.decoder import Decoder, Linear
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


DROPPED = Lora(rank=2, dropout=0.25)  # its targets are the kernels of the decoder's layers


def gradients(remat, key=0, train=True):
    """Those of the adapters of a decoder that reads one token, from a sum of its output."""
    decoder = Decoder(**LLM, remat=remat)
    ones = jnp.ones((1, 1), jnp.int32)
    x = jax.random.normal(jax.random.key(3), (1, 1, 32))
    params = {"llm": nn.unbox(decoder.init(jax.random.key(0), x, 0 * ones, ones))["params"]}
    params = lora.with_adapters(params, DROPPED, jax.random.key(1))
    params["lora"] = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(2), x.shape), params["lora"])

    @jax.jit
    def found(params, key):
        variables = lora.variables_of(params, {}, DROPPED, train=train)
        own = {"params": variables["params"]["llm"], "lora": variables["lora"]["llm"]}
        rngs = {"lora": jax.random.fold_in(jax.random.key(4), key)}
        return jnp.sum(jnp.sin(decoder.apply(own, x, 0 * ones, ones, rngs=rngs)))

    value, moved = jax.value_and_grad(found)(params, key)
    return value, moved["lora"]["llm"]["layers"]


def kept(moved):
    """Kernel -> whether each number of its input was kept, [layers, inputs]; queries and keys of one token are idle."""
    return {name: np.any(moved[name]["kernel"]["a"] != 0, axis=-1) for name in ("v", "o", "gate", "up", "down")}


def test_each_layer_each_kernel_and_each_step_drops_other_numbers():
    (_, moved), (_, again) = gradients("none"), gradients("none", key=1)
    masks = kept(moved)
    share = np.mean([mask.mean() for mask in masks.values()])
    assert 0.65 < share < 0.85 and all(0 < mask.mean() < 1 for mask in masks.values())
    assert all(np.any(mask[0] != mask[1]) for mask in masks.values())
    assert np.any(masks["gate"] != masks["up"])
    assert all(np.any(mask != kept(again)[name]) for name, mask in masks.items())


def test_what_is_computed_again_drops_the_same_numbers():
    (value, moved), (expected, first) = gradients("full"), gradients("none")
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * float(jnp.abs(y).max()) + 1e-9), moved, first
    )


def test_nothing_is_dropped_outside_training():
    value, moved = gradients("none", train=False)
    assert all(mask.all() for mask in kept(moved).values())
    assert value == gradients("none", key=1, train=False)[0]


def test_what_is_dropped_keeps_the_expectation():
    kernel, x = jnp.zeros((8, 3)), jnp.arange(1.0, 9.0)[None]
    params = {"kernel": kernel, "lora": {"kernel": {"a": jnp.ones((8, 1)), "b": jnp.ones((1, 3))}}}
    layer = Linear(3, (None, None), use_bias=False, init_std=0.0)

    def drawn(settings, key):
        variables = lora.variables_of(params, {}, settings, train=True)
        return layer.apply(variables, x, rngs={"lora": key})[0]

    settings = Lora(rank=1, alpha=1.0, dropout=0.5)
    found = jax.jit(jax.vmap(lambda key: drawn(settings, key)))(jax.random.split(jax.random.key(0), 4000))
    # The sum of x is 36, and its variance that of the kept ones, doubled: sum(x**2) = 204.
    np.testing.assert_allclose(found.mean(0), 36, atol=4 * (204 / 4000) ** 0.5)
    np.testing.assert_allclose(found.var(0), 204, rtol=0.1)
    np.testing.assert_allclose(drawn(settings._replace(dropout=0.0), jax.random.key(0)), 36)
