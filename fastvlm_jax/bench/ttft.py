"""Times what lies between a photo and the first token of an answer, part by part: `fastvlm bench ttft`.

decode_resize -> copy -> encoder -> projector -> prefill -> first token -> next_token -> second token
                 \__________________ fused __________________/
user_ttft  = decode_resize + fused               what a user waits for
paper_ttft = encoder + prefill of the image tokens alone ("prefill_image"); paper, section 4 and Table 10
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fastvlm_jax.batch import Batch
from fastvlm_jax.bench import clock, first_token, ttft_transformers
from fastvlm_jax.bench.first_token import Question
from fastvlm_jax.bench.mosaic import PHOTO, sample_jpeg
from fastvlm_jax.bench.ttft_model import Subject
from fastvlm_jax.images.inputs import to_pixels
from fastvlm_jax.images.resize import fit_into, tiles_into
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.models.names import encoder_name, llm_name
from fastvlm_jax.processor import Processor


@dataclasses.dataclass(frozen=True)
class Parts:
    """Holds the parts of a first token, ready to be timed.

    Attributes:
      calls: function of each part, by name; what it returns is waited for.
      programs: compiled program of each part that has one.
      compile_seconds: seconds that each of them took to trace and compile.
      image_tokens: image tokens of a prompt.
    """

    calls: dict[str, Callable[[], Any]]
    programs: dict[str, Any]
    compile_seconds: dict[str, float]
    image_tokens: int


def decode_resize(jpeg: bytes, processor: Processor | None, question: Question) -> np.ndarray:
    """Decodes a photo and resizes it, once for each prompt: uint8 [1, batch * slots, H, W, 3].

    Args:
      jpeg: the encoded photo.
      processor: says how images are fitted into the square; None pads them with black, as FastVLM does.
    """
    fit, background = (processor.fit, processor.background) if processor else ("pad", (0, 0, 0))
    side = question.image_size
    out = np.empty((question.batch, question.slots, side, side, 3), np.uint8)
    for views in out:
        image = to_pixels(jpeg)
        fit_into(image, views[0], "stretch" if question.grid else fit, background, exact=True)
        if question.grid:
            tiles_into(image, views[1:], question.grid, exact=True)
    return out.reshape(1, -1, side, side, 3)


def prepare(model: FastVLM, variables: Any, processor: Processor | None, question: Question) -> Parts:
    """Compiles all programs of a question and returns the parts to time; see the top of this file."""
    image_tokens = first_token.check(model, question)
    programs, seconds = {}, {}

    def ready(name: str, function, *args) -> Callable[[], Any]:
        programs[name], seconds[name] = clock.compile_ahead(function, model, variables, *args)
        return lambda: programs[name](variables, *args)

    jpeg = sample_jpeg(PHOTO)
    pixels = decode_resize(jpeg, processor, question)
    host = first_token.make_batch(model, question, pixels)
    alone = jax.device_put(first_token.make_batch(model, question._replace(prompt_tokens=0), pixels))
    batch = jax.device_put(host)
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: jax.device_put(host)}
    calls["encoder"] = ready("encoder", first_token.encoder, batch.images, batch.image_mask)
    calls["projector"] = ready("projector", first_token.projector, calls["encoder"]())
    features = calls["projector"]()
    calls["prefill"] = ready("prefill", first_token.prefill, features, batch)
    calls["next_token"] = _next_token(model, variables, batch, calls["prefill"](), programs, seconds)
    calls["prefill_image"] = ready("prefill_image", first_token.prefill, features, alone)
    calls["decode_resize"] = lambda: decode_resize(jpeg, processor, question)
    whole = ready("fused", first_token.fused, host)
    calls["fused"] = lambda: np.asarray(whole())  # straight behind a photo, until the id is on the host
    return Parts(calls, programs, seconds, image_tokens)


def _next_token(model, variables, batch: Batch, read: tuple, programs: dict, seconds: dict) -> Callable[[], Any]:
    """Compiles the step of one further token behind a prompt that was read, and returns the call that runs it."""
    (tokens_B, cache), positions_B = read, batch.segment_ids[0].sum(-1)
    args = (variables, tokens_B, positions_B)
    program, seconds["next_token"] = clock.compile_ahead(first_token.next_token, model, *args, cache)
    programs["next_token"] = program

    def call():
        nonlocal cache
        ids, cache = program(*args, cache)
        return ids

    return call


def measure(
    subject: Subject, question: Question, *, runs: int = 20, warmup: int = 3, against: Sequence[str] = ()
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Times the first token of a model on this machine's device.

    Args:
      subject: model with encoder and language model, its variables on the device, and its processor if there is one.
      question: size of the image, tiles, length of the prompt, number of prompts.
      runs, warmup: runs on the clock, and before it.
      against: names of others to time, in turns with this model; "transformers" is known.

    Returns:
      A point, JSON-ready, with all times in seconds; and for each of the others its times and this model's over them.

    Raises:
      ValueError: see `first_token.check`; or PyTorch's packages are missing or have no such model.
    """
    model, variables, processor, _ = subject
    others = ttft_transformers.prepare(model, question) if "transformers" in against else {}
    parts = prepare(model, variables, processor, question)
    calls = dict(parts.calls)
    for name, other in others.items():
        calls |= {f"{name}/{part}": call for part, call in other.calls.items()}
    times = clock.take_turns(calls, runs, warmup)
    point = to_point(model, variables, question, parts, times)
    return point, [ttft_transformers.compared(name, other, point, times) for name, other in others.items()]


def to_point(
    model: FastVLM, variables: Any, question: Question, parts: Parts, times: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Returns what was measured, JSON-ready; see `measure`."""
    device = jax.devices()[0]
    peak, source = clock.peak_memory(device, list(parts.programs.values()))
    own = {name: times[name] for name in parts.calls}

    def total(*names: str) -> float:
        return clock.spread([sum(run) for run in zip(*(own[name] for name in names), strict=True)])["median"]

    return {
        **describe(model, variables, question, parts.image_tokens),
        "device": clock.device_name(device),
        "measured": True,
        "parts": {name: clock.spread(seconds) for name, seconds in own.items()},
        "paper_ttft": total("encoder", "prefill_image"),
        "user_ttft": total("decode_resize", "fused"),
        "runs": len(own["fused"]),
        "compile_seconds": parts.compile_seconds,
        "peak_bytes": peak,
        "peak_bytes_of": source,
        "attention": attention_kernel(parts.programs["prefill"].as_text()),
        "versions": clock.versions("flax"),
        "photo": list(PHOTO),
    }


def describe(model: FastVLM, variables: Any, question: Question, image_tokens: int) -> dict[str, Any]:
    """Returns what a point is about: model, question, dtype and parameters."""
    return {
        "encoder": encoder_name(model.vision_args),
        "encoder_form": dict(model.vision_args).get("form"),
        "llm": llm_name(model.llm_args),
        "image_size": question.image_size,
        "grid": list(question.grid) if question.grid else None,
        "image_tokens": image_tokens,
        "prompt_tokens": question.prompt_tokens,
        "batch": question.batch,
        "dtype": model.dtype,
        "parameters": {
            part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
            for part, tree in variables["params"].items()
        },
    }


def attention_kernel(text: str) -> str:
    """Returns which attention of kernels/attention.py a compiled program holds: splash, cudnn or plain."""
    return "splash" if "splash" in text else "cudnn" if "fmha" in text else "plain"
