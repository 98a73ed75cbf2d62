"""Makes small reinforced sets in the layouts of DataCompDR and DFNDR, with arrays as NumPy and torch write them."""

import gzip
import io
import json
import pathlib
import tarfile

import numpy as np
import PIL.Image
import torch

SIZE = (40, 30)  # (width, height) of the pictures
WIDTH = 6  # features of the teachers together
AUGMENTATIONS = [
    [[3, 5, 20, 30], [[8, 0.27], [3, -4.4]]],
    [[0, 0, 30, 40], [[0, 0.0], [12, 0.0]]],
    [[10, 0, 16, 16], [[10, 7.0], [5, 9.0]]],
    [None, [[11, 178.5]]],
]


def picture(number: int, size=SIZE) -> bytes:
    """Returns a PNG that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def rows(number: int, start: int, count: int) -> np.ndarray:
    """Returns features of entry `number`: those of row r are [number, start + r, 1/3, ...]."""
    found = np.full((count, WIDTH), 1 / 3, np.float32)
    found[:, 0], found[:, 1] = number, start + np.arange(count)
    return found


def npz(arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def pth_gz(arrays) -> bytes:
    """Returns what the generator writes with bfloat16: gzip of a torch-saved dict of tensors."""
    buffer = io.BytesIO()
    torch.save({name: torch.tensor(array).bfloat16() for name, array in arrays.items()}, buffer)
    return gzip.compress(buffer.getvalue(), 1)


def members(number: int, lists=None, separate=False, pack=npz, param_aug=AUGMENTATIONS) -> dict[str, bytes]:
    """Returns the members of a released entry by extension: no picture and no caption.

    Text rows count from 100; those of the first synthetic list from 120, of the second from 140 ..., if `separate`.
    """
    lists = {"syn_text": ["made 0", "made 1", "made 2"]} if lists is None else lists
    arrays = {"image_emb": rows(number, 0, len(AUGMENTATIONS))}
    arrays["text_emb"] = rows(number, 100, 1 + (0 if separate else sum(map(len, lists.values()))))
    if separate:
        arrays |= {f"{key}_emb": rows(number, 120 + 20 * i, len(lists[key])) for i, key in enumerate(lists)}
    return {
        "url.txt": b"https://example.org/1.jpg",
        "syn.json": json.dumps(lists).encode(),
        "paug.json": json.dumps({"param_aug": param_aug}).encode(),
        "npz" if pack is npz else "pth.gz": pack(arrays),
        "json": json.dumps({"uid": f"{number:032x}", "sha256": "0" * 64}).encode(),
    }


def pictured(number: int, size=SIZE) -> dict[str, bytes]:
    """Returns the members of an entry of a tar of pictures, as img2dataset writes it."""
    about = {"caption": f"real {number}", "url": "https://example.org/1.jpg", "status": "success", "width": size[0]}
    return {
        "jpg": picture(number, size),
        "txt": f"real {number}".encode(),
        "json": json.dumps(about).encode(),
    }


def write_tar(path: pathlib.Path, entries: dict[str, dict[str, bytes]]) -> pathlib.Path:
    """Writes the members of entries, {key: {extension: contents}}, one entry after the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, found in entries.items():
            for extension, data in found.items():
                header = tarfile.TarInfo(f"{key}.{extension}")
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
    return path
