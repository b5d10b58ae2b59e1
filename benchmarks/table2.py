"""Table 2 of the Delicate Fine-Tuning paper: does it hold on another architecture? zsRE.

    python -m benchmarks.table2 --data ../shared/data --work FOLDER [--base gemma-3-270m]

The paper takes BLOOM-7B beside its Llamas. Here it is Gemma 3 270M (other attention, norms,
activation and vocabulary than SmolLM2, which is a Llama), fetched by ``second_model``; any other
model goes by folder or hub id. The protocol is that of ``table1``, with the paper's five rows and
F-Learning. Finished cells are kept in ``--work``; ``--summary`` only writes the result.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import planted_study
from benchmarks.measure import write
from benchmarks.planted_study import folder_of, rows_of, short
from benchmarks.second_model import NAME, fetched
from unwrite.files import read_json

REGIME, KIND = "three epochs", "zsre"
ROWS = ("full-ft", "lora", "f-learning, full-full", "delicate, full-ft", "delicate, lora")


def main() -> None:
    """Run what is missing and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    planted_study.add_options(parser, seeds=1)
    parser.set_defaults(base=NAME)
    options = parser.parse_args()
    if not options.summary:
        if options.base == NAME:
            options.base = str(fetched())
        methods = {label: planted_study.METHODS[REGIME][label] for label in ROWS}
        for seeds in range(1, options.seeds + 1):
            planted_study.run(options, KIND, REGIME, range(seeds), methods)
    write("table2", result(options.work))


def result(work: Path) -> dict[str, Any]:
    """The rows that there are, and the model they are of."""
    folder = folder_of(work, KIND, REGIME)
    rows = rows_of(folder, ["[no change]", *ROWS])
    described = read_json(folder / "base.json")
    return {
        "base": Path(described["name"]).name,
        "parameters": described["parameters"],
        "rows": [short(row) for row in rows],
    }


if __name__ == "__main__":
    main()
