"""A sweep of two tiny points that share their first stage: `--config tests/helpers/tiny_sweep.py:DATA` (easy-VQA)."""

import pathlib

from fastvlm_jax.sweep.grid import Point, Stage, sweep_config

SMALL = pathlib.Path(__file__).with_name("small.py")
MODEL = {
    "model.vision.layers": (1,), "model.vision.embed_dims": (8,), "model.vision.mixers": ("repmixer",),
    "data.turns": "conversation", "data.rows_per_group": 1,
}  # fmt: skip


def get_config(data):
    stage = f"{SMALL}:{data}"
    first = Stage(stage, {**MODEL, "data.image_size": 8, "steps": 8, "checkpoint_every": 2})
    second = Stage(stage, {**MODEL, "data.image_size": 16, "steps": 3})
    points = [Point("small-8", "tiny", "tiny", 8, (first,)), Point("small-16", "tiny", "tiny", 16, (first, second))]
    c = sweep_config("tiny", "Two tiny points", points, ["easy-vqa"])
    c.benchmark_data, c.limit = data, 24
    c.ttft, c.ttft_flags = False, ("--runs=3", "--warmup=1", "--prompt_tokens=4")
    return c
