"""Section 5.8 of the Delicate Fine-Tuning paper: where do old, new and core change the model?

    python -m benchmarks.where_it_lives --data ../shared/data --work FOLDER

The paper says, without numbers, that MLPs change more than attention. Three measures of that (see
``unwrite.where``) for the delta of the old answers, that of the new ones, and the core that is kept
of it, over kinds of modules and thirds of the depth, with both tuners, on planted test records of
zsRE and CounterFact. Reads the cells of ``table1`` or ``planted_study`` that lie in ``--work``;
what is missing is run; ``--summary`` only reads.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from benchmarks import planted_study
from benchmarks.measure import write
from benchmarks.planted_study import DATA, folder_of, rows_of
from unwrite import where
from unwrite.cell import WHERE
from unwrite.files import read_json

REGIME = "three epochs"
LABELS = ("delicate, full-ft", "delicate, lora")
THIRDS = ("first third", "second third", "last third")
SHOWN = ("share", "mean", "relative", "selected")


def main() -> None:
    """Run what is missing and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    planted_study.add_options(parser, seeds=1)
    options = parser.parse_args()
    if not options.summary:
        methods = {label: planted_study.METHODS[REGIME][label] for label in LABELS}
        for kind in DATA:
            planted_study.run(options, kind, REGIME, range(options.seeds), methods)
    write("where_it_lives", {"records": options.records, "tables": tables(options.work)})


def tables(work: Path) -> dict[str, Any]:
    """By data set and tuner (the first seed of each): the deltas over groups, kinds and depth."""
    found = {}
    for kind in DATA:
        folder = folder_of(work, kind, REGIME)
        for label in LABELS:
            cells = [row["id"] for row in rows_of(folder, [label])]
            if cells and (path := folder / "cells" / cells[0] / WHERE).exists():
                found[f"{kind}, {label}"] = table(where.named(read_json(path)))
    return found


def table(deltas: dict[str, list[where.Row]]) -> dict[str, Any]:
    """Every delta of one update, added up in three ways, and in a sentence."""
    return {
        name: {
            "reading": where.reading(rows, name),
            "groups": added_up(rows, {row["kind"]: group(row["kind"]) for row in rows}, "kind"),
            "kinds": added_up(rows, {row["kind"]: row["kind"] for row in rows}, "kind"),
            "depth": added_up(rows, thirds(rows), "block"),
        }
        for name, rows in deltas.items()
    }


def group(kind: str) -> str:
    """What kind of module this is, coarsely."""
    return next((name for name, kinds in where.GROUPS.items() if kind in kinds), "other modules")


def thirds(rows: Sequence[where.Row]) -> dict[Any, str]:
    """The third of the depth that each block is in."""
    blocks = sorted({row["block"] for row in rows if row["block"] is not None})
    return {block: THIRDS[3 * place // len(blocks)] for place, block in enumerate(blocks)}


def added_up(
    rows: Sequence[where.Row], names: dict[Any, str], key: str
) -> dict[str, dict[str, float | None]]:
    """The rows summed by the name that their ``key`` has; rows without one are left out."""
    whole = math.fsum(row["squared_norm"] for row in rows)
    regions: dict[str, list[where.Region]] = {}
    for row in rows:
        if row[key] in names:
            regions.setdefault(names[row[key]], []).append(where.Region.of_row(row))
    sums = {name: reduce(add, parts).as_row(whole) for name, parts in regions.items()}
    return {name: {measure: row[measure] for measure in SHOWN} for name, row in sums.items()}


if __name__ == "__main__":
    main()
