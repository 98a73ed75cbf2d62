"""Small packages of icons in the layouts of the real ones: OpenMoji, Fluent 3D, and Iconify's twemoji and noto."""

import io
import json
import tarfile

import numpy as np
import PIL.Image

from fastvlm_jax.data.sets.icons.packages import Package, digest

# Code -> name, tags, subgroup. By the hash of the code, things stand in all splits; see test_icons.py.
THINGS = {
    "1F417": ("boar", "pig", "animal-mammal"),
    "2604-FE0F": ("comet", "space", "sky-weather"),
    "2693": ("anchor", "ship, tool", "transport-water"),
    "1F34E": ("red apple", "apple, fruit, red", "food-fruit"),
    "1F98A": ("fox", "face", "animal-mammal"),
    "1F4D5": ("closed book", "book, closed", "book-paper"),
    "1F511": ("key", "lock, password", "lock"),
    "1F9D1-200D-1F680": ("astronaut", "rocket, space", "person-role"),
    "1F6B2": ("bicycle", "bike", "transport-ground"),
    "1F4A1": ("light bulb", "bulb, idea, light", "light-video"),
    "1F525": ("fire", "flame, tool", "sky-weather"),
    "1F5FF": ("Moai", "face, statue", "other-object"),
}


def entry(code, name, tags="", subgroup="other", group="objects"):
    return {"hexcode": code, "annotation": name, "tags": tags, "subgroups": subgroup, "group": group}


def colour(style, number):
    """A colour that no other picture has."""
    return (40 * style + 10, 20 * number + 5, 200 - 15 * number)


def svg(inside, side=72):
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}">{inside}</svg>'


def square(rgb, side):
    """A square of one colour that leaves a quarter of the icon's side free on each side."""
    return f'<path fill="#{bytes(rgb).hex()}" d="M{side / 4} {side / 4}h{side / 2}v{side / 2}H{side / 4}z"/>'


def webp(rgb):
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[16:48, 16:48] = (*rgb, 255)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "WEBP", lossless=True)
    return file.getvalue()


def file_name(code):
    return code.lower().replace("-fe0f", "")


def contents():
    """Style -> name -> file of its package, without package.json."""
    names = {code: name.lower().replace(" ", "-") for code, (name, *_) in THINGS.items()}
    icons = [{names[c]: {"body": square(colour(s, n), 128)} for n, c in enumerate(THINGS)} for s in (1, 2)]
    del icons[1]["fire"]
    icons[1]["key"] = icons[1]["fox"]  # drawn alike
    listed = [entry(code, name, tags, subgroup) for code, (name, tags, subgroup) in THINGS.items()]
    iconify = [{"prefix": "any", "icons": own, "aliases": {}, "width": 128, "height": 128} for own in icons]
    drawn = {f"color/svg/{code}.svg": svg(square(colour(0, n), 72)) for n, code in enumerate(THINGS)}
    chars = {file_name(code): name for code, name in names.items()}
    return {
        "openmoji": {"data/openmoji.json": json.dumps(listed), **drawn, "color/svg/1F1E9-1F1EA.svg": svg("")},
        "twemoji": {"icons.json": json.dumps(iconify[0]), "chars.json": json.dumps(chars)},
        "noto": {"icons.json": json.dumps(iconify[1]), "chars.json": "{}"},
        "fluent_3d": {f"assets/{file_name(code)}.webp": webp(colour(3, n)) for n, code in enumerate(THINGS)},
    }


FILES = {
    "openmoji": r"data/openmoji\.json|color/svg/[0-9A-F-]+\.svg",
    "twemoji": r"(icons|chars)\.json",
    "noto": r"icons\.json",
    "fluent_3d": r"assets/[0-9a-f-]+\.webp",
}
NAMES = {
    "openmoji": "openmoji",
    "twemoji": "@iconify-json/twemoji",
    "noto": "@iconify-json/noto",
    "fluent_3d": "@lob/f",
}


def encoded(files):
    return {name: data.encode() if isinstance(data, str) else data for name, data in files.items()}


def packages():
    """The packages, as PACKAGES lists the real ones."""
    made = []
    for style, files in contents().items():
        needed = {name: data for name, data in encoded(files).items() if (style, name) != ("noto", "chars.json")}
        made.append(
            Package(style, NAMES[style], "1.2.3", FILES[style], digest(needed), "CC0-1.0", f"{style}'s", "http://x.org")
        )
    return made


def tgz(files, top="package"):
    """The bytes of a package as npm packs it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, data in encoded(files).items():
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def archive_name(name):
    return f"{name.removeprefix('@').replace('/', '-')}-1.2.3.tgz"


def write_packages(folder, unpacked=()):
    """Writes all packages to a folder, as .tgz files or, those of `unpacked` styles, as in node_modules."""
    for style, files in contents().items():
        files = {"package.json": json.dumps({"version": "1.2.3"}), "README.md": "of no use", **files}
        if style not in unpacked:
            (folder / archive_name(NAMES[style])).write_bytes(tgz(files))
            continue
        for name, data in encoded(files).items():
            path = folder / NAMES[style] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
