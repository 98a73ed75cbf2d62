"""One step as one function: accumulation, number formats, what is kept where."""

import functools
import math
import re
from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from movement import assert_moved_alike
from small import small_config

from fastvlm_jax import sharding, stage
from fastvlm_jax.batch import Batch
from fastvlm_jax.models import fastvlm, kinds
from fastvlm_jax.train import train


@pytest.fixture(scope="module")
def batch():
    """8 groups of one image and one row; the supervised tokens are spread unevenly over the groups."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 512, (8, 1, 24))
    image_index = np.full((8, 1, 24), -1)
    image_index[:, :, 2:6] = np.arange(4)
    return Batch(
        images=rng.integers(0, 256, (8, 1, 16, 16, 3)).astype(np.uint8),
        image_mask=np.ones((8, 1), bool),
        tokens=tokens.astype(np.int32),
        image_index=image_index.astype(np.int32),
        targets=np.roll(tokens, -1, axis=2).astype(np.int32),
        loss_mask=np.arange(24) < np.asarray([1, 20, 3, 0, 9, 2, 24, 5])[:, None, None],
        segment_ids=np.ones((8, 1, 24), np.int32),
        positions=np.broadcast_to(np.arange(24, dtype=np.int32), (8, 1, 24)),
        source=np.zeros((8, 1, 24), np.int32) + np.arange(8, dtype=np.int32)[:, None, None] % 2,
    )


@functools.cache
def initial():
    """Variables to begin with, on the host."""
    model = fastvlm.build(**small_config("").model.to_dict())
    return jax.tree.map(np.asarray, nn.unbox(jax.jit(partial(fastvlm.init_variables, model))(jax.random.key(0))))


def steps(batch, count=2, mesh=(1, 1, 1, 1), num_sources=1, born=False, **settings):
    """State and metrics after `count` steps, with the losses of all; `born` on the mesh, from the seed."""
    frozen = dict(model__vision__batch_norm="frozen")
    config = small_config("", mesh=mesh, **{**frozen, **settings})
    model = fastvlm.build(**config.model.to_dict())
    mesh = sharding.make_mesh(mesh, jax.devices()[: np.prod(mesh)])
    with jax.set_mesh(mesh):
        step = stage.make_step(config, model, mesh, steps=10, num_sources=num_sources)
        state = step.make_state(jax.random.key(0), None if born else initial())
        placed = jax.device_put(batch, sharding.batch_sharding(mesh))
        losses = []
        for _ in range(count):
            state, metrics = step.fn(state, placed)
            losses.append(metrics["loss"])
        return state, jax.tree.map(np.asarray, metrics | {"losses": jax.numpy.stack(losses)})


# With so large an epsilon AdamW moves along the gradient itself; with the usual one a rounding may turn a sign.
LINEAR = dict(epsilon=1.0, groups=((".*", 1.0, 0.0),))


@pytest.fixture(scope="module")
def whole(batch):
    return steps(batch, num_sources=2, **LINEAR)


@pytest.mark.parametrize(
    "accumulate, mesh", [pytest.param(8, (1, 1, 1, 1), marks=pytest.mark.full), (2, (1, 2, 2, 1))], ids=str
)
def test_an_accumulated_step_is_that_of_the_large_batch(batch, whole, accumulate, mesh):
    """Weighted by supervised tokens: the mean of the parts' means would be another number here."""
    state, metrics = steps(batch, mesh=mesh, accumulate=accumulate, num_sources=2, **LINEAR)
    for key, value in whole[1].items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5, err_msg=key)
    assert_moved_alike(state.params, whole[0].params, initial()["params"])


@pytest.fixture(scope="module")
def ten_losses(batch):
    return steps(batch, 10, born=True, model__vision__batch_norm="train")[1]["losses"]


@pytest.mark.parametrize(
    "mesh",
    [(1, 2, 2, 2), *(pytest.param(m, marks=pytest.mark.full) for m in ((1, 8, 1, 1), (1, 1, 8, 1), (2, 2, 1, 2)))],
    ids=str,
)
def test_ten_losses_are_the_same_on_every_mesh(batch, ten_losses, monkeypatch, mesh):
    """From one seed, in training form, with statistics of the whole batch; kernels are split as large ones are."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_ELEMENTS", 64)
    _, metrics = steps(batch, 10, mesh, born=True, model__vision__batch_norm="train")
    assert ten_losses[-1] < ten_losses[0]
    np.testing.assert_allclose(metrics["losses"], ten_losses, rtol=1e-4)


ADAPTED = dict(
    lora__rank=2, lora__dropout=0.2, lora__targets="(llm/layers|projector)/.*", model__vision__form="folded",
    groups=(("lora/.*", 1e-2, 0.0), (".*", 0.0, 0.0)),
)  # fmt: skip


@pytest.fixture(scope="module")
def adapted(batch):
    return steps(batch, 3, born=True, **ADAPTED)


@pytest.mark.parametrize("mesh", [(1, 2, 2, 1), (1, 1, 1, 2)], ids=str)
def test_adapters_learn_and_drop_the_same_on_every_mesh(batch, adapted, mesh):
    state, metrics = steps(batch, 3, mesh, born=True, **ADAPTED)
    losses = adapted[1]["losses"]
    assert losses[2] < losses[0]
    np.testing.assert_allclose(metrics["losses"], losses, rtol=1e-4)
    q = state.params["lora"]["llm"]["layers"]["q"]["kernel"]
    shards = [q[name].sharding.shard_shape(q[name].shape) for name in "ab"]
    assert shards == [(2, 32 // mesh[2], 2), (2, 2, 32 // mesh[3])]


def planted(batch, what):
    """Four batches of one image each a group, in [0, 1]; the third has what no update should be made of."""
    rng = np.random.default_rng(1)
    found = [batch.replace(images=rng.random(batch.images.shape, np.float32)) for _ in range(4)]
    if what == "nan":
        found[2].images[5] = np.nan
    else:  # a single supervised token: the gradient is the mean over few, so it is far larger
        found[2] = found[2].replace(loss_mask=np.zeros_like(batch.loss_mask))
        found[2].loss_mask[0, 0, 5] = True
    return found


def walks(rows, mesh, mode, factor=10.0, known=0.0, **settings):
    """State and gradient norms behind the steps of each row of batches, from the same state.

    None leaves a step out. `known` is the norm of all before.
    """
    config = small_config("", mesh=mesh, bad_steps__mode=mode, bad_steps__factor=factor, **settings)
    model = fastvlm.build(**config.model.to_dict())
    mesh = sharding.make_mesh(mesh, jax.devices()[: np.prod(mesh)])
    with jax.set_mesh(mesh):
        step, ends = stage.make_step(config, model, mesh, steps=10), []
        for batches in rows:
            state, norms = step.make_state(jax.random.key(0), initial()), []
            state = state.replace(guard=state.guard.replace(norms=state.guard.norms + known))
            for batch in batches:
                if batch is None:
                    state = state.replace(step=state.step + 1)
                else:
                    state, metrics = step.fn(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
                    norms.append(float(metrics["grad_norm"]))
            ends.append((jax.tree.map(np.asarray, state), norms))
        return ends


FROZEN = dict(groups=(("vision/.*", 0.0, 0.1), (".*", 1e-3, 0.1)), model__vision__batch_norm="frozen")


@pytest.mark.parametrize(
    "what, mesh, changes",
    [
        pytest.param("nan", (1, 1, 1, 1), dict(accumulate=2), marks=pytest.mark.full),
        pytest.param("nan", (1, 2, 2, 2), {}, marks=pytest.mark.full),
        ("nan", (2, 1, 4, 1), FROZEN | dict(accumulate=1)),
        ("spike", (1, 1, 1, 1), FROZEN | dict(clip_norm=1e-3)),
        ("spike", (1, 2, 2, 1), dict(accumulate=2, clip_norm=1e-3)),
    ],
    ids=str,
)
def test_a_planted_step_is_as_if_it_had_not_been(batch, monkeypatch, what, mesh, changes):
    """Parameters, optimizer, its counts and statistics equal those of a step that judges nothing, on the others."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_ELEMENTS", 64)
    batches = planted(batch, what)
    left_out = [*batches[:2], None, batches[3]]
    (expected, norms), (_, (_, _, bad)) = walks([left_out, batches[:3]], mesh, "off", **changes)
    assert np.isnan(bad) if what == "nan" else bad > 1.5 * max(norms)
    factor = 1.2 if what == "spike" else 10.0
    ((state, _),) = walks([batches], mesh, "on", factor, known=max(norms), **changes)
    for name in ("step", "params", "batch_stats", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(expected, name))
    counts = [x for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state) if "count" in str(path[-1])]
    assert int(state.step) == 4 and {int(x) for x in counts} == {3}
    assert (int(state.guard.skipped), int(state.guard.in_a_row)) == (1, 0)
    np.testing.assert_allclose(state.guard.norms[-4:], [max(norms), *norms], rtol=1e-6)


@pytest.mark.parametrize("mode", ["warn", "off"])
def test_a_planted_step_is_made_where_the_config_says_so(batch, mode):
    ((state, _),) = walks([planted(batch, "nan")], (1, 1, 1, 1), mode)
    assert all(np.isnan(x).any() for x in jax.tree.leaves(state.params["llm"]["layers"]))
    assert np.count_nonzero(state.guard.norms) == (2 if mode == "warn" else 0)
    assert (int(state.guard.skipped), int(state.guard.in_a_row)) == (0, 2 if mode == "warn" else 0)


def test_parts_of_a_batch_are_groups_of_every_device():
    from fastvlm_jax.batch import parts_of

    np.testing.assert_array_equal(parts_of(np.arange(8), 2), [[0, 2, 4, 6], [1, 3, 5, 7]])


@pytest.mark.parametrize("param_dtype, moment_dtype", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_number_formats_are_those_of_the_config(batch, whole, param_dtype, moment_dtype):
    formats = dict(param_dtype=param_dtype, moment_dtype=moment_dtype)
    state, metrics = steps(batch, num_sources=2, **formats, **LINEAR)
    assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {param_dtype}
    assert {str(x.dtype) for x in jax.tree.leaves(state.batch_stats)} == {"float32"}
    moments = {name: set() for name in ("mu", "nu")}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        for name in moments:
            if f".{name}" in jax.tree_util.keystr(path):
                moments[name].add(str(leaf.dtype))
    assert moments == {"mu": {moment_dtype}, "nu": {"float32"}}
    assert abs(metrics["loss"] - whole[1]["loss"]) < 0.05


@pytest.mark.parametrize("shard_frozen", [True, False])
def test_frozen_parameters_are_sharded_or_whole_by_config(batch, monkeypatch, shard_frozen):
    monkeypatch.setattr(sharding, "MIN_SHARDED_ELEMENTS", 64)
    groups = (("projector/.*", 1e-3, 0.0), (".*", 0.0, 0.0))
    state, metrics = steps(batch, 1, (1, 1, 2, 2), groups=groups, shard_frozen=shard_frozen)
    local = {k: x.addressable_shards[0].data.size / x.size for k, x in flatten_dict(state.params, sep="/").items()}
    split = 0.25 if shard_frozen else 0.5  # over fsdp and tensor, or over tensor alone
    assert local["llm/layers/q/kernel"] == split and local["llm/embedding"] == split
    assert local["vision/stage_1/ffn/fc1/kernel"] == (0.5 if shard_frozen else 1)
    assert local["projector/fc1/kernel"] == 0.5  # it learns: split as ever
    assert metrics["loss"] > 0


@pytest.mark.parametrize("learns, products", [("projector", 2), ("llm", 3)])
def test_a_frozen_table_has_no_gradient(learns, products):
    """Logits forward and backward, and the gradient of what they are made from; that of the table only if it learns."""
    groups = ((f"({learns}|projector)/.*", 1e-3, 0.0), (".*", 0.0, 0.0))
    config = small_config("", model__vision__batch_norm="frozen", groups=groups)
    model, mesh = fastvlm.build(**config.model.to_dict()), sharding.make_mesh((1, 1, 4, 2))
    with jax.set_mesh(mesh):
        step = stage.make_step(config, model, mesh, steps=10)
        text = step.fn.lower(step.abstract, stage.abstract_batch(config, model, mesh)).compile().as_text()
    assert len(set(re.findall(r"n[cd],[nc]d->[a-z]+", text))) == products


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("accumulate", 3, "accumulate=3 must divide data.groups=8"),
        ("accumulate", 0, "accumulate=0 must divide"),
        ("param_dtype", "float16", "param_dtype='float16' must be float32 or bfloat16"),
        ("moment_dtype", "int8", "moment_dtype='int8' must be float32 or bfloat16"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, key, value, words):
    with pytest.raises(ValueError, match=words):
        train(small_config("/nowhere", **{key: value}), tmp_path / "run", jax.devices()[:1])


def test_an_unknown_remat_policy_is_refused():
    config = small_config("", model__llm__remat="all")
    with pytest.raises(ValueError, match="remat='all' must be one of none, full"):
        kinds.abstract_variables(fastvlm.build(**config.model.to_dict()))


def test_accumulation_that_leaves_devices_without_a_group_is_refused():
    mesh = sharding.make_mesh((1, 4, 1, 1), jax.devices()[:4])
    with pytest.raises(ValueError, match="accumulate=4 does not divide the 2 groups of a data shard"):
        sharding.check_mesh(mesh, groups=8, num_kv_heads=2, accumulate=4)


def test_parameters_are_gathered_once_each_way_and_gradients_reduced_once(batch, monkeypatch):
    """By the bytes of the partitioned program: nothing else of any size crosses the devices."""
    from fastvlm_jax.preflight.hlo import parse
    from fastvlm_jax.preflight.hlo.cost import analyse

    monkeypatch.setattr(sharding, "MIN_SHARDED_ELEMENTS", 64)
    config = small_config(
        "", mesh=(1, 1, 8, 1), model__vision__batch_norm="frozen", model__llm__remat="full", model__vision__remat="full"
    )
    model = fastvlm.build(**config.model.to_dict())
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        step = stage.make_step(config, model, mesh, steps=10)
        compiled = step.fn.lower(step.abstract, stage.abstract_batch(config, model, mesh)).compile()
    state = sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(step.abstract))
    assert compiled.memory_analysis().alias_size_in_bytes >= state  # the new state takes the place of the old one
    text, moved = compiled.as_text(), {}
    for collective in analyse(parse.parse(text), 8).collectives:
        moved[collective.kind] = moved.get(collective.kind, 0) + collective.payload * collective.trips
    leaves = jax.tree.leaves(step.abstract.params)
    whole = 4 * sum(x.size for x in leaves)
    kept_in_shards = 4 * sum(x.size for x in leaves if not x.sharding.is_fully_replicated)
    assert set(moved) <= {"all-gather", "all-reduce", "reduce-scatter"}
    # The table of words is gathered once for both its ends. A layer's activations are 0.3 of the parameters' bytes.
    assert 1.5 * kept_in_shards < moved["all-gather"] < 2.05 * kept_in_shards
    # A stored BatchNorm's gradient is computed from its kernel's. Lookup and loss each reduce the table's.
    assert 0.97 * whole < moved["all-reduce"] + moved.get("reduce-scatter", 0) < 1.02 * whole + 4 * 512 * 32
