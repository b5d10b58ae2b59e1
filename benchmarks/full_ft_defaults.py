"""The defaults of ``full-ft``: learning rates on a development split, the chosen one on test.

    python -m benchmarks.full_ft_defaults

Facts of the atlas that SmolLM2-135M really knows; those at even places are the development split,
those at odd places the test split, drawn by seed. Each run trains until learned. On the development
split only the token form is measured (it decides), on the test split both.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.measure import committed, write
from unwrite import load, read_edits
from unwrite.edits import Edit
from unwrite.model import Model
from unwrite.observe import Question, observe, perplexity, questions, settle
from unwrite.scores import Scores, as_json, score
from unwrite.training import Recipe, Trained, fine_tune, new_pairs

SHOWN = ("reliability", "generality", "locality")


def main() -> None:
    """Sweep on development, report on test, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", default="3e-5,5e-5,1e-4")
    parser.add_argument("--chosen", type=float, default=Recipe().lr)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--test-seeds", type=int, default=1)
    parser.add_argument("--facts", type=int, default=24, help="per run on development")
    parser.add_argument("--test-facts", type=int, default=50)
    parser.add_argument(
        "--test-only", action="store_true", help="keep the development runs of the last result"
    )
    options = parser.parse_args()

    model = load("smollm2-135m")
    known = read_edits("atlas", known_to=model)
    if options.test_only:
        development = committed("full_ft_defaults")["development"]
    else:
        development = [
            quick(
                model, sample(known[0::2], options.facts, seed), Recipe(lr=float(rate), seed=seed)
            )
            for rate in options.rates.split(",")
            for seed in range(options.seeds)
        ]
    rates = sorted({one["lr"] for one in development})
    test = [
        thorough(
            model,
            sample(known[1::2], options.test_facts, seed),
            Recipe(lr=options.chosen, seed=seed),
        )
        for seed in range(options.test_seeds)
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


def quick(model: Model, facts: Sequence[Edit], recipe: Recipe) -> dict[str, Any]:
    """One training run and its token scores, without free generation."""
    probes = [probe for probe in questions(facts) if probe.role in SHOWN]
    before = forced(model, probes)
    trained = fine_tune(model, new_pairs(facts), recipe)
    with model.shifted(trained.delta):
        scores = score(before, forced(model, probes))
    return {**summary(facts, recipe, trained), **in_tokens(scores)}


def thorough(model: Model, facts: Sequence[Edit], recipe: Recipe) -> dict[str, Any]:
    """One training run with everything that an update measures."""
    probes = settle(model, questions(facts))
    before, perplexity_before = observe(model, probes), perplexity(model)
    trained = fine_tune(model, new_pairs(facts), recipe)
    with model.shifted(trained.delta):
        after, perplexity_after = observe(model, probes), perplexity(model)
    scores = score(before, after)
    return {
        **summary(facts, recipe, trained),
        **in_tokens(scores),
        "scores": as_json(scores),
        "perplexity": {"before": perplexity_before, "after": perplexity_after},
    }


def forced(model: Model, probes: Sequence[Question]) -> list[dict[str, Any]]:
    """Rows for the token form only (no text)."""
    results = model.force([model.tokens(probe.prompt, str(probe.target)) for probe in probes])
    return [
        {
            "edit": probe.edit,
            "role": probe.role,
            "prompt": probe.prompt,
            "target": probe.target,
            "target_tokens": len(result.targets),
            "matched_tokens": result.matched,
            "predicted": list(result.predicted),
            "text": "",
        }
        for probe, result in zip(probes, results, strict=True)
    ]


def in_tokens(scores: Scores) -> dict[str, Any]:
    """The three scores in the token form and their harmonic mean."""
    tokens = [scores[role].token or 0.0 for role in SHOWN]
    return {
        "token": dict(zip(SHOWN, tokens, strict=True)),
        "harmonic_mean": statistics.harmonic_mean(tokens),
    }


def summary(facts: Sequence[Edit], recipe: Recipe, trained: Trained) -> dict[str, Any]:
    """How a run went."""
    return {
        "lr": recipe.lr,
        "seed": recipe.seed,
        "facts": len(facts),
        "epochs": trained.epochs,
        "learned": trained.learned,
        "seconds": round(trained.seconds, 1),
    }


if __name__ == "__main__":
    main()
