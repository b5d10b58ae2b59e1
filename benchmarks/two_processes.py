"""How much faster two processes train than one, each pinned to one core of the same machine.

    python -m benchmarks.two_processes [--base smollm2-135m --repeats 3]

Fine-tunes all weights on bundled facts for a fixed number of steps, in turns: one process on the
first core, and two on the first two, which share every batch and average their gradients over gloo
(DDP). Seconds are those of the steps alone. The losses of both must agree; the goal is 1.6 times
the rows a second.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import write

GOAL = 1.6


def main() -> None:
    """Run both in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.base, options.rows, options.batch, options.worker)
        return
    load = os.getloadavg()[0]
    found: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for _ in range(options.repeats):
        for count, runs in found.items():
            runs.append(trained(count, options))
            print(f"{count}: {runs[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(found[1], found[2], strict=True)]
    pairs = zip(found[1][0]["losses"], found[2][0]["losses"], strict=True)
    write(
        "two_processes",
        {
            "base": options.base,
            "rows": options.rows,
            "batch": options.batch,
            "load_at_start": load,
            "steps": len(found[1][0]["losses"]),
            "seconds": {count: [run["seconds"] for run in runs] for count, runs in found.items()},
            "times_faster": {
                "median": statistics.median(ratios),
                "min": min(ratios),
                "max": max(ratios),
            },
            "goal": GOAL,
            "largest_relative_difference_of_losses": max(abs(a - b) / a for a, b in pairs),
        },
    )


def trained(count: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run in so many processes; what the first of them tells."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as scratch:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        out = Path(scratch) / "told.json"
        common = os.environ | {
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(count),
        }
        command = [sys.executable, "-m", "benchmarks.two_processes", "--worker", str(out)]
        command += ["--base", options.base, "--rows", str(options.rows)]
        command += ["--batch", str(options.batch)]
        started = [
            subprocess.Popen(command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(count)
        ]
        if any(process.wait() for process in started):
            raise SystemExit("a process failed")
        told: dict[str, Any] = json.loads(out.read_text("utf-8"))
        return told


def work(base: str, rows: int, batch: int, out: Path) -> None:
    """What one process does: train with the others, if there are any."""
    import torch

    import unwrite
    from unwrite.training import Recipe, fine_tune, new_pairs

    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    if count > 1:
        torch.distributed.init_process_group("gloo")
    model = unwrite.load(base, device="cpu")
    pairs = new_pairs(unwrite.read_edits("atlas", limit=rows))
    recipe = Recipe(epochs=1, until="epochs", batch_size=batch, lr=1e-5)
    fine_tune(model, pairs[:batch], recipe)  # warm
    done = fine_tune(model, pairs, recipe)
    if rank == 0:
        out.write_text(json.dumps({"seconds": done.seconds, "losses": done.losses}), "utf-8")
    if count > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
