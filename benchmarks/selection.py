"""How long ``select`` takes beside reading the two deltas it compares, and how much memory.

    python -m benchmarks.selection [--repeats 5 --threads 2]

Makes two dense fp32 deltas with the tensors of SmolLM2-135M (normal numbers, the two correlated by
0.3, which leaves 40 % of opposite sign), saves them in a temporary folder and times, in turns, on
files in the page cache:

- load      every tensor of both into memory of its own, where it stays
- stream    every byte of both files through a buffer of 4 MiB that is used again and again: the
            least that reading can cost, as nothing leaves the processor's cache
- touch     one element of every page of the mapped tensors, by one thread: what mapping costs
- select    the same files, down to the finished masks in memory, for several ``top``

Peak memory is that of a fresh process which selects once (``VmHWM``; the interpreter and torch are
in it, and the pages of mapped files).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import in_turns, ratio, write
from unwrite import selection
from unwrite.change import Dense
from unwrite.delta import Delta
from unwrite.pretrained import resolve
from unwrite.weights import Weights

TOPS = (0.05, 0.2, 1.0)
CORRELATION = 0.3
PAGE = 1024  # fp32 numbers


def main() -> None:
    """Run all in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=selection.THREADS)
    parser.add_argument("--peak", nargs=2, metavar=("FOLDER", "TOP"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        print(json.dumps(measure_peak(Path(options.peak[0]), float(options.peak[1]))))
        return
    selection.THREADS = options.threads
    with tempfile.TemporaryDirectory(prefix="selection-") as scratch:
        folder = Path(scratch)
        make_deltas(folder)
        work: dict[str, Callable[[], object]] = {
            "load": lambda: loaded(folder),
            "stream": lambda: streamed(folder),
            "touch": lambda: touched(folder),
        }
        work |= {f"select {top}": partial(chosen, folder, top) for top in TOPS}
        in_turns(work, 1)  # warm up
        seconds = in_turns(work, options.repeats)
        peaks = {str(top): peak_of_a_process(folder, top) for top in TOPS}
        size = sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
        results = {str(top): facts(chosen(folder, top)) for top in TOPS}
    write(
        "selection",
        {
            "select_threads": options.threads,
            "repeats": options.repeats,
            "selected": results,
            "seconds_median": {name: statistics.median(times) for name, times in seconds.items()},
            "seconds": seconds,
            "select_over": {
                base: {str(top): ratio(seconds[f"select {top}"], seconds[base]) for top in TOPS}
                for base in ("load", "stream", "touch")
            },
            "bytes_read": size,
            "peak_memory_gb": peaks,
        },
    )


def make_deltas(folder: Path) -> None:
    """Save ``old`` and ``new``, with the names and shapes of the model's tensors."""
    weights = Weights.from_folder(resolve("smollm2-135m").folder)

    def noise(name: str, side: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{side} {name}".encode()))
        return 1e-5 * torch.randn(weights.shape(name), generator=generator)

    def new(name: str) -> Dense:
        rest = (1 - CORRELATION**2) ** 0.5
        return Dense(CORRELATION * noise(name, "old") + rest * noise(name, "new"))

    Delta(weights, lambda name: Dense(noise(name, "old"))).save(folder / "old")
    Delta(weights, new).save(folder / "new")


def loaded(folder: Path) -> list[torch.Tensor]:
    """Every tensor of both deltas, copied into memory of its own."""
    return [
        change.dense().clone()
        for side in ("old", "new")
        for change in Delta.open(folder / side).values()
    ]


def streamed(folder: Path) -> None:
    """Read every byte of both deltas once."""
    buffer = bytearray(4 << 20)
    for path in sorted(folder.glob("*/*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def touched(folder: Path) -> None:
    """Look at one element of every page of both deltas."""
    for side in ("old", "new"):
        for change in Delta.open(folder / side).values():
            if isinstance(change, Dense):
                change.values.view(-1)[::PAGE].sum()


def chosen(folder: Path, top: float) -> selection.Selection:
    """Select from the files; the masks are made."""
    found = selection.select(Delta.open(folder / "old"), Delta.open(folder / "new"), top)
    found.delta.in_memory()
    return found


def facts(found: selection.Selection) -> dict[str, Any]:
    """The numbers of a selection."""
    return {
        "parameters": found.parameters,
        "survivors": found.survivors,
        "kept": found.kept,
        "bytes": found.delta.summary().bytes,
    }


def peak_of_a_process(folder: Path, top: float) -> dict[str, float]:
    """Run ``measure_peak`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.selection", "--peak", str(folder), str(top)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def measure_peak(folder: Path, top: float) -> dict[str, float]:
    """Peak resident memory in GB after importing and after selecting."""
    imports = _peak()
    chosen(folder, top)
    return {"imports": imports, "select": _peak()}


def _peak() -> float:
    status = Path("/proc/self/status").read_text("utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


if __name__ == "__main__":
    main()
