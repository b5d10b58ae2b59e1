"""Do the papers' claims hold here? Planted test records, at three epochs and until learned.

    python -m benchmarks.planted_study --data ../shared/data --work FOLDER [--seeds 3]

SmolLM2-135M, 100 test records of CounterFact and 100 of zsRE, whose old answers are planted first
(three epochs at 1e-4, as ``compare --plant`` does). Every method learns the new answers in the
papers' regime (three epochs, one round) and until every answer is learned, with the learning rates
that were chosen on the development records. Finished cells are kept in ``--work``, and what the
committed result has is not run again either; ``--summary`` only writes the result from what is
there. Token form: free generation would take longer than the training.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.measure import write
from unwrite import compare

# File and first test record; see the provenance of the data.
DATA = {
    "counterfact": ("counterfact_easyedit_2000.json", 500),
    "zsre": ("zsre_mend_eval_700.json", 200),
}
THREE = "epochs=3:until=epochs"


def three(place: str) -> str:
    """The papers' three epochs for a method inside a method."""
    return f"{place}.epochs=3:{place}.until=epochs"


# ``forget`` is three epochs by default in both regimes: what is forgotten was planted so.
METHODS: dict[str, dict[str, str]] = {
    "three epochs": {
        "full-ft": f"full-ft:{THREE}",
        "lora": f"lora:{THREE}",
        "ft-c": f"ft-c:{THREE}",
        "f-learning, full-full": f"f-learning:{three('learn')}",
        "f-learning, lora-full": f"f-learning:forget=lora:{three('forget')}:{three('learn')}",
        "f-learning, full-lora": f"f-learning:learn=lora:{three('learn')}",
        "f-learning, lora-lora": f"f-learning:forget=lora:{three('forget')}:learn=lora"
        f":{three('learn')}",
        "delicate, full-ft": f"delicate:rounds=1:{three('tuner')}:tuner.lr=5e-5",
        "delicate, lora": f"delicate:rounds=1:tuner=lora:{three('tuner')}",
    },
    "until learned": {
        "full-ft": "full-ft",
        "lora": "lora",
        "ft-c": "ft-c",
        "f-learning, full-full": "f-learning",
        "f-learning, lora-full": f"f-learning:forget=lora:{three('forget')}",
        "f-learning, full-lora": "f-learning:learn=lora",
        "f-learning, lora-lora": f"f-learning:forget=lora:{three('forget')}:learn=lora",
        "delicate, full-ft": "delicate",
        "delicate, lora": "delicate:tuner=lora",
    },
}
FIELDS = ("token", "token_low", "token_high", "n")
ROLES = ("reliability", "generality", "locality", "old_recall")


def add_options(parser: argparse.ArgumentParser, seeds: int) -> None:
    """What every study on planted records takes."""
    parser.add_argument("--data", type=Path, required=True, help="folder of the data slices")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs, kept")
    parser.add_argument("--base", default="smollm2-135m", help="the model")
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--summary", action="store_true", help="only write the result")


def main() -> None:
    """Run what is missing, one seed after the other, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, seeds=3)
    parser.add_argument("--regimes", default=",".join(METHODS), help="by comma")
    parser.add_argument("--kinds", default=",".join(DATA), help="by comma")
    options = parser.parse_args()
    if not options.summary:
        for seed in range(options.seeds):
            for kind in options.kinds.split(","):
                for regime in options.regimes.split(","):
                    run_missing(options, kind, regime, seed)
    write("planted_study", {"records": options.records, "tables": summary(options.work)})


def run_missing(options: argparse.Namespace, kind: str, regime: str, seed: int) -> None:
    """The methods of one table that the committed result does not have with this seed."""
    there = {row["method"] for row in committed(kind, regime) if row["seed"] == seed}
    missing = {name: spec for name, spec in METHODS[regime].items() if name not in there}
    if missing:
        run(options, kind, regime, [seed], missing)


def committed(kind: str, regime: str) -> list[dict[str, Any]]:
    """The rows of one table in the committed result."""
    result = measure.measured("planted_study") or {"tables": {}}
    return list(result["tables"].get(f"{kind}, {regime}", []))


def folder_of(work: Path, kind: str, regime: str) -> Path:
    """Where the run of one table lies."""
    return work / f"{kind}-{regime.replace(' ', '-')}"


def run(
    options: argparse.Namespace,
    kind: str,
    regime: str,
    seeds: Sequence[int],
    methods: Mapping[str, str],
    references: Sequence[str] = ("no-change",),
) -> None:
    """One table; what its folder has already is not computed again."""
    file, offset = DATA[kind]
    compare(
        options.base,
        {kind: options.data / file},
        methods,
        folder_of(options.work, kind, regime),
        seeds=seeds,
        sizes=(options.records,),
        offset=offset,
        plant=True,
        references=references,
        exact=False,
    )


def summary(work: Path) -> dict[str, Any]:
    """Of every table that there is: one entry a row, without what only its own folder needs; rows
    of the committed result stay unless they were run again."""
    found = {}
    for kind in DATA:
        for regime, methods in METHODS.items():
            order = ["[no change]", *methods]
            new = [short(row) for row in rows_of(folder_of(work, kind, regime), order)]
            rows = {(row["method"], row["seed"]): row for row in [*committed(kind, regime), *new]}
            if rows:
                key = sorted(rows, key=lambda one: (order.index(one[0]), one[1] or 0))
                found[f"{kind}, {regime}"] = [rows[one] for one in key]
    return found


def rows_of(folder: Path, methods: Sequence[str]) -> list[dict[str, Any]]:
    """The finished rows of some methods, by method and seed; other studies may share the folder."""
    table = folder / "table.json"
    rows = json.loads(table.read_text("utf-8"))["rows"] if table.exists() else []
    wanted = [row for row in rows if row["method"] in methods]
    return sorted(wanted, key=lambda row: (methods.index(row["method"]), row["seed"] or 0))


def short(row: dict[str, Any]) -> dict[str, Any]:
    """What the pages show of a row, and the intervals."""
    return {
        "method": row["method"],
        "seed": row["seed"],
        **{role: {key: row["scores"]["after"][role][key] for key in FIELDS} for role in ROLES},
        "perplexity_ratio": row["perplexity"]["after"] / row["perplexity"]["before"],
        "seconds": row["seconds"]["train"] + row["seconds"]["arithmetic"],
        "changed": row["delta"]["changed_fraction"],
    }


if __name__ == "__main__":
    main()
