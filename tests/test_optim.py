import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch_reference  # noqa: F401 (makes torchvision importable)
import transformers
from timm.optim import Lion

from fastvlm_jax import optim

PARAMS = {
    "vision": {"stem_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}},
    "llm": {"embedding": jnp.ones((4, 2)), "layers": {"q": {"kernel": jnp.ones((2, 2))}}},
}
GROUPS = (("vision/.*", 0.0, 0.0), (".*embedding", 1e-2, 0.1), ("llm/.*", 1e-3, 0.0))


def test_the_first_matching_pattern_wins():
    assert optim.assign(PARAMS, GROUPS) == {
        "vision/stem_0/kernel": 0,
        "vision/stem_0/bias": 0,
        "llm/embedding": 1,
        "llm/layers/q/kernel": 2,
    }


def test_a_parameter_without_a_pattern_is_an_error():
    with pytest.raises(ValueError, match="no pattern matches parameter llm/embedding"):
        optim.assign(PARAMS, (("vision/.*", 1e-3, 0.0), ("llm/layers/.*", 1e-3, 0.0)))


def test_a_pattern_without_a_parameter_is_an_error():
    with pytest.raises(ValueError, match=r"pattern 'projector/\.\*' matches no parameter"):
        optim.assign(PARAMS, (("projector/.*", 1e-3, 0.0), (".*", 1e-3, 0.0)))


def test_merge_is_the_inverse_of_split():
    trainable, frozen = optim.split(PARAMS, GROUPS)
    assert sorted(trainable) == ["llm/embedding", "llm/layers/q/kernel"]
    assert sorted(frozen) == ["vision/stem_0/bias", "vision/stem_0/kernel"]
    assert optim.merge(trainable, frozen) == PARAMS


def test_schedule_warms_up_and_falls_to_zero_as_a_cosine():
    rate = optim.schedule(2.0, optim.Course(100, 0.1))
    values = [float(rate(step)) for step in (0, 5, 10, 55, 100)]
    np.testing.assert_allclose(values, [0.0, 1.0, 2.0, 1.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 33, 100, 264])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.07, 0.5, 0.99])
def test_every_rate_equals_transformers_cosine_schedule(steps, ratio):
    """Ceil of the fraction; without a warm-up the first step has the peak rate."""
    warmup = transformers.TrainingArguments.get_warmup_steps(types.SimpleNamespace(warmup_steps=ratio), steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, steps).lr_lambdas[0]
    ours = optim.schedule(2.0, optim.Course(steps, ratio))
    np.testing.assert_allclose([ours(i) for i in range(steps)], [2 * theirs(i) for i in range(steps)], atol=1e-6)
    assert ratio > 0 or float(ours(0)) == 2.0


@pytest.mark.parametrize("warmup", [0, 1, 2, 7, 40], ids="{}-steps-of-warm-up".format)
@pytest.mark.parametrize("final", [0.0, 0.25])
def test_every_rate_of_open_clip_rises_from_one_part_of_the_peak_to_the_peak_and_falls_to_the_last(warmup, final):
    """The formula of open_clip's cosine_lr and cosine's part above a last rate, step by step."""
    rate, steps = optim.schedule(2.0, optim.Course(40, warmup / 40, "open_clip", final)), range(40)
    expected = [
        2.0 * (step + 1) / warmup
        if step < warmup
        else 2.0 * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (40 - warmup))))
        for step in steps
    ]
    np.testing.assert_allclose([rate(step) for step in steps], expected, rtol=1e-6, atol=1e-7)
    if warmup < 40:
        np.testing.assert_allclose([rate(40), rate(60)], 2.0 * final, atol=1e-6)


def test_a_last_rate_is_the_end_of_the_cosine_behind_a_warm_up_from_zero_too():
    rate = optim.schedule(2.0, optim.Course(100, 0.1, "transformers", 0.5))
    values = [float(rate(step)) for step in (0, 5, 10, 55, 100, 1000)]
    np.testing.assert_allclose(values, [0.0, 1.0, 2.0, 1.5, 1.0, 1.0], atol=1e-6)


def stepped(start, grads, groups=((".*", 1e-2, 0.1),), **settings):
    """(parameters, slots) behind a step along each of the gradients, with rates of a constant 1e-2."""
    params = optim.merge({path: jnp.asarray(x) for path, x in start.items()}, {})
    course = optim.Course(len(grads), 0.0, final_rate=1.0)
    given = dict(beta1=0.9, beta2=0.999, epsilon=1e-8, clip_norm=1e9)
    optimizer = optim.make_optimizer(params, groups, course, **given | settings)
    trainable, _ = optim.split(params, groups)
    slots = optimizer.init(trainable)
    for grad in grads:
        grad = {path: jnp.asarray(x) for path, x in grad.items()}
        trainable, slots = optim.update(optimizer, grad, slots, trainable)
    return trainable, slots


@pytest.mark.parametrize("beta2", [0.999, 0.5], ids=["rising", "at its limit"])
def test_four_steps_of_adafactor_equal_the_formulas_in_numpy(beta2):
    """A matrix with rows and columns of moments, a long and thin one and a vector with all of them."""
    rng = np.random.default_rng(0)
    shapes = {"a/kernel": (33, 40), "b/kernel": (31, 64), "c/bias": (50,)}
    start = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    grads = [{path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()} for _ in range(4)]
    grads[0]["a/kernel"][3] = grads[0]["c/bias"][:5] = 0.0
    found, slots = stepped(start, grads, optimizer="adafactor", beta2=beta2)
    for path, shape in shapes.items():
        x, momentum = start[path].astype(np.float64), np.zeros(shape)
        rows, columns, moments = np.zeros(shape[0]), np.zeros(shape[-1]), np.zeros(shape)
        for t, grad in enumerate(grads, 1):
            g, decay = grad[path].astype(np.float64), min(beta2, 1 - t**-0.8)
            square = g**2 + 1e-30
            if path == "a/kernel":
                rows = decay * rows + (1 - decay) * square.mean(1)
                columns = decay * columns + (1 - decay) * square.mean(0)
                moments = np.outer(rows, columns) / rows.mean()
            else:
                moments = decay * moments + (1 - decay) * square
            momentum = 0.9 * momentum + 0.1 * g / np.sqrt(moments)
            x = x - 1e-2 * (momentum + (0.1 * x if path.endswith("kernel") else 0))
        np.testing.assert_allclose(found[path], x, rtol=1e-5, atol=1e-6, err_msg=path)
    sizes = {x.size for x in jax.tree.leaves(slots) if x.size > 31 * 40}
    assert sizes == {33 * 40, 31 * 64} and sum(x.size == 33 * 40 for x in jax.tree.leaves(slots)) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion"])
def test_decay_is_of_the_named_parameters_alone_and_without_gradients_nothing_else_moves(optimizer):
    start = {path: np.full((2, 2), 4.0, np.float32) for path in ("a/kernel", "a/bias", "b/kernel", "positions")}
    still = {path: np.zeros((2, 2), np.float32) for path in start}
    groups = (("b/.*", 1e-2, 0.0), (".*", 1e-2, 0.5))
    found, _ = stepped(start, [still], groups, optimizer=optimizer, decayed=("positions", "kernel"))
    moved = {path: float(x[0, 0]) for path, x in found.items()}
    assert moved == pytest.approx({"a/kernel": 3.98, "a/bias": 4.0, "b/kernel": 4.0, "positions": 3.98}, rel=1e-6)
    found, _ = stepped(start, [still], groups, optimizer=optimizer)
    assert float(found["positions"][0, 0]) == 4.0 and float(found["a/kernel"][0, 0]) == pytest.approx(3.98, rel=1e-6)


def random_steps(shapes, steps, seed=0):
    """Random parameters by path, and gradients for so many steps."""
    rng = np.random.default_rng(seed)
    start, *grads = [
        {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()} for _ in range(steps + 1)
    ]
    return start, grads


def test_six_steps_of_lion_equal_timms_and_keep_a_first_moment_alone():
    shapes = {"a/kernel": (33, 40), "b/kernel": (3, 4, 2), "c/bias": (50,)}
    start, grads = random_steps(shapes, 6)
    found, slots = stepped(start, grads, optimizer="lion", beta2=0.99)
    theirs = {path: torch.nn.Parameter(torch.tensor(x)) for path, x in start.items()}
    decayed = [x for path, x in theirs.items() if path.endswith("kernel")]
    reference = Lion(
        [{"params": decayed, "weight_decay": 0.1}, {"params": [theirs["c/bias"]]}], lr=1e-2, betas=(0.9, 0.99)
    )
    for grad in grads:
        for path, parameter in theirs.items():
            parameter.grad = torch.tensor(grad[path])
        reference.step()
    for path in shapes:
        np.testing.assert_allclose(found[path], theirs[path].detach().numpy(), rtol=1e-5, atol=1e-6, err_msg=path)
    assert sorted(x.size for x in jax.tree.leaves(slots) if x.size > 1) == sorted(x.size for x in start.values())
    _, slots = stepped(start, grads[:1], optimizer="lion", moment_dtype="bfloat16")
    assert {str(x.dtype) for x in jax.tree.leaves(slots) if x.size > 1} == {"bfloat16"}


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion"])
def test_a_factor_scales_rate_and_decay_along_the_layers_of_a_stack(optimizer):
    """As if every layer were in a group of its own, whose rate is lower."""
    start, grads = random_steps({"a/kernel": (3, 4, 5), "b/kernel": (4, 5)}, 4)
    factors = {"a/kernel": np.float32([0.25, 0.5, 1]).reshape(3, 1, 1), "b/kernel": np.float32(0.5)}
    found, slots = stepped(start, grads, optimizer=optimizer, factors=factors)
    unstacked = [
        {"b/kernel": x["b/kernel"]} | {f"a{i}/kernel": x["a/kernel"][i] for i in range(3)} for x in (start, *grads)
    ]
    groups = (("a0/.*", 0.25e-2, 0.1), ("[ab][1/].*", 0.5e-2, 0.1), (".*", 1e-2, 0.1))
    expected, _ = stepped(unstacked[0], unstacked[1:], groups, optimizer=optimizer)
    np.testing.assert_allclose(found["b/kernel"], expected["b/kernel"], rtol=1e-6)
    for i in range(3):
        np.testing.assert_allclose(found["a/kernel"][i], expected[f"a{i}/kernel"], rtol=1e-6)
    plain, without = stepped(start, grads, optimizer=optimizer)
    assert not np.array_equal(plain["b/kernel"], found["b/kernel"])
    ones, _ = stepped(start, grads, optimizer=optimizer, factors={"a/kernel": np.ones((3, 1, 1), np.float32)})
    jax.tree.map(np.testing.assert_array_equal, ones, plain)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(slots), jax.tree.leaves(without))


def test_the_log_names_every_rate_that_a_run_has():
    params = {
        "vision": {"a": jnp.ones((2, 3)), "b": jnp.ones(2)},
        "llm": {"c": jnp.ones(4)},
        "projector": {"d": jnp.ones(1)},
    }
    groups = (("vision/.*", 4e-3, 0.0), ("projector/.*", 0.0, 0.0), (".*", 2e-3, 0.0))
    factors = {"vision/a": np.float32([0.25, 0.5]).reshape(2, 1)}
    course = optim.Course(10, 0.2)

    def at(step, *given):
        return optim.learning_rates(step, optim.spans(params, *given), course)

    found = at(1, groups, factors)  # half of the peaks
    assert found == pytest.approx({"lr": 2e-3, "lr/vision": 2e-3, "lr_lowest/vision": 5e-4, "lr/rest": 1e-3})
    assert at(2, groups) == pytest.approx({"lr": 4e-3, "lr/vision": 4e-3, "lr/rest": 2e-3})
    assert at(2, ((".*", 1e-3, 0.0),)) == pytest.approx({"lr": 1e-3})
    assert at(2, ((".*", 1e-3, 0.0),), factors) == pytest.approx({"lr": 1e-3, "lr_lowest": 2.5e-4})
    lowered = {"vision/a": np.float32(0.5), "vision/b": np.float32(0.5)}
    found = at(2, (("vision/.*", 4e-3, 0.0), ("(llm|projector)/.*", 1e-3, 0.0)), lowered)
    assert found == pytest.approx({"lr": 2e-3, "lr/vision": 2e-3, "lr/llm_projector": 1e-3})
    twice = optim.spans(params, (("vision/a", 1e-3, 0.0), ("vision.a|vision/.*", 1e-3, 0.0), ("vision.*|.*", 1.0, 0.0)))
    assert [span.name for span in twice] == ["vision_a", "vision_a_vision", "vision"]


def test_a_moving_average_takes_its_part_of_new_values_more_in_the_first_steps_and_stays_in_float32():
    """The decay is (1 + step) / (10 + step) up to that of the config, which is 0.75 from step 26 on."""
    average = {"a": jnp.array([1.0, 2.0]), "b": {"c": jnp.array(10.0)}}
    new = {"a": jnp.array([3.0, 2.0], jnp.bfloat16), "b": {"c": jnp.array(-10.0, jnp.bfloat16)}}
    for step, first, last in ((0, 2.8, -8.0), (5, 2.2, -2.0), (26, 1.5, 5.0), (10_000, 1.5, 5.0)):
        found = optim.averaged(average, new, 0.75, jnp.int32(step))
        assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}
        np.testing.assert_allclose([*found["a"], found["b"]["c"]], [first, 2.0, last], rtol=1e-5)
    twice = optim.averaged(optim.averaged(average, new, 0.75, 26), new, 0.75, 27)
    np.testing.assert_allclose([*twice["a"], twice["b"]["c"]], [1.875, 2.0, 1.25], rtol=1e-5)


def test_five_steps_equal_torch_adamw_with_clipping_and_groups():
    rng = np.random.default_rng(0)
    shapes = {"llm/a/kernel": (3, 4), "llm/a/bias": (4,), "vision/b/kernel": (2, 2)}
    start = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    grads = [{path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()} for _ in range(5)]
    groups = (("vision/.*", 3e-2, 0.3), ("llm/.*", 1e-2, 0.1))
    params = optim.merge({k: jnp.asarray(v) for k, v in start.items()}, {})
    settings = dict(beta1=0.9, beta2=0.95, epsilon=1e-8, clip_norm=1.0)
    optimizer = optim.make_optimizer(params, groups, optim.Course(20, 0.1), **settings)
    ours, _ = optim.split(params, groups)
    slots = optimizer.init(ours)

    theirs = {path: torch.nn.Parameter(torch.tensor(x)) for path, x in start.items()}
    reference = torch.optim.AdamW(
        [
            {"params": [theirs["llm/a/kernel"]], "weight_decay": 0.1, "peak": 1e-2},
            {"params": [theirs["llm/a/bias"]], "weight_decay": 0.0, "peak": 1e-2},
            {"params": [theirs["vision/b/kernel"]], "weight_decay": 0.3, "peak": 3e-2},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    factors = [0, 0.5, 1, *(0.5 * (1 + np.cos(np.pi * i / 18)) for i in (1, 2))]  # 2 of 20 steps warm up
    for factor, grad in zip(factors, grads, strict=True):
        updates, slots = optimizer.update({path: jnp.asarray(g) for path, g in grad.items()}, slots, ours)
        ours = optax.apply_updates(ours, updates)
        for path, parameter in theirs.items():
            parameter.grad = torch.tensor(grad[path])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        for group in reference.param_groups:
            group["lr"] = group["peak"] * factor
        reference.step()
    for path in shapes:
        np.testing.assert_allclose(ours[path], theirs[path].detach().numpy(), rtol=2e-5, atol=1e-6, err_msg=path)
