"""Finds the drawing of each concept in a package, and turns drawings into pictures of one size on white.

openmoji                data/openmoji.json, color/svg/1F417.svg
fluent_3d               assets/1f417.webp
packages of Iconify     icons.json {"icons": {"boar": {"body": "<path .../>"}}, "width": 128, "height": 128}
                        chars.json {"1f417": "boar"}      twemoji's names are those of all
"""

import importlib.metadata
import io
import json
import re
from collections.abc import Mapping

import PIL.Image

from fastvlm_jax.data.sets.icons.concepts import code_of
from fastvlm_jax.data.sets.icons.packages import Files

_FILE = re.compile(r"(?:color/svg|assets)/([0-9A-Fa-f-]+)\.(?:svg|webp)")


def names_of(chars: bytes) -> dict[str, str]:
    """Returns code -> Iconify's name of the icon, from a chars.json."""
    return {code_of(points): name for points, name in json.loads(chars).items()}


def drawings_of(files: Files, names: Mapping[str, str]) -> dict[str, bytes]:
    """Returns code -> drawing, an SVG or a WebP file, of the icons in a package.

    Args:
      files: of the package.
      names: code -> Iconify's name. Only icons of exactly that name are taken: Iconify's aliases lead to older drawings
        of something else, such as a pistol for the water pistol.
    """
    if "icons.json" not in files:
        return {code_of(found[1]): data for name, data in files.items() if (found := _FILE.fullmatch(name))}
    listed = json.loads(files["icons.json"])
    found = {code: listed["icons"][name] for code, name in names.items() if name in listed["icons"]}
    size = {"width": listed["width"], "height": listed["height"]}
    return {code: _svg(**{**size, **icon}) for code, icon in found.items()}


def _svg(body: str, width: int, height: int, hidden: bool = False) -> bytes:
    """Returns an icon as an SVG file, in the middle of a square; Iconify hides icons that Unicode no longer has."""
    side = max(width, height)
    box = f"{(width - side) / 2} {(height - side) / 2} {side} {side}"
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} viewBox="{box}" width="{side}" height="{side}">{body}</svg>'.encode()


def draw(drawing: bytes, size: int) -> bytes:
    """Returns a drawing as a picture of size x size pixels on white: lossless WebP, half as large as PNG here.

    Raises:
      ValueError: the drawing cannot be drawn.
      OSError: the WebP file cannot be read.
    """
    picture = _shrunk(drawing, size) if drawing.startswith(b"RIFF") else _drawn(drawing, size)
    file = io.BytesIO()
    picture.save(file, "WEBP", lossless=True)
    return file.getvalue()


def _drawn(svg: bytes, size: int) -> PIL.Image.Image:
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_string=svg.decode(), width=size, height=size, background="white", skip_system_fonts=True
    )
    picture = PIL.Image.open(io.BytesIO(png)).convert("RGB")
    if picture.size != (size, size):
        raise ValueError(f"it is {picture.width} x {picture.height} pixels, not square")
    return picture


def _shrunk(webp: bytes, size: int) -> PIL.Image.Image:
    picture = PIL.Image.open(io.BytesIO(webp)).convert("RGBA")
    picture = picture.resize((size, size), PIL.Image.Resampling.BICUBIC)
    white = PIL.Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return white.convert("RGB")


def versions() -> dict[str, str]:
    """Returns the versions of the packages that draw and encode, on which the bytes of a picture depend.

    Raises:
      ValueError: one of them is missing.
    """
    try:
        return {name: importlib.metadata.version(name) for name in ("pillow", "resvg-py")}
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"the package {error.name} is missing: pip install 'fastvlm_jax[icons]'") from error
