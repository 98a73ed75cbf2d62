"""Holds the grids of the FastVLM paper's figures 1, 4 and 6 (sections 3 and 5), and LLaVA-1.5's for any encoder.

All use LLaVA-1.5's two stages (Table 8): 558K captions train the projector at the encoder's CLIP resolution, then 665K
conversations the whole model at the point's. That figures 4 and 6 use them too is read off their axes: with stage 1.5
the same models score higher than those end (Table 6).
"""

import re
from typing import Any

import ml_collections

from fastvlm_jax.config import sizes_of
from fastvlm_jax.evaluate.paper import AVG_5
from fastvlm_jax.images.sizes import slots_of
from fastvlm_jax.models.fastvlm import make_encoder
from fastvlm_jax.parent import open_base
from fastvlm_jax.sweep.grid import Point, Stage, sweep_config

Grid = tuple[int, int]
# Where weights are named: `--config.weights.NAME`. Keys have no dots.
LLM_WEIGHTS = {"0.5b": "qwen2_0_5b", "1.5b": "qwen2_1_5b", "7b": "qwen2_7b", "vicuna-7b": "vicuna_7b"}
CLIP_SIZE = {"convnext_l": 320}  # px of the encoder's contrastive training, where stage1_align's 256 is not it
SAMPLES = 4  # samples of a group, whose texts share a row, in stage 2
TEXT = {"stage1_align": 40, "stage2_instruct": 256}  # text tokens of an average sample, as in the stage files
FIGURE_1 = {
    "fastvithd": (256, 512, 768, 1024), "convnext_l": (320, 512, 768, 1024), "convnext_xxl": (256,),
    "clip_vit_l_336": (336,), "siglip_so400m_384": (384,),
}  # fmt: skip
FIGURE_4 = {"fastvithd": (256, 512, 768, 1024, 1536), "mci2": (256, 512, 768, 1024)}
# Figure 6's resolutions are those of the whole grid: 1024 (2 x 2) are tiles of 512 px.
FIGURE_6 = {512: (2,), 768: (2, 3), 1024: (2, 4), 1152: (3,), 1536: (2, 3, 4)}


def figure_1() -> ml_collections.ConfigDict:
    """Returns Figure 1a's grid: Qwen2-0.5B with five encoders."""
    points = [llava15(encoder, "0.5b", size) for encoder, sizes in FIGURE_1.items() for size in sizes]
    return _sweep(
        "paper-fig1", "Figure 1a of the paper: accuracy and time to first token of five encoders", points, "1a"
    )


def figure_4() -> ml_collections.ConfigDict:
    """Returns Figure 4's grid: FastViTHD and FastViT with three language models; 2048 px as 2 x 2 tiles (Table 10)."""
    points = []
    for llm in ("0.5b", "1.5b", "7b"):
        points += [llava15(encoder, llm, size) for encoder, sizes in FIGURE_4.items() for size in sizes]
        points.append(llava15("fastvithd", llm, 1024, (2, 2)))
    return _sweep("paper-fig4", "Figure 4 of the paper: encoder, language model and resolution together", points, "4")


def figure_6() -> ml_collections.ConfigDict:
    """Returns Figure 6's grid: Vicuna-7B with one view, or with an overview and tiles, of the same resolution."""
    points = [llava15("fastvithd", "vicuna-7b", size) for size in (512, 768, 1024, 1536)]
    points += [llava15("fastvithd", "vicuna-7b", size // n, (n, n)) for size, grids in FIGURE_6.items() for n in grids]
    return _sweep("paper-fig6", "Figure 6 of the paper: one view against tiles (AnyRes)", points, "6")


def own_encoder(argument: str) -> ml_collections.ConfigDict:
    """Returns a grid of one's own encoder at all its resolutions, trained as in LLaVA-1.5.

    Args:
      argument: "vision=DIR", or "llm=0.5b,vision=DIR" with another language model than Vicuna-7B. DIR is a model that
        `--config.parent` takes, whose encoder's architecture and weights are used.

    Raises:
      ValueError: the argument has another form, or there is no such language model; see `open_base`.
    """
    head, found, folder = argument.partition("vision=")
    llm = head.removesuffix(",").removeprefix("llm=") or "vicuna-7b"
    if not found or not folder or head not in ("", f"llm={llm},") or llm not in LLM_WEIGHTS:
        raise ValueError(
            f"llava15 takes vision=DIR, the folder of an encoder, or llm=NAME,vision=DIR with a language model of "
            f"{', '.join(LLM_WEIGHTS)}, and not {argument!r}"
        )
    vision = _vision(llm, "", folder)
    sizes = [vision["image_size"]] if "image_size" in vision else [256, 512, 768, 1024]
    name = re.sub(r"[^A-Za-z0-9._]", "_", folder.rstrip("/").rpartition("/")[2].lstrip("."))
    points = [llava15(name, llm, size, folder=folder) for size in sizes]
    return _sweep("llava15", f"{folder} by resolution, in LLaVA-1.5's setting", points, "")


def _sweep(setup: str, title: str, points: list[Point], figure: str) -> ml_collections.ConfigDict:
    names = dict.fromkeys(name for point in points for name in _weights_of(point))
    c = sweep_config(setup, title, points, AVG_5, tuple(names))
    c.ttft_flags = ("--dtype=bfloat16",)
    c.paper_figure = figure
    return c


def _weights_of(point: Point) -> list[str]:
    """Returns the names in braces in the parent of a point's first stage."""
    return [part.partition("}")[0] for part in point.stages[0].overrides["parent"].split("{")[1:]]


def llava15(encoder: str, llm: str, size: int, tiles: Grid | None = None, folder: str = "") -> Point:
    """Returns a point of LLaVA-1.5's two stages.

    Args:
      encoder: a name in VISION_SIZES; a label if there is a folder.
      llm: a key of LLM_WEIGHTS.
      size: side of the image, pixels; of a tile if there are tiles.
      tiles: AnyRes grid.
      folder: model whose encoder is used; "" takes `--config.weights.ENCODER`.
    """
    vision = _vision(llm, encoder, folder)
    parent = f"vision={folder or '{' + encoder + '}'},llm={{{LLM_WEIGHTS[llm]}}}"
    model, base = (llm, f",parent=vision={folder}") if folder else (f"{llm},{encoder}", "")
    aligned = vision.get("image_size", CLIP_SIZE.get(encoder, 256))
    stages = (
        Stage(f"configs/stage1_align.py:{model}{base}", {"parent": parent} | _rows("stage1_align", vision, aligned, 8)),
        Stage(
            f"configs/stage2_instruct.py:{model}/665k{base}",
            _rows("stage2_instruct", vision, size, SAMPLES, tiles),
        ),
    )
    name = f"{encoder}-{llm}-{size}" if tiles is None else f"{encoder}-{llm}-{size * tiles[0]}-{tiles[0]}x{tiles[1]}"
    return Point(name, encoder, llm, size, stages, (tiles,) if tiles else ())


def _vision(llm: str, encoder: str, folder: str) -> dict[str, Any]:
    """Returns the arguments of an encoder, by name or as a folder has it."""
    if folder:
        return open_base(f"{llm},parent=vision={folder}").model.vision.to_dict()
    return sizes_of(f"{llm},{encoder}")[1]


def _rows(stage: str, vision: dict[str, Any], size: int, samples: int, tiles: Grid | None = None) -> dict[str, Any]:
    """Returns the image size of a stage, and room in its groups for samples with an image, all its tiles, and text."""
    rows, columns = make_encoder(**vision).grid(size, size)
    slots = slots_of(tiles) if tiles else 1
    tokens = samples * (slots * rows * columns + TEXT[stage])
    found = {"data.image_size": size, "data.row_length": -(-tokens // 256) * 256}
    return found | ({"data.grids": (tiles,), "data.images_per_group": samples * slots} if tiles else {})
