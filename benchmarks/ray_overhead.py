"""What it costs to give the cells of a grid to Ray and not to compute them here.

    python -m benchmarks.ray_overhead [--base smollm2-135m --cells 20 --epochs 8]

One comparison twice, at the same time: by the local executor on the first core, and by a Ray
cluster of one worker on the second, where Ray's own processes run as well. A cell is a fine-tune of
all weights on bundled facts and its scores. Files tell when a cell was finished: from the first to
the last is the steady work, and the overhead is how much longer that took with Ray; what passed
before the first cell was finished, from when the cluster was there, is told apart as start-up. The
goal: below 5 % with cells of 30 seconds. The scores of both must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.measure import write

GOAL = 0.05


def main() -> None:
    """Run both and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--cells", type=int, default=20)
    parser.add_argument("--facts", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--swap", action="store_true", help="Ray on the first core")
    parser.add_argument("--worker", nargs=2, metavar=("EXECUTOR", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options, *options.worker)
        return
    load = os.getloadavg()[0]
    command = [sys.executable, "-m", "benchmarks.ray_overhead", *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as scratch:
        runs = {name: Path(scratch) / name for name in ("local", "ray")}
        started = [
            subprocess.Popen(
                [*command, "--worker", name, str(out)],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for name, out in runs.items()
        ]
        if any(process.wait() for process in started):
            raise SystemExit("a process failed")
        found = {name: times(out) for name, out in runs.items()}
        same = scores(runs["local"]) == scores(runs["ray"])
    write(
        "ray_overhead",
        {
            "base": options.base,
            "cells": options.cells,
            "load_at_start": load,
            "ray_on_the_first_core": options.swap,
            **found,
            "overhead": found["ray"]["steady"] / found["local"]["steady"] - 1,
            "overhead_of_the_median_cell": found["ray"]["cell"] / found["local"]["cell"] - 1,
            "same_scores": same,
            "goal": GOAL,
        },
    )


def times(out: Path) -> dict[str, Any]:
    """Seconds until the first cell was finished, from there to the last, and of the median cell."""
    begun = json.loads(out.with_suffix(".begun").read_text("utf-8"))
    done = sorted(path.stat().st_mtime for path in out.glob("cells/*/result.json"))
    return {
        "first": done[0] - begun,
        "steady": done[-1] - done[0],
        "cell": statistics.median(b - a for a, b in pairwise(done)),
    }


def scores(out: Path) -> list[Any]:
    """What was found, without what depends on the clock."""
    rows = json.loads((out / "table.json").read_text("utf-8"))["rows"]
    return sorted(((row["seed"], row["scores"]) for row in rows), key=lambda one: one[0])


def work(options: argparse.Namespace, name: str, out: str) -> None:
    """One comparison on one core."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int((name == "ray") != options.swap)]})
    import unwrite
    from unwrite.executors import RayExecutor

    executor = None
    if name == "ray":
        import ray

        ray.init(
            address="local",
            num_cpus=1,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
        executor = RayExecutor()
    folder = Path(out)
    folder.with_suffix(".begun").write_text(json.dumps(time.time()), "utf-8")
    unwrite.compare(
        options.base,
        list(unwrite.read_edits("atlas", limit=options.facts)),
        {"full-ft": f"full-ft:epochs={options.epochs}:until=epochs:lr=1e-5"},
        folder,
        seeds=range(options.cells),
        references=(),
        exact=False,
        executor=executor,
        device="cpu",
    )


if __name__ == "__main__":
    main()
