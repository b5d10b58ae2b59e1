"""How well what a new task destroys can be forecast: all models, in and out of domain.

    python -m benchmarks.forgetting_prediction --matrix FOLDER [--features hidden,gradient]
        [--published 2]

Reads the matrix that ``benchmarks.forgetting_matrix`` collected, and the features beside it for the
baselines of similarity; ``--features`` makes those that are missing (hidden, gradient, and semantic
with the extra of that name). In domain: bundled tasks from bundled tasks, a fifth of them new at a
time. Out of domain: knowledge updates (the relations of atlas) from bundled tasks. 30 revealed
examples a new task, scores on the others, mean and spread over seeds (METHODS 5.4); what an update
itself changes is not scored. ``--published N`` adds the paper's own models, which are fitted anew
for every new task, on N seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.forgetting_matrix import PAIRS, changed_by, tasks_of_bundled_text
from benchmarks.measure import write
from unwrite import load
from unwrite.errors import UnwriteError
from unwrite.forgetting import (
    ForgettingMatrix,
    PublishedFactorization,
    PublishedNeighbours,
    Trial,
    evaluate,
)
from unwrite.forgetting.examples import from_details
from unwrite.forgetting.features import make_features
from unwrite.forgetting.fitting import MODELS
from unwrite.forgetting.protocol import METRICS, summary
from unwrite.forgetting.similarity import Features, models_beside
from unwrite.training import Pair

BANK, UPDATES = "bank/", "atlas/"
REVEALED, FOLDS = 30, 5
Table = dict[str, dict[str, dict[str, float | None]]]


def main() -> None:
    """Test and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--matrix", required=True)
    parser.add_argument("--base", default="smollm2-135m", help="for --features")
    parser.add_argument("--features", default="", metavar="KIND,...")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--published", type=int, default=0, metavar="SEEDS")
    options = parser.parse_args()
    folder = Path(options.matrix)
    matrix = ForgettingMatrix.load(folder)
    learned = tasks_of_bundled_text(None, PAIRS)
    tasks = {name: learned[name] for name in matrix.tasks}
    kinds = [kind for kind in options.features.split(",") if kind]
    describe(folder, matrix, kinds, options.base, tasks)
    result = run(matrix, models_beside(folder, matrix), options.seeds, options.published)
    write("forgetting_prediction", result)


def describe(
    folder: Path,
    matrix: ForgettingMatrix,
    kinds: Sequence[str],
    base: str,
    tasks: Mapping[str, Sequence[Pair]],
) -> None:
    """Make the features of these kinds, unless they are there for these tasks already."""
    examples = from_details(matrix.examples, matrix.example_details)
    for kind in kinds:
        try:
            Features.load(folder, kind).of_tasks(matrix.tasks)
        except UnwriteError:  # not there, damaged, or of fewer tasks
            make_features(kind, load(base), tasks, examples).save(folder, kind)


def run(
    matrix: ForgettingMatrix,
    beside: Mapping[str, Any] | None = None,
    seeds: int = 10,
    published: int = 0,
) -> dict[str, Any]:
    """Everything that the result file says; tasks are named ``bank/...`` or ``atlas/...``."""
    bank = [n for n, name in enumerate(matrix.tasks) if name.startswith(BANK)]
    updates = [n for n, name in enumerate(matrix.tasks) if name.startswith(UPDATES)]
    models = {**MODELS, **(beside or {})}
    slow = {
        "published": PublishedFactorization(),
        "published, scaled": PublishedFactorization(scaled=True),
        "published neighbours": PublishedNeighbours(),
    }
    splits = {"in_domain": folds(bank), "out_of_domain": [(updates, bank)]}
    forecast = collateral(matrix)
    found: dict[str, Any] = {
        "tasks": {"bank": len(bank), "updates": len(updates)},
        "examples": len(matrix.examples),
        "base": matrix.provenance.get("base_name"),
        "tuner": matrix.provenance.get("tuner"),
        "revealed": _revealed(matrix),
        "seeds": seeds,
        "forgotten_share": float((matrix.values > 0).mean()),
        "spread": float(np.nanstd(matrix.values)),
        "rank_profile": matrix.rank_profile(),
    }
    for name, parts in splits.items():
        if not all(new and past for new, past in parts):
            continue  # a matrix still being collected
        found[name] = table(forecast, parts, models, seeds)
        chosen = {"factorization, chosen": MODELS["factorization"]}
        found[name] |= table(forecast, parts, chosen, 1, choose="d-optimal")
        if published:
            found[name] |= table(forecast, parts, slow, published)
    return found


def collateral(matrix: ForgettingMatrix) -> ForgettingMatrix:
    """The matrix without what updates change on purpose: nobody needs a forecast of that."""
    values = matrix.values.copy()
    prompts = [matrix.example_details[name].get("prompt") for name in matrix.examples]
    for row, task in enumerate(matrix.tasks):
        own = changed_by(task)
        values[row, [prompt in own for prompt in prompts]] = np.nan
    return replace(matrix, values=values)


def table(
    matrix: ForgettingMatrix,
    parts: Sequence[tuple[Sequence[int], Sequence[int]]],
    models: Mapping[str, Any],
    seeds: int,
    threshold: float = 0.0,
    choose: str = "random",
) -> Table:
    """Mean and spread over seeds by model and metric; a seed's score is its mean over the parts,
    each (new tasks, past tasks). What lost more than ``threshold`` is forgotten."""
    trial = Trial(_revealed(matrix), tuple(range(seeds)), choose=choose, threshold=threshold)
    by_part = [evaluate(matrix, models, new, past, trial) for new, past in parts]
    rows = []
    for same in zip(*by_part, strict=True):
        row = {"model": same[0]["model"], "seed": same[0]["seed"]}
        for metric in METRICS:
            values = [one[metric] for one in same if one[metric] is not None]
            row[metric] = float(np.mean(values)) if values else None
        rows.append(row)
    return summary(rows)


def folds(tasks: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Every task is new once: (new, past) for each fifth of them."""
    order = np.random.default_rng(0).permutation(tasks)
    parts = [part.tolist() for part in np.array_split(order, FOLDS) if len(part)]
    return [(part, [task for task in tasks if task not in part]) for part in parts] or [([], [])]


def _revealed(matrix: ForgettingMatrix) -> int:
    return min(REVEALED, len(matrix.examples) // 3)


if __name__ == "__main__":
    main()
