"""PDFs to records: the picture of a page, and questions whose answers are its own exact text.

Of three kinds of conversation, a page gets one, chosen by its key among those that it has text for:

    transcription   "Transcribe the text of this page."                        all lines
    next line       "What does the line after 'X' say?"                        X: a line that is there only once
    heading         "What is the heading of this page?"                        a line set clearly larger than the rest

Pages are rendered with a longer side of 1584 pixels, 144 pixels an inch for a Letter page, where 9-point print is still
18 pixels high; more than the largest size that models are trained at here (1536) would be thrown away again. They
are stored as PNG, without loss: a page of text as JPEG of quality 95 is blurred and a fifth larger, at 90 as large.

PDFium must not be used by two threads at once; a process reads one page after the other.
"""

import hashlib
import io
import re
import statistics
from collections.abc import Iterator

import pypdfium2 as pdfium
import pypdfium2.raw as raw
from etils import epath

from fastvlm_jax.data.readers import Options, Part
from fastvlm_jax.data.readers.folders import any_below, below
from fastvlm_jax.data.record import Record, Rejected

LONG_SIDE = 1584  # pixels
_MAX_BYTES = 512 << 20  # of a file
_MAX_POINTS = 14_400  # the longest side that the format allows: 200 inches
_MAX_RATIO = 20.0  # of a page's sides
_MAX_CHARACTERS = 20_000  # of a page: more is no text to read
_LARGER = 1.2  # a heading's letters are so many times as high as those of the text
_HYPHEN = "\x02"  # what PDFium makes of the hyphen and the end of a line inside a word
TRANSCRIBE = ("Transcribe the text of this page.", "What does this page say?", "Read out the text in the image.")
NEXT_LINE = ("What does the line after '{}' say?", "Which line follows '{}'?")
HEADING = ("What is the heading of this page?", "Which heading does the page have?")


def recognise(path: epath.Path) -> bool:
    """Whether `path` is a .pdf file, or a folder with one somewhere in it."""
    try:
        return any_below(path, ".pdf") if path.is_dir() else path.suffix.lower() == ".pdf"
    except (OSError, ValueError):
        return False


def parts(path: epath.Path, options: Options) -> list[Part]:
    """Returns the files in the order of their names.

    Raises:
      FileNotFoundError: no such file or folder, or no PDF in it.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    files = below(path, ".pdf") if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"the folder {path} holds no .pdf file")
    return [Part(str(file)) for file in files]


def read(part: Part, options: Options) -> Iterator[Record | Rejected]:
    """Yields a file's pages. One that cannot be opened, or a page without use, is a Rejected."""
    path = epath.Path(part.path)
    name = f"{path.parent.name}/{path.name}"
    if path.stat().length > _MAX_BYTES:
        yield Rejected(part.path, name, f"the file is over {_MAX_BYTES >> 20} MB")
        return
    data = path.read_bytes()
    try:
        document = pdfium.PdfDocument(data)
    except (pdfium.PdfiumError, ValueError):
        # What PDFium says is no help: it may be about the file before.
        encrypted = data[:5] == b"%PDF-" and b"/Encrypt" in data
        told = (
            "the file is encrypted: it needs a password" if encrypted else "it is no PDF, or damaged, or has no pages"
        )
        yield Rejected(part.path, name, told)
        return
    try:
        if not len(document):
            yield Rejected(part.path, name, "the file has no pages")
        for number in range(len(document)):
            key = f"{name}/{number + 1}"
            try:
                yield _page(document, number, key)
            except (pdfium.PdfiumError, ValueError) as error:
                yield Rejected(part.path, key, " ".join(str(error).split())[:200])
    finally:
        document.close()


def _page(document: pdfium.PdfDocument, number: int, key: str) -> Record:
    page = document[number]
    try:
        width, height = page.get_size()
        if not 0 < min(width, height) <= max(width, height) <= _MAX_POINTS:
            raise ValueError(f"a page of {width:.0f} x {height:.0f} points cannot be drawn")
        if max(width, height) > _MAX_RATIO * min(width, height):
            raise ValueError(f"a page of {width:.0f} x {height:.0f} points is too narrow to be read")
        lines = _lines(page)
        question, answer = _conversation(lines, key)
        picture = page.render(scale=LONG_SIDE / max(width, height)).to_pil().convert("RGB")
    finally:
        page.close()
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=3)  # smaller and faster than 6 on pages of text
    return Record(key, (file.getvalue(),), (("user", (0, question)), ("assistant", (answer,))))


def _lines(page: pdfium.PdfPage) -> list[tuple[str, float]]:
    """The lines of a page from top to bottom as the file has them, each with the height of its type in points."""
    text = page.get_textpage()
    try:
        count = text.count_chars()
        if count > _MAX_CHARACTERS:
            raise ValueError(f"the page has {count} characters: it is no page to be read")
        whole = text.get_text_range()
        if not whole.strip():
            raise ValueError("the page has no text")
        if "\ufffd" in whole or "\x00" in whole:
            raise ValueError("the text of the page is incomplete: a font does not say which letters it draws")
        sizes = [raw.FPDFText_GetFontSize(text, i) for i in range(count)]
        letters = [_letter(raw.FPDFText_GetUnicode(text, i)) for i in range(count)]
    finally:
        text.close()
    lines, line, heights = [], "", []
    for letter, size in [*zip(letters, sizes, strict=True), ("\n", 0.0)]:
        if letter in ("\r", "\n", _HYPHEN):
            line += "-" * (letter == _HYPHEN)
            if line := " ".join(line.split()):
                lines.append((line, statistics.median(heights) if heights else 0.0))
            line, heights = "", []
        else:
            line += letter
            if not letter.isspace():
                heights.append(size)
    return lines


def _letter(code: int) -> str:
    if 0xD800 <= code < 0xE000:
        raise ValueError("the text of the page holds half a surrogate pair")
    return chr(code)


def _conversation(lines: list[tuple[str, float]], key: str) -> tuple[str, str]:
    """The question and answer of a page, which follow from its lines and its key."""
    draw = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
    texts = [text for text, _ in lines]
    kinds = [(TRANSCRIBE, None, "\n".join(texts))]
    places = [i for i, text in enumerate(texts[:-1]) if texts.count(text) == 1 and _is_telling(text)]
    if places:
        at = places[draw // 64 % len(places)]
        kinds.append((NEXT_LINE, texts[at], texts[at + 1]))
    if heading := _heading(lines):
        kinds.append((HEADING, None, heading))
    questions, about, answer = kinds[draw % len(kinds)]
    question = questions[draw // 8 % len(questions)]
    return (question if about is None else question.format(about)), answer


def _is_telling(text: str) -> bool:
    return 8 <= len(text) <= 120 and len(re.findall(r"\w{2,}", text)) >= 2 and "'" not in text


def _heading(lines: list[tuple[str, float]]) -> str | None:
    """The one line whose type is clearly larger than that of the text and of every other line."""
    if len(lines) < 4:
        return None
    heights = [height for text, height in lines for _ in text]
    usual, (text, largest) = statistics.median(heights), max(lines, key=lambda line: line[1])
    others = [height for _, height in lines if height != largest]
    alone = len(others) == len(lines) - 1 and largest > 1.05 * max(others)
    return text if alone and largest >= _LARGER * usual > 0 and 3 <= len(text) <= 120 else None
