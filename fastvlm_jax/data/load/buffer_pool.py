"""Memory for the images of batches, used again when nothing reads it any more."""

import collections
import math
import mmap
import weakref

import numpy as np


class BufferPool:
    """Hands out uint8 arrays in memory that earlier ones left; safe to use from several threads.

    Fresh memory costs a page fault and a zeroing for every 4 KB: a tenth to a quarter of the time to decode into it. It
    begins at a page, so JAX reads it in place on CPUs, where it would copy what begins in the middle of 64 bytes.
    There are as many buffers as arrays were in use at once, each of the size of the largest.
    """

    def __init__(self):
        self._free: collections.deque[mmap.mmap] = collections.deque()

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """Returns an array of that shape with any content; its memory is taken back when all views of it are gone.

        JAX holds a view as long as it copies from it or reads it in place.
        """
        size = math.prod(shape)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = None
        if memory is None or len(memory) < size:
            memory = mmap.mmap(-1, max(size, 1))
        # Every view has this array as its base: numpy goes no further than to what is not an array.
        whole = np.frombuffer(memory, np.uint8)
        weakref.finalize(whole, self._free.append, memory).atexit = False
        return whole[:size].reshape(shape)
