"""Holds the figures of the FastVLM paper (arXiv 2412.13303) as data, and finds those of the same model.

Sources: tables 1, 4, 5, 6, 7, 11 and 12 of version 2; the AnyRes rows stand in table 6 of the CVPR version alone. Rows
of "card" are from the model card of the published models, which names no protocol and agrees with no row of the paper.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fastvlm_jax.models.sizes import LLM_SIZES, VISION_SIZES

AVG_5 = ("gqa", "textvqa", "pope", "docvqa", "seedbench-image")  # the mean that the paper compares encoders by
NAMES = {
    "0.5b": "Qwen2-0.5B", "1.5b": "Qwen2-1.5B", "7b": "Qwen2-7B", "vicuna-7b": "Vicuna-7B",
    "fastvithd": "FastViTHD", "mci2": "FastViT", "clip_vit_l_336": "ViT-L/14", "convnext_l": "ConvNeXt-L",
    "convnext_xxl": "ConvNeXt-XXL", "siglip_so400m_384": "SigLIP-SO400M", "fastvit_naive": "FastViT-Naive",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """Holds the figures of one model of the paper.

    Attributes:
      llm: its language model, a key of models.sizes.LLM_SIZES.
      encoder: its encoder, a key of models.sizes.VISION_SIZES.
      image_size: side of the square that the encoder sees, pixels; of a tile with AnyRes.
      grids: AnyRes grids, as (rows, columns).
      data: millions of samples of pretraining (stages 1 and 1.5) and of instruction tuning, as "15+12.5"; or "card".
      tables: where the figures stand.
      figures: name of a benchmark -> published figure.
    """

    llm: str
    encoder: str
    image_size: int
    grids: tuple[tuple[int, int], ...]
    data: str
    tables: str
    figures: Mapping[str, float]

    @property
    def model(self) -> str:
        """Returns the model in words: "Qwen2-0.5B, FastViTHD, 1024 px"."""
        tiles = ", ".join(f" AnyRes {rows}x{columns}" for rows, columns in self.grids)
        return f"{NAMES[self.llm]}, {NAMES[self.encoder]}, {self.image_size} px{tiles}"

    @property
    def avg_5(self) -> float | None:
        """Returns the mean of the five benchmarks of the paper's Avg-5; None if a figure is missing."""
        found = [self.figures[name] for name in AVG_5 if name in self.figures]
        return sum(found) / 5 if len(found) == 5 else None


_TABLE_1 = ("gqa", "textvqa", "pope", "docvqa", "seedbench-image")
_TABLE_6 = (
    "gqa", "scienceqa", "textvqa", "pope", "llava-w", "mm-vet", "vqav2", "docvqa", "mmmu", "seedbench-image",
)  # fmt: skip
_CARD = (
    "ai2d", "scienceqa", "mmmu", "vqav2", "chartqa", "textvqa", "infovqa", "docvqa", "ocrbench", "realworldqa",
    "seedbench-image",
)  # fmt: skip
TILES = ((2, 2),)  # the paper's AnyRes: four tiles of 1024 pixels and an overview


def _row(
    llm: str,
    image_size: int,
    data: str,
    tables: str,
    columns: Sequence[str],
    figures: str,
    *,
    encoder: str = "fastvithd",
    grids: tuple[tuple[int, int], ...] = (),
    **more: float,
) -> PaperRow:
    """Makes a row of figures as a table prints them, "-" for none, and `more` of other tables."""
    printed = dict(zip(columns, figures.split(), strict=True))
    found = {name: float(figure) for name, figure in printed.items() if figure != "-"}
    more = {name.replace("_", "-"): figure for name, figure in more.items()}
    return PaperRow(llm, encoder, image_size, grids, data, tables, found | more)


# Columns of table 6: GQA SQA TextVQA POPE LLaVA-W MM-Vet VQAv2 DocVQA MMMU SEED-image.
PAPER = (
    _row("0.5b", 1024, "15+1.1", "6", _TABLE_6, "61.6 61.4 57.4 87.4 56.0 31.8 77.0 61.0 30.9 65.6"),
    _row("0.5b", 1024, "15+12.5", "6, 11", _TABLE_6, "63.1 81.5 62.9 86.6 66.7 29.8 78.8 70.4 32.9 69.2",
         chartqa=63.4, ocrbench=54.9, infovqa=35.8),
    _row("0.5b", 1024, "15+23.1", "6, 7, 11", _TABLE_6, "62.7 82.0 65.8 86.2 - 37.5 78.6 79.1 33.6 69.3",
         chartqa=71.4, ocrbench=55.8, infovqa=43.3, ai2d=66.0),
    _row("0.5b", 1024, "card", "card", _CARD, "68.0 85.2 33.9 76.3 76.0 64.5 46.4 82.5 63.9 56.1 71.0"),
    _row("0.5b", 1024, "15+12.5", "6, 11", _TABLE_6, "64.0 80.7 65.4 86.9 65.2 35.3 79.2 82.1 32.9 69.6", grids=TILES,
         chartqa=68.8, ocrbench=59.0, infovqa=49.3),
    _row("0.5b", 1024, "15+23.1", "11", ("textvqa", "docvqa"), "65.5 85.3", grids=TILES,
         chartqa=64.2, ocrbench=55.7, infovqa=53.9),
    _row("1.5b", 768, "15+1.1", "6", _TABLE_6, "63.9 75.8 64.4 87.2 65.2 35.4 79.4 61.3 34.9 71.7"),
    _row("1.5b", 768, "15+12.5", "6", _TABLE_6, "64.2 87.9 66.4 88.3 68.5 41.1 80.1 69.4 38.1 72.4"),
    _row("1.5b", 1024, "15+1.1", "6", _TABLE_6, "64.2 74.8 66.0 88.0 66.9 37.6 79.9 67.7 33.1 71.4"),
    _row("1.5b", 1024, "15+12.5", "6, 11", _TABLE_6, "64.3 89.9 69.0 87.8 68.0 43.6 80.7 75.6 39.1 73.1",
         chartqa=69.6, ocrbench=62.9, infovqa=41.7),
    _row("1.5b", 1024, "15+23.1", "6, 7, 11", _TABLE_6, "64.3 92.9 71.2 87.8 - 51.0 80.9 84.2 38.0 72.6",
         chartqa=69.5, ocrbench=61.2, infovqa=49.6, ai2d=76.6),
    _row("1.5b", 1024, "card", "card", _CARD, "77.4 94.4 37.8 79.1 80.1 70.4 59.7 88.3 70.2 61.2 74.2"),
    _row("1.5b", 1024, "15+12.5", "6, 11", _TABLE_6, "64.7 90.8 71.5 86.8 71.3 45.2 81.0 87.6 40.1 73.4", grids=TILES,
         chartqa=76.4, ocrbench=63.2, infovqa=60.0),
    # Table 11 prints 12.5 for this row too; the row before it is the one of 12.5.
    _row("1.5b", 1024, "15+23.1", "11", ("textvqa", "docvqa"), "72.9 90.2", grids=TILES,
         chartqa=71.2, ocrbench=62.4, infovqa=62.5),
    _row("7b", 768, "15+1.1", "6, 11", _TABLE_6, "65.6 85.9 69.5 87.2 73.0 41.3 81.3 66.9 43.6 75.3",
         chartqa=69.3, ocrbench=45.9, infovqa=34.3),
    _row("7b", 768, "15+11.9", "11, 12", ("textvqa", "docvqa"), "72.8 72.0",
         chartqa=74.2, ocrbench=59.0, infovqa=44.3, cvbench_2d=75.9, cvbench_3d=79.3, mathvista=64.6),
    _row("7b", 768, "15+12.5", "6", _TABLE_6, "64.7 96.0 71.9 87.4 73.6 49.4 81.1 75.3 44.6 74.3"),
    _row("7b", 1024, "15+1.1", "6, 11", _TABLE_6, "65.8 84.9 72.1 87.8 75.8 44.1 81.7 73.3 46.2 75.1",
         chartqa=71.0, ocrbench=49.7, infovqa=37.5),
    # Table 12 does not print the image size of 15+6.5; tables 6 and 11 have it at 1024 pixels alone.
    _row("7b", 1024, "15+6.5", "6, 11, 12", _TABLE_6, "66.0 87.4 73.1 87.3 72.4 47.6 82.3 78.7 42.8 75.9",
         chartqa=76.6, ocrbench=52.9, infovqa=44.2, cvbench_2d=71.8, cvbench_3d=69.6, mathvista=57.6),
    _row("7b", 1024, "15+11.9", "11, 12", ("textvqa", "docvqa"), "74.8 78.9",
         chartqa=77.0, ocrbench=63.3, infovqa=49.7, cvbench_2d=76.7, cvbench_3d=80.9, mathvista=64.8),
    _row("7b", 1024, "15+12.5", "6, 11", _TABLE_6, "65.2 95.7 73.4 86.9 71.1 48.4 81.6 82.7 47.3 74.1",
         chartqa=77.5, ocrbench=65.7, infovqa=51.2),
    _row("7b", 1024, "15+23.1", "6, 11", _TABLE_6, "64.1 96.8 76.1 87.2 - 56.3 81.9 88.0 44.0 74.5",
         chartqa=78.1, ocrbench=67.3, infovqa=55.1),
    _row("7b", 1024, "card", "card", _CARD, "83.6 96.7 45.4 80.8 85.0 74.9 75.8 93.2 73.1 67.2 75.4"),
    _row("7b", 1024, "15+12.5", "6, 11", _TABLE_6, "65.5 96.9 76.6 87.6 75.1 54.7 82.5 92.3 47.6 75.8", grids=TILES,
         chartqa=82.4, ocrbench=67.3, infovqa=68.3),
    _row("7b", 1024, "15+23.1", "11", ("textvqa", "docvqa"), "77.1 94.5", grids=TILES,
         chartqa=74.6, ocrbench=65.7, infovqa=71.1),
    _row("vicuna-7b", 256, "0.5+0.6", "4, 5, 6", _TABLE_6, "60.6 69.2 53.1 82.3 60.4 27.5 74.7 17.4 36.2 63.7",
         seedbench=58.8),
    _row("vicuna-7b", 256, "15+1.1", "6", _TABLE_6, "62.1 75.7 57.2 83.9 64.0 31.5 77.3 29.8 37.6 68.8"),
    _row("vicuna-7b", 512, "0.5+0.6", "4, 5", _TABLE_1, "63.0 59.3 86.4 25.7 67.1",
         scienceqa=68.9, vqav2=78.0, seedbench=61.8),
    _row("vicuna-7b", 768, "0.5+0.6", "4, 5, 6, 11", _TABLE_6, "62.4 67.6 62.9 87.7 63.8 31.5 78.9 32.9 34.9 68.2",
         seedbench=62.5, chartqa=17.1, ocrbench=30.0, infovqa=28.7),
    _row("vicuna-7b", 768, "0.5+1.1", "6, 11", _TABLE_6, "63.2 73.5 67.5 86.3 63.9 33.0 79.1 57.3 36.9 69.9",
         chartqa=59.1, ocrbench=38.4, infovqa=29.7),
    _row("vicuna-7b", 768, "15+1.1", "6, 11", _TABLE_6, "65.0 78.7 69.4 87.5 67.0 42.2 81.3 65.5 37.0 73.7",
         chartqa=65.4, ocrbench=45.3, infovqa=32.0),
    _row("vicuna-7b", 1024, "0.5+0.6", "4, 5, 6, 11", _TABLE_6, "63.1 67.4 64.4 88.1 64.8 31.7 79.2 35.6 35.1 68.5",
         chartqa=19.2, ocrbench=29.3, infovqa=28.9),
    _row("vicuna-7b", 1024, "0.5+1.1", "6, 11", _TABLE_6, "63.3 74.1 67.4 87.1 66.5 32.4 79.3 62.8 37.3 69.9",
         chartqa=61.0, ocrbench=38.3, infovqa=32.0),
    _row("vicuna-7b", 1024, "15+1.1", "6, 11", _TABLE_6, "65.2 80.3 70.6 87.2 71.5 40.1 81.6 72.4 36.7 73.5",
         chartqa=66.9, ocrbench=47.1, infovqa=34.7),
    # Other encoders, LLaVA-1.5's recipe. ViT-L/14 is LLaVA-1.5 itself, and once with its encoder tuned in stage 2.
    _row("vicuna-7b", 336, "0.5+0.6", "1, 6", _TABLE_6, "62.0 70.4 58.2 85.9 59.6 31.1 76.6 28.1 35.3 66.1",
         encoder="clip_vit_l_336"),
    _row("vicuna-7b", 336, "0.5+0.6 tuned", "1", _TABLE_1, "63.5 59.2 86.3 28.7 68.6", encoder="clip_vit_l_336"),
    _row("vicuna-7b", 256, "0.5+0.6", "1", _TABLE_1, "60.2 51.6 82.9 15.8 61.5", encoder="mci2"),
    _row("vicuna-7b", 768, "0.5+0.6", "1", _TABLE_1, "62.7 62.3 86.5 34.4 67.1", encoder="mci2"),
    _row("vicuna-7b", 320, "0.5+0.6", "4", _TABLE_1, "61.9 55.5 85.3 21.3 64.6", encoder="convnext_l"),
    _row("vicuna-7b", 512, "0.5+0.6", "4", _TABLE_1, "61.8 61.0 86.3 30.8 66.8", encoder="convnext_l"),
    _row("vicuna-7b", 256, "0.5+0.6", "4", _TABLE_1, "62.7 56.3 85.3 21.6 65.6", encoder="convnext_xxl"),
    _row("vicuna-7b", 512, "0.5+0.6", "4", _TABLE_1, "62.3 65.1 87.7 36.2 68.4", encoder="convnext_xxl"),
)  # fmt: skip


def most_trained(benchmark: str) -> list[PaperRow]:
    """Returns FastVLM's rows of a benchmark at 1024 pixels: of each size of Qwen2 the one with the most data."""
    found = {
        row.llm: row
        for row in PAPER  # which lists a model's rows by their data
        if benchmark in row.figures
        and (row.encoder, row.image_size, row.grids) == ("fastvithd", 1024, ())
        and row.data != "card"
        and row.llm != "vicuna-7b"
    }
    return list(found.values())


# Arguments that tell the sizes of a kind apart; others, such as the form of an encoder, do not make another model.
_ENCODER_KEYS = ("family", "layers", "embed_dims", "width", "num_layers", "patch_size", "mlp_dim")
_LLM_KEYS = ("width", "num_layers", "num_heads", "num_kv_heads", "mlp_dim")


def rows_of(
    vision: Mapping[str, Any] | None,
    llm: Mapping[str, Any] | None,
    image_size: int,
    grids: Sequence[Sequence[int]] = (),
) -> list[PaperRow]:
    """Returns the paper's rows of a model: the same language model, encoder, image size and AnyRes grids.

    What it was trained on is not compared: a row tells its data.

    Args:
      vision: arguments of its encoder, as in a config's model.vision; None if it has none.
      llm: arguments of its language model, as in model.llm.
      image_size: side of the square that the encoder sees, pixels.
    """
    encoder, decoder = _name(vision, VISION_SIZES, _ENCODER_KEYS), _name(llm, LLM_SIZES, _LLM_KEYS)
    wanted = (decoder, encoder, image_size, tuple(map(tuple, grids)))
    return [row for row in PAPER if (row.llm, row.encoder, row.image_size, row.grids) == wanted]


def _name(args: Mapping[str, Any] | None, sizes: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> str:
    """Returns the first of `sizes` that agrees with the arguments; "" if none does."""

    def shape(args: Mapping[str, Any]) -> list[Any]:
        values = [args.get(key, "fastvit" if key == "family" else None) for key in keys]
        return [tuple(value) if isinstance(value, list | tuple) else value for value in values]

    return next((name for name, size in sizes.items() if args and shape(size) == shape(args)), "")
