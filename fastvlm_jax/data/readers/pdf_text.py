"""Reads the text of a PDF's page that the picture of the page shows, and no other.

A page may hold text that nobody sees: outside the crop box, clipped away, invisible (as a scan's text layer is), white
on white, under a picture. So the page is drawn again without its text, and a word counts only if its ink is in the
difference: that of every letter, over most of the letter's height and width.

    page              without its text     difference      words that count
    Red  [XXXX]       [XXXX]               Red             Red; a word under the box leaves no difference

Texts that lie over each other are left out one after the other, so that the ink of one is not taken for that of
another. Words of like size over each other cannot be read, and none of them counts.
"""

import collections
import ctypes
import math
import statistics
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageChops
import pypdfium2 as pdfium
import pypdfium2.raw as raw

_MAX_CHARACTERS = 20_000  # characters of a page; a page with more is not made for reading
_HYPHEN = "\x02"  # PDFium's character for a hyphen at the end of a line, inside a word
_NO_INK = ("Cc", "Cf", "Mn", "Zs")  # Unicode categories of characters that may be drawn as nothing
_CONTRAST = 40  # least difference between a letter's ink and what is behind it, grey levels
_HEIGHT = 4.0  # least height of a word, pixels
_WIDTH = 0.05  # least width of a letter, on the average of a word / the height of the word
_SPAN = 0.85  # least height (and width) of a letter's ink / that of its outline
_SLACK = 1.0  # pixels that the ink may fall short besides, because edges are blurred
_LAYERS = 6  # most drawings, for texts that lie over each other
_OVERLAP = 0.25  # part of a letter under another word's that makes both words unreadable
_LIKE = 2.0  # height of one word / height of another from which on both are readable, as text and a watermark are

_Box = tuple[float, float, float, float]  # left, top, right, bottom, pixels of the picture


class Line(NamedTuple):
    """Holds a line of text and the size of its font in points."""

    text: str
    size: float


class _Letter(NamedTuple):
    text: str
    owner: int  # address of the text object that draws it; 0 for spaces and line ends that PDFium adds
    quarter: int  # direction: quarter turns clockwise from the upright, on the page before /Rotate
    box: _Box
    is_outline: bool  # whether the box is that of the letter's outline, not that of its font
    width: float  # points, in the direction of the text
    height: float  # points, across it
    size: float  # points, of the font


_Word = list[_Letter]


def shown_lines(page: pdfium.PdfPage, scale: float) -> tuple[PIL.Image.Image, list[Line]]:
    """Returns the picture of a page, RGB, and the lines of text that it shows.

    Lines come as the file orders them; those in the direction that most letters have come first. A line lacks the words
    that the picture does not show.

    Args:
      page: page of a document.
      scale: pixels a point.

    Raises:
      ValueError: the page has too much text, or none that the picture shows, or its text is incomplete.
    """
    picture = _draw(page, scale)
    lines = [line for block in _blocks(page, _to_pixels(page, picture.size)) for line in _split(block)]
    words = [word for line in lines for word in line]
    if not words:
        raise ValueError("the page has no text")
    inked = _inked(page, scale, picture, words)
    alone = _alone(words, inked, picture.size)
    kept = [[word for word in line if id(word) in alone and _is_readable(word, inked, scale)] for line in lines]
    found = [Line(" ".join(map(_text, line)), _size(line)) for line in kept if line]
    if not found:
        raise ValueError("the picture of the page shows none of its text, which is invisible, covered or outside")
    if any("\ufffd" in line.text or "\x00" in line.text for line in found):
        raise ValueError("the text of the page is incomplete: a font does not say which letters it draws")
    return picture, found


def _draw(page: pdfium.PdfPage, scale: float) -> PIL.Image.Image:
    return page.render(scale=scale).to_pil().convert("RGB")


def _to_pixels(page: pdfium.PdfPage, size: tuple[int, int]) -> Callable[[float, float, float, float], _Box]:
    """Returns a function from (left, bottom, right, top) in the page's points to the box in a picture of that size."""
    fine = 64  # PDFium rounds to whole pixels

    def place(x: int, y: int) -> tuple[float, float]:
        across, down = ctypes.c_int(), ctypes.c_int()
        raw.FPDF_PageToDevice(page, 0, 0, size[0] * fine, size[1] * fine, 0, x, y, across, down)
        return across.value / fine, down.value / fine

    (left, top), (x1, y1), (x2, y2) = place(0, 0), place(1000, 0), place(0, 1000)
    xx, xy, yx, yy = (x1 - left) / 1000, (y1 - top) / 1000, (x2 - left) / 1000, (y2 - top) / 1000

    def to_pixels(x: float, y: float, other_x: float, other_y: float) -> _Box:
        across = sorted((left + xx * x + yx * y, left + xx * other_x + yx * other_y))
        down = sorted((top + xy * x + yy * y, top + xy * other_x + yy * other_y))
        return across[0], down[0], across[1], down[1]

    return to_pixels


def _blocks(page: pdfium.PdfPage, to_pixels: Callable) -> list[list[_Letter]]:
    """Returns the letters of a page, in a list for each direction; the direction of most letters comes first.

    PDFium puts only lines that stand upright in the right order, so the page is turned for each direction.
    """
    turned = page.get_rotation()
    try:
        page.set_rotation(0)
        letters = _letters(page, to_pixels)
        blocks = []
        for quarter, _ in collections.Counter(letter.quarter for letter in letters if letter.owner).most_common():
            page.set_rotation(-90 * quarter % 360)
            own = _letters(page, to_pixels) if quarter else letters
            # Spaces and line ends that PDFium adds have no direction.
            blocks.append([letter for letter in own if letter.quarter == quarter or not letter.owner])
        return blocks
    finally:
        page.set_rotation(turned)


def _letters(page: pdfium.PdfPage, to_pixels: Callable) -> list[_Letter]:
    text = page.get_textpage()
    try:
        count = text.count_chars()
        if count > _MAX_CHARACTERS:
            raise ValueError(f"the page has {count} characters: too many for a page of text")
        return [_letter(text, i, to_pixels) for i in range(count)]
    finally:
        text.close()


def _letter(text: pdfium.PdfTextPage, i: int, to_pixels: Callable) -> _Letter:
    code = raw.FPDFText_GetUnicode(text, i)
    if 0xD800 <= code < 0xE000:
        raise ValueError("the text of the page holds half a surrogate pair")
    left, right, bottom, top = (ctypes.c_double() for _ in range(4))
    loose, matrix = raw.FS_RECTF(), raw.FS_MATRIX()
    raw.FPDFText_GetCharBox(text, i, left, right, bottom, top)
    raw.FPDFText_GetLooseCharBox(text, i, loose)
    raw.FPDFText_GetMatrix(text, i, matrix)
    width, height = abs(right.value - left.value), abs(top.value - bottom.value)
    quarter = round(raw.FPDFText_GetCharAngle(text, i) / (math.pi / 2)) % 4
    return _Letter(
        text=chr(code),
        owner=_address(raw.FPDFText_GetTextObject(text, i)),
        quarter=quarter,
        box=to_pixels(left.value, bottom.value, right.value, top.value),
        is_outline=width < 0.95 * abs(loose.right - loose.left) or height < 0.95 * abs(loose.top - loose.bottom),
        width=height if quarter % 2 else width,
        height=width if quarter % 2 else height,
        size=raw.FPDFText_GetFontSize(text, i) * math.hypot(matrix.c, matrix.d),
    )


def _address(pointer) -> int:
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0


def _split(letters: list[_Letter]) -> Iterator[list[_Word]]:
    """Yields the lines of a block, each as its words."""
    line: list[_Word] = [[]]
    for letter in letters:
        if letter.text == _HYPHEN:
            line[-1].append(letter._replace(text="-"))
        elif not letter.text.isspace():
            line[-1].append(letter)
        elif line[-1]:
            line.append([])
        if letter.text in ("\r", "\n", _HYPHEN):
            yield [word for word in line if word]
            line = [[]]
    yield [word for word in line if word]


def _text(word: _Word) -> str:
    return "".join(letter.text for letter in word)


def _size(line: list[_Word]) -> float:
    return statistics.median(letter.size for word in line for letter in word)


def _inked(page: pdfium.PdfPage, scale: float, picture: PIL.Image.Image, words: Iterable[_Word]) -> set[int]:
    """Returns the ids of the letters whose ink is in the picture."""
    owned: dict[int, list[_Letter]] = {}
    for word in words:
        for letter in word:
            owned.setdefault(letter.owner, []).append(letter)
    objects = {_address(found.raw): found.raw for found in page.get_objects([raw.FPDF_PAGEOBJ_TEXT])}
    # A text that is drawn twice to look bold is read once: its copies have no letters.
    copies = objects.keys() - owned.keys()
    inked = set()
    for layer in _layers(owned, picture.size):
        without = [objects[owner] for owner in {*layer, *copies} if owner in objects]
        ink = _difference(page, scale, picture, without)
        inked |= {id(letter) for owner in layer for letter in owned[owner] if _has_ink(letter, ink)}
    return inked


def _layers(owned: dict[int, list[_Letter]], size: tuple[int, int]) -> list[set[int]]:
    """Returns the text objects in layers, in each of which none lies over another; those beyond _LAYERS are lost."""
    layers: list[tuple[set[int], np.ndarray]] = []
    for owner, letters in owned.items():
        left, top, right, bottom = _around(letters)
        less = min(right - left, bottom - top) / 5  # lines that are set close touch each other
        place = _slice(left + less, top + less, right - less, bottom - less)
        layer = next((layer for layer in layers if not layer[1][place].any()), None)
        if layer is None and len(layers) < _LAYERS:
            layer = (set(), np.zeros(size[::-1], bool))
            layers.append(layer)
        if layer:
            layer[0].add(owner)
            layer[1][place] = True
    return [owners for owners, _ in layers]


def _difference(page: pdfium.PdfPage, scale: float, picture: PIL.Image.Image, objects: list) -> np.ndarray:
    """Returns which pixels look different without some objects of the page: bool [height, width]."""
    for thing in objects:
        raw.FPDFPageObj_SetIsActive(thing, False)
    try:
        without = _draw(page, scale)
    finally:
        for thing in objects:
            raw.FPDFPageObj_SetIsActive(thing, True)
    red, green, blue = (np.asarray(band) for band in PIL.ImageChops.difference(picture, without).split())
    return np.maximum(np.maximum(red, green), blue) >= _CONTRAST


def _has_ink(letter: _Letter, ink: np.ndarray) -> bool:
    if unicodedata.category(letter.text) in _NO_INK:
        return True
    left, top, right, bottom = letter.box
    seen = ink[_slice(left - 1, top - 1, right + 1, bottom + 1)]
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    if not len(rows) or not letter.is_outline:
        return len(rows) > 0
    tall, wide = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    return tall >= _SPAN * (bottom - top) - _SLACK and wide >= _SPAN * (right - left) - _SLACK


def _is_readable(word: _Word, inked: set[int], scale: float) -> bool:
    """Returns whether all letters of a word have ink, and are large enough."""
    height = _height(word)
    is_large = height * scale >= _HEIGHT and sum(letter.width for letter in word) >= _WIDTH * height * len(word)
    has_letters = any(letter.text.isalnum() for letter in word)  # a dash may be small
    return all(id(letter) in inked for letter in word) and (is_large or not has_letters)


def _alone(words: list[_Word], inked: set[int], size: tuple[int, int]) -> set[int]:
    """Returns the ids of the words none of whose letters lies over a letter of another word of like size."""
    taken, lost = np.full(size[::-1], -1, np.int32), set()
    for number, word in enumerate(words):
        for place in (taken[_slice(*letter.box)] for letter in word if id(letter) in inked):
            covered = place[(place >= 0) & (place != number)]
            if covered.size > _OVERLAP * place.size:
                other = int(np.bincount(covered).argmax())
                heights = sorted((_height(word), _height(words[other])))
                if heights[1] < _LIKE * heights[0]:
                    lost |= {number, other}
            place[:] = number
    return {id(word) for number, word in enumerate(words) if number not in lost}


def _around(letters: Iterable[_Letter]) -> _Box:
    lefts, tops, rights, bottoms = zip(*(letter.box for letter in letters), strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def _height(word: _Word) -> float:
    return max(letter.height for letter in word)


def _slice(left: float, top: float, right: float, bottom: float) -> tuple[slice, slice]:
    """Returns the rows and columns of a box, without those outside the picture's left and upper edge."""
    rows = max(math.floor(top), 0), max(math.ceil(bottom), 0)
    return slice(*rows), slice(max(math.floor(left), 0), max(math.ceil(right), 0))
