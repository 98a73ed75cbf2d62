"""Opens the fonts that come with matplotlib, and knows which characters each draws as they are."""

import functools
import os
import pathlib
import string

import matplotlib
from PIL import ImageFont

ASCII = frozenset(string.printable.strip())
# Computer Modern has the glyphs of TeX's encoding: its "<" is an upside-down exclamation mark, its "_" a dot.
_TEX = ASCII - frozenset("\"'<>\\^_`{|}~")
FONTS: dict[str, frozenset[str]] = {  # name of the file -> the characters besides the space that may be drawn with it
    "DejaVuSans": ASCII,
    "DejaVuSans-Bold": ASCII,
    "DejaVuSans-Oblique": ASCII,
    "DejaVuSerif": ASCII,
    "DejaVuSerif-Bold": ASCII,
    "DejaVuSerif-Italic": ASCII,
    "DejaVuSansMono": ASCII,
    "DejaVuSansMono-Bold": ASCII,
    "STIXGeneral": ASCII,
    "STIXGeneralBol": ASCII,
    "STIXGeneralItalic": ASCII,
    "cmr10": _TEX,
    "cmb10": _TEX,
    "cmss10": _TEX,
    "cmtt10": _TEX,
    "cmti10": _TEX - {"$"},  # a pound sign
}


def path_of(name: str) -> pathlib.Path:
    """Returns the file of a font of FONTS."""
    return pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")


@functools.lru_cache(maxsize=1024)
def open_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Returns a font of FONTS.

    Args:
      size: of its em square, pixels; a capital is about 0.7 times as high.
    """
    # The basic layout places glyph after glyph: it needs no library that another machine may lack.
    return ImageFont.truetype(os.fspath(path_of(name)), size, layout_engine=ImageFont.Layout.BASIC)


def drawing(text: str) -> list[str]:
    """Returns the names of the fonts that draw every character of a text as it is."""
    needed = set(text) - {" "}
    return [name for name, known in FONTS.items() if needed <= known]
