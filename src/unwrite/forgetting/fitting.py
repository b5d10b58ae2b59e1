"""Which model forecasts a given matrix best: tried on its own past tasks, and remembered.

``compare`` plays the published test in turns: a part of the tasks is taken for new, then the next.
The verdict lies beside the matrix in ``fit.json``, and is void once the matrix has grown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from unwrite.errors import BadSetting
from unwrite.files import read_json, user_path, write_json
from unwrite.forgetting.completion import (
    Additive,
    Completion,
    CompletionByTask,
    ExampleMean,
    Random,
    TaskMean,
)
from unwrite.forgetting.factorization import Factorization, NuclearNorm
from unwrite.forgetting.logistic import LogisticFactorization
from unwrite.forgetting.matrix import ForgettingMatrix, place_of
from unwrite.forgetting.neighbours import Neighbours
from unwrite.forgetting.protocol import METRICS, Trial, evaluate, summary

NAME = "fit.json"
DEFAULT = "factorization"
MODELS: Mapping[str, Completion] = {
    "factorization": Factorization(),
    "neighbours": Neighbours(),
    "nuclear-norm": NuclearNorm(),
    "additive": Additive(),
    "example-mean": ExampleMean(),
    "task-mean": TaskMean(),
    "random": Random(),
}
BINARY_MODELS: Mapping[str, Completion] = {
    "logistic": LogisticFactorization(),
    "logistic-additive": LogisticFactorization(rank=0),
}
REVEALED, FOLDS = 30, 5


@dataclass(frozen=True)
class Verdict:
    """``scores``: mean and std over seeds by model and metric; ``best``: the model with the least
    RMSE (binary: the best average precision); ``trial``: how it was tried."""

    scores: Mapping[str, Mapping[str, Mapping[str, float | None]]]
    best: str
    trial: Trial
    tasks: int


def models_for(matrix: ForgettingMatrix) -> dict[str, Completion]:
    """The models that can forecast this matrix, by name."""
    binary = matrix.provenance.get("quantity") == "exact-match"
    return {**MODELS, **(BINARY_MODELS if binary else {})}


def model_named(name: str, matrix: ForgettingMatrix) -> Completion:
    """A model by name. Raises ``BadSetting`` listing those that there are."""
    known = models_for(matrix)
    if name not in known:
        raise BadSetting(f"There is no model {name!r} for this matrix. Models: {', '.join(known)}.")
    return known[name]


def compare(
    matrix: ForgettingMatrix,
    names: Sequence[str] | None = None,
    trial: Trial | None = None,
    folds: int = FOLDS,
    beside: Mapping[str, CompletionByTask] | None = None,
) -> Verdict:
    """Play the test with every part of the tasks as the new ones, and average.

    ``names``: default all models for this matrix. ``beside``: further baselines that are tried with
    them but cannot be the best, because they must be told of a task by name (``similarity``).
    ``trial.revealed`` is lowered to a third of the examples where there are few. Raises
    ``BadSetting`` with fewer than three tasks.
    """
    if len(matrix.tasks) < 3:
        raise BadSetting(
            f"The matrix has {len(matrix.tasks)} tasks; forecasts can be tried from 3 on. Collect "
            "more tasks."
        )
    others = dict(beside or {})
    known = [name for name in names or models_for(matrix) if name not in others]
    models: dict[str, Completion | CompletionByTask] = {
        name: model_named(name, matrix) for name in known
    }
    models |= {name: one for name, one in others.items() if names is None or name in names}
    trial = trial or Trial(revealed=REVEALED, seeds=(0, 1, 2))
    trial = replace(trial, revealed=min(trial.revealed, max(1, len(matrix.examples) // 3)))
    order = np.random.default_rng(0).permutation(len(matrix.tasks))
    parts = [part.tolist() for part in np.array_split(order, min(folds, len(order))) if len(part)]
    by_fold = [evaluate(matrix, models, part, trial=trial) for part in parts]
    rows = [_mean_row(same) for same in zip(*by_fold, strict=True)]
    scores = summary(rows)
    able = {name: found for name, found in scores.items() if name in known} or scores
    return Verdict(scores, _best(able, matrix), trial, len(matrix.tasks))


def remember(folder: str | Path, verdict: Verdict) -> None:
    """Write ``fit.json`` beside the matrix."""
    write_json(
        user_path(folder) / NAME,
        {
            "best": verdict.best,
            "tasks": verdict.tasks,
            "revealed": verdict.trial.revealed,
            "seeds": list(verdict.trial.seeds),
            "scores": verdict.scores,
        },
    )


def remembered(folder: str | Path, matrix: ForgettingMatrix) -> str:
    """The model to forecast with: the one that was best, or the default where nobody tried."""
    file = place_of(folder) / NAME
    if not file.is_file():
        return "logistic" if matrix.provenance.get("quantity") == "exact-match" else DEFAULT
    kept = read_json(file)
    best = kept.get("best") if isinstance(kept, dict) else None
    return best if best in models_for(matrix) else DEFAULT


def _mean_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of one model and seed, averaged over the folds in which they are defined."""
    found: dict[str, Any] = {"model": rows[0]["model"], "seed": rows[0]["seed"]}
    for metric in METRICS:
        values = [row[metric] for row in rows if row[metric] is not None]
        found[metric] = float(np.mean(values)) if values else None
    return found


def _best(
    scores: Mapping[str, Mapping[str, Mapping[str, float | None]]], matrix: ForgettingMatrix
) -> str:
    if matrix.provenance.get("quantity") == "exact-match":
        return max(scores, key=lambda name: scores[name]["pr_auc"]["mean"] or 0.0)
    return min(scores, key=lambda name: scores[name]["rmse"]["mean"] or 0.0)
