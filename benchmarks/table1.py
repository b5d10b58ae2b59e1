"""Table 1 of the Delicate Fine-Tuning paper at our size, with F-Learning and the reference rows.

    python -m benchmarks.table1 --data ../shared/data --work FOLDER [--seeds 1] [--base MODEL]

Test records of zsRE and CounterFact whose old answers are planted first (three epochs); every
method in the papers' regime of three epochs; ROME and MEMIT as they are by default; token form.
What is in ``--work`` is not run again, also not what ``planted_study`` left there; ``--summary``
only writes the result from what is there. The result says how long the rows took.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import planted_study
from benchmarks.measure import write
from benchmarks.planted_study import DATA, folder_of, rows_of, short
from unwrite.files import read_json
from unwrite.reference import NAMES

REGIME = "three epochs"
LOCATE = {"rome": "rome", "memit": "memit"}
METHODS = {**planted_study.METHODS[REGIME], **LOCATE}


def main() -> None:
    """Run what is missing, one seed after the other, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    planted_study.add_options(parser, seeds=1)
    parser.add_argument("--kinds", default=",".join(DATA), help="by comma")
    options = parser.parse_args()
    if not options.summary:
        for seeds in range(1, options.seeds + 1):
            for kind in options.kinds.split(","):
                planted_study.run(options, kind, REGIME, range(seeds), METHODS, NAMES)
    write("table1", result(options.work))


def result(work: Path) -> dict[str, Any]:
    """The rows of both data sets that there are, and what they took."""
    tables, hours, bases, failed = {}, 0.0, set(), []
    for kind in DATA:
        folder = folder_of(work, kind, REGIME)
        if rows := rows_of(folder, labels_in(folder)):
            tables[kind] = [short(row) for row in rows]
            hours += sum(sum(row["seconds"].values()) for row in rows) / 3600
            bases.add(Path(read_json(folder / "plan.json")["base"]["name"]).name)
            failed += read_json(folder / "table.json")["failed"]
    return {
        "base": ", ".join(sorted(bases)),
        "hours": round(hours, 2),
        "tables": tables,
        "failed": [f"{one['method']}, {one['edits']}: {one['error']}" for one in failed],
    }


def labels_in(folder: Path) -> Sequence[str]:
    """Our labels with the reference rows that the run has, references first."""
    planned = read_json(folder / "plan.json")["methods"] if (folder / "plan.json").exists() else {}
    return [*(label for label in planned if label.startswith("[")), *METHODS]


if __name__ == "__main__":
    main()
