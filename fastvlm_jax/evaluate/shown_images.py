"""Writes the images of questions as small JPEGs, for pages and logs that show them."""

import hashlib
import io
import os
import pathlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import PIL.Image

from fastvlm_jax.evaluate.benchmark import Picture, Result
from fastvlm_jax.files import write_whole
from fastvlm_jax.images.decode import decode, size_of
from fastvlm_jax.images.resize import pad_scaled, resize

FOLDER = "predictions_images"  # where they lie, beside what shows them
SIDE = 768  # longest side of such an image, pixels


def write_images(folder: pathlib.Path, results: Iterable[Result]) -> dict[str, dict[str, Any]]:
    """Writes the images of a benchmark as JPEGs named by their digests, those that are not there, and returns fields.

    The keys are the images' names. The fields are a file, relative to the folder, its width and height; or the error if
    the image cannot be read.
    """
    pictures = {picture.name: picture for result in results for picture in result.row.pictures}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(
            zip(pictures, pool.map(lambda picture: _write_image(folder, picture), pictures.values()), strict=True)
        )


def _write_image(folder: pathlib.Path, picture: Picture) -> dict[str, Any]:
    try:
        data = picture.read()
        name = f"{FOLDER}/{hashlib.sha256(data).hexdigest()[:16]}.jpg"
        if not (folder / name).exists():
            write_whole(folder / name, small_jpeg(data))
        width, height = size_of((folder / name).read_bytes())
    except ValueError as error:
        return {"error": str(error)}
    return {"file": name, "width": width, "height": height}


def small_jpeg(data: bytes) -> bytes:
    """Returns an encoded image as JPEG with sides of at most SIDE pixels.

    Raises:
      ValueError: the image cannot be decoded.
    """
    width, height = size_of(data)
    box = pad_scaled((height, width), (SIDE, SIDE)) if max(width, height) > SIDE else (height, width)
    pixels = np.empty((*box, 3), np.uint8)
    resize(decode(data, box), pixels)
    buffer = io.BytesIO()
    # Full colour resolution, and little loss: drawings and small print stay legible.
    PIL.Image.fromarray(pixels).save(buffer, "JPEG", quality=88, subsampling=0)
    return buffer.getvalue()
