"""How much to forget? F-Learning over its strength, with both kinds of forgetting.

    python -m benchmarks.strength_sweep --data ../shared/data --work FOLDER [--seeds 1]

Planted test records of zsRE and CounterFact, three epochs, as in ``table1``, whose cells are used
where they lie in ``--work``: strength 0 is plain fine-tuning there, and 0.3 F-Learning by default.
The papers leave the strength open; nothing is chosen here. ``--summary`` only writes the result.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import planted_study
from benchmarks.measure import write
from benchmarks.planted_study import DATA, folder_of, rows_of, short

REGIME = "three epochs"
# Deltas of LoRA touch few matrices, so the strengths of interest are larger.
STRENGTHS = {
    "f-learning, full-full": (0.1, 0.3, 0.5, 0.7, 1.0),
    "f-learning, lora-full": (0.3, 0.7, 1.0, 1.5, 3.0),
}
DEFAULT, PLAIN = 0.3, "full-ft"


def main() -> None:
    """Run what is missing and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    planted_study.add_options(parser, seeds=1)
    parser.add_argument("--kinds", default=",".join(DATA), help="by comma")
    options = parser.parse_args()
    if not options.summary:
        for kind in options.kinds.split(","):
            planted_study.run(options, kind, REGIME, range(options.seeds), methods())
    write("strength_sweep", {"records": options.records, "curves": curves(options.work)})


def label_of(name: str, strength: float) -> str:
    """The label of a row; the default strength and no strength have theirs already."""
    if strength == 0:
        return PLAIN
    return name if strength == DEFAULT else f"{name}, strength {strength:g}"


def methods() -> dict[str, str]:
    """All rows of the curves, by label."""
    known = planted_study.METHODS[REGIME]
    found = {PLAIN: known[PLAIN]}
    for name, strengths in STRENGTHS.items():
        for strength in strengths:
            own = "" if strength == DEFAULT else f":strength={strength:g}"
            found[label_of(name, strength)] = known[name] + own
    return found


def curves(work: Path) -> dict[str, Any]:
    """By data set and way of forgetting: the points that there are, by strength."""
    found: dict[str, Any] = {}
    for kind in DATA:
        folder = folder_of(work, kind, REGIME)
        for name, strengths in STRENGTHS.items():
            points = [
                {"strength": strength, **short(row)}
                for strength in (0.0, *strengths)
                for row in rows_of(folder, [label_of(name, strength)])
            ]
            if len({point["strength"] for point in points}) > 1:
                found[f"{kind}, {name}"] = points
    return found


if __name__ == "__main__":
    main()
