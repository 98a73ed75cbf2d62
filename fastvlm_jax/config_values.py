"""Returns what a config says as the values that other modules take."""

import ml_collections

from fastvlm_jax.models.lora import Lora
from fastvlm_jax.optim import Course


def rows_of(config: ml_collections.ConfigDict) -> tuple[int, int]:
    """Returns (rows of text in a group, tokens in a row) of a config; in stage 0 a text has a row of its own."""
    if "text" in config.model:
        return config.data.images_per_group * config.data.texts, config.model.text.context_length
    return config.data.rows_per_group, config.data.row_length


def lora_of(config: ml_collections.ConfigDict) -> Lora | None:
    """Returns the adapters that a config asks for; None if it asks for none."""
    return Lora(**config.lora.to_dict()) if "lora" in config and config.lora.rank else None


def frozen_dtype(config: ml_collections.ConfigDict) -> str:
    """Returns the dtype of a stage's frozen kernels and embeddings."""
    return config.frozen_dtype or ("bfloat16" if lora_of(config) else config.param_dtype)


def course_of(config: ml_collections.ConfigDict, steps: int) -> Course:
    """Returns how the learning rates of a run of so many steps go."""
    return Course(steps, config.warmup_ratio, config.warmup, config.final_rate)
