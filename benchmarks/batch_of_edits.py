"""A hundred edits in one update against a hundred updates of one edit each.

    python -m benchmarks.batch_of_edits --edits counterfact_easyedit_2000.json [--repeats 3]

Full fine-tuning by its defaults until the answers are learned, all at once and one by one, each
from the base. The single ones are timed on a sample and scaled. Timed are the training alone, with
snapshot and delta, and whole updates of a home: with measuring before and after, verifying, storing
and the ledger. The goal is a tenth of the time an edit, or less.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import unwrite
from benchmarks.measure import ratio, write
from unwrite import load, read_edits
from unwrite.edits import Edit
from unwrite.methods.full_ft import FullFT
from unwrite.training import fine_tune, new_pairs

GOAL = 10


def main() -> None:
    """Train in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", default="atlas", help="a file of edits, or atlas")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--sample", type=int, default=6, help="single edits in a turn")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model = load("smollm2-135m")
    edits = list(read_edits(options.edits, limit=options.limit))
    pairs, recipe, draw = new_pairs(edits), FullFT(), random.Random(0)
    fine_tune(model, pairs[:1], recipe)  # warm
    together, alone, epochs = [], [], []
    updates: dict[str, list[float]] = {"together": [], "alone": []}
    for _ in range(options.repeats):
        whole = fine_tune(model, pairs, recipe)
        drawn = draw.sample(range(len(pairs)), options.sample)
        singles = [fine_tune(model, [pairs[one]], recipe) for one in drawn]
        together.append(whole.seconds / len(pairs))
        alone.append(sum(one.seconds for one in singles) / len(singles))
        epochs.append({"together": whole.epochs, "alone": [one.epochs for one in singles]})
        updates["together"].append(update_seconds(edits) / len(edits))
        each = [update_seconds([edits[one]]) for one in drawn]
        updates["alone"].append(sum(each) / len(each))
    write(
        "batch_of_edits",
        {
            "edits": len(pairs),
            "sample": options.sample,
            "epochs": epochs,
            "seconds_an_edit": {"together": together, "alone": alone},
            "alone_over_together": ratio(alone, together),
            "update_seconds_an_edit": updates,
            "update_alone_over_together": ratio(updates["alone"], updates["together"]),
            "goal": GOAL,
        },
    )


def update_seconds(edits: Sequence[Edit]) -> float:
    """Seconds of one update of a new home; opening it and loading the model are not counted."""
    with tempfile.TemporaryDirectory() as place:
        home = unwrite.open(Path(place, "home"), base="smollm2-135m")
        home.model("base")
        started = time.perf_counter()
        home.update(edits, FullFT())
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
