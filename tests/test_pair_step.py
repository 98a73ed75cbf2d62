"""The step of stage 0: the same on every mesh and in parts, and the same as PyTorch's."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import movement
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from small_pairs import distilled, random_pairs, small_pairs_config

from fastvlm_jax import config_checks, optim, sharding, stage
from fastvlm_jax.batch import joined
from fastvlm_jax.checkpoint.saving import joined_state, parts_of
from fastvlm_jax.models import kinds
from fastvlm_jax.pair_loss import equal_share
from fastvlm_jax.train_state import averaged
from fastvlm_jax.train_step import cached, numbered_parts

# With so large an epsilon AdamW moves along the gradient itself; with the usual one a rounding may turn a sign.
LINEAR = dict(epsilon=1.0, groups=((".*", 1.0, 0.0),))


@functools.cache
def initial(sigmoid=False):
    model = kinds.build(**small_pairs_config(model__sigmoid=sigmoid).model.to_dict())
    return jax.tree.map(np.asarray, nn.unbox(jax.jit(lambda rng: kinds.init_variables(model, rng))(jax.random.key(0))))


def steps(config, batch, count=2, variables=None, mesh=(1, 1, 1, 1)):
    """The states after each of `count` steps on a mesh, the initial one first, and the metrics of all steps."""
    config_checks.validate(config)
    model = kinds.build(**config.model.to_dict())
    mesh = sharding.make_mesh(mesh, jax.devices()[: np.prod(mesh)])
    with jax.set_mesh(mesh):
        step, metrics = stage.make_step(config, model, mesh, steps=10), []
        state = step.make_state(jax.random.key(0), variables or initial(config.model.sigmoid))
        placed, states = jax.device_put(batch, sharding.batch_sharding(mesh)), [jax.tree.map(np.array, state)]
        for _ in range(count):
            state, found = step.fn(state, placed)
            metrics.append(jax.tree.map(np.asarray, found))
            states.append(jax.tree.map(np.array, state))
        return states, metrics


def assert_moved_alike(found, expected, start):
    """States of parameters, statistics and averages that moved alike from the state `start`."""
    for name in ("params", "batch_stats", "average"):
        movement.assert_moved_alike(*(getattr(state, name) for state in (found, expected, start)), name=name)


@pytest.fixture(scope="module")
def whole():
    return steps(distilled(ema=0.9, log_every=2, **LINEAR), random_pairs())


def test_a_mesh_takes_the_same_steps(whole):
    (*_, state), metrics = steps(distilled(ema=0.9, log_every=2, **LINEAR), random_pairs(), mesh=(2, 1, 2, 1))
    for found, expected in zip(metrics, whole[1], strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
    assert_moved_alike(state, whole[0][-1], whole[0][0])


def test_a_step_in_parts_is_the_step_of_the_whole_batch(whole):
    """Gradients, moved along by LINEAR, and statistics: the groups of BatchNorm lie within the parts."""
    config = distilled(ema=0.9, log_every=2, accumulate=2, **LINEAR)
    (*_, state), metrics = steps(config, random_pairs(), mesh=(1, 2, 1, 1))
    for found, expected in zip(metrics, whole[1], strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
    assert_moved_alike(state, whole[0][-1], whole[0][0])


def test_both_passes_over_the_parts_drop_the_same_paths():
    """Against the gradient of one function that embeds the parts with the same random numbers."""
    config = distilled(model__vision__drop_path=0.5)
    model = kinds.build(**config.model.to_dict())
    loss, batch, rng = stage.make_loss(config, model, 10), random_pairs(), jax.random.key(3)
    params, batch_stats = initial()["params"], initial()["batch_stats"]
    trainable, _ = optim.split(params, ((".*", 1.0, 0.0),))

    def variables_of(trainable, batch_stats):
        return {"params": optim.merge(trainable, {}), "batch_stats": batch_stats}

    def value_of(trainable):
        variables = variables_of(trainable, batch_stats)
        numbers, parts = numbered_parts(batch, 2)
        found = [loss.embed(variables, jax.tree.map(lambda x: x[i], parts), jax.random.fold_in(rng, i))
                 for i in numbers]  # fmt: skip
        features = jax.tree.map(lambda *x: joined(jnp.stack(x)), *[features for features, _ in found])
        return loss.compare(variables["params"], batch, features)[0]

    value, grads = jax.jit(jax.value_and_grad(value_of))(trainable)
    in_parts = jax.jit(lambda t, rng: cached(loss, variables_of, t, batch_stats, batch, rng, lambda g: g, 2))
    found = in_parts(trainable, rng)
    np.testing.assert_allclose(found.value, value, rtol=1e-6)
    largest = max(np.abs(x).max() for x in grads.values())  # some gradients are 0 but for roundings
    for path, expected in grads.items():
        np.testing.assert_allclose(found.grads[path], expected, atol=1e-5 * largest, err_msg=path)
    assert abs(float(in_parts(trainable, jax.random.key(4)).value) - float(value)) > 1e-4


def test_terms_are_those_of_the_distillation_and_the_rest_says_what_happens(whole):
    """From the report of a step that is logged: excess over the teachers' entropy, written out in NumPy."""
    batch, (first, found) = random_pairs(), whole[1]
    np.testing.assert_allclose(first["logit_scale"], 1 / 0.07, rtol=1e-6)
    assert np.isnan(first["loss_soft_excess"])  # of a step that is not logged it is not computed
    np.testing.assert_allclose(found["loss"], 0.5 * found["loss_hard"] + found["loss_soft"], rtol=1e-6)
    entropy = 0.0
    for s in range(2):
        images = batch.teacher_images.reshape(16, -1).astype(np.float64)
        texts = batch.teacher_texts[:, :, s].reshape(16, -1).astype(np.float64)
        logits = [20 * images[:, :6] @ texts[:, :6].T, 30 * images[:, 6:] @ texts[:, 6:].T]
        for axis in (0, 1):
            p = np.mean([np.exp(x) / np.exp(x).sum(axis, keepdims=True) for x in logits], 0)
            entropy -= (p * np.log(p)).sum() / 32
    np.testing.assert_allclose(found["loss_soft_excess"], found["loss_soft"] - entropy, rtol=1e-5)
    assert 0 <= found["top1_images"] <= 1 and found["equal_captions"] == 0


def test_held_out_pairs_are_compared_whole_when_they_are_embedded_in_parts():
    """And against each other alone: the loss of pairs without teachers is CLIP's, which NumPy writes out."""
    batch = random_pairs(teachers=())
    model = kinds.build(**distilled().model.to_dict())
    found = []
    for accumulate in (1, 2):
        held_out = stage.make_loss(distilled(accumulate=accumulate), model, 10).held_out
        value, count = jax.jit(held_out)(initial(), batch)
        found.append(float(value) / int(count))
    images, texts = (np.asarray(x, np.float64) for x in jax.jit(model.apply)(
        initial(), batch.images, batch.texts.reshape(32, -1)))  # fmt: skip
    expected = 0.0
    for s in range(2):
        logits = images @ texts[s::2].T / 0.07
        for axis in (0, 1):
            expected -= np.mean(np.diag(logits) - np.log(np.exp(logits).sum(axis))) / 2
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_equal_captions_are_counted():
    texts = np.array([[[1, 2, 3], [1, 2, 4]], [[1, 2, 3], [3, 2, 1]], [[1, 2, 4], [1, 2, 3]]], np.int32)
    np.testing.assert_allclose(jax.jit(equal_share)(texts), 5 / 6, rtol=1e-6)


def test_the_factor_of_the_logits_is_clamped_behind_the_step_and_keeps_its_gradient():
    config = small_pairs_config(groups=(("logit_scale", 0.5, 0.0), (".*", 0.0, 0.0)))
    settle = stage.make_loss(config, kinds.build(**config.model.to_dict()), 10).settle
    for found, kept in ((-0.3, 0.0), (9.0, np.log(100)), (2.0, 2.0)):
        np.testing.assert_allclose(settle({"logit_scale": np.float32(found)})["logit_scale"], kept, rtol=1e-6)
    # Random towers lose less, the smaller the factor: the step would take it below the bound.
    variables = {**initial(), "params": {**initial()["params"], "logit_scale": np.array(0.0, np.float32)}}
    (*_, state), metrics = steps(config, random_pairs(texts=1, teachers=()), variables=variables)
    assert all(found["grad_norm"] > 0 for found in metrics)  # of logit_scale alone, at the bound too
    assert state.params["logit_scale"] == 0


def test_sigmoid_has_a_bias_that_learns():
    config = small_pairs_config(model__sigmoid=True, **LINEAR)
    (*_, state), metrics = steps(config, random_pairs(texts=1, teachers=()))
    assert set(metrics[0]) == {"loss", "grad_norm", "logit_scale", "equal_captions"}
    assert metrics[1]["loss"] < metrics[0]["loss"] and float(state.params["logit_bias"]) != -10


def test_averages_follow_parameters_and_statistics_and_a_bad_step_moves_none():
    config = small_pairs_config(ema=0.75, bad_steps__mode="on", **LINEAR)
    batch = random_pairs(texts=1, teachers=())
    states, _ = steps(config, batch)
    paths = [("params", "logit_scale"), ("params", "vision/stem_0/conv/kernel")]
    for _, path in paths:
        last = [np.asarray(flatten_dict(state.params, sep="/")[path], np.float64) for state in states]
        first = 0.1 * last[0] + 0.9 * last[1]  # decays of 1/10 and 2/11, below 0.75
        expected = 2 / 11 * first + 9 / 11 * last[2]
        np.testing.assert_allclose(states[2].average["params"][path], expected, rtol=1e-5, atol=1e-7)
    stats = [np.asarray(state.batch_stats["vision"]["stem_0"]["conv"]["bn"]["mean"], np.float64) for state in states]
    found = averaged(states[2])["batch_stats"]["vision"]["stem_0"]["conv"]["bn"]["mean"]
    np.testing.assert_allclose(found, 2 / 11 * 0.9 * stats[1] + 9 / 11 * stats[2], rtol=1e-5, atol=1e-7)
    broken = {**initial(), "params": {**initial()["params"], "logit_scale": np.array(np.nan, np.float32)}}
    (*_, state), metrics = steps(config, batch, count=1, variables=broken)
    assert metrics[0]["verdict"].skipped == 1
    kept = state.average["params"]["vision/stem_0/conv/kernel"]
    np.testing.assert_array_equal(kept, states[0].average["params"]["vision/stem_0/conv/kernel"])


def test_a_checkpoint_holds_the_average_as_the_model_and_gives_back_the_state(whole):
    state = whole[0][-1]
    parts = parts_of(state)
    for path, x in flatten_dict(parts["model"]["params"], sep="/").items():
        np.testing.assert_array_equal(x, state.average["params"][path])
    again = joined_state(parts)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)
