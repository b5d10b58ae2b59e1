"""Keep freed memory in the process while a loop allocates the same tensors over and over.

glibc gives large blocks back to the system when they are freed. Training frees and allocates a
gradient per tensor and step, so the system clears hundreds of megabytes of pages each time. Within
``freed_memory_is_kept`` the blocks stay and are used again; afterwards they go back.
Why, and what else was tried: docs/notes/training.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

# From malloc.h: parameters of mallopt, and the values they have when a process starts.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 128 * 1024, 65536


@contextlib.contextmanager
def freed_memory_is_kept() -> Iterator[None]:
    """Within the block, freed memory is not returned to the system; nothing changes elsewhere than
    with glibc."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)  # no block is mapped on its own, to be unmapped when freed
    libc.mallopt(_TRIM_THRESHOLD, -1)  # the heap never shrinks by itself
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
        libc.mallopt(_TRIM_THRESHOLD, _DEFAULT_TRIM_THRESHOLD)
        libc.malloc_trim(0)
