"""Let the C library of Linux keep the memory that tensors free.

By default, glibc returns the memory of a large tensor to the system at once, and the system maps and clears every page
anew for the next one: up to a fifth of the time of a forward pass. A command owns its process, so it may change this; a
library may not. Not for models that are read block by block, whose memory has to go back.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Keep freed memory in this process, on Linux with glibc; elsewhere, do nothing."""
    with suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_TRIM_THRESHOLD, _LARGEST)
