"""Fetches the npm packages that hold the icons, and reads from each the files that are needed, in memory.

FOLDER/openmoji-17.0.0.tgz                        as `npm pack openmoji@17.0.0` writes it
FOLDER/@lobehub/fluent-emoji-3d/package.json      or unpacked, as in a folder node_modules

Nothing is unpacked to disk. The files are used only if they are those that were published: `Package.sha256`.
"""

import hashlib
import io
import json
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any, NamedTuple

from fastvlm_jax.data.readers import tar
from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.files import gunzip, read_small

MAX_UNPACKED = 256 << 20  # bytes of a package; openmoji has 70 MB
MAX_FILES = 10_000  # that are needed of a package; openmoji has 4,496
_MAX_MANIFEST = 1 << 20  # bytes of package.json
Files = dict[str, bytes]  # name in the package, such as "data/openmoji.json" -> contents


class Package(NamedTuple):
    """Describes an npm package and the style of its icons.

    Attributes:
      style: short name of the style.
      name, version: the package, as npm has it.
      files: regular expression of the names of the files that are needed.
      sha256: SHA-256 of what `sha256sum` prints about these files, sorted by name.
      licence: licence of its pictures, as SPDX has it.
      credit: who made them, as the licence wants it named.
      home: web page of the project.
    """

    style: str
    name: str
    version: str
    files: str
    sha256: str
    licence: str
    credit: str
    home: str

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"


# Styles that draw the same thing alike are left out: fluent-emoji, its flat and its high-contrast form show what
# fluent_3d shows, and emojione-monotone has the outlines of emojione. docs/data.md has the measured distances.
PACKAGES = (
    Package(
        "openmoji", "openmoji", "17.0.0", r"data/openmoji\.json|color/svg/[0-9A-F-]+\.svg",
        "f8cb13f4318dd22b254cac490006d4786c251e9b3b58a1f24c294687af898d20", "CC-BY-SA-4.0",
        "All emojis designed by OpenMoji, the open-source emoji and icon project", "https://openmoji.org",
    ),
    Package(
        "twemoji", "@iconify-json/twemoji", "1.2.5", r"(icons|chars)\.json",
        "478fb53a416365e17d2e61d523ae1613486d12949211e185c1ec2aaafbf3dc66", "CC-BY-4.0",
        "Twemoji: copyright Twitter, Inc and other contributors", "https://github.com/jdecked/twemoji",
    ),
    Package(
        "noto", "@iconify-json/noto", "1.2.9", r"icons\.json",
        "3504bdbcfd5e8a856bdc6d68cb34f1d1e8611dfe1e013c97b9d82bc9952b03ff", "Apache-2.0",
        "Noto Emoji: copyright Google Inc", "https://github.com/googlefonts/noto-emoji",
    ),
    Package(
        "noto_v1", "@iconify-json/noto-v1", "1.2.5", r"icons\.json",
        "e5ff99f18cea3795b266cf3c6e97b58467fa9eccf01255c07cd87645b597c9c5", "Apache-2.0",
        "Noto Emoji, the first version: copyright Google Inc", "https://github.com/googlefonts/noto-emoji",
    ),
    Package(
        "fluent_3d", "@lobehub/fluent-emoji-3d", "1.1.0", r"assets/[0-9a-f-]+\.webp",
        "ca47dcae378af83bac090e6ad37b7e63ca60209fdb8bf5107da636cea43474e4", "MIT",
        "Fluent Emoji: copyright Microsoft Corporation; packed by LobeHub", "https://github.com/microsoft/fluentui-emoji",
    ),
    Package(
        "emojione", "@iconify-json/emojione", "1.2.3", r"icons\.json",
        "71809ea2fd462b2f779ff0269127969c2a3ddf16fb9a7cd49f51609da375871b", "CC-BY-4.0",
        "Emoji One 2.3 by Emoji One, kept by EmojiTwo", "https://github.com/EmojiTwo/emojitwo",
    ),
    Package(
        "emojione_v1", "@iconify-json/emojione-v1", "1.2.3", r"icons\.json",
        "feb263624eccb1dc7b9118d12983f28e298c7b027fcb3117cb92c8a6ae752f2c", "CC-BY-SA-4.0",
        "Emoji One 1.5 by Emoji One", "https://github.com/joypixels/emojione-legacy",
    ),
)  # fmt: skip


def fetch(package: Package, folder: pathlib.Path) -> None:
    """Lets npm put the .tgz file of a package into a folder; no script of the package is run.

    Raises:
      ValueError: npm is missing or fails.
    """
    npm = shutil.which("npm")
    if npm is None:
        specs = " ".join(one.spec for one in PACKAGES)
        raise ValueError(
            "npm is not on the PATH: install Node.js, or give --packages a folder where somebody ran "
            f"`npm pack {specs}`"
        )
    command = [npm, "pack", package.spec, "--ignore-scripts", "--loglevel=error"]
    done = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        said = [line.removeprefix("npm error ") for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise ValueError(
            f"`npm pack {package.spec}` failed ({said[0][:200]}): run it yourself, and give --packages its folder"
        )


def read(package: Package, folder: pathlib.Path) -> Files:
    """Returns the files of a package that are needed, from its .tgz file or its folder in `folder`.

    Raises:
      ValueError: the package is missing, damaged, of another version, or holds other files than the published ones.
    """
    start = f"{package.name.removeprefix('@').replace('/', '-')}-"
    path, again = folder / f"{start}{package.version}.tgz", f"`npm pack {package.spec}` fetches it"
    wanted = re.compile(rf"package\.json|{package.files}")
    if path.is_file():
        found = _in_archive(path, wanted)
    elif (folder / package.name / "package.json").is_file():
        path = folder / package.name
        found = _in_folder(path, wanted)
    else:
        others = sorted(other.name for other in folder.glob(f"{start}[0-9]*.tgz"))
        held = f"has {others[0]}, another version than" if others else "lacks"
        raise ValueError(f"{folder} {held} {path.name}: {again}")
    try:
        files = _gathered(found)
        version = _version(files.pop("package.json", b"{}"))
        if version != package.version:
            raise ValueError(f"it is of version {shown(version)}, not {package.version}")
        if digest(files) != package.sha256:
            raise ValueError("its files are not the published ones, by their SHA-256")
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {again}") from error
    return files


def digest(files: Files) -> str:
    """Returns the SHA-256 of what `sha256sum` prints about files, sorted by name."""
    lines = (f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _in_archive(path: pathlib.Path, wanted: re.Pattern) -> Iterator[tuple[str, bytes]]:
    """Yields (name, contents) of the wanted files of a .tgz file, whose names begin with one folder, "package"."""
    data = gunzip(read_small(path), MAX_UNPACKED)
    for member in tar.members(io.BytesIO(data), len(data)):
        name = member.name.partition("/")[2]
        if member.wrong and (not member.name or wanted.fullmatch(name)):
            raise ValueError(f"{shown(name)} {member.wrong}" if member.name else member.wrong)
        if wanted.fullmatch(name):
            yield name, data[member.at : member.at + member.size]


def _in_folder(folder: pathlib.Path, wanted: re.Pattern) -> Iterator[tuple[str, bytes]]:
    """Yields (name, contents) of the wanted files of an unpacked package."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if wanted.fullmatch(name) and path.is_file():
            yield name, read_small(path)


def _gathered(found: Iterator[tuple[str, bytes]]) -> Files:
    files: Files = {}
    left = MAX_UNPACKED
    for name, data in found:
        left -= len(data)
        if name in files:
            raise ValueError(f"it holds {name} twice")
        if len(files) == MAX_FILES or left < 0:
            raise ValueError(f"it holds more than {MAX_FILES:,} icons or {MAX_UNPACKED >> 20} MB")
        files[name] = data
    return files


def _version(manifest: bytes) -> Any:
    """Returns what the package.json of a package says about its version."""
    if len(manifest) > _MAX_MANIFEST:
        raise ValueError(f"its package.json has {len(manifest):,} bytes")
    try:
        return json.loads(manifest).get("version")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"its package.json cannot be read ({error})") from error
