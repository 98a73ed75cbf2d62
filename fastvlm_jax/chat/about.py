"""Describes a model for the people who talk with it."""

import math
import pathlib
from typing import Any

import jax

from fastvlm_jax.chat.answering import Answering
from fastvlm_jax.chat.uploads import MAX_IMAGE, MAX_IMAGES
from fastvlm_jax.model_io import Loaded
from fastvlm_jax.models.names import encoder_name, llm_name
from fastvlm_jax.text.conversation import TEMPLATES
from fastvlm_jax.workdir import origin


def describe(loaded: Loaded, answering: Answering, temperature: float) -> dict[str, Any]:
    """Returns what the page shows of a model, as JSON values: name, parts, lineage, and what it may be asked."""
    model, processor = answering.model, answering.processor
    reads_images = bool(processor.image_size) and model.vision_args is not None
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(answering.variables["params"]))
    device = jax.devices()[0]
    context, answer = answering.limit + answering.max_tokens, answering.max_tokens
    facts = {
        "model": loaded.source,
        "lineage": origin(loaded.lineage),
        "encoder": encoder_name(model.vision_args) if reads_images else "none: it reads text alone",
        "image": f"{processor.image_size} px, {processor.tokens_per_image} tokens" if reads_images else "",
        "language model": llm_name(model.llm_args),
        "parameters": f"{parameters:,}",
        "computed in": f"{model.dtype} on {device.device_kind if device.platform != 'cpu' else 'the CPU'}",
        "context": f"{context:,} tokens, of which {answer:,} for an answer",
    }
    return {
        "name": pathlib.Path(loaded.source.split(",")[0].split("=")[-1]).name or loaded.source,
        "facts": {name: fact for name, fact in facts.items() if fact},
        "lineage": loaded.lineage,
        "reads_images": reads_images,
        "reads_text": TEMPLATES[processor.template].user_text,
        "max_images": MAX_IMAGES,
        "max_bytes": MAX_IMAGE,
        "temperature": temperature,
    }
