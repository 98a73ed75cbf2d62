"""Turns PDFs into records: the picture of a page, and a question whose answer is the text that the picture shows.

A page gets one of three kinds of conversation, chosen by its key among the kinds that its text allows:

    transcription   "Transcribe the text of this page."                        all lines
    next line       "What does the line after 'X' say?"                        the next line; X occurs only once
    heading         "What is the heading of this page?"                        a line set clearly larger than the rest

Pages are rendered with a longer side of 1584 pixels: 144 pixels an inch for a Letter page, so that 9-point print is
18 pixels high. A larger picture would only be shrunk again: models are trained at 1536 pixels at most here. Pages are
stored as PNG, without loss: as JPEG of quality 95, a page of text is blurred and a fifth larger; at 90 it is as large.

Two threads must not use PDFium at the same time; a process reads one page after another.
"""

import hashlib
import io
import re
import statistics
from collections.abc import Iterator

import pypdfium2 as pdfium
from etils import epath

from fastvlm_jax.data.readers import Options, Part
from fastvlm_jax.data.readers.folders import any_below, below
from fastvlm_jax.data.readers.pdf_text import Line, shown_lines
from fastvlm_jax.data.record import Record, Rejected

LONG_SIDE = 1584  # pixels
_MAX_BYTES = 512 << 20  # bytes of a file
_MAX_POINTS = 14_400  # points; the longest side that the format allows, 200 inches
_MAX_RATIO = 20.0  # longer side / shorter side of a page
_LARGER = 1.2  # least font size of a heading / font size of the text
TRANSCRIBE = ("Transcribe the text of this page.", "What does this page say?", "Read out the text in the image.")
NEXT_LINE = ("What does the line after '{}' say?", "Which line follows '{}'?")
HEADING = ("What is the heading of this page?", "Which heading does the page have?")


def recognise(path: epath.Path) -> bool:
    """Returns whether `path` is a .pdf file, or a folder with one in or below it."""
    try:
        return any_below(path, ".pdf") if path.is_dir() else path.suffix.lower() == ".pdf"
    except (OSError, ValueError):
        return False


def parts(path: epath.Path, options: Options) -> list[Part]:
    """Returns one part for each file.

    Raises:
      FileNotFoundError: `path` does not exist, or holds no .pdf file.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    files = below(path, ".pdf") if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"the folder {path} holds no .pdf file")
    return [Part(str(file)) for file in files]


def read(part: Part, options: Options) -> Iterator[Record | Rejected]:
    """Yields the pages of a file as records. A page that cannot be used is a Rejected, and so is an unreadable file."""
    path = epath.Path(part.path)
    name = f"{path.parent.name}/{path.name}"
    if path.stat().length > _MAX_BYTES:
        yield Rejected(part.path, name, f"the file is over {_MAX_BYTES >> 20} MB")
        return
    data = path.read_bytes()
    try:
        document = pdfium.PdfDocument(data)
    except (pdfium.PdfiumError, ValueError):
        # PDFium's own message may be about the file before.
        encrypted = data[:5] == b"%PDF-" and b"/Encrypt" in data
        reason = (
            "the file is encrypted: it needs a password" if encrypted else "it is no PDF, or damaged, or has no pages"
        )
        yield Rejected(part.path, name, reason)
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
        picture, lines = shown_lines(page, LONG_SIDE / max(width, height))
        question, answer = _conversation(lines, key)
    finally:
        page.close()
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=3)  # smaller and faster than level 6 on pages of text
    return Record(key, (file.getvalue(),), (("user", (0, question)), ("assistant", (answer,))))


def _conversation(lines: list[Line], key: str) -> tuple[str, str]:
    """Returns the question and answer of a page, which its lines and its key determine."""
    draw = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
    texts = [text for text, _ in lines]
    kinds = [(TRANSCRIBE, None, "\n".join(texts))]
    places = [i for i, text in enumerate(texts[:-1]) if texts.count(text) == 1 and _is_quotable(text)]
    if places:
        at = places[draw // 64 % len(places)]
        kinds.append((NEXT_LINE, texts[at], texts[at + 1]))
    if heading := _heading(lines):
        kinds.append((HEADING, None, heading))
    questions, about, answer = kinds[draw % len(kinds)]
    question = questions[draw // 8 % len(questions)]
    return (question if about is None else question.format(about)), answer


def _is_quotable(text: str) -> bool:
    return 8 <= len(text) <= 120 and len(re.findall(r"\w{2,}", text)) >= 2 and "'" not in text


def _heading(lines: list[Line]) -> str | None:
    """Returns the line whose font is clearly larger than the text and all other lines; None if there is none."""
    if len(lines) < 4:
        return None
    heights = [height for text, height in lines for _ in text]
    usual, (text, largest) = statistics.median(heights), max(lines, key=lambda line: line[1])
    others = [height for _, height in lines if height != largest]
    alone = len(others) == len(lines) - 1 and largest > 1.05 * max(others)
    return text if alone and largest >= _LARGER * usual > 0 and 3 <= len(text) <= 120 else None
