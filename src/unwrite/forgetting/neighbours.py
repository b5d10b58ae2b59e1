"""Neighbours: a new task will do what past tasks did that look like it so far.

A kernel regression on what additive effects leave over. Nearness is measured in units of that
remainder, so that the weights tell tasks apart whatever the scale of the numbers (the published
KNN does not: METHODS 5.4 c, kept as ``published.PublishedNeighbours``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from unwrite.errors import BadSetting
from unwrite.forgetting.completion import (
    Prediction,
    additive_effects,
    checked_row,
    scale_of,
    training_values,
)
from unwrite.forgetting.matrix import Array, ForgettingMatrix

WIDTHS = (0.05, 0.1, 0.2, 0.5, 1.0, 4.0)
REVEALED, LEFT_OUT_EXAMPLES, DRAWS = 30, 2000, 2


@dataclass(frozen=True)
class Neighbours:
    """Weighted mean of the ``k`` nearest past tasks, weight exp(-MSD / (width * mean MSD)).

    MSD: the mean squared difference of the residuals on the revealed examples; a task's own mean
    level is taken out first. ``width``: None chooses it by forecasting each past task from the
    others. A wide kernel ends at the additive model; with nothing revealed all tasks weigh alike.
    """

    k: int = 40
    width: float | None = None

    def __post_init__(self) -> None:
        if self.k < 1 or (self.width is not None and not self.width > 0):
            raise BadSetting(f"k must be at least 1 and width above 0, not {self.k}, {self.width}.")

    def fit(self, matrix: ForgettingMatrix) -> FittedNeighbours:
        values = training_values(matrix)
        scale = scale_of(values)
        task, example = additive_effects(values / scale)
        residuals = values / scale - task[:, None] - example
        width = self.width
        if width is None:
            width = _chosen_width(residuals, self.k)
        return FittedNeighbours(example, residuals, float(task.mean()), self.k, width, scale)


@dataclass(frozen=True, eq=False)
class FittedNeighbours:
    """Example effects (examples,) and residuals (tasks, examples), divided by ``scale``."""

    example: Array
    residuals: Array
    level: float
    k: int
    width: float
    scale: float

    def predict(self, seen: npt.ArrayLike) -> Prediction:
        row, known = checked_row(seen, len(self.example))
        differences = row / self.scale - self.example
        effect = float(differences[known].mean()) if known.any() else self.level
        shift, noise = _kernel_mean(self.residuals, differences - effect, self.k, self.width)
        # The revealed examples' mean shift is part of their level already: the level is what is
        # left when the neighbours have explained what they can.
        if known.any():
            effect = float((differences - shift)[known].mean())
        return Prediction(
            self.scale * (self.example + effect + shift),
            self.scale * noise,
            np.zeros((len(row), 1)),
        )


def _kernel_mean(residuals: Array, row: Array, k: int, width: float) -> tuple[Array, Array]:
    """Mean and spread of the residuals of the tasks nearest to ``row`` (NaN where unobserved)."""
    seen = np.flatnonzero(~np.isnan(row))
    distances = mean_squared_differences(residuals[:, seen], row[seen])
    finite = np.isfinite(distances)
    if not finite.any() or not distances[finite].mean() > 0:
        return weighted_nearest(residuals, np.ones(len(residuals)), k)
    # From the nearest one on, so that not all weights vanish when every task is far away.
    beyond = distances - distances[finite].min()
    weights = np.exp(-beyond / (width * distances[finite].mean()))
    return weighted_nearest(residuals, weights, k)


def _chosen_width(residuals: Array, k: int) -> float:
    """The width that forecasts past tasks best, each from 30 of its entries and the others."""
    tasks, examples = residuals.shape
    if tasks < 3 or examples < 2:
        return 1.0
    random = np.random.default_rng(0)
    known = ~np.isnan(residuals)
    # Drawn by the order of the sums, so that the order of the columns plays no part.
    by_sum = np.argsort(np.where(known, residuals, 0.0).sum(axis=0), kind="stable")
    part = residuals[:, by_sum[random.permutation(examples)[:LEFT_OUT_EXAMPLES]]]
    errors = np.zeros(len(WIDTHS))
    for task, row in enumerate(part):
        others = np.delete(part, task, axis=0)
        observed = np.flatnonzero(~np.isnan(row))
        for _ in range(DRAWS):
            mixed = random.permutation(observed)
            count = min(REVEALED, len(mixed) // 2)
            revealed = np.full(part.shape[1], np.nan)
            revealed[mixed[:count]] = row[mixed[:count]]
            for number, width in enumerate(WIDTHS):
                shift, _ = _kernel_mean(others, revealed, k, width)
                errors[number] += float(((row - shift)[mixed[count:]] ** 2).sum())
    return WIDTHS[int(errors.argmin())]


def mean_squared_differences(past: Array, row: Array) -> Array:
    """Between a row and each past task on the entries that both have, (tasks,); infinite where
    they have none in common."""
    differences = (past - row) ** 2
    common = ~np.isnan(differences)
    counts = common.sum(axis=1)
    sums = np.where(common, differences, 0.0).sum(axis=1)
    means: Array = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    return means


def weighted_nearest(residuals: Array, weights: Array, k: int) -> tuple[Array, Array]:
    """Weighted mean and weighted standard deviation, (examples,) each, of the ``k`` rows with the
    largest weights, over the entries that are known; zero mean where none is."""
    nearest = np.argsort(-weights, kind="stable")[:k]
    nearest = nearest[weights[nearest] > 0]
    chosen, weight = residuals[nearest], weights[nearest, None]
    known = ~np.isnan(chosen)
    mass = np.maximum((known * weight).sum(axis=0), np.finfo(float).tiny)
    filled = np.where(known, chosen, 0.0)
    mean = (weight * filled).sum(axis=0) / mass
    square = (weight * known * (filled - mean) ** 2).sum(axis=0) / mass
    return mean, np.sqrt(square)
