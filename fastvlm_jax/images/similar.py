"""Tells whether two images are the same or nearly the same: digests of the pixels, and a perceptual hash.

    image ──grey, longest side 512──trim a plain border──96 x 96──DCT──> signs of its 24 x 24 lowest frequencies

The hash stays nearly the same when an image is encoded again, resized, stretched, made brighter or darker, or loses a
little of its border. It is finer than the usual one of 64 bits, in which pages of text, charts and tables, mostly white
as they are, look alike; docs/evaluation.md has the measured distances.
"""

import hashlib
from typing import NamedTuple

import cv2
import numpy as np

from fastvlm_jax.images.decode import decode, size_of

WORDS = 9  # of 64 bits
BITS = 64 * WORDS
# Most bits that may differ. Photographs fill their frame, so that a cut border moves all that they show; pages and
# charts have plain borders, which are trimmed, and resemble each other more.
NEAR, NEAR_PHOTOGRAPHS = 60, 120
_LONGEST = 512  # pixels of the longer side of the image that is hashed
_FREQUENCIES, _SIDE = 24, 96
_ALIKE = 26  # grey levels that count as equally bright
_FLAT = 8  # grey levels; an image that differs from its border by no more shows nothing


class Look(NamedTuple):
    """Holds how an image looks.

    Attributes:
      hash: uint64 [WORDS], the perceptual hash; all 0 for an image of one colour, which is like nothing.
      photograph: whether no third of its pixels is equally bright, to a tenth of the scale.
    """

    hash: np.ndarray
    photograph: bool


def look_at(data: bytes) -> Look:
    """Returns how an encoded image looks.

    Raises:
      ValueError: the image cannot be decoded.
    """
    width, height = size_of(data)
    scale = min(_LONGEST / max(width, height), 1)
    height, width = (max(round(side * scale), 1) for side in (height, width))
    grey = cv2.cvtColor(decode(data, (height, width)), cv2.COLOR_RGB2GRAY)
    grey = cv2.resize(grey, (width, height), interpolation=cv2.INTER_AREA)
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    away = np.abs(grey.astype(np.int16) - int(np.median(border)))
    contrast = int(away.max())
    if contrast <= _FLAT:
        return Look(np.zeros(WORDS, np.uint64), False)
    counts = np.bincount(grey.ravel(), minlength=256)
    photograph = bool(3 * np.convolve(counts, np.ones(_ALIKE)).max() < grey.size)
    if not photograph:
        shown = away > contrast / 4
        rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
        grey = grey[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    small = cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:_FREQUENCIES, :_FREQUENCIES].ravel()
    bits = low > np.median(low[1:])
    bits[0] = False  # the mean brightness
    return Look(np.packbits(bits).view(np.uint64), photograph)


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


def nearest(look: Look, hashes: np.ndarray, photographs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns which of B images look nearly the same as one, the closest first, and how many bits differ: int [N], [N].

    Args:
      hashes: uint64 [B, WORDS], hash of each of the images.
      photographs: bool [B], whether it is like a photograph.
    """
    apart = distances(look.hash[None], hashes)[0].astype(np.int64)
    near = np.flatnonzero(apart <= np.where(photographs & look.photograph, NEAR_PHOTOGRAPHS, NEAR))
    near = near[np.argsort(apart[near], kind="stable")]
    return near, apart[near]
