"""Stands in for a full disk."""

import contextlib
import resource


@contextlib.contextmanager
def files_of_at_most(size):
    """A largest file size stands in for a full disk: both end a write in its middle, and here all may do it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
