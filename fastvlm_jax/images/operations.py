"""Applies the operations of RandAugment to uint8 images: every pixel is that of torchvision's on a Pillow image.

What changes each value by itself is looked up in a table of 256, and a translation copies: OpenCV and NumPy do both
without the GIL and without Pillow's four bytes a pixel. The rest is Pillow's own.
"""

import math

import cv2
import numpy as np
import PIL.Image

# The index of each operation is its number in DataCompDR's paug.json.
OPS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast"),
    *("Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)
_VALUES = np.arange(256, dtype=np.uint8)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # PIL.ImageFilter.SMOOTH


def apply(image: np.ndarray, name: str, magnitude: float) -> np.ndarray:
    """Returns an image as an operation changes it; areas without a source pixel become black.

    Args:
      image: uint8 [H, W, 3].
      name: one of OPS.
      magnitude: as torchvision's RandAugment draws it: a factor less 1, a slope, degrees, pixels, bits or a threshold.

    Returns:
      uint8 [H, W, 3]: a new array, or `image` itself if nothing changes.

    Raises:
      KeyError: there is no such operation.
    """
    return image if name == "Identity" else _APPLY[name](image, magnitude)


def _brightness(image: np.ndarray, magnitude: float) -> np.ndarray:
    return cv2.LUT(image, _blend(np.zeros_like(_VALUES), _VALUES, 1 + magnitude))


def _color(image: np.ndarray, magnitude: float) -> np.ndarray:
    return _blend(cv2.cvtColor(_grey(image), cv2.COLOR_GRAY2RGB), image, 1 + magnitude)


def _contrast(image: np.ndarray, magnitude: float) -> np.ndarray:
    mean = int(_grey(image).mean() + 0.5)
    return cv2.LUT(image, _blend(np.full_like(_VALUES, mean), _VALUES, 1 + magnitude))


def _sharpness(image: np.ndarray, magnitude: float) -> np.ndarray:
    smooth = image.copy()  # Pillow leaves the border as it is
    if min(image.shape[:2]) > 2:
        # Thirteenths are never half-way between two integers, so both round alike.
        smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, _SMOOTH)[1:-1, 1:-1]
    return _blend(smooth, image, 1 + magnitude)


def _posterize(image: np.ndarray, magnitude: float) -> np.ndarray:
    return image & np.uint8(256 - 2 ** (8 - int(magnitude)))


def _solarize(image: np.ndarray, magnitude: float) -> np.ndarray:
    return cv2.LUT(image, np.where(magnitude > _VALUES, _VALUES, 255 - _VALUES))


def _auto_contrast(image: np.ndarray, _: float) -> np.ndarray:
    tables = []
    for counts in _histograms(image):
        low, high = np.flatnonzero(counts)[[0, -1]]
        scale, low = (255 / (high - low), low) if high > low else (1, 0)
        tables.append(np.clip(_VALUES * scale - low * scale, 0, 255).astype(np.uint8))
    return _look_up(image, tables)


def _equalize(image: np.ndarray, _: float) -> np.ndarray:
    tables = []
    for counts in _histograms(image):
        step = int(counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        below = np.cumsum(counts) - counts
        tables.append(np.clip((step // 2 + below) // step, 0, 255).astype(np.uint8) if step else _VALUES)
    return _look_up(image, tables)


def _shear_x(image: np.ndarray, magnitude: float) -> np.ndarray:
    return _affine(image, (1, math.tan(_angle(magnitude)), 0, 0, 1, 0))


def _shear_y(image: np.ndarray, magnitude: float) -> np.ndarray:
    angle = _angle(magnitude)
    return _affine(image, (1, 0, 0, math.sin(angle) / math.cos(angle), 1, 0))


def _translate_x(image: np.ndarray, magnitude: float) -> np.ndarray:
    return np.ascontiguousarray(_moved_down(image.swapaxes(0, 1), int(magnitude)).swapaxes(0, 1))


def _translate_y(image: np.ndarray, magnitude: float) -> np.ndarray:
    return _moved_down(image, int(magnitude))


def _rotate(image: np.ndarray, magnitude: float) -> np.ndarray:
    return np.asarray(PIL.Image.fromarray(image).rotate(magnitude, PIL.Image.Resampling.NEAREST))


_APPLY = {
    "ShearX": _shear_x, "ShearY": _shear_y, "TranslateX": _translate_x, "TranslateY": _translate_y, "Rotate": _rotate,
    "Brightness": _brightness, "Color": _color, "Contrast": _contrast, "Sharpness": _sharpness,
    "Posterize": _posterize, "Solarize": _solarize, "AutoContrast": _auto_contrast, "Equalize": _equalize,
}  # fmt: skip


def _blend(base: np.ndarray, changed: np.ndarray, factor: float) -> np.ndarray:
    """Returns base + factor * (changed - base) as Pillow rounds it, for uint8 arrays of any one shape."""
    flat = (PIL.Image.fromarray(array.reshape(len(array), -1)) for array in (base, changed))
    return np.asarray(PIL.Image.blend(*flat, factor)).reshape(base.shape)


def _grey(image: np.ndarray) -> np.ndarray:
    """Returns Pillow's luminance, uint8 [H, W]."""
    return np.asarray(PIL.Image.fromarray(image).convert("L"))


def _histograms(image: np.ndarray) -> list[np.ndarray]:
    """Returns how many pixels have each value, int64 [256], of each channel."""
    return [cv2.calcHist([image], [c], None, [256], [0, 256]).ravel().astype(np.int64) for c in range(3)]


def _look_up(image: np.ndarray, tables: list[np.ndarray]) -> np.ndarray:
    """Returns an image whose values are looked up in a table, uint8 [256], of each channel."""
    return cv2.LUT(image, np.stack(tables, -1)[None])


def _moved_down(image: np.ndarray, rows: int) -> np.ndarray:
    """Returns an image moved down by so many rows, or up by as many less than none."""
    moved, kept = np.zeros_like(image), max(0, len(image) - abs(rows))
    if rows >= 0:
        moved[rows:] = image[:kept]
    else:
        moved[:kept] = image[-rows:]
    return moved


def _angle(slope: float) -> float:
    """Returns the angle of a slope; torchvision converts it to degrees and back, and its last bit decides a pixel."""
    return math.radians(math.degrees(math.atan(slope)))


def _affine(image: np.ndarray, inverse: tuple[float, ...]) -> np.ndarray:
    """Returns an image that shows at each point what is at another: `inverse` maps the one to the other."""
    theirs = PIL.Image.fromarray(image)
    return np.asarray(theirs.transform(theirs.size, PIL.Image.Transform.AFFINE, inverse, PIL.Image.Resampling.NEAREST))
