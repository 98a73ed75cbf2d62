"""Holds the parts of a first token as transformers runs them, for `fastvlm bench ttft --against transformers`."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from fastvlm_jax.bench import transformers_model
from fastvlm_jax.bench.clock import spread
from fastvlm_jax.bench.first_token import Question
from fastvlm_jax.models.fastvlm import FastVLM


@dataclasses.dataclass(frozen=True)
class Other:
    """Holds the parts of another implementation.

    Attributes:
      calls: function of each part, by the name of the same part of this package.
      parameters: number of its parameters.
      compile_seconds: seconds of the first call of each part, where the parts are compiled.
    """

    calls: dict[str, Callable[[], Any]]
    parameters: int
    compile_seconds: dict[str, float]


def prepare(model: FastVLM, question: Question) -> dict[str, Other]:
    """Builds transformers' model and returns its parts: run eagerly and, on a GPU, compiled by torch.compile.

    A model that torch.compile cannot compile is left out, with a warning.

    Raises:
      ValueError: see `transformers_model.build`.
    """
    import torch

    theirs = transformers_model.build(model)
    count = sum(parameter.numel() for parameter in theirs.parameters())
    found = {"transformers, eager": Other(_calls(theirs, theirs.model.vision_tower, model, question), count, {})}
    if jax.default_backend() != "cpu":
        name = "transformers, torch.compile"
        try:
            tower = torch.compile(theirs.model.vision_tower, dynamic=False)
            calls = _calls(torch.compile(theirs, dynamic=False), tower, model, question)
            seconds = {part: _seconds(call) for part, call in calls.items()}
        except Exception as error:  # whatever torch.compile fails with: the eager model is still timed
            logging.warning("%s is left out: %s", name, " ".join(str(error).split())[:300])
        else:
            found[name] = Other(calls, count, seconds)
    return found


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _calls(theirs: Any, tower: Any, model: FastVLM, question: Question) -> dict[str, Callable[[], Any]]:
    """Returns the parts of a model of transformers; each call ends when its device has finished.

    Args:
      theirs: the model, compiled or not.
      tower: its encoder, compiled or not.
    """
    import torch

    device, dtype = transformers_model.torch_device(), getattr(torch, model.dtype)
    pixels, ids = _inputs(model, question)
    pixels, ids = torch.from_numpy(pixels).to(dtype), torch.from_numpy(ids)
    there, ids_there = pixels.to(device), ids.to(device)
    project = theirs.model.multi_modal_projector

    def waited(function: Callable[[], Any]) -> Callable[[], Any]:
        def call():
            with torch.inference_mode():
                result = function()
                if device == "cuda":
                    torch.cuda.synchronize()
            return result

        return call

    def read(images: Any, tokens: Any, **given: Any) -> Any:
        return theirs(input_ids=tokens, pixel_values=images, use_cache=True, logits_to_keep=1, **given)

    def flat(maps: Any) -> Any:
        return maps.last_hidden_state.flatten(2).permute(0, 2, 1)

    encode = waited(lambda: tower(there, return_dict=True))
    maps = encode()
    maps.pooler_output = waited(lambda: project(flat(maps)))()
    prefill = waited(lambda: read(None, ids_there, mm_encoder_outputs={"image": maps}))
    first = prefill()
    cache, last = first.past_key_values, first.logits[:, -1].argmax(-1, keepdim=True)

    def step():
        logits = read(None, last, past_key_values=cache).logits
        cache.crop(-1)  # the token of this step
        return logits[:, -1].argmax(-1)

    return {
        "copy": waited(lambda: (pixels.to(device, copy=True), ids.to(device, copy=True))),
        "encoder": encode,
        "projector": waited(lambda: project(flat(maps))),
        "prefill": waited(lambda: prefill().logits[:, -1].argmax(-1)),
        "next_token": waited(step),
        "fused": waited(lambda: read(pixels.to(device), ids.to(device)).logits[:, -1].argmax(-1).cpu()),
    }


def _inputs(model: FastVLM, question: Question) -> tuple[np.ndarray, np.ndarray]:
    """Returns random images, float32 [B, 3, H, W] in [0, 1], and ids [batch, T]: image tokens, then text."""
    rng, side = np.random.default_rng(0), question.image_size
    image = np.full((question.batch, question.slots * model.tokens_per_image(side)), transformers_model.IMAGE_ID)
    lowest, highest = transformers_model.IMAGE_ID + 1, model.llm_args["vocab_size"]
    text = rng.integers(lowest, highest, (question.batch, question.prompt_tokens))
    images = rng.random((question.batch * question.slots, 3, side, side), np.float32)
    return images, np.concatenate([image, text], axis=1)


def compared(name: str, other: Other, point: Mapping[str, Any], times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Returns what was measured of another implementation, JSON-ready, and the ratio of this package's medians to its.

    Args:
      name: its name.
      point: what was measured of this package.
      times: seconds of all runs, by "name/part".
    """
    parts = {part: spread(times[f"{name}/{part}"]) for part in other.calls}
    kept = ("encoder", "llm", "image_size", "grid", "image_tokens", "prompt_tokens", "batch", "dtype", "device", "runs")
    return {
        "name": name,
        **{key: point[key] for key in kept},
        "measured": True,
        "parts": parts,
        "ratios": {part: point["parts"][part]["median"] / parts[part]["median"] for part in parts},
        "parameters": other.parameters,
        "compile_seconds": other.compile_seconds,
        "versions": transformers_model.versions(),
    }
