"""Says what a stage takes from its parent: the architecture of its config, and weights adapted to its model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from fastvlm_jax import model_io
from fastvlm_jax.config import base_of, get_base, sizes_of
from fastvlm_jax.convert.heads import without_head
from fastvlm_jax.models import fastvlm, kinds
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.models.fastvit import FastViT
from fastvlm_jax.models.fastvlm import FastVLM
from fastvlm_jax.models.fold import fold_variables
from fastvlm_jax.processor import Processor
from fastvlm_jax.text.tokenizer import END

# What a stage chooses for itself. The CLIP projection is dropped from a FastViT.
OWN = ("form", "batch_norm", "batch_norm_images", "drop_path", "remat", "head_features", "head_bias")
# Arguments that may differ between parent and stage: those, and what no computation on given weights uses.
FREE = (*OWN, "init_std", "layer_scale_init", "context_length", "parent", "name")


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


def adapt(parent: model_io.Loaded, model: FastVLM, source: str = "DIR") -> dict[str, Any]:
    """Returns the parent's variables in the form that `model` needs, as arrays or Leaves.

    Parts that the parent lacks are left out. A branched encoder is folded for a folded stage, and a CLIP projection is
    dropped.

    Args:
      source: where the parent comes from, for messages.

    Raises:
      ValueError: the parent has another size, or is folded where the stage needs the branched form; the message lists
        all differences.
    """
    there, config, variables = kinds.build(**parent.config), parent.config, parent.variables
    found, folded = [], False
    if there.vision_args is not None:
        theirs, ours = (fastvlm.make_encoder(**args) for args in (there.vision_args, model.vision_args))
        found += _differences("vision", theirs, ours)
        if isinstance(ours, FastViT) and isinstance(theirs, FastViT):
            folded = theirs.form == "folded" and ours.form == "branched"
    if there.llm_args is not None:
        theirs, ours = (Decoder(**args) for args in (there.llm_args, model.llm_args))
        found += _differences("llm", *(llm.clone(head_dim=llm.size_of_head) for llm in (theirs, ours)))
    _refuse(found, folded, source)
    if there.vision_args is not None:
        _, variables = without_head(config, variables)
        if config["vision"].get("form", "branched") != model.vision_args.get("form", "branched"):
            variables = fold_variables(variables)
    expected = kinds.abstract_variables(model)
    variables = {
        name: {part: tree for part, tree in variables.get(name, {}).items() if part in expected[name]}
        for name in expected
    }
    for name, parts in variables.items():
        for part, tree in parts.items():
            if jax.tree.map(jnp.shape, tree) != jax.tree.map(jnp.shape, expected[name][part]):
                raise ValueError(f"the parent's {part} has other {name} than this stage's: both need the same size")
    return variables


def _differences(part: str, theirs: nn.Module, ours: nn.Module) -> list[str]:
    """Returns "key: our value, their value" of every argument that keeps the weights of one module from the other."""
    if type(theirs) is not type(ours):
        kinds = [name for module in (ours, theirs) for name, kind in fastvlm.FAMILIES.items() if kind is type(module)]
        return [f"model.{part}.family: {kinds[0]!r}, {kinds[1]!r}"]
    found = []
    for field in dataclasses.fields(ours):
        x, y = (list(x) if isinstance(x, list | tuple) else x for x in (getattr(m, field.name) for m in (ours, theirs)))
        if field.name not in FREE and x != y:
            found.append(f"model.{part}.{field.name}: {x!r}, {y!r}")
    return found


def _refuse(differences: list[str], folded: bool, source: str) -> None:
    """Raises ValueError with all that differs, and the mend of each kind of difference."""
    unfold = "the parent's encoder is folded and cannot be unfolded: set --config.model.vision.form=folded"
    if differences:
        mend = f"--config FILE.py:parent={source} takes the parent's" + (f"; and {unfold}" if folded else "")
        raise ValueError(
            f"the parent {source} does not fit this config (key: config, parent): {'; '.join(differences)}. {mend}"
        )
    if folded:
        raise ValueError(unfold)
