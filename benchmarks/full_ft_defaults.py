"""The defaults of ``full-ft``: learning rates on a development split, the chosen one on a test split.

    python -m benchmarks.full_ft_defaults

Facts of the atlas that SmolLM2-135M really knows; those at even places are the development split,
those at odd places the test split, 32 and 50 of each drawn by seed. Each run trains until learned.
Token form only on the development split (it decides), both forms on the test split.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.measure import write
from unwrite import load, read_edits
from unwrite.edits import Edit
from unwrite.model import Model
from unwrite.observe import observe, perplexity, questions, settle
from unwrite.scores import score
from unwrite.training import Recipe, fine_tune, new_pairs

SHOWN = ("reliability", "generality", "locality")


def main() -> None:
    """Sweep on development, report on test, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", default="2e-5,3e-5,5e-5,1e-4")
    parser.add_argument("--chosen", type=float, default=Recipe().lr)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()

    model = load("smollm2-135m")
    known = read_edits("atlas", known_to=model)
    rates = [float(rate) for rate in options.rates.split(",")]
    development = [
        measured(model, sample(known[0::2], 32, seed), Recipe(lr=rate, seed=seed))
        for rate in rates
        for seed in range(options.seeds)
    ]
    test = [
        measured(model, sample(known[1::2], 50, seed), Recipe(lr=options.chosen, seed=seed))
        for seed in range(options.seeds)
    ]
    write(
        "full_ft_defaults",
        {
            "known": len(known),
            "asked": known.asked,
            "development": development,
            "development_harmonic_mean": {
                str(rate): statistics.mean(
                    one["harmonic_mean"] for one in development if one["lr"] == rate
                )
                for rate in rates
            },
            "chosen": options.chosen,
            "test": test,
        },
    )


def sample(facts: Sequence[Edit], count: int, seed: int) -> list[Edit]:
    """``count`` facts drawn by seed."""
    return random.Random(seed).sample(list(facts), min(count, len(facts)))


def measured(model: Model, facts: Sequence[Edit], recipe: Recipe) -> dict[str, Any]:
    """One training run and its scores."""
    probes = settle(model, questions(facts))
    before, perplexity_before = observe(model, probes), perplexity(model)
    trained = fine_tune(model, new_pairs(facts), recipe)
    with model.shifted(trained.delta):
        after, perplexity_after = observe(model, probes), perplexity(model)
    scores = score(before, after)
    tokens = [scores[role].token or 0.0 for role in SHOWN]
    return {
        "lr": recipe.lr,
        "seed": recipe.seed,
        "facts": len(facts),
        "epochs": trained.epochs,
        "learned": trained.learned,
        "seconds": round(trained.seconds, 1),
        "token": dict(zip(SHOWN, tokens, strict=True)),
        "exact": {role: scores[role].exact for role in SHOWN},
        "harmonic_mean": statistics.harmonic_mean(tokens),
        "old_recall": scores["old_recall"].exact,
        "perplexity": {"before": perplexity_before, "after": perplexity_after},
    }


if __name__ == "__main__":
    main()
