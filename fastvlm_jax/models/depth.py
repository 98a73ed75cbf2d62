"""Says how deep each parameter lies, by which layer-wise decay lowers its learning rate.

Every tower counts its layers on its own, from its input: 0 is what comes before the first block, 1 to L - 1 are the
blocks, and L is what comes behind the last one.

    layer        vision: FastViT, ConvNeXt   vision: ViT                                  llm, text
    0            stem_*                      patch_embed cls_token positions pre_norm     embedding positions
    1 to L - 1   stage_0/, stage_1/ ...      layers/                                      layers/
    L            expand pool_* head unused   unused                                       final_norm lm_head projection

What stands between two stages (patch_embed_2, positions_2, downsample_2) lies with the first block of the later one, as
in timm. A projector, an image head and the factor of the logits lie in no tower, and adapters, lora/PATH/..., where
PATH does.
"""

import re
from collections.abc import Mapping

import numpy as np
from flax.traverse_util import flatten_dict

from fastvlm_jax.optim import kernel_of

STACKED = re.compile(r"(?:layers|stage_(\d+))/")  # blocks along a leading axis
BETWEEN = re.compile(r"(?:patch_embed|positions|downsample|downsample_norm)_(\d+)/")
BEFORE = re.compile(r"(?:stem(?:_\w+)?|patch_embed|cls_token|positions|pre_norm|embedding)(?:/|$)")
BEHIND = re.compile(r"(?:expand|pool_\d+|head|lm_head|unused|final_norm|projection)(?:/|$)")


def rate_factors(params, decays: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Returns path -> factor of the learning rate, decay ** (L - layer), of the parameters in towers that decay.

    A factor is float32 [] or, of stacked blocks, [blocks, 1, ...], with as many axes as the parameter.

    Args:
      params: all parameters, or their shapes.
      decays: tower ("vision", "llm", "text") -> decay; 1 is none.

    Raises:
      ValueError: the name of a parameter of a tower that decays does not tell its layer; the message names the key.
    """
    shapes = {path: x.shape for path, x in flatten_dict(params, sep="/").items()}
    factors = {}
    for tower, decay in decays.items():
        places = {path: kernel_of(path) for path in shapes}
        own = {
            path: (place.removeprefix(f"{tower}/"), shapes[path])
            for path, place in places.items()
            if place.startswith(f"{tower}/")
        }
        if decay == 1 or not own:
            continue
        try:
            layers, last = layers_of(own)
        except ValueError as error:
            raise ValueError(f"layer_decay.{tower}={decay}: {error}") from error
        for path, layer in layers.items():
            ones = (1,) * (len(shapes[path]) - 1) if np.ndim(layer) else ()
            factors[path] = np.asarray(float(decay) ** (last - layer), np.float32).reshape((*np.shape(layer), *ones))
    return factors


def layers_of(parameters: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[dict[str, np.ndarray | int], int]:
    """Returns (the layer of each parameter of a tower, those of all blocks if they are stacked; the last layer L).

    Args:
      parameters: any name -> (path within the tower, shape).

    Raises:
      ValueError: the name of a parameter does not tell its layer.
    """
    stacks = {}
    for path, shape in parameters.values():
        if match := STACKED.match(path):
            stacks[int(match[1] or 0)] = shape[0]

    def first(stage: int) -> int:
        return 1 + sum(blocks for earlier, blocks in stacks.items() if earlier < stage)

    last = 1 + sum(stacks.values())
    layers: dict[str, np.ndarray | int] = {}
    for name, (path, shape) in parameters.items():
        if match := STACKED.match(path):
            layers[name] = first(int(match[1] or 0)) + np.arange(shape[0])
        elif match := BETWEEN.match(path):
            layers[name] = first(int(match[1]))
        elif BEFORE.match(path) or BEHIND.match(path):
            layers[name] = 0 if BEFORE.match(path) else last
        else:
            raise ValueError(f"models/depth.py does not know in which layer {name} lies")
    return layers, last
