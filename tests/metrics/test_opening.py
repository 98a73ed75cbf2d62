"""What a run says before its first step."""

from functools import partial

import jax
import jax.numpy as jnp

from fastvlm_jax import optim
from fastvlm_jax.batch import Batch
from fastvlm_jax.changes import Change
from fastvlm_jax.config import get_base
from fastvlm_jax.config_values import course_of
from fastvlm_jax.metrics import opening

PARAMS = {
    "vision": {"stem": {"kernel": jax.ShapeDtypeStruct((3, 4), jnp.float32)}},
    "projector": {"fc1": {"kernel": jax.ShapeDtypeStruct((4, 2), jnp.float32)}},
    "llm": {"embedding": jax.ShapeDtypeStruct((10, 2), jnp.float32)},
}


def config(**changes):
    c = get_base("tiny")
    c.parent, c.groups = "runs/a", (("projector/.*", 1e-3, 0.0), (".*", 0.0, 0.0))
    with c.unlocked():
        c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return c


def test_parts_parameters_and_their_trained_share_are_told(capsys):
    opening.tell_model("run", config(), PARAMS, {"params": {"vision": 0, "llm": 0}})
    assert capsys.readouterr().err.splitlines() == [
        "run: vision, llm from runs/a; projector from random weights",
        "run: 40 parameters, 8 of them trained (20.0%)",
    ]


def test_an_encoder_that_cannot_learn_from_scratch_is_told_in_one_line_with_the_mend(capsys):
    learning, branched = ((".*", 1e-3, 0.0),), dict(model__vision__form="branched", model__vision__batch_norm="train")
    cases = [
        ({}, "and stays folded with frozen BatchNorm statistics at rate 0"),
        (dict(groups=learning), "and stays folded with frozen BatchNorm statistics,"),
        (branched, "from random weights at rate 0,"),
        (dict(groups=learning, **branched), None),
    ]
    for changes, words in cases:
        opening.tell_model("run", config(**changes), PARAMS, {"params": {"llm": 0}})
        warnings = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
        assert len(warnings) == (words is not None)
        if words:
            assert words in warnings[0] and "--config.parent=vision=DIR" in warnings[0]
            assert "--config.model.vision.form=branched" in warnings[0]


def test_a_vision_transformer_is_not_told_of_keys_that_it_lacks(capsys):
    c = get_base("0.5b,clip_vit_l_336")
    c.groups = (("vision/.*", 0.0, 0.0), (".*", 1e-3, 0.0))
    opening.tell_model("run", c, PARAMS, None)
    line = capsys.readouterr().err.splitlines()[-1]
    assert "at rate 0" in line and "form" not in line and "batch_norm" not in line


def test_an_epoch_of_few_steps_gets_a_smaller_batch_proposed(capsys):
    c = config(data__groups=128, accumulate=2)
    opening.tell_data("run", c, 264, 3, 3)
    assert capsys.readouterr().err.splitlines() == [
        "run: 264 records in batches of 128 groups; steps an epoch: 3, in all: 3",
        "run: 3 steps an epoch are few to learn from: --config.data.groups=2 gives about 192 (the data shards of the "
        "mesh must divide it)",
    ]
    many = (dict(data__groups=128), 400, 400), (dict(data__groups=128), 3, 100)
    for changes, per_epoch, steps in (*many, (dict(data__groups=128, steps=5), 3, 5)):
        opening.tell_data("run", config(**changes), 264, per_epoch, steps)
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_changed_run_is_told_its_next_rate_which_counts_updates_and_no_skipped_steps(capsys):
    c = config(groups=((".*", 1e-3, 0.0),), warmup_ratio=0.0)
    rates = partial(optim.learning_rates, spans=[optim.Span("rest", 1e-3, 1e-3)], course=course_of(c, 100))
    change = Change("steps", 90, 100)
    opening.tell_changes("run", c, [change], [{"step": 50, "lr": 5e-4}], rates, 50, 100, skipped=10)
    # 1e-3 (1 + cos(0.41 pi)) / 2 = 0.00063950
    said = "was 0.0005 in the last row of its metrics, is 0.000639 at step 51 and ends at 0 with step 100"
    assert said in capsys.readouterr().err


def test_compilation_is_told_once_for_each_size_and_happens_once(capsys):
    traced = []

    def count(state, batch):
        traced.append(batch.images.shape)
        return state + batch.images.sum()

    step = opening.telling_compilation("run", jax.jit(count, donate_argnums=0))
    state = jnp.zeros((), jnp.int32)
    for side in (2, 2, 3, 2, 3):
        images = jnp.ones((1, 1, side, side, 3), jnp.int32)
        state = step(state, Batch(images, *[None] * 8))
    assert int(state) == 3 * 12 + 2 * 27 and len(traced) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "run: compiling the training step for images of 2 x 2 px ..." and "3 x 3 px" in told[2]
    assert len(told) == 4 and all(line.startswith("run: compiled in ") and line.endswith(" s") for line in told[1::2])
