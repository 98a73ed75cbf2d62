"""Tells whether two images are the same or nearly the same: digests of the pixels, and a perceptual hash.

    image ──grey, longest side 512──trim a plain border──96 x 96──DCT──> signs of its 24 x 24 lowest frequencies

The hash stays nearly the same when an image is encoded again, resized, stretched, made brighter or darker, or loses a
little of its border. It is finer than the usual one of 64 bits, in which pages of text, charts and tables, mostly white
as they are, look alike; docs/evaluation.md has the measured distances.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from fastvlm_jax.images.decode import decode, size_of

WORDS = 9  # of 64 bits
BITS = 64 * WORDS
# Most bits that may differ. Photographs fill their frame, so that a cut border moves all that they show; pages and
# charts have plain borders, which are trimmed, and resemble each other more.
NEAR, NEAR_PHOTOGRAPHS = 60, 120
# The hash sees neither where something lies on a plain ground nor its colours: how far these may differ.
MOVED, COLORED = 0.1, 20  # part of a side; levels of 255
_LONGEST = 512  # pixels of the longer side of the image that is hashed
_FREQUENCIES, _SIDE = 24, 96
_ALIKE = 26  # grey levels that count as equally bright
_FLAT = 8  # grey levels; an image that differs from its border by no more shows nothing


class Look(NamedTuple):
    """Holds how an image looks; of several images, each array has their number in front.

    Attributes:
      hash: uint64 [WORDS], the perceptual hash; all 0 for an image of one colour, which is like nothing.
      photograph: bool [], whether no third of its pixels is equally bright, to a tenth of the scale.
      box: float32 [4], first and last row and column of what it shows inside its plain border, as parts of the sides.
      color: float32 [2], mean of red and of blue above the brightness in that box, levels of 255.
    """

    hash: np.ndarray
    photograph: np.ndarray
    box: np.ndarray
    color: np.ndarray


NOTHING = Look(np.zeros(WORDS, np.uint64), np.array(False), np.zeros(4, np.float32), np.zeros(2, np.float32))


def stacked(looks: Sequence[Look]) -> Look:
    """Returns the looks of several images as one; it has the form of `looks[i]` with [len(looks)] in front."""
    if not looks:
        return Look(*(part[None][:0] for part in NOTHING))
    return Look(*map(np.stack, zip(*looks, strict=True)))


def look_at(data: bytes) -> Look:
    """Returns how an encoded image looks.

    Raises:
      ValueError: the image cannot be decoded.
    """
    width, height = size_of(data)
    scale = min(_LONGEST / max(width, height), 1)
    height, width = (max(round(side * scale), 1) for side in (height, width))
    pixels = cv2.resize(decode(data, (height, width)), (width, height), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    away = np.abs(grey.astype(np.int16) - int(np.median(border)))
    contrast = int(away.max())
    if contrast <= _FLAT:
        return NOTHING
    counts = np.bincount(grey.ravel(), minlength=256)
    photograph = 3 * np.convolve(counts, np.ones(_ALIKE)).max() < grey.size
    shown = np.ones_like(grey, bool) if photograph else away > contrast / 4
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    inner = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    box = np.array([rows[0], rows[-1], columns[0], columns[-1]], np.float32) / (height, height, width, width)
    red, green, blue = cv2.mean(pixels[inner])[:3]
    brightness = 0.299 * red + 0.587 * green + 0.114 * blue
    color = np.array([red - brightness, blue - brightness], np.float32)
    return Look(_hash(grey[inner]), np.array(photograph), box.astype(np.float32), color)


def _hash(grey: np.ndarray) -> np.ndarray:
    small = cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:_FREQUENCIES, :_FREQUENCIES].ravel()
    bits = low > np.median(low[1:])
    bits[0] = False  # the mean brightness
    return np.packbits(bits).view(np.uint64)


def digest(data: bytes) -> bytes:
    """Returns a digest of the bytes of a file, 16 bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()


def pixel_digest(data: bytes) -> bytes:
    """Returns a digest of the decoded pixels of an image and of its size, 16 bytes.

    Raises:
      ValueError: the image cannot be decoded.
    """
    pixels = np.ascontiguousarray(decode(data))
    return digest(repr(pixels.shape).encode() + pixels.tobytes())


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns how many bits differ between the hashes `a`, uint64 [A, WORDS], and `b` [B, WORDS]: uint16 [A, B]."""
    found = np.zeros((len(a), len(b)), np.uint16)
    differ, counts = np.empty(found.shape, np.uint64), np.empty(found.shape, np.uint8)
    for left, right in zip(a.T, b.T, strict=True):  # word by word, so that the block stays in the cache
        np.bitwise_xor(left[:, None], right[None], out=differ)
        found += np.bitwise_count(differ, out=counts)
    return found


def nearest(look: Look, others: Look) -> tuple[np.ndarray, np.ndarray]:
    """Returns which of B images look nearly the same as one, the closest first, and how many bits differ: int [N], [N].

    Args:
      others: looks of the B images, `stacked`.
    """
    apart = distances(look.hash[None], others.hash)[0].astype(np.int64)
    near = np.flatnonzero(apart <= np.where(others.photograph & look.photograph, NEAR_PHOTOGRAPHS, NEAR))
    moved = np.abs(others.box[near] - look.box).max(1, initial=0)
    colored = np.abs(others.color[near] - look.color).max(1, initial=0)
    near = near[(moved <= MOVED) & (colored <= COLORED)]
    near = near[np.argsort(apart[near], kind="stable")]
    return near, apart[near]
