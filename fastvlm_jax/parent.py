"""Says what the config of a stage takes from its parent: the architecture, and the template. Weights: adapt.py."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from fastvlm_jax import model_io
from fastvlm_jax.adapt import OWN
from fastvlm_jax.config import base_of, get_base, sizes_of
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.tokenizer import END


def open_base(argument: str) -> ml_collections.ConfigDict:
    """Returns the config that the argument of a stage file asks for, which the file overrides.

    Only files that describe the parent are read, and no weights.

    Args:
      argument: a size, as in config.get_base, or "parent=SOURCE" with a source of `model_io.read`: encoder, decoder
        and template are the parent's, and so are the image size and fit if the parent answers questions or its encoder
        takes no other size; SOURCE becomes `parent`. What SOURCE lacks has the size before it, as in
        "1.5b,parent=SOURCE", by default 0.5b.

    Raises:
      FileNotFoundError, ValueError: see `get_base` and `model_io.read`.
      ValueError: a size is given beside a parent that has both encoder and decoder.
    """
    size, given, source = argument.partition("parent=")
    if not given:
        return get_base(size)
    loaded, size = model_io.read(source), size.removesuffix(",")
    theirs = {part: _architecture(loaded.config[part]) for part in ("vision", "llm") if loaded.config.get(part)}
    if size and len(theirs) == 2:
        raise ValueError(f"{source} has an encoder and a language model: leave out {size!r}, as in FILE.py:parent=DIR")
    llm, vision = sizes_of(size or "0.5b")
    llm, vision, processor = theirs.get("llm", llm), theirs.get("vision", vision), loaded.processor
    template = _template(processor, llm) if "llm" in theirs else get_base(size or "0.5b").data.template
    c = base_of(llm, vision, template)
    c.parent = source
    answers = "projector" in loaded.variables["params"] and processor is not None and processor.template != "plain"
    if answers:
        c.data.fit = processor.fit
        if "image_size" not in vision:
            c.data.image_size = processor.image_size
    return c


def _architecture(args: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a parent's module that a stage does not choose for itself; lists become tuples."""
    kept = {key: value for key, value in args.items() if key not in OWN and (key, value) != ("family", "fastvit")}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in kept.items()}


def _template(processor: Processor | None, llm: Mapping[str, Any]) -> str:
    """Returns the parent's template; if it has none, or was only aligned on captions, the one of its language model."""
    if processor is not None and processor.template != "plain":
        return processor.template
    if llm.get("qkv_bias", True):
        return "qwen_2"
    return "chatml" if processor is not None and processor.tokenizer.end == END else "vicuna_v1"
