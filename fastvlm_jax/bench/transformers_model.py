"""Builds the FastVLM of transformers with the sizes of a model of this package, to time both side by side."""

import functools
import importlib.metadata
import importlib.util
from typing import Any

import jax

from fastvlm_jax.convert.layouts import fastvlm as layout
from fastvlm_jax.convert.layouts.text_config import text_config
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.models.fastvlm import FastVLM, make_encoder

PACKAGES = ("torch", "transformers", "timm")
IMAGE_ID = 2  # of the placeholder of an image token; any id inside the vocabulary will do


@functools.lru_cache(maxsize=1)  # the model of all image sizes of a command
def build(model: FastVLM) -> Any:
    """Returns transformers' FastVlmForConditionalGeneration on the device that JAX uses, in the model's dtype.

    Its encoder is timm's, in the form of ours; its weights are those that transformers starts from.

    Raises:
      ValueError: a package is missing, timm has no such encoder, or PyTorch sees no device where JAX sees one.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--against transformers needs {', '.join(missing)}: pip install 'fastvlm_jax[demo]' (torch for this GPU)"
        )
    transformers = import_transformers()
    import torch

    try:
        tower = layout.vision_config(make_encoder(**model.vision_args, parent=None))
    except ValueError as error:
        raise ValueError(
            f"--against transformers: its FastVLM has no such encoder ({str(error).partition(':')[0]})"
        ) from error
    decoder = Decoder(**model.llm_args, parent=None)
    config = transformers.FastVlmConfig(
        vision_config=tower,
        text_config=text_config(decoder, bos_token_id=0, eos_token_id=1, pad_token_id=0),
        image_token_index=IMAGE_ID,
        tie_word_embeddings=decoder.tie_embeddings,
    )
    with torch.device(torch_device()):
        theirs = transformers.FastVlmForConditionalGeneration(config)
    return theirs.to(getattr(torch, model.dtype)).eval()


def import_transformers() -> Any:
    """Imports transformers and returns it; a torchvision that was built for another torch does not stop it."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # its compiled part does not fit, and so has not declared its operators
        _torchvision_operators()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


@functools.cache
def _torchvision_operators() -> Any:
    """Declares two operators of torchvision, of which transformers and timm need the names alone.

    The library that declares them is returned, and so kept: they are forgotten with it.
    """
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def torch_device() -> str:
    """Returns PyTorch's name of the device that JAX uses by default.

    Raises:
      ValueError: PyTorch has no such device.
    """
    import torch

    platform = jax.default_backend()
    if platform == "cpu":
        return "cpu"
    if platform != "gpu" or not torch.cuda.is_available():
        raise ValueError(f"--against transformers: this PyTorch does not run on JAX's device, a {platform}")
    return "cuda"


def versions() -> dict[str, str]:
    """Returns the versions of PyTorch's packages."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}
