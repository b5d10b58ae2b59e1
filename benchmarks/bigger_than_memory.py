"""Arithmetic on a checkpoint of any size: how much memory it takes, and how its time grows.

    python -m benchmarks.bigger_than_memory [--sizes 0.25,0.5,1,2,4,8 --folder SCRATCH]

For every size (GB of one checkpoint in bf16) a fresh process

- makes a sharded checkpoint of zeros in sparse files, which take no disk,
- selects the core of two full changes (top 5 % of the elements in conflict) and saves it,
- exports base + core as a checkpoint,
- undoes it: composes the base alone, and compares its fingerprint with that before.

The two full changes would take four times the checkpoint on disk; here they are computed when they
are read (normal numbers out of one long row of them), which costs less than reading them would.
Peak memory is that of the process (``VmHWM``; the interpreter and torch are in it); the exponent is
the slope of log seconds over log size, of selecting and of exporting. The goal: a peak below 2 GB
whatever the size, and exponents of 0.95 to 1.05.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import exponent, peak_memory, write
from unwrite.change import Dense
from unwrite.delta import Delta, compose
from unwrite.selection import select
from unwrite.weights import INDEX, Weights, fingerprint, save_weights

WIDTH = 4096
SHARD_GB = 2.0
TOP = 0.05
GOAL_GB, GOAL_EXPONENT = 2.0, (0.95, 1.05)


def main() -> None:
    """Run all sizes and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="0.25,0.5,1,2,4,8")
    parser.add_argument("--largest", type=float, default=None, help="one more, not in the fit")
    parser.add_argument("--folder", type=Path, default=None, help="where there is disk")
    parser.add_argument("--worker", nargs=2, metavar=("GB", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        print(json.dumps(work(float(options.worker[0]), Path(options.worker[1]))))
        return
    sizes = [float(size) for size in options.sizes.split(",")]
    beyond = [] if options.largest is None else [options.largest]
    runs = []
    for size in (*sizes, *beyond):
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            runs.append(one(size, Path(scratch)))
        print(runs[-1], file=sys.stderr, flush=True)
    fitted = runs[: len(sizes)]
    exponents = {
        stage: exponent([run["gb"] for run in fitted], [run["seconds"][stage] for run in fitted])
        for stage in ("select", "export")
    }
    write(
        "bigger_than_memory",
        {
            "load_at_start": os.getloadavg()[0],
            "top": TOP,
            "runs": runs,
            "exponents": exponents,
            "largest_peak_gb": max(run["peak_gb"]["undo"] for run in runs),
            "goal": {"peak_gb": GOAL_GB, "exponent": GOAL_EXPONENT},
        },
    )


def one(size: float, folder: Path) -> dict[str, Any]:
    """One size in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bigger_than_memory", "--worker"]
    done = subprocess.run(
        [*command, str(size), str(folder)], check=True, stdout=subprocess.PIPE, text=True
    )
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def work(size: float, folder: Path) -> dict[str, Any]:
    """All stages at one size: seconds and peaks so far."""
    seconds: dict[str, float] = {}
    peaks = {"imports": peak_memory()}

    def timed(stage: str, run: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        found = run()
        seconds[stage] = time.perf_counter() - started
        peaks[stage] = peak_memory()
        return found

    base = sparse_checkpoint(folder / "base", size)
    old, new = changes(base)
    scratch = folder / "scratch"
    scratch.mkdir()

    def selected() -> Delta:
        chosen = select(old, new, TOP, scratch=scratch)
        return chosen.delta.save(folder / "core")

    core = timed("select", selected)
    shutil.rmtree(scratch)
    before = timed("fingerprint", lambda: fingerprint(base))
    out = folder / "exported"
    timed("export", lambda: save_weights(out, base, lambda name: compose(base, [core], name)))
    with Weights.from_folder(out) as exported:
        name = core.names[len(core.names) // 2]
        assert torch.equal(exported[name], core[name].dense().to(torch.bfloat16)), "a wrong export"
    shutil.rmtree(out)
    undone = Weights(dict(base.specs), lambda name: compose(base, [], name))
    assert timed("undo", lambda: fingerprint(undone)) == before, "it was not undone"
    return {
        "gb": base.bytes() / 1e9,
        "tensors": len(base),
        "core_gb": core.summary().bytes / 1e9,
        "changed": core.summary().changed,
        "seconds": seconds,
        "peak_gb": peaks,
    }


def sparse_checkpoint(folder: Path, gigabytes: float) -> Weights:
    """A sharded checkpoint of bf16 zeros: headers, and holes in place of data."""
    folder.mkdir()
    matrix = 2 * WIDTH * WIDTH
    count = max(3, round(gigabytes * 1e9 / matrix))
    per_shard = max(1, round(SHARD_GB * 1e9 / matrix))
    shards = math.ceil(count / per_shard)
    where = {}
    for number in range(shards):
        names = [f"layers.{n:05}.weight" for n in range(count)][number::shards]
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        header = {
            name: {
                "dtype": "BF16",
                "shape": [WIDTH, WIDTH],
                "data_offsets": [place * matrix, (place + 1) * matrix],
            }
            for place, name in enumerate(names)
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(8 + len(text) + len(names) * matrix)
        where |= dict.fromkeys(names, file)
    if shards == 1:
        (folder / next(iter(where.values()))).rename(folder / "model.safetensors")
    else:
        index = {"metadata": {"total_size": count * matrix}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index))
    return Weights.from_folder(folder)


def changes(base: Weights) -> tuple[Delta, Delta]:
    """Two full changes, fp32, of which about half the elements are in conflict."""
    noise = torch.randn(2 * WIDTH * WIDTH, generator=torch.Generator().manual_seed(0)) * 1e-3

    def of(shift: int) -> Delta:
        def read(name: str) -> Dense:
            start = (int(name.split(".")[1]) * 7919 * 16 + shift) % (WIDTH * WIDTH)
            return Dense(noise[start : start + WIDTH * WIDTH].view(WIDTH, WIDTH).clone())

        return Delta(base, read)

    return of(0), of(12_345)


if __name__ == "__main__":
    main()
