"""The predictors exactly as arXiv 2406.14026 ran them (METHODS 5.4 a-e), for comparison.

Each new task is stacked under the past ones and everything is fitted anew by plain stochastic
gradient descent, entry by entry and row by row. The models of the other modules do the same job
thousands of times faster; these say what the paper's numbers were made with, warts included: on a
small matrix of small numbers the factors never leave their start near zero (METHODS, scale
warning), unless ``scaled`` divides by the standard deviation first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from unwrite.forgetting.completion import (
    Prediction,
    checked_row,
    column_spread,
    scale_of,
    training_values,
)
from unwrite.forgetting.matrix import Array, ForgettingMatrix
from unwrite.forgetting.neighbours import mean_squared_differences, weighted_nearest

LARGEST = 100.0  # the rating scale of the original: predictions are clipped to it


@dataclass(frozen=True)
class PublishedFactorization:
    """Biases and factors by SGD: scikit-surprise's SVD with the paper's settings.

    ``rank`` 0 and ``decay`` 0.02 give the published additive model. Cost: ``epochs`` times all
    entries, for every task to be forecast; ``predict_all`` forecasts many side by side. ``seed``
    draws the factors' start (the original left it to chance); with the same
    one, scikit-surprise gives the same numbers (`benchmarks/results/forecast_speed.json`).
    """

    rank: int = 5
    epochs: int = 1000
    lr: float = 0.005
    decay: float = 0.0
    spread: float = 0.001  # of the factors at the start
    scaled: bool = False
    seed: int = 0

    def fit(self, matrix: ForgettingMatrix) -> FittedPublished:
        return FittedPublished(training_values(matrix), self)


@dataclass(frozen=True, eq=False)
class FittedPublished:
    """The past tasks; all the work is done for each new one."""

    values: Array
    model: PublishedFactorization

    def predict(self, seen: npt.ArrayLike) -> Prediction:
        row, _ = checked_row(seen, self.values.shape[1])
        return self.predict_all(row[None])[0]

    def predict_all(self, seen: npt.ArrayLike) -> list[Prediction]:
        """Forecast several tasks, each as if it were the only new one; ``seen``: (n, examples)."""
        rows = np.asarray(seen, dtype=np.float64)
        scale = scale_of(self.values) if self.model.scaled else 1.0
        descent = descend(self.values / scale, rows / scale, self.model)
        limit = LARGEST / scale if self.model.scaled else LARGEST
        noise = column_spread(self.values - scale * descent.past, 1.0)
        none = np.zeros((rows.shape[1], 1))
        return [Prediction(scale * np.clip(row, -limit, limit), noise, none) for row in descent.new]


@dataclass(frozen=True)
class Descent:
    """What SGD arrived at. ``past``: fitted values of the past tasks beside the first new one,
    (tasks, examples); ``new``: fitted rows of the new tasks, (n, examples); ``new_bias``: their
    task effects, (n,); ``example_bias``: (n, examples); ``mean``: (n,)."""

    past: Array
    new: Array
    mean: Array
    new_bias: Array
    past_bias: Array
    example_bias: Array


def descend(past: Array, new: Array, model: PublishedFactorization) -> Descent:
    """SGD on every new row (n, examples) stacked under the past rows (tasks, examples), n separate
    runs side by side. NaN entries are not visited.

    The order is that of the original, row by row and within a row example by example. An entry
    depends on its row's entry before it and on its column's entry before it and on nothing else,
    so all entries of one antidiagonal are independent: row t works on example s - t at step s, and
    the next epoch follows on its heels. Same arithmetic, a row of numbers at a time.
    """
    runs, rows, columns = len(new), len(past) + 1, past.shape[1]
    known_past, known_new = ~np.isnan(past), ~np.isnan(new)
    filled_past, filled_new = np.where(known_past, past, 0.0), np.where(known_new, new, 0.0)
    mean = (filled_past.sum() + filled_new.sum(axis=1)) / (known_past.sum() + known_new.sum(axis=1))
    # The runs come last: what an antidiagonal takes from an array are whole stretches of memory.
    value, rate = np.ascontiguousarray(filled_new.T), model.lr * np.ascontiguousarray(known_new.T)
    past_rate = model.lr * known_past
    # The generator of the original, in its order, so that equal seeds give equal starts.
    random = np.random.RandomState(model.seed)
    p = np.repeat(random.normal(0, model.spread, (rows, model.rank, 1)), runs, axis=2)
    q = np.repeat(random.normal(0, model.spread, (columns, model.rank, 1)), runs, axis=2)
    row_bias, column_bias = np.zeros((rows, runs)), np.zeros((columns, runs))
    # A row may begin its next epoch when the last row has left the example: at least ``rows`` steps
    # after it began this one.
    period = max(rows, columns)
    lag = np.arange(rows)
    for step in range(model.epochs * period + rows - 1):
        since = step - lag
        position = since % period
        active = (since >= 0) & (since < model.epochs * period) & (position < columns)
        at = np.flatnonzero(active)
        if not len(at):
            continue
        column = position[at]
        target, speed = np.empty((len(at), runs)), np.empty((len(at), runs))
        of_past = at < len(past)
        target[of_past] = filled_past[at[of_past], column[of_past], None]
        speed[of_past] = past_rate[at[of_past], column[of_past], None]
        target[~of_past], speed[~of_past] = value[column[~of_past]], rate[column[~of_past]]
        p_old, q_old = p[at], q[column]
        row_old, column_old = row_bias[at], column_bias[column]
        guess = mean + row_old + column_old + np.einsum("afn,afn->an", p_old, q_old)
        move, stay = speed * (target - guess), 1 - speed * model.decay
        row_bias[at] = stay * row_old + move
        column_bias[column] = stay * column_old + move
        if model.rank:
            move, stay = move[:, None], stay[:, None]
            p[at] = stay * p_old + move * q_old
            q[column] = stay * q_old + move * p_old
    fitted = mean + row_bias[-1] + column_bias + np.einsum("cfn,fn->cn", q, p[-1])
    beside_first = mean[0] + row_bias[:-1, :1] + column_bias[:, 0] + p[:-1, :, 0] @ q[..., 0].T
    return Descent(beside_first, fitted.T, mean, row_bias[-1], row_bias[:-1].T, column_bias.T)


@dataclass(frozen=True)
class PublishedNeighbours:
    """The paper's KNN (knn_baseline): SGD biases, then a mean of the ``k`` nearest past tasks.

    Near means a small mean squared difference (MSD) on the revealed examples; the weight is
    1 / (MSD + 1). With values far below 1 all weights are near 1, and this is little more than the
    mean of ``k`` tasks; ``neighbours.Neighbours`` knows the scale.
    """

    k: int = 40
    epochs: int = 1000
    lr: float = 0.005
    decay: float = 0.02

    def fit(self, matrix: ForgettingMatrix) -> FittedPublishedNeighbours:
        return FittedPublishedNeighbours(training_values(matrix), self)


@dataclass(frozen=True, eq=False)
class FittedPublishedNeighbours:
    """The past tasks; biases are fitted anew for each new one."""

    values: Array
    model: PublishedNeighbours

    def predict(self, seen: npt.ArrayLike) -> Prediction:
        row, _ = checked_row(seen, self.values.shape[1])
        return self.predict_all(row[None])[0]

    def predict_all(self, seen: npt.ArrayLike) -> list[Prediction]:
        """Forecast several tasks, each as if it were the only new one; ``seen``: (n, examples)."""
        rows = np.asarray(seen, dtype=np.float64)
        sgd = PublishedFactorization(
            rank=0, epochs=self.model.epochs, lr=self.model.lr, decay=self.model.decay
        )
        biases = descend(self.values, rows, sgd)
        none = np.zeros((rows.shape[1], 1))
        found = []
        for run, row in enumerate(rows):
            baseline = biases.mean[run] + biases.example_bias[run]
            residuals = self.values - baseline - biases.past_bias[run][:, None]
            weights = 1 / (mean_squared_differences(self.values, row) + 1)
            shift, noise = weighted_nearest(residuals, weights, self.model.k)
            values = np.clip(baseline + biases.new_bias[run] + shift, -LARGEST, LARGEST)
            found.append(Prediction(values, noise, none))
        return found
