"""Forecasting: what a new task will do to every example, from what it did to a few.

All models keep one small protocol: ``fit(matrix)`` learns from past tasks, ``predict(seen)`` takes
the new task's row with NaN where nobody has looked and returns the whole row with its uncertainty
(METHODS 5.4; arXiv 2406.14026, section 4). Nothing here reads an entry that is NaN.

Every model works on values divided by their standard deviation, so that scale does not matter.

Here are the protocol, the additive model and the baselines; ``factorization``, ``neighbours``,
``nuclear`` and ``logistic`` hold the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from unwrite.errors import BadSetting
from unwrite.forgetting.matrix import Array, ForgettingMatrix


@dataclass(frozen=True, eq=False)
class Prediction:
    """The forecast row of one task, float64 (examples,).

    ``values``: expected forgetting. ``noise``: standard deviation of what each example does on its
    own. ``shared``: (examples, k) directions in which all examples may be off together, one
    standard deviation each: the uncertainty of what the few observations say about the task.
    ``threshold``: an example counts as forgotten above it (0, or 0.5 where values are
    probabilities).
    """

    values: Array
    noise: Array
    shared: Array
    threshold: float = 0.0

    @property
    def std(self) -> Array:
        """Standard deviation of the truth around ``values``, (examples,)."""
        return np.sqrt(self.noise**2 + np.einsum("jk,jk->j", self.shared, self.shared))

    @property
    def ranking(self) -> npt.NDArray[np.intp]:
        """Positions of the examples, the most endangered first; ties in the order of examples."""
        return np.argsort(-self.values, kind="stable")

    def count_above(
        self, threshold: float | None = None, draws: int = 64, seed: int = 0
    ) -> tuple[float, float]:
        """How many examples are expected above ``threshold``, and the standard deviation of that.

        The errors that examples share make the count far less certain than independent ones would,
        so it is averaged over ``draws`` normal draws of them; the rest is counted in closed form.
        Probabilities (``threshold`` 0.5) are counted as what they are.
        """
        if self.threshold == 0.5 and threshold is None:
            certain = np.clip(self.values, 0, 1)
            return float(certain.sum()), math.sqrt(float((certain * (1 - certain)).sum()))
        limit = self.threshold if threshold is None else threshold
        random = np.random.default_rng(seed)
        counts, variances = [], []
        for _ in range(draws if self.shared.any() else 1):
            shift = self.shared @ random.standard_normal(self.shared.shape[1])
            above = probability_above(self.values + shift - limit, self.noise)
            counts.append(float(above.sum()))
            variances.append(float((above * (1 - above)).sum()))
        return float(np.mean(counts)), math.sqrt(float(np.var(counts) + np.mean(variances)))


class Fitted(Protocol):
    """A model that has seen past tasks."""

    def predict(self, seen: npt.ArrayLike) -> Prediction:
        """The whole row of a new task from ``seen``, (examples,), NaN where unobserved."""


class Completion(Protocol):
    """A model that can learn from past tasks."""

    def fit(self, matrix: ForgettingMatrix) -> Fitted:
        """Learn from the observed entries of ``matrix``."""


class FittedByTask(Protocol):
    """A model that must be told which task a new row belongs to."""

    def about(self, task: str) -> Fitted:
        """The model for one task, by its label."""


class CompletionByTask(Protocol):
    """A model that learns from past tasks and knows tasks by their labels."""

    def fit(self, matrix: ForgettingMatrix) -> FittedByTask:
        """Learn from the observed entries of ``matrix``."""


# ---- additive ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Additive:
    """Task effect + example effect (METHODS 5.4 a), by least squares instead of SGD.

    The published SGD shrinks every effect by about 2 % (its weight decay is 0.02); here nothing is
    shrunk, so additive data are recovered exactly.
    """

    def fit(self, matrix: ForgettingMatrix) -> FittedAdditive:
        values = training_values(matrix)
        task, example = additive_effects(values)
        residuals = values - task[:, None] - example
        freedom = max(1 - 1 / len(values), 1e-9)  # one example effect is fitted to each column
        noise = column_spread(residuals, freedom)
        return FittedAdditive(example, noise, float(task.mean()), float(task.std()))


@dataclass(frozen=True, eq=False)
class FittedAdditive:
    """Example effects (examples,), the spread of their residuals, and of the tasks' effects."""

    example: Array
    noise: Array
    task_mean: float
    task_spread: float

    def predict(self, seen: npt.ArrayLike) -> Prediction:
        row, known = checked_row(seen, len(self.example))
        differences = row[known] - self.example[known] - self.task_mean
        count = len(differences)
        if count:
            effect = float(differences.mean())
            unsure = math.sqrt(float((self.noise[known] ** 2).sum())) / count
        else:
            effect, unsure = 0.0, self.task_spread
        values = self.example + self.task_mean + effect
        return Prediction(values, self.noise, np.full((len(values), 1), unsure))


# ---- baselines -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExampleMean:
    """Every task does what tasks do on average: the mean of each example over past tasks."""

    def fit(self, matrix: ForgettingMatrix) -> FittedConstant:
        values = training_values(matrix)
        _, example = additive_effects(values)
        means = np.where(np.isnan(values).all(axis=0), example, _nanmean(values))
        return FittedConstant(means, column_spread(values - means, 1.0))


@dataclass(frozen=True, eq=False)
class FittedConstant:
    """The same row (examples,) for every task."""

    means: Array
    noise: Array

    def predict(self, seen: npt.ArrayLike) -> Prediction:
        checked_row(seen, len(self.means))
        return Prediction(self.means, self.noise, np.zeros((len(self.means), 1)))


@dataclass(frozen=True)
class TaskMean:
    """Every example suffers alike: the mean of the new task's observed entries."""

    def fit(self, matrix: ForgettingMatrix) -> FittedTaskMean:
        values = training_values(matrix)
        means = np.nanmean(values, axis=1)
        spread = float(np.sqrt(np.nanmean((values - means[:, None]) ** 2)))
        return FittedTaskMean(values.shape[1], float(means.mean()), float(means.std()), spread)


@dataclass(frozen=True)
class FittedTaskMean:
    """Mean and spread of past tasks' means, and of the entries around their task's mean."""

    examples: int
    mean: float
    mean_spread: float
    spread: float

    def predict(self, seen: npt.ArrayLike) -> Prediction:
        row, known = checked_row(seen, self.examples)
        count = int(known.sum())
        mean = float(row[known].mean()) if count else self.mean
        unsure = self.spread / math.sqrt(count) if count else self.mean_spread
        return Prediction(
            np.full(self.examples, mean),
            np.full(self.examples, self.spread),
            np.full((self.examples, 1), unsure),
        )


@dataclass(frozen=True)
class Random:
    """Chance: entries of past tasks, drawn at random."""

    seed: int = 0

    def fit(self, matrix: ForgettingMatrix) -> FittedRandom:
        values = training_values(matrix)
        return FittedRandom(values[~np.isnan(values)], len(matrix.examples), self.seed)


@dataclass(frozen=True, eq=False)
class FittedRandom:
    """Entries to draw from."""

    entries: Array
    examples: int
    seed: int

    def predict(self, seen: npt.ArrayLike) -> Prediction:
        checked_row(seen, self.examples)
        drawn = np.random.default_rng(self.seed).choice(self.entries, self.examples)
        noise = np.full(self.examples, self.entries.std())
        return Prediction(drawn, noise, np.zeros((self.examples, 1)))


# ---- shared by the models ------------------------------------------------------------------------


def training_values(matrix: ForgettingMatrix) -> Array:
    """The values of past tasks: at least one task, and something observed in each.

    Raises ``BadSetting`` otherwise: there is nothing to learn from.
    """
    if not matrix.tasks or not matrix.examples:
        raise BadSetting("The forgetting matrix is empty; collect some tasks first.")
    blank = ~matrix.observed.any(axis=1)
    if blank.any():
        raise BadSetting(
            f"Nothing was observed of the task {matrix.tasks[int(blank.argmax())]!r}; collect it, "
            "or leave it out."
        )
    return matrix.values


def checked_row(seen: npt.ArrayLike, examples: int) -> tuple[Array, npt.NDArray[np.bool_]]:
    """A new task's row as float64 and which of its entries are observed."""
    row = np.asarray(seen, dtype=np.float64)
    if row.shape != (examples,):
        raise BadSetting(
            f"The model was fitted on {examples} examples; the new task's row must have as many "
            f"entries (NaN where unobserved), not the shape {row.shape}."
        )
    if np.isinf(row).any():
        raise BadSetting("The new task's row has an infinite entry; leave it out (NaN).")
    return row, ~np.isnan(row)


def scale_of(values: Array) -> float:
    """Standard deviation of the observed entries, by which models divide; 1 if there is none."""
    scale = float(np.nanstd(values))
    return scale if scale > 0 else 1.0


def additive_effects(values: Array, sweeps: int = 200) -> tuple[Array, Array]:
    """Task effects (tasks,) and example effects (examples,) that sum to zero, by least squares.

    One sweep is exact when everything was observed; with gaps the two are solved in turns until
    nothing moves by more than 1e-12 of the spread. An example never observed gets effect zero.
    """
    known = ~np.isnan(values)
    measured = known.any(axis=0)
    per_task, per_example = known.sum(axis=1), np.maximum(known.sum(axis=0), 1)
    filled = np.where(known, values, 0.0)
    example = np.zeros(values.shape[1])
    enough = 1e-12 * scale_of(values)
    for _ in range(sweeps):
        task = (filled - known * example).sum(axis=1) / per_task
        before = example
        example = (filled - known * task[:, None]).sum(axis=0) / per_example
        # Only the sum of both is determined: the mean of the example effects goes to the tasks.
        mean = example[measured].mean()
        example, task = np.where(measured, example - mean, 0.0), task + mean
        if np.abs(example - before).max() <= enough:
            break
    return task, example


def column_spread(residuals: Array, freedom: float, prior: float = 4.0) -> Array:
    """Standard deviation of each example's residuals, (examples,), pulled towards the overall one.

    ``freedom``: degrees of freedom left per residual. ``prior``: as many tasks' worth of the
    overall variance are added to every example, because few tasks say little about one variance.
    """
    known = ~np.isnan(residuals)
    squares = np.where(known, residuals, 0.0) ** 2
    counts = freedom * known.sum(axis=0)
    overall = squares.sum() / max(counts.sum(), 1.0)
    spread: Array = np.sqrt((squares.sum(axis=0) + prior * overall) / (counts + prior))
    return spread


def _nanmean(values: Array) -> Array:
    known = ~np.isnan(values)
    sums: Array = np.where(known, values, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return sums


def probability_above(margin: Array, noise: Array) -> Array:
    """Probability that margin + noise * standard normal > 0."""
    import torch  # numpy has no error function

    safe = np.where(noise > 0, noise, 1.0)
    ratio = torch.from_numpy(margin / safe / math.sqrt(2))
    smooth: Array = 0.5 * torch.erfc(-ratio).numpy()
    return np.where(noise > 0, smooth, (margin > 0).astype(np.float64))
