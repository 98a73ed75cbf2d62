"""Renders pages, forms, tables, charts and pictures, and changes them: `python tests/helpers/documents.py 300` measures
how far apart their hashes are, the table in docs/evaluation.md.

Pictures of one kind share fonts, margins and layout and differ in their contents, which is the hard case.
"""

import io
import itertools
import random
import sys

import cv2
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

TEXT = (
    "the of report company letter date total market research annual meeting budget table amount percent sales product "
    "sample analysis department director regarding section figure value state rate growth request agreement number"
)
WORDS = TEXT.split()
FONT, LARGE = (PIL.ImageFont.load_default(size) for size in (16, 28))


def words(rng, count):
    return " ".join(rng.choice(WORDS) for _ in range(count))


def sheet(width, height):
    image = PIL.Image.new("RGB", (width, height), "white")
    return image, PIL.ImageDraw.Draw(image)


def page(rng):
    image, draw = sheet(850, 1100)
    for y in range(80, 1020, 24):
        if rng.random() > 0.08:
            draw.text((80, y), words(rng, 20)[: rng.choice([78, 78, 78, 78, 40])], "black", FONT)
    return image


def letter(rng):
    image, draw = sheet(850, 1100)
    draw.text((80, 80), "ACME RESEARCH COMPANY", "black", LARGE)
    draw.text((600, 130), f"{rng.choice(WORDS)} {rng.randint(1, 28)}, 19{rng.randint(50, 99)}", "black", FONT)
    for y in range(220, 220 + 24 * rng.randint(6, 14), 24):
        draw.text((80, y), words(rng, 20)[:78], "black", FONT)
    return image


def form(rng):
    image, draw = sheet(850, 1100)
    draw.text((250, 60), "EXPENSE REPORT FORM", "black", LARGE)
    for i, y in enumerate(range(140, 140 + 16 * 54, 54)):
        draw.rectangle((80, y, 770, y + 54), outline="black")
        draw.line((300, y, 300, y + 54), "black")
        draw.text((90, y + 16), WORDS[i].title(), "black", FONT)
        draw.text((320, y + 16), words(rng, rng.randint(1, 5)), "black", FONT)
    return image


def table(rng):
    image, draw = sheet(900, 700)
    rows, columns = rng.randint(8, 16), rng.randint(4, 7)
    for i in range(rows):
        for j in range(columns):
            x, y = 50 + j * 115, 60 + i * 36
            draw.rectangle((x, y, x + 115, y + 36), outline="black")
            value = rng.choice(WORDS) if 0 in (i, j) else f"{rng.random() * 10 ** rng.randint(1, 5):,.1f}"
            draw.text((x + 8, y + 8), value, "black", FONT)
    return image


def bars(rng):
    image, draw = sheet(600, 400)
    draw.text((200, 10), words(rng, 4), "black", FONT)
    draw.line((50, 40, 50, 360, 580, 360), "black", 2)
    count = rng.randint(4, 9)
    for i in range(count):
        x, height = 60 + i * 520 // count, rng.randint(5, 300)
        draw.rectangle((x, 360 - height, x + 400 // count, 360), "#1f77b4")
        draw.text((x, 365), rng.choice(WORDS)[:7], "black", FONT)
    return image


def lines(rng):
    image, draw = sheet(600, 400)
    draw.text((200, 10), words(rng, 4), "black", FONT)
    draw.line((50, 40, 50, 360, 580, 360), "black", 2)
    for color in ("#1f77b4", "#ff7f0e", "#2ca02c")[: rng.randint(1, 3)]:
        draw.line([(60 + 45 * i, 360 - rng.randint(5, 300)) for i in range(12)], color, 3)
    return image


def pie(rng):
    image, draw = sheet(600, 400)
    draw.text((200, 10), words(rng, 4), "black", FONT)
    cuts = [0, *sorted(rng.randint(10, 350) for _ in range(rng.randint(3, 6))), 360]
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        draw.pieslice((170, 60, 470, 360), start, stop, ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728")[i % 4], "white")
    return image


def discs(rng):
    """A stand-in for a photograph: discs of all sizes that hide each other, which has a photograph's spectrum."""
    draw = np.random.default_rng(rng.getrandbits(32))
    pixels = np.full((480, 640, 3), draw.integers(0, 255, 3), np.uint8)
    for _ in range(400):
        center = int(draw.integers(640)), int(draw.integers(480))
        cv2.circle(pixels, center, min(int(8 / (draw.random() + 0.02)), 90), draw.integers(0, 255, 3).tolist(), -1)
    return PIL.Image.fromarray(cv2.GaussianBlur(pixels, (0, 0), 1.5))


KINDS = (page, letter, form, table, bars, lines, pie, discs)


def cut(image, share):
    """Cuts up to `share` off each side, another part of it on each."""
    (width, height), parts = image.size, (1, 0.4, 0.7, 0.3)
    left, top, right, bottom = (share * part for part in parts)
    return image.crop((int(left * width), int(top * height), int((1 - right) * width), int((1 - bottom) * height)))


def scaled(image, factor):
    return image.resize((int(image.width * factor), int(image.height * factor)), PIL.Image.Resampling.LANCZOS)


# name -> (change, quality of the JPEG that it is stored as)
CHANGES = {
    "JPEG 75": (lambda image: image, 75),
    "JPEG 30": (lambda image: image, 30),
    "half size": (lambda image: scaled(image, 0.5), 90),
    "quarter size": (lambda image: scaled(image, 0.25), 90),
    "1.5 times": (lambda image: scaled(image, 1.5), 90),
    "stretched": (lambda image: image.resize((672, 672)), 90),
    "20 % darker": (lambda image: image.point(lambda value: value * 0.8), 90),
    "15 % brighter": (lambda image: image.point(lambda value: min(value * 1.15, 255)), 90),
    "cut by 1 %": (lambda image: cut(image, 0.01), 90),
    "cut by 2 %": (lambda image: cut(image, 0.02), 90),
    "cut by 4 %": (lambda image: cut(image, 0.04), 90),
}


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def render(kind, number):
    return kind(random.Random(f"{kind.__name__} {number}"))


def measure(count):
    """Prints a row of the table for each kind: pairs taken for the same, least distance, and the share found again."""
    from fastvlm_jax.images.similar import distances, look_at, nearest, stacked

    print("| pictures | pairs | taken for the same | least distance |", " | ".join(CHANGES), "|")
    for kind in KINDS:
        images = [render(kind, number) for number in range(count)]
        looks = [look_at(encoded(image)) for image in images]
        known, upper = stacked(looks), np.triu_indices(count, 1)
        wrong = sum(len(nearest(look, known)[0]) for look in looks) - count
        cells = [f"{len(upper[0]):,}", wrong // 2, distances(known.hash, known.hash)[upper].min()]
        for change, quality in CHANGES.values():
            moved = [look_at(encoded(change(image), "JPEG", quality=quality)) for image in images]
            found = [len(nearest(look, stacked(looks[i : i + 1]))[0]) for i, look in enumerate(moved)]
            cells.append(f"{100 * np.mean(found):.0f} %")
        print("|", " | ".join(map(str, [kind.__name__, *cells])), "|", flush=True)


if __name__ == "__main__":
    measure(int(sys.argv[1]))
