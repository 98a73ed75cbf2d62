"""Computes the sizes that images are resized to: squares, aspect buckets, and AnyRes tiles.

fixed           one square size for all batches          1600 x 900  ->  1024 x 1024, padded
resolutions     the side is drawn for each batch                     ->  512 x 512 or 1024 x 1024
aspects         the bucket nearest to the image's shape              ->  1344 x 768 of ((1, 1), (16, 9), (9, 16))
grids           an overview and tiles (paper, section 4.3: 2 x 2)    ->  5 x 1024 x 1024: whole image, 4 tiles
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Grid = tuple[int, int]  # rows, columns of tiles; (0, 0) without AnyRes
MAX_VIEWS = 1 << 28  # pixels of all views of one image together, 800 MB: a square of 16,384, or 255 tiles of 1,024
MAX_TOKENS = 1 << 16  # tokens of one square: 4,096 pixels in patches of 16


class Size(NamedTuple):
    """Describes the size of the images of a batch.

    Attributes:
      side: side of the square that names the resolution, pixels; height * width is at most side^2.
      height, width: size of each image, pixels.
      tokens: feature vectors that the model makes of one image.
    """

    side: int
    height: int
    width: int
    tokens: int


def check_room(sizes: Sequence[Size], grids: Sequence[Grid]) -> None:
    """Raises ValueError if an image in one of these sizes and grids would have more than MAX_VIEWS or MAX_TOKENS."""
    tiles = max((rows * columns for rows, columns in grids), default=0)
    if max(size.height * size.width for size in sizes) * (1 + tiles) > MAX_VIEWS:
        raise ValueError(f"an image would have more than {MAX_VIEWS:,} pixels in all its sizes or tiles")
    if wrong := [size.tokens for size in sizes if not 0 <= size.tokens <= MAX_TOKENS]:
        raise ValueError(f"an image must have 0 to {MAX_TOKENS:,} tokens, not {wrong[0]:,}")


def make_sizes(
    side: int, aspects: Sequence[tuple[int, int]], multiple: int, tokens: Callable[[int, int], int]
) -> tuple[Size, ...]:
    """Returns the sizes of one resolution: its square, or one bucket for each aspect (width, height), such as (16, 9).

    Both sides of a bucket are multiples of `multiple`, and its area is at most side^2; of the possible roundings, the
    one nearest to the aspect is taken. Aspects that round to the same size share one bucket.

    Args:
      side: side of the square, pixels.
      aspects: aspects of the buckets; none for the square alone.
      multiple: stride of the encoder, pixels.
      tokens: function from (height, width) to the number of feature vectors.

    Raises:
      ValueError: an aspect is not two positive numbers, or makes a side shorter than `multiple`.
    """
    if not aspects:
        return (Size(side, side, side, tokens(side, side)),)
    sizes = []
    for aspect in aspects:
        if len(aspect) != 2 or min(aspect) <= 0:
            raise ValueError(f"data.aspects: {aspect} must be two positive numbers, width and height")
        ratio = aspect[0] / aspect[1]
        wide, tall = side * ratio**0.5 / multiple, side / ratio**0.5 / multiple  # exact sides, in units of `multiple`
        options = []
        for width, height in itertools.product((int(wide), math.ceil(wide)), (int(tall), math.ceil(tall))):
            if 0 < width * height <= (side / multiple) ** 2:
                options.append((abs(math.log(width / height / ratio)), -width * height, height, width))
        if not options:
            raise ValueError(
                f"data.aspects: {aspect} at {side} px makes a side shorter than {multiple} pixels: leave it out"
            )
        _, _, height, width = min(options)
        sizes.append(Size(side, height * multiple, width * multiple, tokens(height * multiple, width * multiple)))
    return tuple(dict.fromkeys(sizes))


def nearest(aspect: np.ndarray, sizes: Sequence[Size]) -> np.ndarray:
    """Returns, for each aspect (width / height), the index of the size whose aspect is nearest, compared by ratio."""
    shapes = np.log([size.width / size.height for size in sizes])
    return np.abs(np.log(np.asarray(aspect, np.float32))[..., None] - shapes.astype(np.float32)).argmin(-1)


def best_grid(widths: np.ndarray, heights: np.ndarray, grids: Sequence[Grid], side: int) -> np.ndarray:
    """Returns, for each image, the index of the grid of side x side tiles that keeps the most of it.

    LLaVA's rule: the grid that keeps the most pixels, counted up to the number that the image has; of equal grids, the
    one with the least padding.
    """
    widths, heights = np.asarray(widths, np.int64), np.asarray(heights, np.int64)
    kept, padding = [], []
    for rows, columns in grids:
        scale = np.minimum(columns * side / widths, rows * side / heights)
        pixels = (widths * scale).astype(np.int64) * (heights * scale).astype(np.int64)
        kept.append(np.minimum(pixels, widths * heights))
        padding.append(rows * columns * side * side - kept[-1])
    kept, padding = np.array(kept), np.array(padding)
    padding[kept < kept.max(0)] = np.iinfo(np.int64).max
    return padding.argmin(0)


def slots_of(grid: Grid) -> int:
    """Returns the number of image slots of an image: one for the overview, and one per tile."""
    rows, columns = grid
    return 1 + rows * columns
