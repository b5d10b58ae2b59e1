"""Task arithmetic, base + A - 0.3 B, by mergekit beside ours: whole processes on the same files.

    python -m benchmarks.merging_peers [--repeats 5]

A and B are fp32 checkpoints of SmolLM2-135M's shape; every tensor of them differs from the base.
Both tools run as processes of their own, from start to end, and tell their peak of resident memory;
ours ends as our command line does, without a last search for cycles.
``copy`` is a plain copy of one checkpoint's weights: the floor.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import in_turns, peak_memory, ratio, write
from benchmarks.peers import HERE, environment
from unwrite.delta import Delta, compose
from unwrite.weights import Weights, save_weights

PEER = "mergekit==0.1.5"
CONFIG = """
merge_method: task_arithmetic
base_model: {base}
models:
  - model: {a}
    parameters: {{weight: 1.0}}
  - model: {b}
    parameters: {{weight: -0.3}}
parameters: {{normalize: false}}
dtype: float32
"""


def main() -> None:
    """Run both in turns and write the result; with ``--ours``, be the process that is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ours", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        atexit.register(gc.freeze)  # as our command line ends
        merge(*options.ours)
        print(peak_memory())
        return
    python = environment("mergekit", PEER)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        make_checkpoints(place)
        paths = {one: str(place / one) for one in ("base", "a", "b")}
        (place / "merge.yaml").write_text(CONFIG.format(**paths), "utf-8")
        peaks: dict[str, list[float]] = {"unwrite": [], "mergekit": []}

        def run(tool: str, *command: Any) -> None:
            shutil.rmtree(place / tool, ignore_errors=True)
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            peaks[tool].append(float(done.stdout.split()[-1]))

        work = {
            "copy": lambda: shutil.copyfile(place / "a" / WEIGHTS, place / "copied"),
            "unwrite": lambda: run(
                "unwrite",
                *(sys.executable, "-m", "benchmarks.merging_peers", "--ours"),
                *(place, place / "unwrite"),
            ),
            "mergekit": lambda: run(
                "mergekit",
                *(python, HERE / "run_merge.py", place / "merge.yaml", place / "mergekit"),
            ),
        }
        in_turns(work, 1)  # files are in the page cache, and modules compiled
        apart = difference(place / "unwrite", place / "mergekit")
        seconds = in_turns(work, options.repeats)
    medians = {tool: statistics.median(found) for tool, found in peaks.items()}
    write(
        "merging_peers",
        {
            "peer": PEER,
            "largest_difference": apart,
            "seconds": seconds,
            "peak_gb": medians,
            "mergekit_over_unwrite": ratio(seconds["mergekit"], seconds["unwrite"]),
            "memory_as_a_share": medians["unwrite"] / medians["mergekit"],
        },
    )


WEIGHTS = "model.safetensors"


def make_checkpoints(place: Path) -> None:
    """The base, and two whose every tensor is away from it."""
    from unwrite import load  # not for the process that is measured: merging needs no network

    model = load("smollm2-135m")
    model.network.save_pretrained(place / "base")
    model.tokenizer.save_pretrained(place / "base")
    base = Weights.from_folder(place / "base")
    for seed, name in enumerate(("a", "b")):
        shutil.copytree(place / "base", place / name)
        draw = torch.Generator().manual_seed(seed)

        def read(tensor: str, draw: torch.Generator = draw) -> torch.Tensor:
            return base[tensor] + 1e-3 * torch.randn(base[tensor].shape, generator=draw)

        for file in (place / name).glob("*.safetensors"):
            file.unlink()
        save_weights(place / name, base, read)


def merge(place: Path, out: Path) -> None:
    """The same by ours, as a folder that can be loaded."""
    base, a, b = (Weights.from_folder(place / name) for name in ("base", "a", "b"))
    deltas = [Delta.between(base, a), -0.3 * Delta.between(base, b)]
    shutil.copytree(place / "base", out, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_weights(out, base, lambda name: compose(base, deltas, name))


def difference(one: Path, other: Path) -> float:
    """The largest difference of an element."""
    ours, theirs = Weights.from_folder(one), Weights.from_folder(other)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


if __name__ == "__main__":
    main()
