import types

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch_reference  # noqa: F401 (makes torchvision importable)
import transformers

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
