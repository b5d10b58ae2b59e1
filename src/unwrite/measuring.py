"""What a piece of work cost: seconds by kind of work, and the peak of memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch

KINDS = ("train", "arithmetic", "observe")
SLACK = 8 << 20  # bytes that a process may let go of between two lines of the kernel's account


class Meter:
    """Measures from its making on. One at a time: the peaks belong to the process.

    ``seconds`` by kind of work. On a GPU the clock waits for the work that is under way.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self._host_from_zero = _forget_host_peak()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @contextlib.contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """The block's time counts as this kind of work, however it ends."""
        started = _now()
        try:
            yield
        finally:
            self.seconds[kind] += _now() - started

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
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    # Sandboxed kernels take the request and do nothing: believed only where the peak came down.
    peak, now = _host_memory("VmHWM"), _host_memory("VmRSS")
    return peak is not None and now is not None and peak <= now + SLACK


def _host_peak() -> int | None:
    return _host_memory("VmHWM")


def _host_memory(name: str) -> int | None:
    """A line of the kernel's account of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
