"""Adapts a parent's weights to the model of a stage: folds, drops or keeps parts, and refuses what does not fit."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastvlm_jax.convert.heads import with_head_bias, without_head
from fastvlm_jax.loaded import Loaded
from fastvlm_jax.models import fastvlm, kinds
from fastvlm_jax.models.clip import CLIP
from fastvlm_jax.models.decoder import Decoder
from fastvlm_jax.models.fastvit import FastViT
from fastvlm_jax.models.fold import fold_variables
from fastvlm_jax.models.kinds import Model
from fastvlm_jax.models.text_tower import TextTower

# What a stage chooses for itself. A VLM stage drops the CLIP projection from a FastViT.
OWN = ("form", "batch_norm", "batch_norm_images", "drop_path", "remat", "head_features", "head_bias")
# Arguments that may differ between parent and stage: those, and what no computation on given weights uses. A text tower
# has one position for each token of its context.
FREE = (*OWN, "init_std", "layer_scale_init", "context_length", "parent", "name")
TEXT_FREE = ("remat", "parent", "name")


def adapt(parent: Loaded, model: Model, source: str = "DIR") -> dict[str, Any]:
    """Returns the parent's variables in the form that `model` needs, as arrays or Leaves.

    Parts that the parent lacks are left out, and so are those that the stage lacks, as a VLM stage the text tower of a
    CLIP. A branched encoder is folded for a folded stage. A VLM stage drops the CLIP projection; a CLIP stage keeps one
    of its own width. The factor and the bias of a CLIP's logits come from a parent with the same loss.

    Args:
      source: where the parent comes from, for messages.

    Raises:
      ValueError: the parent has another size, or is folded where the stage needs the branched form (the message lists
        all differences), or the stage has none of its parts.
    """
    _refuse(*_all_differences(kinds.build(**parent.config), model), source, isinstance(model, CLIP))
    config, variables = parent.config, parent.variables
    if config.get("vision"):
        config, variables = _with_projection_of(model, config, variables)
        if config["vision"].get("form", "branched") != model.vision_args.get("form", "branched"):
            variables = fold_variables(variables)
    expected = kinds.abstract_variables(model)
    parts = set(expected["params"])
    if isinstance(model, CLIP) and model.sigmoid != config.get("sigmoid", False):
        parts -= {"logit_scale", "logit_bias"}
    variables = {
        name: {part: tree for part, tree in variables.get(name, {}).items() if part in parts} for name in expected
    }
    if not variables["params"]:
        raise ValueError(
            f"the parent {source} holds {', '.join(parent.variables['params'])}, of which this stage has nothing: give "
            f"one with {' or '.join(sorted(part for part in parts if isinstance(expected['params'][part], dict)))}"
        )
    for name, trees in variables.items():
        for part, tree in trees.items():
            if not _fits(tree, expected[name][part]):
                raise ValueError(f"the parent's {part} has other {name} than this stage's: both need the same size")
    return variables


def _fits(tree: Any, expected: Any) -> bool:
    """Returns whether a part has the shapes that a stage expects; a CLIP projection may be missing."""
    if isinstance(expected, dict) and "head" in expected and "head" not in tree:
        expected = {name: inner for name, inner in expected.items() if name != "head"}
    return jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, expected)


def _with_projection_of(model: Model, config: Mapping[str, Any], variables: dict) -> tuple[Mapping[str, Any], dict]:
    """Returns the parent's config and variables with the CLIP projection that the stage uses, or without any."""
    wanted = model.vision_args.get("head_features", 0) if isinstance(model, CLIP) else 0
    if not wanted or config["vision"].get("head_features", 0) != wanted:
        return without_head(config, variables)
    return with_head_bias(config, variables) if model.vision_args.get("head_bias") else (config, variables)


def _all_differences(there: Model, model: Model) -> tuple[list[str], bool]:
    """Returns all that keeps a parent's weights from a stage, and whether its folded encoder would have to unfold."""
    found, folded = [], False
    if there.vision_args is not None:
        theirs, ours = (fastvlm.make_encoder(**args) for args in (there.vision_args, model.vision_args))
        found += _differences("vision", theirs, ours)
        if isinstance(ours, FastViT) and isinstance(theirs, FastViT):
            folded = theirs.form == "folded" and ours.form == "branched"
            same = isinstance(model, CLIP) and theirs.head_features == ours.head_features > 0
            if same and theirs.head_bias and not ours.head_bias:
                found.append("model.vision.head_bias: False, True")
    if there.llm_args is not None and model.llm_args is not None:
        theirs, ours = (Decoder(**args) for args in (there.llm_args, model.llm_args))
        found += _differences("llm", *(llm.clone(head_dim=llm.size_of_head) for llm in (theirs, ours)))
    if isinstance(there, CLIP) and isinstance(model, CLIP):
        towers = (TextTower(**args) for args in (there.text_args, model.text_args))
        found += _differences("text", *towers, free=TEXT_FREE)
    return found, folded


def _differences(part: str, theirs: nn.Module, ours: nn.Module, free: tuple[str, ...] = FREE) -> list[str]:
    """Returns "key: our value, their value" of every argument that keeps the weights of one module from the other."""
    if type(theirs) is not type(ours):
        names = [name for module in (ours, theirs) for name, kind in fastvlm.FAMILIES.items() if kind is type(module)]
        return [f"model.{part}.family: {names[0]!r}, {names[1]!r}"]
    found = []
    for field in dataclasses.fields(ours):
        x, y = (list(x) if isinstance(x, list | tuple) else x for x in (getattr(m, field.name) for m in (ours, theirs)))
        if field.name not in free and x != y:
            found.append(f"model.{part}.{field.name}: {x!r}, {y!r}")
    return found


def _refuse(differences: list[str], folded: bool, source: str, clip: bool) -> None:
    """Raises ValueError with all that differs, and the mend of each kind of difference, for a CLIP stage or another."""
    unfold = "the parent's encoder is folded and cannot be unfolded: set --config.model.vision.form=folded"
    if differences:
        mend = "set these keys to the parent's" if clip else f"--config FILE.py:parent={source} takes the parent's"
        mend += f"; and {unfold}" if folded else ""
        raise ValueError(
            f"the parent {source} does not fit this config (key: config, parent): {'; '.join(differences)}. {mend}"
        )
    if folded:
        raise ValueError(unfold)
