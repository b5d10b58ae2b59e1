"""The published test of forecasts: some tasks are new, a few of their examples are revealed.

Rows are split into past and new tasks. For every new task by itself, ``revealed`` examples are
drawn (the same for all new tasks of a seed), the model forecasts the rest, and all scores are taken
on the rest only, pooled over the new tasks (METHODS 5.4; arXiv 2406.14026, section 4). Models see
neither other new tasks nor an unrevealed entry: those are NaN in what they are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from unwrite.errors import BadSetting
from unwrite.forgetting.completion import Completion, CompletionByTask, Prediction
from unwrite.forgetting.design import d_optimal
from unwrite.forgetting.factorization import Factorization
from unwrite.forgetting.matrix import Array, ForgettingMatrix

METRICS = ("rmse", "f1", "precision", "recall", "pr_auc", "lift")


@dataclass(frozen=True)
class Trial:
    """How forecasts are tested.

    ``revealed`` examples a new task and ``seeds`` as published. ``replace``: draw with replacement
    as the original does, so that fewer may be distinct. ``choose``: "random", or "d-optimal" by a
    ``Factorization`` of the past tasks (one draw, whatever the seed). ``threshold``: an entry above
    it is forgotten. ``top``: the part of all entries that lift looks at.
    """

    revealed: int = 30
    seeds: tuple[int, ...] = tuple(range(10))
    replace: bool = False
    choose: str = "random"
    threshold: float = 0.0
    top: float = 0.05

    def __post_init__(self) -> None:
        if self.choose not in ("random", "d-optimal"):
            raise BadSetting(f"choose must be random or d-optimal, not {self.choose!r}.")
        if self.revealed < 0 or not self.seeds or not 0 < self.top <= 1:
            raise BadSetting("revealed must be at least 0, top in (0, 1], and seeds not empty.")


def evaluate(
    matrix: ForgettingMatrix,
    models: Mapping[str, Completion | CompletionByTask],
    new_tasks: Sequence[int],
    past_tasks: Sequence[int] | None = None,
    trial: Trial | None = None,
) -> list[dict[str, Any]]:
    """One row a model and seed: ``{model, seed, rmse, f1, precision, recall, pr_auc, lift, n}``.

    ``new_tasks``, ``past_tasks``: positions of rows (past: all others). Scores are None where they
    are undefined (no entry is forgotten). Every model is fitted once.
    """
    trial = trial or Trial()
    new = list(new_tasks)
    past = [t for t in range(len(matrix.tasks)) if t not in new]
    if past_tasks is not None:
        past = list(past_tasks)
    if not new or not past or set(new) & set(past):
        raise BadSetting("The test needs past tasks and new tasks, and none may be both.")
    if not trial.revealed < len(matrix.examples):
        raise BadSetting(
            f"{trial.revealed} of {len(matrix.examples)} examples are revealed, so none is left to "
            "forecast."
        )
    training = matrix.select(tasks=past)
    truth = matrix.values[new]
    # All seeds at once: a model that forecasts many tasks side by side does them side by side.
    seen = np.full((len(trial.seeds), *truth.shape), np.nan)
    for place, seed in enumerate(trial.seeds):
        columns = _revealed(training, trial, seed)
        seen[place, :, columns] = truth[:, columns].T
    names = [matrix.tasks[task] for task in new] * len(trial.seeds)
    rows = []
    for name, model in models.items():
        predictions = forecast_all(model.fit(training), np.concatenate(seen), names)
        predicted = np.stack([one.values for one in predictions]).reshape(seen.shape)
        limit = predictions[0].threshold or trial.threshold
        for seed, shown, values in zip(trial.seeds, seen, predicted, strict=True):
            hidden = np.isnan(shown) & ~np.isnan(truth)
            scores = score(truth[hidden], values[hidden], trial.threshold, limit, trial.top)
            rows.append({"model": name, "seed": seed, **scores})
    return rows


def forecast_all(fitted: Any, seen: Array, tasks: Sequence[str] = ()) -> list[Prediction]:
    """Forecasts of several new tasks, each by itself; at once where the model can. ``tasks``: their
    names, for models that must be told which task a row belongs to (``similarity``)."""
    if hasattr(fitted, "about"):
        return [fitted.about(task).predict(row) for task, row in zip(tasks, seen, strict=True)]
    together = getattr(fitted, "predict_all", None)
    if together is not None:
        found: list[Prediction] = together(seen)
        return found
    return [fitted.predict(row) for row in seen]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Mean and standard deviation over seeds, by model and metric."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        found[model] = {}
        for metric in METRICS:
            values = [row[metric] for row in mine if row[metric] is not None]
            found[model][metric] = {
                "mean": float(np.mean(values)) if values else None,
                "std": float(np.std(values)) if values else None,
            }
    return found


def score(
    truth: Array, predicted: Array, threshold: float = 0.0, limit: float = 0.0, top: float = 0.05
) -> dict[str, Any]:
    """Scores of forecasts (n,) against the truth (n,).

    ``rmse`` in the units of the truth. ``f1``, ``precision``, ``recall`` of "forgotten": truth
    above ``threshold``, forecast above ``limit``. ``pr_auc``: average precision of the ranking.
    ``lift``: how many times more of the ``top`` part by forecast are forgotten than of all.
    """
    forgotten, called = truth > threshold, predicted > limit
    hits = int((forgotten & called).sum())
    precision = hits / int(called.sum()) if called.any() else None
    recall = hits / int(forgotten.sum()) if forgotten.any() else None
    f1 = 2 * hits / (int(called.sum()) + int(forgotten.sum())) if forgotten.any() else None
    return {
        "n": len(truth),
        "rmse": float(np.sqrt(((truth - predicted) ** 2).mean())) if len(truth) else None,
        "f1": f1,
        "precision": precision,
        "recall": recall,
        "pr_auc": average_precision(forgotten, predicted),
        "lift": lift(forgotten, predicted, top),
    }


def average_precision(forgotten: npt.NDArray[np.bool_], predicted: Array) -> float | None:
    """Area under the precision-recall curve as a sum over the thresholds between distinct
    forecasts, so that ties count together and chance scores the base rate. None without cases."""
    if not forgotten.any():
        return None
    order = np.argsort(-predicted, kind="stable")
    hits = np.cumsum(forgotten[order])
    last_of_tie = np.append(np.diff(predicted[order]) != 0, True)
    hits, called = hits[last_of_tie], np.flatnonzero(last_of_tie) + 1
    gained = np.diff(np.concatenate([[0], hits]))
    return float((gained * hits / called).sum() / hits[-1])


def lift(forgotten: npt.NDArray[np.bool_], predicted: Array, top: float) -> float | None:
    """Share of forgotten entries among the ``top`` part by forecast, over their share among all.
    Entries tied at the border count in proportion. None without cases."""
    if not forgotten.any():
        return None
    count = max(1, round(top * len(predicted)))
    border = np.sort(predicted)[-count]
    above, tied = predicted > border, predicted == border
    hits = forgotten[above].sum() + (count - above.sum()) * forgotten[tied].mean()
    return float(hits / count / forgotten.mean())


def _revealed(training: ForgettingMatrix, trial: Trial, seed: int) -> npt.NDArray[np.intp]:
    if trial.choose == "d-optimal":
        return d_optimal(Factorization().fit(training), trial.revealed)
    random = np.random.default_rng(seed)
    drawn = random.choice(len(training.examples), trial.revealed, replace=trial.replace)
    return np.unique(drawn)
