"""Finds pictures in the values of a row, and reads them.

"coco/1.jpg"   "file:///data/1.jpg"                       the name of a file, see files.py
"data:image/png;base64,iVBOR..."   "iVBOR..."             base64 text
b"\\xff\\xd8\\xff..."                                        the encoded file itself
{"bytes": ..., "path": "1.jpg"}   {"url": "1.jpg"}        as hubs and chat interfaces store it
["1.jpg", "2.jpg"]                                        several
'["1.jpg", "2.jpg"]'                                      any of these as JSON text
"""

import base64
import json
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fastvlm_jax.data.readers.conversations import shown
from fastvlm_jax.data.readers.files import MAX_IMAGE_BYTES, MAX_RECORD_BYTES, ImagesFolder, checked, read_image

DATA_KEYS = ("bytes", "data", "base64", "b64_json")  # where an object holds an encoded image ...
NAME_KEYS = ("path", "image", "url", "image_url", "source", "file_name")  # ... or the name of its file
SUFFIXES = "jpe?g|png|webp|gif|tiff?|bmp|avif"
UNREAD = "heic|heif|jxl|jp2|j2k|svg|ico|exr|psd|ppm|pgm|tga|dng"  # pictures that no decoder here reads
SOUND_AND_VIDEO = "mp4|avi|mkv|mov|webm|flv|m4v|wav|mp3|flac|ogg|m4a"
_NAME = re.compile(rf"[^\r\n]{{1,1000}}\.(?:{SUFFIXES}|{UNREAD}|{SOUND_AND_VIDEO})", re.IGNORECASE)
_ADDRESS = re.compile(r"[a-z][a-z0-9+]{1,9}://", re.IGNORECASE)
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(?:;[\w=.+-]+)*;base64,", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{16}")
# The first bytes of a picture, also of one that cannot be decoded: a column of them is a column of pictures.
_PICTURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|RIFF....WEBP|II[*+]\0|MM\0[*+]|BM....\0\0\0\0|\0\0\0\x0cJXL "
    rb"|....ftyp(?:avi|hei|hev|mif|msf)|\s*<svg",
    re.DOTALL,
)
_DEPTH = 16  # levels of lists and objects that are searched


def is_picture(data: bytes) -> bool:
    """Returns whether bytes begin as an encoded picture does."""
    return _PICTURE.match(data) is not None


def is_name(text: str) -> bool:
    """Returns whether a text is the name or the address of a picture, a video or a sound."""
    text = text.strip()
    if _ADDRESS.match(text):
        text = re.split(r"[?#]", text, maxsplit=1)[0]
    return _NAME.fullmatch(text) is not None


def is_address(text: str) -> bool:
    """Returns whether a text is an address of the network, not a file."""
    return _ADDRESS.match(text.strip()) is not None and not text.strip().lower().startswith("file:")


def base_name(text: str) -> str:
    """Returns the last part of a name or an address."""
    return posixpath.basename(re.split(r"[?#]", text.strip().replace("\\", "/"), maxsplit=1)[0])


def found_in(value: Any, depth: int = _DEPTH) -> Iterator[str | bytes]:
    """Yields what is like a picture in a value: names as they stand, and encoded pictures as bytes or base64 text."""
    value = _unpacked(value)
    if isinstance(value, bytes):
        if is_picture(value):
            yield value
    elif isinstance(value, str):
        if is_name(value) or _is_encoded(value):
            yield value
    elif depth and isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from found_in(inner, depth - 1)


def texts_in(value: Any) -> Iterator[str]:
    """Yields the texts in a value, in lists and objects too."""
    value = _unpacked(value)
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_in(inner)


def is_encoded(found: str | bytes) -> bool:
    """Returns whether what `found_in` found is an encoded picture, not a name."""
    return isinstance(found, bytes) or _is_encoded(found)


def read(values: Iterable[tuple[str, Any]], folder: ImagesFolder) -> list[bytes]:
    """Returns the encoded pictures in the values of some columns, in order; None, "" and [] hold none.

    Args:
      values: (column, value).
      folder: where the files are that the values name.

    Raises:
      ValueError: a value holds something else, or a picture cannot be read; or they are over MAX_RECORD_BYTES together.
        The message is a short line that names the file or the column.
    """
    images, size = [], 0
    for name, value in values:
        for image in _read(name, value, folder):
            images.append(image)
            size += len(image)
            if size > MAX_RECORD_BYTES:
                raise ValueError(f"its images are more than {MAX_RECORD_BYTES >> 20} MB together")
    return images


def _read(name: str, value: Any, folder: ImagesFolder, depth: int = _DEPTH) -> Iterator[bytes]:
    value = _unpacked(value)
    if value is None or value == "" or (isinstance(value, list) and value in ([], [""])):
        return
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, bytes):
            yield checked(item, name)
        elif isinstance(item, dict):
            yield from _read_object(name, item, folder, depth)
        elif not isinstance(item, str):
            raise ValueError(f"the name of an image is {shown(item)}, not text, in {shown(name)}")
        elif _is_encoded(item):
            yield _decoded(name, item)
        else:
            yield read_image(folder, _encodable(item))


def _unpacked(value: Any) -> Any:
    """Returns the list or object that a text holds in JSON, as the cell of a table does; any other value as it is."""
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, str) and value[:1] + value[-1:] in ("[]", "{}"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value


def _read_object(name: str, value: Mapping[str, Any], folder: ImagesFolder, depth: int) -> Iterator[bytes]:
    if not depth:
        raise ValueError(f"{shown(name)} nests too deep")
    if (data := next((value[key] for key in DATA_KEYS if value.get(key) is not None), None)) is not None:
        yield checked(data, name) if isinstance(data, bytes) else _decoded(name, data)
    elif (key := next((key for key in NAME_KEYS if value.get(key) not in (None, "")), None)) is not None:
        yield from _read(name, value[key], folder, depth - 1)
    elif not value.keys() & {*DATA_KEYS, *NAME_KEYS}:
        keys = shown(", ".join(map(str, value)))
        raise ValueError(f"{shown(name)} is an object of {keys}: an image is one of bytes, path or url")


def _is_encoded(text: str) -> bool:
    """Returns whether a text is a data URL or a picture in base64."""
    if _DATA_URL.match(text):
        return True
    head = text[:64].lstrip()[:48]
    return len(head) >= 24 and _BASE64.match(head) is not None and is_picture(_from_base64(head[: len(head) & ~3]))


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text.translate({ord("-"): "+", ord("_"): "/"}), validate=True)
    except ValueError:
        return b""


def _decoded(name: str, text: Any) -> bytes:
    """Returns the picture in a data URL or in base64 text."""
    if not isinstance(text, str):
        raise ValueError(f"the bytes of {shown(name)} are {shown(text)}, not bytes or base64 text")
    if not text:
        return checked(b"", name)
    if len(text) > MAX_IMAGE_BYTES * 3 // 2:
        raise ValueError(f"{shown(name)} is over {MAX_IMAGE_BYTES >> 20} MB")
    text = "".join(text[match.end() if (match := _DATA_URL.match(text)) else 0 :].split())
    data = _from_base64(text + "=" * (-len(text) % 4))
    if not is_picture(data):
        raise ValueError(f"{shown(name)} holds base64 text that is no picture, or cut")
    return checked(data, name)


def _encodable(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError("the name of an image holds half a surrogate pair, which is no text") from None
    return name
