"""Turns an image of any Pillow mode into uint8 RGB: its depth, its palette, its transparency."""

import numpy as np
import PIL.Image

TRANSPARENCIES = ("white", "drop")
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags


def to_array(image: PIL.Image.Image) -> np.ndarray:
    """Returns an image of any Pillow mode as uint8 [H, W, 3], or as [H, W, 4] if a pixel is not opaque.

    The fourth channel is the opacity; the colours are not multiplied by it. Grey of 16 bits keeps its high byte.

    Raises:
      ValueError: the pixels are floating-point numbers.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is not known: convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _to_eight_bits(image)
    if image.mode == "La":  # premultiplied, from a program: Pillow converts it to LA alone
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            return np.asarray(image)
    return np.asarray(image.convert("RGB"))


def to_rgb(pixels: np.ndarray, transparency: str = "white") -> np.ndarray:
    """Returns the pixels of `to_array` as uint8 [H, W, 3].

    Args:
      pixels: uint8 [H, W, 3] or [H, W, 4].
      transparency: "white" shows transparent pixels over white, as transformers 5.23 does. "drop" shows
        the colours that are stored behind the transparency, as LLaVA's and ml-fastvlm's `convert("RGB")` does.
    """
    if pixels.shape[2] == 3:
        return pixels
    if transparency == "drop":
        return np.ascontiguousarray(pixels[..., :3])
    image = PIL.Image.fromarray(pixels)
    return np.asarray(PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def shrink_with_alpha(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns uint8 [h, w, 4] pixels as [height, width, 4], so that both ways of `to_rgb` still show the picture.

    A colour counts by its opacity, so that one that no pixel shows does not stain the edges. Where nothing is opaque,
    the colours behind the transparency stay.
    """
    image, size = PIL.Image.fromarray(pixels), (width, height)
    small = np.array(image.resize(size, PIL.Image.Resampling.BICUBIC))  # Pillow weighs RGBA by its opacity
    clear = small[..., 3] == 0
    small[clear, :3] = np.asarray(image.convert("RGB").resize(size, PIL.Image.Resampling.BICUBIC))[clear]
    return small


def _to_eight_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """Returns 16-bit grey, which convert() would clip to white, as L, or as LA if a level counts as transparent."""
    tags = getattr(image, "tag_v2", {})
    top = 4095 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535
    levels = np.asarray(image).clip(0, top)
    if tags.get(_PHOTOMETRIC) == 0:  # 0 is white, which Pillow heeds for fewer bits only
        levels = top - levels
    grey = PIL.Image.fromarray((levels >> top.bit_length() - 8).astype(np.uint8))
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return grey
    return PIL.Image.merge("LA", (grey, PIL.Image.fromarray(np.where(levels == key, 0, 255).astype(np.uint8))))
