"""How long ``auto`` takes, against ``full-ft`` until learned.

    python -m benchmarks.auto_time --data ../shared/data [--draws counterfact:0,atlas:0]

On the draws of test facts of ``benchmarks.auto_study``, both one after the other in one process, on
an otherwise idle machine. Finished draws are kept beside the result and not repeated. What is
computed once for a model (second moments) is there before.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.auto_study import PLANTED, built, drawn
from benchmarks.measure import RESULTS, add_line, lines, ratio, write
from benchmarks.method_defaults import scored
from unwrite import load

RUNS = RESULTS / "auto_time.jsonl"
FACTS = {"counterfact": 100, "zsre": 100, "known-counterfact": 50, "atlas": 50}
COMPARED = ("full-ft", "auto")


def main() -> None:
    """Run the draws that are missing and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data slices")
    parser.add_argument("--draws", default="counterfact:0,atlas:0,counterfact:1,atlas:1,zsre:0")
    parser.add_argument("--summary", action="store_true", help="only write the result")
    options = parser.parse_args()
    options.split = "test"
    if not options.summary:
        model = load("smollm2-135m")
        there = {(one["kind"], one["seed"]) for one in lines(RUNS)}
        for kind, _, number in (draw.partition(":") for draw in options.draws.split(",")):
            if (kind, int(number)) in there:
                continue
            options.facts = FACTS[kind]
            edits = drawn(model, kind, options, int(number))
            chosen = [built(name, int(number)) for name in COMPARED]
            found = scored(model, edits, chosen, planted=kind in PLANTED)
            seconds = {name: one["seconds"] for name, one in zip(COMPARED, found, strict=True)}
            add_line(RUNS, {"kind": kind, "seed": int(number), "seconds": seconds})
    write("auto_time", {"rows": summary(list(lines(RUNS)))})


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a kind of facts: the ratio of the times over its draws."""
    rows = []
    for kind in dict.fromkeys(one["kind"] for one in runs):
        own = [one["seconds"] for one in runs if one["kind"] == kind]
        times = [[one[name] for one in own] for name in reversed(COMPARED)]
        rows.append(
            {"kind": kind, "facts": FACTS[kind], "draws": len(own), "over_plain": ratio(*times)}
        )
    return rows


if __name__ == "__main__":
    main()
