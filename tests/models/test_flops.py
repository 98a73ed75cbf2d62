"""FLOP counts against the products in JAX's traces; tests/parity/test_flop_counts.py compares them with PyTorch's."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict
from jax.interpreters import partial_eval

from fastvlm_jax import optim
from fastvlm_jax.config import get_base
from fastvlm_jax.models import fastvlm, flops, kinds, remat

VIT = dict(family="vit", image_size=28, patch_size=7, width=32, num_layers=4, num_heads=4, mlp_dim=48)
LLM = dict(width=32, num_layers=3, num_heads=4, num_kv_heads=2, mlp_dim=80, vocab_size=96)
ROWS, LENGTH, IMAGES = 2, 24, 2
SIZE = (IMAGES, 28, 28, ROWS, LENGTH)
ALL = ((".*", 1.0, 0.0),)
STAGE_1 = (("projector/.*", 1.0, 0.0), (".*", 0.0, 0.0))
ENCODER_FROZEN = (("vision/.*", 0.0, 0.0), (".*", 1.0, 0.0))


def traced_flops(jaxpr) -> float:
    """Returns 2 x the multiply-adds of all matrix products and convolutions in a jaxpr; loops count every iteration."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, shapes = equation.primitive.name, [v.aval.shape for v in equation.invars if hasattr(v.aval, "shape")]
        if name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shapes[0][i] for i in contracting)
        elif name == "conv_general_dilated":
            (_, _, *window), taps = equation.params["dimension_numbers"].rhs_spec, shapes[1]
            features_in = taps[equation.params["dimension_numbers"].rhs_spec[1]]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * features_in * math.prod(taps[i] for i in window)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += equation.params.get("length", 1) * traced_flops(inner)
    return total


def make_model(vision=VIT, **llm):
    return fastvlm.build(vision, {**LLM, **llm})


def arguments(model):
    images = jax.ShapeDtypeStruct((1, IMAGES, 28, 28, 3), jnp.float32)
    text = jax.ShapeDtypeStruct((1, ROWS, LENGTH), jnp.int32)
    return images, text


def traced_step(model, groups) -> float:
    """Returns the FLOPs of the loss and its gradients as a training step computes them."""
    images, text = arguments(model)
    trainable, frozen = optim.split(kinds.abstract_variables(model)["params"], groups)

    def loss(trainable, frozen, images, text):
        variables = {"params": optim.merge(trainable, frozen)}
        return model.apply(variables, images, text, text, text, text, targets=text, train=True).sum()

    traced = jax.make_jaxpr(jax.value_and_grad(loss))(trainable, frozen, images, text).jaxpr
    needed, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    return traced_flops(needed)


def trainable_of(model, groups):
    return optim.split(kinds.abstract_variables(model)["params"], groups)[0]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_forward_is_what_jax_traces(tied):
    model = make_model(tie_embeddings=tied)
    images, text = arguments(model)
    variables = kinds.abstract_variables(model)
    traced = jax.make_jaxpr(model.apply)(variables, images, text, text, text, text)
    counted = flops.forward_flops(model, *SIZE, causal=False)
    assert sum(counted.values()) == traced_flops(traced.jaxpr)
    assert counted["loss"] == 2 * 32 * 96 * ROWS * LENGTH


@pytest.mark.parametrize(
    "groups, policies",
    [
        (ALL, ["full", "dots", "attention", "depthwise"]),
        (STAGE_1, ["none", "full", "dots"]),
        (ENCODER_FROZEN, ["none"]),
    ],
    ids=["all", "projector", "encoder frozen"],
)
def test_a_step_with_recomputation_is_what_jax_traces(groups, policies):
    for policy in policies:
        model = make_model({**VIT, "remat": policy}, remat=policy)
        counted = sum(flops.hardware_flops(model, trainable_of(model, groups), *SIZE).values())
        # With frozen weights and "dots", JAX eliminates one product of the attention that hardware_flops counts.
        leeway = 0.021 if policy == "dots" and groups == STAGE_1 else 0
        assert counted == pytest.approx(traced_step(model, groups), rel=leeway), policy


def test_a_trained_part_costs_three_times_its_forward_pass_and_a_frozen_one_in_front_once():
    model = make_model()
    forward = flops.forward_flops(model, *SIZE)
    first = 2 * 3 * 49 * 32 * IMAGES * 16  # the patch embed: images get no gradient
    trained = flops.train_flops(model, trainable_of(model, ALL), *SIZE)
    assert trained == {part: 3 * x - (first if part == "vision" else 0) for part, x in forward.items()}
    stage_1 = flops.train_flops(model, trainable_of(model, STAGE_1), *SIZE)
    attention = 3 * 2 * (2 * 32) * ROWS * (LENGTH * (LENGTH + 1) / 2)  # 3 layers, 2 products each
    assert stage_1["vision"] == forward["vision"] and stage_1["loss"] == 2 * forward["loss"]
    assert stage_1["llm"] == 2 * forward["llm"] + attention
    assert stage_1["projector"] == 3 * forward["projector"] - 2 * 32 * 32 * IMAGES * 16  # features get no gradient


def test_gradients_stop_below_the_lowest_trainable_parameter():
    vision = dict(get_base("tiny").model.vision.to_dict(), form="folded")
    model = fastvlm.build(vision)
    size = (1, 64, 64, 0, 0)
    forward = flops.products(model, *size)
    convolution, *gate = (p.flops for p in forward if p.unit == "vision/expand")
    top = [f"vision/expand/{name}/kernel" for name in ("folded", "se/fc1", "se/fc2")]
    trained = flops.train_flops(model, top, *size)["vision"]
    assert trained == sum(p.flops for p in forward) + convolution + 2 * sum(gate)
    # A layer scale in the last stage: gradients flow through its blocks and all that follows, no weight gets one.
    trained = flops.train_flops(model, ["vision/stage_4/layer_scale_ffn"], *size)["vision"]
    behind = [p for p in forward if p.unit in ("vision/stage_4", "vision/expand")]
    products = sum(p.flops * (2 if p.path == "vision/stage_4/mixer" else 1) for p in behind)  # both operands
    assert trained == sum(p.flops for p in forward) + products


@pytest.mark.parametrize(
    "size, form",
    [
        ("tiny", "branched"),
        ("7b,tiny", "folded"),
        ("tiny,mci0", "folded"),
        ("tiny,clip_vit_l_336", ""),
        ("tiny,convnext_l", ""),
    ],
)
def test_every_weight_of_a_product_is_counted_and_no_other(size, form):
    config = get_base(size)
    if form:
        config.model.vision.update(form=form, multiscale=(0, 1), multiscale_pool="depthwise")
    model = fastvlm.build(**config.model.to_dict())
    params = flatten_dict(kinds.abstract_variables(model)["params"], sep="/")
    side = config.model.vision.get("image_size", 256)
    counted = [p for p in flops.products(model, 1, side, side, 1, 8) if p.kind not in ("scores", "mixed")]
    kernels = {path for path in params if path.endswith(("kernel", "embedding")) and "/unused/" not in path}
    assert {p.path for p in counted} == kernels
    # Each output position uses each element of a kernel once, so the FLOPs are a multiple of 2 x the elements.
    for product in counted:
        if product.flops:
            elements = 2 * math.prod(params[product.path].shape)
            assert product.flops % elements == 0, product


def test_the_encoder_costs_what_the_paper_and_timm_tell():
    def gmac(vision, side):
        model = fastvlm.build(get_base(f"0.5b,{vision}").model.vision.to_dict())
        return flops.forward_flops(model, 1, side, side, 0, 0)["vision"] / 2e9

    # Multiply-adds in billions from timm's model cards, at the image sizes given there.
    for vision, side, published in [
        ("mci0", 256, 2.4),
        ("mci1", 256, 4.7),
        ("mci2", 256, 7.9),
        ("convnext_xxl", 256, 198.1),
    ]:
        assert gmac(vision, side) == pytest.approx(published, rel=0.03)
    assert gmac("fastvithd", 1024) / gmac("fastvithd", 256) == pytest.approx(16.4, abs=0.1)


def test_policies_of_remat_are_all_known_here():
    assert set(flops.RECOMPUTED) == {"none", *remat.POLICIES}


def test_both_towers_of_a_clip_count_and_each_has_gradients_of_its_own():
    """Worked by hand: 4 texts of 5 tokens, 2 layers of 16 channels; 3 images, whose head maps 16 channels to 12."""
    vision = dict(layers=(1,), embed_dims=(8,), mixers=("repmixer",))
    text = dict(features=12, width=16, num_layers=2, num_heads=2, vocab_size=50, context_length=5)
    model, sizes = kinds.build(vision={**vision, "head_features": 12}, text=text), (3, 8, 8, 4, 5)
    tower = flops.forward_flops(fastvlm.build(vision), *sizes)["vision"]
    forward = flops.forward_flops(model, *sizes)
    layer = 2 * 5 * (3 * 16 * 16 + 16 * 16 + 2 * 4 * 16 * 16) + 2 * 2 * 5 * 5 * 16
    texts = 4 * (2 * layer + 2 * 16 * 12)
    images = tower + 3 * 2 * 16 * 12
    expected = {"vision": images, "text": texts, "loss": 2 * 12 * 3 * 4, "projector": 0, "llm": 0}
    assert forward == expected and texts == 260_096
    paths = flatten_dict(kinds.abstract_variables(model)["params"], sep="/")

    def trained(*towers):
        return flops.train_flops(model, [path for path in paths if path.startswith(towers)], *sizes)

    both = trained("vision/", "text/", "logit_scale")
    assert (both["text"], both["loss"]) == (3 * texts, 3 * 288)
    alone = trained("vision/")
    assert (alone["vision"], alone["text"], alone["loss"]) == (both["vision"], texts, 3 * 288)
    alone = trained("text/")
    assert (alone["vision"], alone["text"], alone["loss"]) == (images, 3 * texts, 3 * 288)
    assert trained("logit_scale")["loss"] < 3 * 288


@pytest.mark.parametrize("policy", ["none", "full"])
def test_a_clip_is_what_jax_traces_forward_and_in_a_step(policy):
    """With all logits in one matrix, whose gradients take two products; recomputed logits are counted, not traced."""
    text = dict(features=12, width=16, num_layers=2, num_heads=2, vocab_size=50, context_length=5, remat=policy)
    model, sizes = kinds.build(vision={**VIT, "remat": policy, "select_layer": -1}, text=text), (3, 28, 28, 3, 5)
    variables = kinds.abstract_variables(model)
    images, tokens = jnp.zeros((1, 3, 28, 28, 3), jnp.uint8), jnp.zeros((3, 5), jnp.int32)

    def loss(params):
        embedded = model.apply({"params": params}, images, tokens, train=True)
        return jnp.sum(jnp.square(embedded[0] @ embedded[1].T))

    forward, logits = flops.forward_flops(model, *sizes), 2 * 12 * 3 * 3
    assert sum(forward.values()) == traced_flops(jax.make_jaxpr(loss)(variables["params"]).jaxpr)
    step = jax.make_jaxpr(jax.grad(loss))(variables["params"]).jaxpr
    step, _ = partial_eval.dce_jaxpr(step, [True] * len(step.outvars))
    counted = flops.hardware_flops(model, flatten_dict(variables["params"], sep="/"), *sizes)
    assert sum(counted.values()) - logits == traced_flops(step)
