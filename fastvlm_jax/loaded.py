"""Describes a model that was read: what every command and stage that takes a model works with."""

import dataclasses
from typing import Any, NamedTuple

from fastvlm_jax.models.lora import Lora
from fastvlm_jax.pair_processor import PairProcessor
from fastvlm_jax.processor import Processor


class Adapters(NamedTuple):
    """Holds adapters that were stored apart from the model that they adapt.

    Attributes:
      lora: what they are.
      params: their arrays or Leaves, the tree under "lora" of the parameters.
      base: where the model is that they adapt.
      others: paths of further parameters that were trained with them.
    """

    lora: Lora
    params: dict[str, Any]
    base: str
    others: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Holds a model that was read: config, variables on the host, processor and lineage.

    Attributes:
      source: what `read` was asked for.
      config: arguments of `kinds.build`, {"vision": ..., "llm": ..., "dtype": ...} or those of a CLIP, {"vision": ...,
        "text": ..., "sigmoid": ..., "dtype": ...}; a missing part is left out.
      variables: arrays or Leaves; a Leaf reads its part of the files when it is indexed.
      processor: tokenizer, template and image settings; for a CLIP a PairProcessor; None for an encoder alone or
        without a tokenizer.
      lineage: JSON values that say where the weights come from.
      adapters: the adapters that `variables` contain, if they were stored apart from their base; else None.
    """

    source: str
    config: dict[str, Any]
    variables: dict[str, Any]
    processor: Processor | PairProcessor | None
    lineage: dict[str, Any]
    adapters: Adapters | None = None
