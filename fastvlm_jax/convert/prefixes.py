"""Gives the tensors of a checkpoint their usual prefix, where it was saved from within or around a larger module."""

import pathlib

from fastvlm_jax.convert.mapping import Tensor

HEAD = "lm_head."  # the head of a language model, which stands outside its body


def with_usual_prefix(tensors: dict[str, Tensor], part: str, usual: str, source: pathlib.Path) -> dict[str, Tensor]:
    """Returns the tensors under the names that a layout expects.

        stored                              usual prefix "model."
        layers.0.norm.weight                model.layers.0.norm.weight      saved without the module around it
        module.model.layers.0.norm.weight   model.layers.0.norm.weight      saved with a wrapper (DDP, torch.compile)

    Args:
      tensors: all tensors of the checkpoint by name.
      part: end of the name of a tensor that every model of the layout has once.
      usual: what precedes `part` in the layout.
      source: the checkpoint, for messages.

    Raises:
      ValueError: `part` is stored once, under a prefix that is neither a part of the usual one nor contains it.
    """
    found = [name.removesuffix(part) for name in tensors if name == part or name.endswith(f".{part}")]
    if usual in found or len(found) != 1:
        return tensors
    (prefix,) = found
    if usual.endswith(prefix):
        missing = usual.removesuffix(prefix) if prefix else usual
        return {name if name.startswith(HEAD) else missing + name: x for name, x in tensors.items()}
    if prefix.endswith(usual):
        return {name.removeprefix(prefix.removesuffix(usual) if usual else prefix): x for name, x in tensors.items()}
    raise ValueError(
        f"{source}: its tensors are called {prefix}{part}, this package reads {usual}{part}: save the whole model with "
        "`save_pretrained` of its own class"
    )
