"""Tests that the text asked about a PDF's page is text that its picture shows, on pages whose makers know the truth."""

import io
import os
import random
import zlib

import numpy as np
import PIL.Image
import pypdfium2 as pdfium
import pytest

from fastvlm_jax.data.readers import Options, Part, pdf
from fastvlm_jax.data.readers.pdf_text import shown_lines
from fastvlm_jax.data.record import Rejected

COUNT = int(os.environ.get("FASTVLM_TEST_PDFS", "24"))
FONTS = ("Helvetica", "Times-Roman", "Courier", "Helvetica-Bold", "Times-Italic")
STATES = {"clear": "/ca 0", "faint": "/ca 0.03", "half": "/ca 0.6", "nearly": "/ca 0.97", "multiply": "/BM /Multiply"}


def document(content: str, page: str = "/MediaBox [0 0 612 792]", form: str = "") -> bytes:
    """Returns a PDF of one page, which can use these names: the fonts F0 to F4, the Type 3 font T, whose letters are
    squares, the states of STATES, the opaque picture P, the form X, drawn at half its size, and the hidden layer O."""
    fonts = [f"/F{i} << /Type /Font /Subtype /Type1 /BaseFont /{name} >>" for i, name in enumerate(FONTS)]
    states = [f"/{name} << {state} >>" for name, state in STATES.items()]
    used = f"/Font << {' '.join(fonts)} /T 8 0 R >> /ExtGState << {' '.join(states)} >>"
    used = f"/Resources << {used} /XObject << /P 6 0 R /X 5 0 R >> /Properties << /O 7 0 R >> >>"
    image = "/Subtype /Image /Width 16 /Height 16 /ColorSpace /DeviceRGB /BitsPerComponent 8 /Filter /FlateDecode"
    pixels = zlib.compress(bytes(random.Random(0).choices(range(150, 256), k=16 * 16 * 3)))
    squares = f"/FirstChar 97 /LastChar 122 /Widths [{'600 ' * 26}] /CharProcs << /a 9 0 R >>"
    squares += f" /Encoding << /Type /Encoding /Differences [97 {'/a ' * 26}] >>"

    def stream(words: str, data: bytes) -> bytes:
        return f"<< {words} /Length {len(data)} >>\nstream\n".encode() + data + b"\nendstream"

    objects = [
        b"<< /Type /Catalog /Pages 2 0 R /OCProperties << /OCGs [7 0 R] /D << /OFF [7 0 R] /Order [] >> >> >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        f"<< /Type /Page /Parent 2 0 R /Contents 4 0 R {used} {page} >>".encode(),
        stream("", content.encode()),
        stream(f"/Type /XObject /Subtype /Form /BBox [0 0 2000 2000] /Matrix [0.5 0 0 0.5 0 0] {used}", form.encode()),
        stream(f"/Type /XObject {image}", pixels),
        b"<< /Type /OCG /Name (hidden) >>",
        f"<< /Type /Font /Subtype /Type3 /FontBBox [0 0 0 0] /FontMatrix [0.001 0 0 0.001 0 0] {squares} >>".encode(),
        stream("", b"600 0 0 0 500 500 d1 0 0 500 500 re f"),
    ]
    data, places = b"%PDF-1.5\n", []
    for number, thing in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, thing)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, len(data))
    return data + b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, table) + end


def say(text: str, x: float, y: float, *, size=12, font=0, how="0 g", turn="1 0 0 1") -> str:
    return f"BT {how} /F{font} {size} Tf {turn} {x} {y} Tm ({text}) Tj ET\n"


# Ways to draw a line that the picture shows, and ways that hide it: functions of the text, its place, size and font.
SHOWN = {
    "plain": lambda text, x, y, **f: say(text, x, y, **f),
    "blue": lambda text, x, y, **f: say(text, x, y, how="0.1 0.2 0.7 rg", **f),
    "grey": lambda text, x, y, **f: say(text, x, y, how="0.6 g", **f),
    "outline": lambda text, x, y, **f: say(text, x, y, how="0 G 1 Tr", **f) + "0 Tr\n",
    "filled outline": lambda text, x, y, **f: say(text, x, y, how="0 g 0 G 2 Tr", **f) + "0 Tr\n",
    "white on black": lambda text, x, y, **f: f"0 g 40 {y - 8} 540 30 re f\n" + say(text, x, y, how="1 g", **f),
    "on a picture": lambda text, x, y, **f: f"q 540 0 0 30 40 {y - 8} cm /P Do Q\n" + say(text, x, y, **f),
    "half transparent": lambda text, x, y, **f: "q /half gs\n" + say(text, x, y, **f) + "Q\n",
    "bold by two": lambda text, x, y, **f: say(text, x, y, **f) + say(text, x + 0.3, y, **f),
    "bold by three": lambda text, x, y, **f: "".join(say(text, x + 0.2 * i, y, **f) for i in range(3)),
    "marked": lambda text, x, y, **f: say(text, x, y, **f) + f"q /multiply gs 1 1 0 rg 40 {y - 8} 540 30 re f Q\n",
    "underlined": lambda text, x, y, **f: say(text, x, y, **f) + f"0 g 40 {y - 2} 540 0.7 re f\n",
    "clip around": lambda text, x, y, **f: f"q 40 {y - 8} 560 32 re W n\n" + say(text, x, y, **f) + "Q\n",
    "hidden behind": lambda text, x, y, **f: say("hidden" + text[:9], x, y, how="1 g", **f) + say(text, x, y, **f),
    "hidden before": lambda text, x, y, **f: say(text, x, y, **f) + HIDDEN["invisible"]("hidden" + text[:9], x, y, **f),
    "scaled": lambda text, x, y, size, font: say(text, x, y, size=1, font=font, turn=f"{size} 0 0 {size}"),
    "wide": lambda text, x, y, **f: "1 Tc 110 Tz\n" + say(text, x, y, **f) + "0 Tc 100 Tz\n",
    "word by word": lambda text, x, y, size, font: "".join(
        say(word, x + 9 * size * i, y, size=size, font=font) for i, word in enumerate(text.split())
    ),
}  # fmt: skip
HIDDEN = {
    "invisible": lambda text, x, y, **f: say(text, x, y, how="3 Tr", **f) + "0 Tr\n",
    "a clip": lambda text, x, y, **f: "q\n" + say(text, x, y, how="7 Tr", **f) + "Q\n",
    "transparent": lambda text, x, y, **f: "q /clear gs\n" + say(text, x, y, **f) + "Q\n",
    "faint": lambda text, x, y, **f: "q /faint gs\n" + say(text, x, y, **f) + "Q\n",
    "white": lambda text, x, y, **f: say(text, x, y, how="1 g", **f),
    "nearly white": lambda text, x, y, **f: say(text, x, y, how="0.95 g", **f),
    "black on black": lambda text, x, y, **f: f"0 g 40 {y - 8} 540 30 re f\n" + say(text, x, y, **f),
    "white outline": lambda text, x, y, **f: say(text, x, y, how="1 G 1 Tr", **f) + "0 Tr\n",
    "under a box": lambda text, x, y, **f: say(text, x, y, **f) + f"0.8 g 40 {y - 8} 540 30 re f\n",
    "under a picture": lambda text, x, y, **f: say(text, x, y, **f) + f"q 540 0 0 30 40 {y - 8} cm /P Do Q\n",
    "under a veil": lambda text, x, y, **f: say(text, x, y, **f) + f"q /nearly gs 1 g 40 {y - 8} 540 30 re f Q\n",
    "half covered": lambda text, x, y, **f: say(text, x, y, **f) + f"1 g 40 {y + f['size'] / 4} 540 30 re f\n",
    "clipped away": lambda text, x, y, **f: "q 0 0 9 9 re W n\n" + say(text, x, y, **f) + "Q\n",
    "clipped in half": lambda text, x, y, **f: f"q 0 0 999 {y + f['size'] / 4} re W n\n" + say(text, x, y, **f) + "Q\n",
    "far above": lambda text, x, y, **f: say(text, x, y + 1500, **f),
    "left of the page": lambda text, x, y, **f: say(text, x - 1500, y, **f),
    "no size": lambda text, x, y, size, font: say(text, x, y, size=0, font=font),
    "tiny": lambda text, x, y, size, font: say(text, x, y, size=0.7, font=font),
    "squeezed": lambda text, x, y, **f: "0.1 Tz\n" + say(text, x, y, **f) + "100 Tz\n",
    "a layer": lambda text, x, y, **f: "/OC /O BDC\n" + say(text, x, y, **f) + "EMC\n",
    "twice over": lambda text, x, y, **f: say(text, x, y, **f) + say(text[::-1], x + 1, y + 1, **f),
}  # fmt: skip


def words_of(draw: random.Random, count: int) -> str:
    """Returns words of letters with outlines of several heights, so many that none occurs twice."""
    return " ".join(
        "".join(draw.choices("abcdefghiknopqrstuvxyzABDEGHKRST", k=draw.randint(3, 6))) for _ in range(count)
    )


# A paper of 612 x 792 points, drawn on a page that is then turned clockwise, so that the paper stands upright: the
# page's size, and the matrix that the paper is drawn with.
UPRIGHT = {
    0: ((612, 792), (1, 0, 0, 1, 0, 0)),
    90: ((792, 612), (0, 1, -1, 0, 792, 0)),
    180: ((612, 792), (-1, 0, 0, -1, 612, 792)),
    270: ((792, 612), (0, -1, 1, 0, 0, 612)),
}


def crop(matrix: tuple[int, ...]) -> str:
    """Returns the box of the paper's points (30, 34) to (600, 780) on its page."""
    a, b, c, d, e, f = matrix
    xs, ys = zip(*((a * x + c * y + e, b * x + d * y + f) for x, y in ((30, 34), (600, 780))), strict=True)
    return f"{min(xs)} {min(ys)} {max(xs)} {max(ys)}"


def made(seed: int) -> tuple[bytes, list[str]]:
    """Returns a PDF of one page, and the words that its picture shows, in order."""
    draw = random.Random(seed)
    font, cropped = draw.randrange(len(FONTS)), draw.random() < 0.5
    rotate, upright = draw.choice([0, 0, 90, 180, 270]), draw.random() < 0.5
    shown, content, form = [], "", ""
    for y in range(740, 40, -36):
        text, ways = words_of(draw, 4), draw.choice([SHOWN, SHOWN, HIDDEN])
        content += ways[draw.choice(list(ways))](text, 60, y, size=draw.randint(8, 16), font=font)
        shown += text.split() if ways is SHOWN else []
    if cropped:  # a line below the box, and a word across its right edge
        content += say(words_of(draw, 3), 60, 22, font=font) + say(words_of(draw, 1) * 3, 592, 398, font=font)
    if draw.random() < 0.5:  # a line in a form, at half the size
        text = words_of(draw, 3)
        form = say(text, 120, 1536, size=20, font=font)
        content += "/X Do\n"
        shown += text.split()
    size, matrix = UPRIGHT[rotate if upright else 0]
    content = f"q {' '.join(map(str, matrix))} cm\n{content}Q\n"
    page = f"/MediaBox [0 0 {size[0]} {size[1]}] /Rotate {rotate}"
    page += f" /CropBox [{crop(matrix)}]" * cropped
    return document(content, page, form), shown


def test_every_supervised_word_is_readable_in_the_picture(tmp_path):
    """Of 200 pages (FASTVLM_TEST_PDFS=200) all words that are shown were kept, and no other; by default 24 are read."""
    kept = total = 0
    for seed in range(COUNT):
        data, shown = made(seed)
        with pdfium.PdfDocument(data) as found:
            _, lines = shown_lines(found[0], 2.0)
        words = [word for line in lines for word in line.text.split()]
        assert set(words) <= set(shown), (seed, set(words) - set(shown))
        assert words == [word for word in shown if word in words], f"page {seed} is read in another order"
        kept, total = kept + len(words), total + len(shown)
        if seed % 6 == 0:
            (tmp_path / f"{seed}.pdf").write_bytes(data)
            (record,) = pdf.read(Part(str(tmp_path / f"{seed}.pdf")), Options())
            question, answer = record.turns[0][1][1], record.turns[1][1][0]
            quoted = question.split("'")[1] if "'" in question else ""
            assert {*answer.split(), *quoted.split()} <= set(shown) and answer
    assert kept >= 0.98 * total, f"{kept} of {total} words"


def lines_of(data: bytes) -> list[str]:
    with pdfium.PdfDocument(data) as document:
        return [line.text for line in shown_lines(document[0], 2.0)[1]]


PLAIN = [f"{word} line of the page" for word in ("First", "Second", "Third", "Fourth")]
SIDE = [f"{word} beside the text" for word in ("One", "Two", "Three")]
TURNS = {0: "1 0 0 1", 90: "0 -1 1 0", 180: "-1 0 0 -1", 270: "0 1 -1 0"}  # clockwise
STEPS = {0: (0, -20), 90: (-20, 0), 180: (0, 20), 270: (20, 0)}  # from line to line


@pytest.mark.parametrize("turn", [90, 180, 270])
@pytest.mark.parametrize("rotate", [0, 90, 180, 270])
def test_lines_are_read_in_order_in_whatever_direction_they_stand(turn, rotate):
    """Text beside the text in another direction, as labels and stamps are, comes behind it."""
    content = "".join(say(line, 60, 700 - 20 * i) for i, line in enumerate(PLAIN))
    across, down = STEPS[turn]
    content += "".join(say(line, 400 + across * i, 400 + down * i, turn=TURNS[turn]) for i, line in enumerate(SIDE))
    assert lines_of(document(content, f"/MediaBox [0 0 612 792] /Rotate {rotate}")) == PLAIN + SIDE


@pytest.mark.parametrize("rotate", [0, 90, 180, 270])
def test_the_picture_is_the_whole_page_as_it_is_turned(rotate, tmp_path):
    content = "".join(
        way("words of every kind", 60, 740 - 36 * i, size=12, font=0) for i, way in enumerate(SHOWN.values())
    )
    data = document(content, f"/MediaBox [0 0 612 792] /Rotate {rotate}")
    (tmp_path / "a.pdf").write_bytes(data)
    (record,) = pdf.read(Part(str(tmp_path / "a.pdf")), Options())
    with pdfium.PdfDocument(data) as untouched:
        expected = untouched[0].render(scale=2).to_pil().convert("RGB")
    found = PIL.Image.open(io.BytesIO(record.images[0]))
    assert found.size == ((1584, 1224) if rotate in (90, 270) else (1224, 1584))
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_text_under_a_watermark_counts_and_words_over_each_other_do_not():
    content = "".join(say(line, 60, 700 - 20 * i) for i, line in enumerate(PLAIN))
    mark = say("DRAFT", 80, 560, size=150, how="0.8 g", turn="0.8 0.6 -0.6 0.8")
    assert [line for line in lines_of(document(mark + content)) if line != "DRAFT"] == PLAIN
    assert [
        line for line in lines_of(document(content + mark.replace("0.8 g", "0.8 g /multiply gs"))) if line != "DRAFT"
    ] == PLAIN
    over = say("quite other words here", 62, 641)
    assert lines_of(document(content + over)) == PLAIN[:3]


@pytest.mark.parametrize("box", [b"0 0 500 500", b"0 0 600 900", b"0 0 0 0"])
def test_a_font_of_pictures_counts_too(box):
    """Such fonts, as old TeX makes them, may state the box of the letter's ink, a larger one, or none."""
    content = "BT 0 g /T 20 Tf 60 700 Td (abc abd) Tj ET BT 1 g /T 20 Tf 60 600 Td (xyz) Tj ET\n"
    assert lines_of(document(content).replace(b"0 0 500 500 d1", (box + b" d1").ljust(14))) == ["abc abd"]


@pytest.mark.parametrize("percent", [0.1, 1, 3])
def test_text_without_width_is_left_out(percent):
    squeezed = "".join(say("pouz", 60, 740 - 30 * i, size=size, font=4) for i, size in enumerate(range(8, 17)))
    assert lines_of(document(f"{say('but this', 300, 400)} {percent} Tz\n{squeezed}")) == ["but this"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "the page has no text"),
        (say("nobody sees this", 60, 700, how="1 g"), "the picture of the page shows none of its text"),
        (
            "q 612 0 0 792 0 0 cm /P Do Q\n"
            + HIDDEN["invisible"]("the text layer of a scan", 60, 700, size=12, font=0),
            "the picture of the page shows none of its text, which is invisible, covered or outside",
        ),
    ],
)
def test_a_page_that_shows_no_text_is_rejected(content, expected, tmp_path):
    (tmp_path / "a.pdf").write_bytes(document(content))
    (rejected,) = pdf.read(Part(str(tmp_path / "a.pdf")), Options())
    assert isinstance(rejected, Rejected) and rejected.reason.startswith(expected)


def test_the_size_of_a_heading_is_that_in_the_picture():
    """Many programs write a font of 1 point and enlarge it."""
    content = say("A heading", 60, 740, size=1, turn="24 0 0 24")
    content += "".join(say(line, 60, 700 - 20 * i, size=1, turn="12 0 0 12") for i, line in enumerate(PLAIN))
    with pdfium.PdfDocument(document(content)) as found:
        assert [size for _, size in shown_lines(found[0], 2.0)[1]] == pytest.approx([24, 12, 12, 12, 12])
