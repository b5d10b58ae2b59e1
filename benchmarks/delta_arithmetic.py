"""How fast is arithmetic on checkpoints, against copying the same files; how much memory it takes.

    python -m benchmarks.delta_arithmetic --json benchmarks/results/delta_arithmetic.json

Makes two synthetic sharded checkpoints in a temporary folder and times, in turns, on files in the
page cache:

- copy            ``shutil.copyfile`` of one checkpoint              reads 1, writes 1
- copy, flushed   the same, then ``fsync`` of every file             reads 1, writes 1
- between         ``Delta.between(before, after).save()``            reads 2, writes a delta
- combine         ``(delta - 0.5 * delta).save()``                   reads 2 deltas, writes one
- compose         all tensors of base + delta, into a checkpoint     reads 1 and a delta, writes 1

Everything Unwrite writes is hashed (SHA-256) and flushed to disk; the plain copy does neither, so
the comparison with it is the hard one. Bandwidth is bytes read plus bytes written, per second; the
goal is half of copying's. Peak memory is that of a fresh process which does all three on the
checkpoints (``VmHWM``; the interpreter and torch are in it).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import machine, peak_memory
from unwrite.delta import Delta, compose
from unwrite.tensorfile import TensorSpec
from unwrite.weights import Weights, save_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDTH = 4096


def main() -> None:
    """Run everything and print the result as JSON; with ``--json``, write it there too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of one checkpoint")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--json", type=Path, default=None, help="file to write the result to")
    parser.add_argument("--peak", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        print(json.dumps(measure_peak(options.peak)))
        return

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    results: dict[str, Any] = {
        "benchmark": "delta_arithmetic",
        "command": " ".join(["python -m benchmarks.delta_arithmetic", *sys.argv[1:]]),
        "machine": machine() | {"memory_gb": round(memory / 1e9, 1)},
        "load_at_start": os.getloadavg()[0],
    }
    for dtype in options.dtypes.split(","):
        with tempfile.TemporaryDirectory(prefix="delta-arithmetic-") as scratch:
            folder = Path(scratch)
            make_checkpoints(folder, options.gigabytes, options.shards, DTYPES[dtype])
            results[dtype] = measure_speed(folder, options.repeats)
            results[dtype]["peak_memory"] = peak_of_a_process(folder)
    text = json.dumps(results, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", "utf-8")


def make_checkpoints(folder: Path, gigabytes: float, shards: int, dtype: torch.dtype) -> None:
    """Write ``before`` and ``after``: square matrices, an embedding twice as large, a few norms."""
    matrix = WIDTH * WIDTH * dtype.itemsize
    count = max(shards, round(gigabytes * 1e9 / matrix) - 2)
    files = [f"model-{n:05}-of-{shards:05}.safetensors" for n in range(1, shards + 1)]
    specs = {"embedding": TensorSpec(dtype, (2 * WIDTH, WIDTH), files[0])}
    for n in range(count):
        file = files[(n + 2) * shards // (count + 2)]
        specs[f"layers.{n}.weight"] = TensorSpec(dtype, (WIDTH, WIDTH), file)
        specs[f"layers.{n}.norm"] = TensorSpec(dtype, (WIDTH,), file)

    noise = torch.randn(2 * WIDTH * WIDTH, generator=torch.Generator().manual_seed(0))
    for name, step in (("before", 0.0), ("after", 1e-4)):

        def read(tensor: str, step: float = step) -> torch.Tensor:
            spec = specs[tensor]
            values = noise[: spec.size] * 0.02 + noise[-spec.size :].flip(0) * step
            return values.view(spec.shape).to(spec.dtype)

        save_weights(folder / name, Weights(specs, read))


def measure_speed(folder: Path, repeats: int) -> dict[str, Any]:
    """Time all stages, each ``repeats`` times after one round to warm up, in changing order."""
    before = Weights.from_folder(folder / "before")
    after = Weights.from_folder(folder / "after")
    delta = Delta.between(before, after).save(folder / "delta")
    checkpoint, changes = before.bytes(), delta.summary().bytes
    stages: dict[str, tuple[int, Callable[[Path], object]]] = {
        "copy": (2 * checkpoint, lambda out: copy(folder / "after", out, flush=False)),
        "copy, flushed": (2 * checkpoint, lambda out: copy(folder / "after", out, flush=True)),
        "between": (
            2 * checkpoint + changes,
            lambda out: Delta.between(before, after).save(out),
        ),
        "combine": (3 * changes, lambda out: (delta - 0.5 * delta).save(out)),
        "compose": (
            2 * checkpoint + changes,
            lambda out: save_weights(out, before, lambda name: compose(before, [delta], name)),
        ),
    }
    seconds: dict[str, list[float]] = {stage: [] for stage in stages}
    order = list(stages)
    for round_number in range(repeats + 1):
        for stage in order:
            out = folder / "out"
            os.sync()  # what others left unwritten is not for this stage to wait for
            started = time.perf_counter()
            stages[stage][1](out)
            took = time.perf_counter() - started
            shutil.rmtree(out)
            print(f"round {round_number}, {stage}: {took:.2f} s", file=sys.stderr, flush=True)
            if round_number:
                seconds[stage].append(took)
        order = order[1:] + order[:1]

    speeds = {stage: stages[stage][0] / 1e9 / statistics.median(seconds[stage]) for stage in stages}
    return {
        "checkpoint_gb": checkpoint / 1e9,
        "delta_gb": changes / 1e9,
        "tensors": len(before),
        "repeats": repeats,
        "stages": {
            stage: {
                "gb_read_and_written": stages[stage][0] / 1e9,
                "seconds": [round(took, 3) for took in seconds[stage]],
                "seconds_median": statistics.median(seconds[stage]),
                "gb_per_second": speeds[stage],
                "share_of_copy": speeds[stage] / speeds["copy"],
                "share_of_copy_flushed": speeds[stage] / speeds["copy, flushed"],
            }
            for stage in stages
        },
    }


def copy(source: Path, target: Path, *, flush: bool) -> None:
    """Copy the files of a folder one by one."""
    target.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        if flush:
            with open(target / file.name, "rb") as written:
                os.fsync(written.fileno())


def peak_of_a_process(folder: Path) -> dict[str, float]:
    """Run ``measure_peak`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.delta_arithmetic", "--peak", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def measure_peak(folder: Path) -> dict[str, float]:
    """Peak resident memory in GB after importing, and after each further stage."""
    peaks = {"imports": peak_memory()}
    before = Weights.from_folder(folder / "before")
    after = Weights.from_folder(folder / "after")
    out = folder / "peak"
    delta = Delta.between(before, after).save(out / "delta")
    peaks["between"] = peak_memory()
    (delta - 0.5 * delta).save(out / "combined")
    peaks["combine"] = peak_memory()
    save_weights(out / "state", before, lambda name: compose(before, [delta], name))
    peaks["compose"] = peak_memory()
    shutil.rmtree(out)
    return peaks


if __name__ == "__main__":
    main()
