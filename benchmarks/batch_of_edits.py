"""A hundred edits in one update against a hundred updates of one edit each.

    python -m benchmarks.batch_of_edits --edits counterfact_easyedit_2000.json [--repeats 3]

Full fine-tuning by its defaults until the answers are learned, all at once and one by one, each
from the base. The single ones are timed on a sample and scaled. What is timed is the training, with
snapshot and delta. The goal is a tenth of the time an edit, or less.
"""

from __future__ import annotations

import argparse
import random

from benchmarks.measure import ratio, write
from unwrite import load, read_edits
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
    pairs = new_pairs(read_edits(options.edits, limit=options.limit))
    recipe, draw = FullFT(), random.Random(0)
    fine_tune(model, pairs[:1], recipe)  # warm
    together, alone, epochs = [], [], []
    for _ in range(options.repeats):
        whole = fine_tune(model, pairs, recipe)
        singles = [fine_tune(model, [pair], recipe) for pair in draw.sample(pairs, options.sample)]
        together.append(whole.seconds / len(pairs))
        alone.append(sum(one.seconds for one in singles) / len(singles))
        epochs.append({"together": whole.epochs, "alone": [one.epochs for one in singles]})
    write(
        "batch_of_edits",
        {
            "edits": len(pairs),
            "sample": options.sample,
            "epochs": epochs,
            "seconds_an_edit": {"together": together, "alone": alone},
            "alone_over_together": ratio(alone, together),
            "goal": GOAL,
        },
    )


if __name__ == "__main__":
    main()
