"""Packages of icons: fetched by npm, read in memory from hostile tars and folders, and refused if they are others."""

import gzip
import io
import json
import os
import random
import subprocess
import tarfile

import pytest
from command import fastvlm
from icon_packages import NAMES, archive_name, contents, packages, tgz, write_packages

from fastvlm_jax.data.sets.icons import packages as packages_lib
from fastvlm_jax.data.sets.icons.packages import PACKAGES, digest, fetch, read
from fastvlm_jax.data.sets.icons.write import write_icons

MANIFEST = json.dumps({"name": "@iconify-json/noto", "version": "1.2.3"})
ICONS = contents()["noto"]["icons.json"]
NOTO = packages()[2]
PATH = archive_name(NOTO.name)
MEND = "; `npm pack @iconify-json/noto@1.2.3` fetches it"


def archive(*members, pack=gzip.compress):
    """A .tgz file of (TarInfo or name, contents)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as made:
        for member, data in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(data) if info.isreg() else 0
            made.addfile(info, io.BytesIO(data.encode()))
    return pack(file.getvalue())


def test_files_are_read_from_tgz_and_folder_alike(tmp_path):
    (tmp_path / "packed").mkdir()
    write_packages(tmp_path / "packed")
    write_packages(tmp_path, unpacked=NAMES)
    for package in packages():
        found = read(package, tmp_path / "packed")
        assert found == read(package, tmp_path) and "README.md" not in found and "package.json" not in found
    assert found["assets/1f417.webp"] == contents()["fluent_3d"]["assets/1f417.webp"]
    assert set(read(NOTO, tmp_path)) == {"icons.json"}


def test_the_digest_is_what_sha256sum_prints(tmp_path):
    files = {"b.json": b"two", "a/1.svg": b"one"}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    printed = subprocess.check_output("sha256sum a/1.svg b.json | sha256sum", shell=True, cwd=tmp_path, text=True)
    assert digest(files) == printed.split()[0]


def test_a_missing_package_and_another_version_name_the_command(tmp_path):
    with pytest.raises(ValueError, match=rf"^{tmp_path} lacks {PATH}: `npm pack @iconify-json/noto@1.2.3` fetches it$"):
        read(NOTO, tmp_path)
    (tmp_path / "iconify-json-noto-1.2.2.tgz").touch()
    (tmp_path / "iconify-json-noto-v1-1.2.9.tgz").touch()
    with pytest.raises(ValueError, match=f"has iconify-json-noto-1.2.2.tgz, another version than {PATH}: `npm"):
        read(NOTO, tmp_path)


@pytest.mark.parametrize(
    "data, words",
    [
        (archive(("package/package.json", MANIFEST), ("package/icons.json", "{}")), "not the published ones"),
        (archive(("package/package.json", MANIFEST)), "not the published ones"),
        (archive(("package/icons.json", ICONS)), "it is of version None, not 1.2.3"),
        (archive(("package/package.json", '{"version": "9"}'), ("package/icons.json", ICONS)), "of version '9', not"),
        (archive(("package/package.json", "[1]"), ("package/icons.json", ICONS)), "its package.json cannot be read"),
        (archive(("package/package.json", "[" * 10_000), ("package/icons.json", ICONS)), "package.json cannot be read"),
        (archive(("package/package.json", " " * (1 << 20) + "{}")), "its package.json has 1,048,578 bytes"),
        (archive(("package/icons.json", ICONS), ("package/icons.json", ICONS)), "it holds icons.json twice"),
        (archive(("package/../icons.json", ICONS), ("package/package.json", MANIFEST)), "not the published ones"),
        (archive(("icons.json", ICONS), ("package/package.json", MANIFEST)), "not the published ones"),
        (archive(("package/icons.json", ICONS), pack=bytes), "its gzip is damaged"),
        (archive(("package/icons.json", ICONS))[:-30], "the gzip is cut"),
        (archive(("package/icons.json", ICONS)) + b"more", "bytes follow the gzip"),
        (gzip.compress(b"no tar" * 1000), "this is no tar file"),
        (gzip.compress(gzip.decompress(tgz({"icons.json": ICONS}))[:1000]), "claims"),
        (b"", "the gzip is cut"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_tgz_of_anything_else_is_refused_in_a_line(tmp_path, data, words):
    (tmp_path / PATH).write_bytes(data)
    with pytest.raises(ValueError) as error:
        read(NOTO, tmp_path)
    text = str(error.value)
    assert text.startswith(f"{tmp_path / PATH}: ") and text.endswith(MEND) and words in text and "\n" not in text


def test_links_and_devices_in_a_tar_are_not_followed(tmp_path):
    (tmp_path / "icons.json").write_text(ICONS)
    for kind, words in ((tarfile.SYMTYPE, "is a link"), (tarfile.LNKTYPE, "is a link"), (tarfile.CHRTYPE, "is not a")):
        link = tarfile.TarInfo("package/icons.json")
        link.type, link.linkname = kind, str(tmp_path / "icons.json")
        (tmp_path / PATH).write_bytes(archive((link, ""), ("package/package.json", MANIFEST)))
        with pytest.raises(ValueError, match=f"'icons.json' {words}"):
            read(NOTO, tmp_path)


def test_a_tgz_that_unpacks_to_too_much_is_refused(monkeypatch, tmp_path):
    (tmp_path / PATH).write_bytes(gzip.compress(bytes(3 << 20)))
    monkeypatch.setattr(packages_lib, "MAX_UNPACKED", 2 << 20)
    with pytest.raises(ValueError, match="it is over 2 MB"):
        read(NOTO, tmp_path)
    monkeypatch.setattr(packages_lib, "MAX_FILES", 3)
    many = {f"assets/{number}.webp": b"" for number in range(4)}
    fluent = packages()[3]
    (tmp_path / archive_name(fluent.name)).write_bytes(tgz(many))
    with pytest.raises(ValueError, match="more than 3 icons or 2 MB"):
        read(fluent, tmp_path)
    folder = tmp_path / "unpacked" / fluent.name
    (folder / "assets").mkdir(parents=True)
    (folder / "package.json").write_text(MANIFEST)
    for number in range(3):
        (folder / f"assets/{number}.webp").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(packages_lib, "MAX_FILES", 10)
    with pytest.raises(ValueError, match="more than 10 icons or 2 MB"):
        read(fluent, tmp_path / "unpacked")


def test_a_folder_of_another_version_or_of_changed_files_is_refused(tmp_path):
    write_packages(tmp_path, unpacked=("noto",))
    where = tmp_path / NOTO.name
    (where / "icons.json").write_text(ICONS + " ")
    with pytest.raises(ValueError, match=rf"^{where}: its files are not the published ones, by their SHA-256; `npm pa"):
        read(NOTO, tmp_path)
    (where / "package.json").write_text('{"version": "1.2.4"}')
    with pytest.raises(ValueError, match=r"it is of version '1.2.4', not 1.2.3"):
        read(NOTO, tmp_path)
    (where / "icons.json").unlink()
    os.mkfifo(where / "icons.json")  # reading it would never end
    (where / "package.json").write_text(MANIFEST)
    with pytest.raises(ValueError, match="not the published ones"):
        read(NOTO, tmp_path)


def test_damaged_tgz_files_give_a_line_or_the_published_files(tmp_path):
    """1,000 mutations, of the gzip or of the tar in it."""
    good = tgz({"package.json": MANIFEST, "icons.json": ICONS})
    tar, rng, path = gzip.decompress(good), random.Random(0), tmp_path / PATH
    path.write_bytes(good)
    published, refused = read(NOTO, tmp_path), 0
    for number in range(1000):
        data = bytearray(tar if number % 2 else good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        data = data[: rng.randrange(len(data))] if rng.random() < 0.1 else data
        path.write_bytes(gzip.compress(data, 1) if number % 2 else data)
        try:
            assert read(NOTO, tmp_path) == published
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert refused > 500


# npm.


def fake_npm(folder, script):
    (folder / "bin").mkdir()
    (folder / "bin/npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin/npm").chmod(0o755)
    return f"{folder / 'bin'}:/usr/bin:/bin"


def test_npm_fetches_what_is_not_given(monkeypatch, tmp_path):
    write_packages(tmp_path)
    script = f'echo "$@" >> {tmp_path}/asked; cp {tmp_path}/*-1.2.3.tgz .'
    monkeypatch.setenv("PATH", fake_npm(tmp_path, script))
    monkeypatch.chdir(tmp_path)
    told = []
    counts = write_icons(tmp_path / "out", 16, packages=packages(), progress=lambda *what: told.append(what))
    assert sum(counts.values()) == 33
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == [f"pack {package.spec} --ignore-scripts --loglevel=error" for package in packages()]
    assert told[0] == ("read openmoji@1.2.3", 0, 4) and told[4] == ("draw train", 0, 22)
    write_icons(tmp_path / "out", 16, packages=packages())  # a finished set needs nothing
    assert (tmp_path / "asked").read_text().splitlines() == asked


def test_the_cause_of_a_failure_of_npm_is_told(monkeypatch, tmp_path):
    script = 'echo "npm error code E404" >&2; echo "npm error 404 Not Found" >&2; exit 1'
    monkeypatch.setenv("PATH", fake_npm(tmp_path, script))
    with pytest.raises(ValueError, match=r"^`npm pack openmoji@1.2.3` failed \(code E404\): run it yourself, and give"):
        fetch(packages()[0], tmp_path)


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "npm is not on the PATH: install Node.js, or give --packages a folder where somebody ran `npm pack openm"),
        (["--size=8"], "size 8: pictures of 16 to 1024 pixels are drawn"),
        (["--packages=nowhere"], "--packages nowhere is not a folder"),
        (["--packages=bin"], "bin lacks openmoji-17.0.0.tgz: `npm pack openmoji@17.0.0` fetches it"),
        (["--packages=set"], "openmoji-17.0.0.tgz: its files are not the published ones, by their SHA-256; `npm pack"),
    ],
)
def test_bad_use_is_told_in_a_line_and_writes_nothing(monkeypatch, capsys, tmp_path, flags, words):
    (tmp_path / "bin").mkdir()
    (tmp_path / "set").mkdir()
    manifest = json.dumps({"version": "17.0.0"})
    (tmp_path / "set/openmoji-17.0.0.tgz").write_bytes(tgz({"package.json": manifest, **contents()["openmoji"]}))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path)
    status, out, err = fastvlm(monkeypatch, capsys, "data", "icons", f"--output={tmp_path / 'out'}", *flags)
    assert (status, out) == (1, "") and words in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


def test_a_missing_renderer_names_the_mend_before_anything_is_fetched(monkeypatch, tmp_path):
    import importlib.metadata

    def version(name):
        if name == "resvg-py":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"^the package resvg-py is missing: pip install 'fastvlm_jax\[icons\]'$"):
        write_icons(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_table_says_what_each_package_is():
    assert len({package.style for package in PACKAGES}) == len(PACKAGES) == 7
    for package in PACKAGES:
        assert len(package.sha256) == 64 and package.home.startswith("https://") and package.credit
        assert package.licence in ("CC-BY-SA-4.0", "CC-BY-4.0", "Apache-2.0", "MIT")
