"""Table 3 of the Delicate Fine-Tuning paper: seconds that 1, 10 and 100 edits take.

    python -m benchmarks.table3 --data ../shared/data --work FOLDER [--base MODEL] [--sizes 1,10]

What is timed is ``method.delta(model, edits)`` on test records of zsRE, in the papers' regime of
three epochs and one round; neither loading nor scoring. The values of the weights do not matter, so
nothing is planted. ROME writes one edit after the other, MEMIT all at once. The second moments that
both need are measured once a model and kept; their time is a line of its own. Every timing is a
line of FOLDER/seconds.jsonl and is not taken again; ``--summary`` only writes the result.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from benchmarks import planted_study
from benchmarks.measure import add_line, lines, write
from benchmarks.planted_study import DATA
from unwrite import load, read_edits
from unwrite.errors import TrainingFailed
from unwrite.grid import named_methods
from unwrite.methods.memit import MEMIT, layers_of
from unwrite.moments import second_moments

CHOSEN = ("full-ft", "lora", "ft-c", "f-learning, full-full", "delicate, full-ft", "delicate, lora")
METHODS = {
    **{label: planted_study.METHODS["three epochs"][label] for label in CHOSEN},
    "rome": "rome",
    "memit": "memit",
}
MOMENTS = "second moments"


def main() -> None:
    """Take the timings that are missing, the small ones first, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    planted_study.add_options(parser, seeds=1)
    parser.add_argument("--sizes", default="1,10,100", help="numbers of edits, by comma")
    parser.add_argument("--methods", default=";".join(METHODS), help="labels, by semicolon")
    parser.add_argument("--device", help="cpu, cuda; default: the GPU if there is one")
    options = parser.parse_args()
    path = options.work / "seconds.jsonl"
    if not options.summary:
        run(options, path)
    write("table3", result(lines(path)))


def run(options: argparse.Namespace, path: Path) -> None:
    """One line a timing."""
    file, offset = DATA["zsre"]
    sizes = [int(size) for size in options.sizes.split(",")]
    edits = read_edits(options.data / file, limit=max(sizes), offset=offset)
    model = load(options.base, device=options.device)
    # From here on statistics are kept beside the timings: whether they are there is known.
    os.environ["UNWRITE_CACHE"] = str(options.work / "cache")
    done = {(row["method"], row["edits"]) for row in lines(path)}
    chosen = named_methods({label: METHODS[label] for label in options.methods.split(";")})

    def timed(label: str, size: int, work: Any) -> None:
        if (label, size) not in done:
            note, started = None, time.perf_counter()
            try:
                work()
            except TrainingFailed as error:  # no value was found for any edit: that took time, too
                note = str(error)
            if model.device.type == "cuda":
                import torch

                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            row = {"method": label, "edits": size, "seconds": seconds, "note": note}
            where = {"device": str(model.device), "base": Path(model.source.name).name}
            add_line(path, row | where)

    if {"rome", "memit"} & set(chosen):
        memit = MEMIT()
        layers = layers_of(model, edits, memit.layers)
        timed(MOMENTS, 0, lambda: second_moments(model, layers, memit))
    for size in sizes:
        for label, method in chosen.items():
            timed(label, size, lambda method=method, size=size: method.delta(model, edits[:size]))


def result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds by method and number of edits, in the order of the methods."""
    found = {(row["method"], row["edits"]): row["seconds"] for row in rows}
    seconds = {
        label: {str(size): found[name, size] for name, size in sorted(found) if name == label}
        for label in METHODS
    }
    return {
        "base": ", ".join(sorted({row["base"] for row in rows})),
        "device": ", ".join(sorted({row["device"] for row in rows})),
        "seconds": {label: times for label, times in seconds.items() if times},
        "second_moments": found.get((MOMENTS, 0)),
        "notes": [f"{row['method']}, {row['edits']}: {row['note']}" for row in rows if row["note"]],
    }


if __name__ == "__main__":
    main()
