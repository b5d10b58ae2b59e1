"""What becomes of freed memory while a loop allocates the same tensors over and over.

glibc gives large blocks back to the system when they are freed, and the system clears their pages
again when the next ones are made: much of the time of streaming a checkpoint, and of asking a model
in a process that has trained. What "large" means glibc learns from the blocks that it sees freed,
up to 32 MB, but only a process that happens to free such a block early learns all of it.
``blocks_stay`` tells it the end of that road at the beginning.

Training frees and allocates a gradient per tensor and step, of any size. Within
``freed_memory_is_kept`` all blocks stay and are used again; afterwards they go back. Blocks of the
size of a large vocabulary's gradients are left out: the hole that one leaves is broken up by small
ones before the next comes, and the heap would grow by as much in every step.

But blocks that stay come from a heap whose holes count as used. Where a step makes and frees blocks
of many sizes and memory is short, the holes are a third of the whole. Within
``freed_memory_goes_back`` every block of 128 KB or more is the system's again as soon as it is
freed. Why, and what else was tried: docs/notes/training.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
from collections.abc import Iterator

# From malloc.h: parameters of mallopt, and values that they have when a process starts.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_DEFAULT_MMAP_MAX, _DEFAULT_MMAP_THRESHOLD = 65536, 128 * 1024
# Where glibc itself ends: the largest block it keeps in a heap, and twice that of free memory.
_LARGEST_MMAP_THRESHOLD, _LARGEST_TRIM_THRESHOLD = 32 << 20, 64 << 20
_LARGEST_KEPT = 1 << 27  # bytes


def blocks_stay() -> None:
    """From now on, freed blocks below 32 MB stay with the process, and up to 64 MB of them when
    nothing lies behind them; nothing changes elsewhere than with glibc."""
    if (libc := _glibc()) is not None:
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_TRIM_THRESHOLD, _LARGEST_TRIM_THRESHOLD)


@contextlib.contextmanager
def freed_memory_is_kept(largest: int) -> Iterator[None]:
    """Within the block, freed memory is not returned to the system, and afterwards ``blocks_stay``;
    nothing changes elsewhere than with glibc. ``largest``: bytes of the largest block that is made
    and freed over and over; where that is more than a heap can keep, only what is below 32 MB is
    kept."""
    if (libc := _glibc()) is None:
        yield
        return
    if largest > _LARGEST_KEPT:
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    else:
        libc.mallopt(_MMAP_MAX, 0)  # no block is mapped on its own, to be unmapped when freed
    libc.mallopt(_TRIM_THRESHOLD, -1)  # the heap never shrinks by itself
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
        blocks_stay()
        libc.malloc_trim(0)


@contextlib.contextmanager
def freed_memory_goes_back() -> Iterator[None]:
    """Within the block and afterwards, blocks from 128 KB on are mapped on their own and go when
    they are freed; nothing changes elsewhere than with glibc. What was freed before goes as well.
    """
    if (libc := _glibc()) is not None:
        # The value it starts with; setting it keeps it from moving.
        libc.mallopt(_MMAP_THRESHOLD, _DEFAULT_MMAP_THRESHOLD)
        libc.malloc_trim(0)
    yield


@functools.cache  # finding out reads Python's own file, and every checkpoint asks
def _glibc() -> ctypes.CDLL | None:
    """The C library of this process if it is glibc."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
