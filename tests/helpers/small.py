"""The smallest config that exercises everything: two encoder stages, 16 px images, 4 tokens an image; and turns."""

from fastvlm_jax.config import get_base

# Overrides for a still smaller encoder, 8 px images of 4 tokens, where compiling is most of what a test costs.
ONE_STAGE = dict(
    data__image_size=8, model__vision__layers=(1,), model__vision__embed_dims=(8,), model__vision__mixers=("repmixer",)
)


def small_config(data, steps=4, **overrides):
    c = get_base("tiny")
    c.stage = "small"
    c.model.vision.layers, c.model.vision.embed_dims = (1, 1), (8, 32)
    c.model.vision.mixers = ("repmixer", "attention")
    c.model.vision.form, c.model.vision.batch_norm = "branched", "train"
    c.model.llm.update(width=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=64)
    c.data.path, c.data.template, c.data.turns, c.data.image_size = str(data), "chatml", "separate", 16
    c.data.groups, c.data.images_per_group, c.data.rows_per_group, c.data.row_length = 8, 1, 8, 80
    c.groups = ((".*", 1e-3, 0.1),)
    c.steps, c.log_every, c.checkpoint_every, c.eval_every = steps, 1, 1000, 1000
    c.eval_batches = 0
    with c.unlocked():
        for key, value in overrides.items():
            c.update_from_flattened_dict({key.replace("__", "."): value})
    return c


def get_config(data):
    """`--config tests/helpers/small.py:DATA`."""
    return small_config(data)


def ask(*pairs, images=1):
    """The turns of questions and answers, with the images in the first question."""
    turns = [turn for q, a in pairs for turn in (("user", (q,)), ("assistant", (a,)))]
    return (("user", (*range(images), *turns[0][1])), *turns[1:])
