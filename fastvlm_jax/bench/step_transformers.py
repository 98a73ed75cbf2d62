"""Holds the training step of transformers' FastVLM, for `fastvlm bench step --against transformers`.

The same sizes, batch and dtypes: parameters and AdamW in param_dtype and float32, computation in the model's dtype (by
autocast where they differ), gradients clipped, the same parts frozen, BatchNorm by stored statistics. Where our decoder
recomputes activations, theirs does; timm's encoder never does.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging

from fastvlm_jax import optim
from fastvlm_jax.batch import Batch
from fastvlm_jax.bench import transformers_model
from fastvlm_jax.config_values import lora_of
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.models.kinds import abstract_variables

PREFIXES = {"vision": "model.vision_tower.", "projector": "model.multi_modal_projector.", "llm": ""}


@dataclasses.dataclass(frozen=True)
class Other:
    """Holds the step of another implementation: a function that ends when it is done, and facts to report."""

    call: Callable[[], Any]
    facts: dict[str, Any]


def prepare(config, model: FastVLM, batch: Batch) -> dict[str, Other]:
    """Builds transformers' step on the device that JAX uses: run eagerly and, on a GPU, by torch.compile.

    What torch.compile cannot compile is left out, with a warning.

    Raises:
      ValueError: a package is missing, transformers has no such model, or it cannot read such a batch or train so.
    """
    check(config, model, batch)
    import torch

    theirs = transformers_model.build(FastVLM(model.vision_args, model.llm_args, config.param_dtype))
    notes = _freeze(config, model, theirs)
    if config.model.llm.get("remat", "none") != "none":
        theirs.model.language_model.gradient_checkpointing_enable()
        theirs.model.language_model.train()  # else nothing is recomputed; there is no dropout
        notes.append("its decoder recomputes activations, its encoder does not")
    facts = {"versions": transformers_model.versions(), "notes": notes}
    found = {"transformers, eager": Other(_step(config, theirs, theirs, batch), {**facts, "compile_seconds": 0.0})}
    if jax.default_backend() != "cpu":
        name, call = "transformers, torch.compile", _step(config, theirs, torch.compile(theirs, dynamic=False), batch)
        begin = time.perf_counter()
        try:
            call()
        except Exception as error:  # whatever torch.compile fails with: the eager step is still timed
            logging.warning("%s is left out: %s", name, " ".join(str(error).split())[:300])
        else:
            found[name] = Other(call, {**facts, "compile_seconds": time.perf_counter() - begin})
    return found


def check(config, model: FastVLM, batch: Batch) -> None:
    """Raises ValueError for what transformers' model cannot do; the message names the key."""
    if batch.tokens.shape[1] != 1:
        raise ValueError("--against transformers encodes the images of every row: set --config.data.rows_per_group=1")
    wanted = batch.images.shape[1] * model.tokens_per_image(config.data.image_size)
    if wanted > batch.tokens.shape[-1]:
        raise ValueError(
            f"--against transformers: a row must hold the {wanted} image tokens of its group: set "
            f"--config.data.row_length={wanted} or more"
        )
    if lora_of(config):
        raise ValueError("--against transformers has no adapters: set --config.lora.rank=0")
    if config.accumulate != 1:
        raise ValueError("--against transformers takes the whole batch at once: set --config.accumulate=1")
    if config.model.vision.get("batch_norm") == "train":
        raise ValueError("--against transformers uses stored statistics: set --config.model.vision.batch_norm=frozen")


def _freeze(config, model: FastVLM, theirs: Any) -> list[str]:
    """Freezes the parts that the config freezes; returns what to note.

    Raises:
      ValueError: the config trains some parameters of a part and freezes others.
    """
    trainable, frozen = optim.split(abstract_variables(model)["params"], config.groups)
    notes = []
    for part in PREFIXES:
        learns = {path in trainable for path in [*trainable, *frozen] if path.startswith(f"{part}/")}
        if len(learns) > 1:
            raise ValueError(f"--against transformers: groups train {part} in part: train or freeze all of it")
        if learns == {False}:
            notes.append(f"{part} frozen")
            for name, parameter in theirs.named_parameters():
                own = next(key for key, prefix in PREFIXES.items() if name.startswith(prefix))
                parameter.requires_grad_(parameter.requires_grad and own != part)
    return notes


def _step(config, theirs: Any, forward: Callable, batch: Batch) -> Callable[[], Any]:
    """Returns a function that takes a step and waits for the device.

    Args:
      theirs: the model, for its parameters.
      forward: the model, compiled or not.
    """
    import torch

    device, dtype = transformers_model.torch_device(), getattr(torch, config.model.dtype)
    pixels, ids, labels = (torch.from_numpy(x).to(device) for x in _inputs(batch))
    learning = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        learning, lr=2e-5, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=device == "cuda"
    )

    same = config.model.dtype == config.param_dtype

    def call():
        with contextlib.nullcontext() if same else torch.autocast(device, dtype):
            scaled = pixels.to(dtype) / 255
            loss = forward(input_ids=ids, pixel_values=scaled, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, config.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    return call


def _inputs(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns pixels uint8 [images, 3, H, W], ids [rows, T] with placeholders of images, and labels [rows, T]."""
    images, tokens = np.asarray(batch.images), np.asarray(batch.tokens)
    pixels = np.ascontiguousarray(images.reshape(-1, *images.shape[2:]).transpose(0, 3, 1, 2))
    tokens = np.where(tokens == transformers_model.IMAGE_ID, transformers_model.IMAGE_ID + 1, tokens)
    ids = np.where(np.asarray(batch.image_index) >= 0, transformers_model.IMAGE_ID, tokens)
    ids, labels = (x.reshape(-1, x.shape[-1]).astype(np.int64) for x in (ids, np.asarray(batch.targets)))
    return pixels, ids, labels
