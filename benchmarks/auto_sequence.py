"""Ten updates of twenty edits, each on top of those before: how much is left of the earlier ones?

    python -m benchmarks.auto_sequence --data ../shared/data --work FOLDER [--seeds 1]
    python -m benchmarks.auto_sequence --data ../shared/data --work FOLDER --split development

SmolLM2-135M, the first 200 test records of CounterFact in chunks of twenty, ``compare`` in
sequence: the states are those of a home with the same updates, where ``auto`` protects what earlier
ones taught. Of the development split six such updates, with and without prompts of the model's own
among what ``auto`` protects; its result is ``auto_sequence_development``. Token form. Finished
methods are kept in ``--work``; ``--summary`` only writes the result.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import write
from benchmarks.planted_study import DATA, ROLES, rows_of
from unwrite import compare

METHODS = {
    "full-ft": "full-ft",
    "memit": "memit",
    "auto": "auto",
    "auto, own_prompts=0": "auto:own_prompts=0",
}
ASKED = {
    "test": METHODS,
    "development": {
        f"auto, own_prompts={count}": f"auto:own_prompts={count}" for count in (0, 100)
    },
}
RESULTS = {"test": "auto_sequence", "development": "auto_sequence_development"}
UPDATES = {"test": 10, "development": 6}


def main() -> None:
    """Run what is missing and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data slices")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs, kept")
    parser.add_argument("--base", default="smollm2-135m", help="the model")
    parser.add_argument("--split", choices=tuple(ASKED), default="test")
    parser.add_argument("--only", help="methods, by semicolon; those of the split by default")
    parser.add_argument("--updates", type=int, help="ten, or six of the development split")
    parser.add_argument("--edits", type=int, default=20, help="in one update")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--summary", action="store_true", help="only write the result")
    options = parser.parse_args()
    options.updates = options.updates or UPDATES[options.split]
    if not options.summary:
        run(options)
    rows = rows_of(options.work, list(ASKED[options.split]))
    size = {"updates": options.updates, "edits": options.edits}
    write(RESULTS[options.split], {**size, "rows": summary(rows)})


def run(options: argparse.Namespace) -> None:
    """The methods that ``--work`` does not have yet."""
    file, first = DATA["counterfact"]
    asked = ASKED[options.split]
    chosen = options.only.split(";") if options.only else asked
    compare(
        options.base,
        {"counterfact": options.data / file},
        {name: asked[name] for name in chosen},
        options.work,
        seeds=range(options.seeds),
        sizes=(options.updates * options.edits,),
        offset=first if options.split == "test" else 0,
        references=(),
        exact=False,
        mode="sequential",
        chunk=options.edits,
    )


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a method, means over seeds: what each update learned, what is left of all earlier ones
    after the last, the scores of all edits then, and perplexity relative to the start."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        last = [row["steps"][-1] for row in own]
        learned = [step["new"]["reliability"]["token"] for row in own for step in row["steps"]]
        found.append(
            {
                "method": method,
                "seeds": len(own),
                "updates": min(len(row["steps"]) for row in own),
                "learned": statistics.mean(learned),
                "retained": statistics.mean(
                    step["earlier"]["reliability"]["token"] for step in last
                ),
                **{
                    role: statistics.mean(row["scores"]["after"][role]["token"] for row in own)
                    for role in ROLES
                },
                "perplexity_ratio": statistics.mean(
                    step["perplexity"] / row["perplexity"]["before"]
                    for step, row in zip(last, own, strict=True)
                ),
                "seconds": statistics.mean(row["seconds"]["train"] for row in own),
            }
        )
    return found


if __name__ == "__main__":
    main()
