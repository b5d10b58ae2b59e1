"""What a piece of work cost: seconds by kind of work, and the peak of memory."""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Iterator
from pathlib import Path

import torch

KINDS = ("train", "arithmetic", "observe")
PROBE = 32 << 20  # bytes held for a moment to see whether the peak comes down after them


class Clock:
    """``seconds`` by kind of work. On a GPU the clock waits for the work that is under way."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(KINDS, 0.0)

    @contextlib.contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """The block's time counts as this kind of work, however it ends."""
        started = _now()
        try:
            yield
        finally:
            self.seconds[kind] += _now() - started


class Meter(Clock):
    """A clock and the peaks of memory since its making. One at a time: the peaks belong to the
    process."""

    def __init__(self) -> None:
        super().__init__()
        self._host_from_zero = _forget_host_peak()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> dict[str, int | None]:
        """Peaks in bytes: ``host``, resident memory of the whole process (null where the system
        cannot start to count anew), ``device``, what torch held on the GPU (null without one)."""
        device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        return {"host": _host_peak() if self._host_from_zero else None, "device": device}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _forget_host_peak() -> bool:
    """Make the kernel count the peak of this process anew (Linux only); whether it did."""
    # Sandboxed kernels take the request and do nothing: believed only where a peak of our own
    # making came down again.
    with mmap.mmap(-1, PROBE) as probe:
        for page in range(0, PROBE, mmap.PAGESIZE):
            probe[page] = 1
        before = _host_peak()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    after = _host_peak()
    return before is not None and after is not None and after <= before - PROBE // 2


def _host_peak() -> int | None:
    """The kernel's account of this process's peak of resident memory, in bytes."""
    try:
        account = Path("/proc/self/status").read_text()
    except OSError:
        return None
    for line in account.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
