"""What becomes of freed memory while a loop allocates the same tensors over and over.

glibc gives large blocks back to the system when they are freed. Training frees and allocates a
gradient per tensor and step, so the system clears hundreds of megabytes of pages each time. Within
``freed_memory_is_kept`` the blocks stay and are used again; afterwards they go back. Blocks of the
size of a large vocabulary's gradients are left out: the hole that one leaves is broken up by small
ones before the next comes, and the heap would grow by as much in every step.

But glibc also moves its idea of "large" up, to 32 MB, when large blocks are freed, and what is
smaller comes from a heap whose holes count as used. Where a step makes and frees blocks of many
sizes and memory is short, the holes are a third of the whole. Within ``freed_memory_goes_back``
every block of 128 KB or more is the system's again as soon as it is freed.
Why, and what else was tried: docs/notes/training.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

# From malloc.h: parameters of mallopt, and the values they have when a process starts.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 128 * 1024, 65536
_DEFAULT_MMAP_THRESHOLD = 128 * 1024
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc takes no larger one
_LARGEST_KEPT = 1 << 27  # bytes


@contextlib.contextmanager
def freed_memory_is_kept(largest: int) -> Iterator[None]:
    """Within the block, freed memory is not returned to the system; nothing changes elsewhere than
    with glibc. ``largest``: bytes of the largest block that is made and freed over and over; where
    that is more than a heap can keep, only what is below 32 MB is kept."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    if largest > _LARGEST_KEPT:
        # It stays there afterwards: where glibc itself moves it once such blocks are freed.
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    else:
        libc.mallopt(_MMAP_MAX, 0)  # no block is mapped on its own, to be unmapped when freed
    libc.mallopt(_TRIM_THRESHOLD, -1)  # the heap never shrinks by itself
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
        libc.mallopt(_TRIM_THRESHOLD, _DEFAULT_TRIM_THRESHOLD)
        libc.malloc_trim(0)


@contextlib.contextmanager
def freed_memory_goes_back() -> Iterator[None]:
    """Within the block and afterwards, blocks from 128 KB on are mapped on their own and go when
    they are freed; nothing changes elsewhere than with glibc. What was freed before goes as well.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # The value it starts with; setting it keeps it from moving.
        libc.mallopt(_MMAP_THRESHOLD, _DEFAULT_MMAP_THRESHOLD)
        libc.malloc_trim(0)
    yield
