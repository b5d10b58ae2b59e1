"""Forecasting the binary matrix: the odds that a right answer becomes wrong (METHODS 5.4 d, e).

    log odds[t, j] = task_t + example_j + p_t . q_j

``LogisticFactorization`` fits past tasks once and a new one by Newton's method on its few
observations; rank 0 is the additive logistic model. ``PublishedLogistic`` is the paper's gradient
ascent on everything anew for each task.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from unwrite.errors import BadSetting
from unwrite.forgetting.completion import Prediction, checked_row, training_values
from unwrite.forgetting.matrix import Array, ForgettingMatrix

NEWTON_STEPS = 50
# Log odds beyond this are certainty in double precision; it keeps separable data finite.
LARGEST_LOGIT = 30.0


@dataclass(frozen=True)
class LogisticFactorization:
    """Logistic regression with task and example effects and ``rank`` factors.

    ``ridge`` penalises factors and effects by half their square, and keeps separable data finite
    (the published 0.1). The fit on past tasks is by L-BFGS (``torch.optim``); a new task takes a
    few Newton steps in ``rank + 1`` unknowns. Predicted ``values`` are probabilities.
    """

    rank: int = 5
    ridge: float = 0.1
    iterations: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 0 or not self.ridge > 0:
            raise BadSetting(
                f"rank must be at least 0 and ridge above 0, not {self.rank}, {self.ridge}."
            )

    def fit(self, matrix: ForgettingMatrix) -> FittedLogistic:
        values = binary_values(matrix)
        task, example, p, q = self._factors(values)
        points = np.column_stack([task, p])
        # In coordinates in which past tasks have mean zero and spread one, the ridge is 1.
        centre = points.mean(axis=0)
        spread = np.maximum(points.std(axis=0), 1e-6)
        design = np.column_stack([np.ones(len(example)), q])
        return FittedLogistic(example + design @ centre, design * spread)

    def _factors(self, values: Array) -> tuple[Array, Array, Array, Array]:
        known = torch.from_numpy(~np.isnan(values))
        target = torch.from_numpy(np.nan_to_num(values))
        tasks, examples = values.shape
        random = torch.Generator().manual_seed(self.seed)

        def start(*shape: int) -> torch.Tensor:
            drawn = 0.01 * torch.randn(*shape, generator=random, dtype=torch.float64)
            return drawn.requires_grad_()

        task, example = start(tasks), start(examples)
        p, q = start(tasks, self.rank), start(examples, self.rank)
        unknowns = [task, example, p, q]
        optimizer = torch.optim.LBFGS(
            unknowns, max_iter=self.iterations, line_search_fn="strong_wolfe"
        )

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            logits = task[:, None] + example + p @ q.T
            losses = torch.nn.functional.binary_cross_entropy_with_logits(
                logits, target, reduction="none"
            )
            penalty = sum((one**2).sum() for one in unknowns)
            total = losses[known].sum() + 0.5 * self.ridge * penalty
            total.backward()
            return total

        optimizer.step(loss)
        found = [one.detach().numpy() for one in unknowns]
        return found[0], found[1], found[2], found[3]


@dataclass(frozen=True, eq=False)
class FittedLogistic:
    """Log odds = ``offset`` (examples,) + ``design`` (examples, d) @ u, with u ~ N(0, 1) over past
    tasks."""

    offset: Array
    design: Array

    def predict(self, seen: npt.ArrayLike) -> Prediction:
        row, known = checked_row(seen, len(self.offset))
        _check_binary(row[known])
        seen_at = np.flatnonzero(known)
        offset, design = self.offset[seen_at], self.design[seen_at]
        point = np.zeros(design.shape[1])
        precision = np.eye(design.shape[1])
        for _ in range(NEWTON_STEPS):
            probability = _sigmoid(offset + design @ point)
            weight = probability * (1 - probability)
            precision = np.eye(design.shape[1]) + (design * weight[:, None]).T @ design
            gradient = design.T @ (row[seen_at] - probability) - point
            step = np.linalg.solve(precision, gradient)
            point = point + step
            if np.abs(step).max() < 1e-10:
                break
        values = _sigmoid(self.offset + self.design @ point)
        variance = values * (1 - values)
        # Covariance of the point by Laplace's approximation, carried over to probabilities.
        root = np.linalg.inv(np.linalg.cholesky(precision)).T
        return Prediction(
            values, np.sqrt(variance), variance[:, None] * (self.design @ root), threshold=0.5
        )


@dataclass(frozen=True)
class PublishedLogistic:
    """The paper's logistic matrix factorization: gradient ascent on past and new task together.

    Maximises the log likelihood - ``ridge`` / 2 (|W|^2 + |H|^2) by ``iterations`` full steps of
    ``lr``, H before W. ``additive`` replaces factors by task and example effects.
    """

    rank: int = 5
    lr: float = 0.001
    ridge: float = 0.1
    iterations: int = 5000
    additive: bool = False
    seed: int = 0

    def fit(self, matrix: ForgettingMatrix) -> FittedPublishedLogistic:
        return FittedPublishedLogistic(binary_values(matrix), self)


@dataclass(frozen=True, eq=False)
class FittedPublishedLogistic:
    """The past tasks; all the work is done for each new one."""

    values: Array
    model: PublishedLogistic

    def predict(self, seen: npt.ArrayLike) -> Prediction:
        row, known = checked_row(seen, self.values.shape[1])
        _check_binary(row[known])
        stacked = np.vstack([self.values, row])
        logits = _ascend(stacked, self.model)[-1]
        values = _sigmoid(logits)
        noise = np.sqrt(values * (1 - values))
        return Prediction(values, noise, np.zeros((len(values), 1)), threshold=0.5)


def _ascend(values: Array, model: PublishedLogistic) -> Array:
    """Fitted log odds of all rows, (tasks + 1, examples)."""
    known = ~np.isnan(values)
    target = np.where(known, values, 0.0)
    tasks, examples = values.shape
    left, right = np.random.default_rng(model.seed), np.random.default_rng(model.seed + 1)
    if model.additive:
        w, h = left.normal(0, 1, (tasks, 1)), right.normal(0, 1, (1, examples))
    else:
        w = left.normal(0, 0.005, (tasks, model.rank))
        h = right.normal(0, 0.005, (model.rank, examples))

    def logits() -> Array:
        return np.asarray(w + h if model.additive else w @ h)

    for _ in range(model.iterations):
        error = known * (target - _sigmoid(logits()))
        slope = error.sum(axis=0, keepdims=True) if model.additive else w.T @ error
        h = h + model.lr * (slope - model.ridge * h)
        error = known * (target - _sigmoid(logits()))
        slope = error.sum(axis=1, keepdims=True) if model.additive else error @ h.T
        w = w + model.lr * (slope - model.ridge * w)
    return logits()


def binary_values(matrix: ForgettingMatrix) -> Array:
    """The values of a binary matrix. Raises ``BadSetting`` when an entry is neither 0 nor 1."""
    values = training_values(matrix)
    _check_binary(values[~np.isnan(values)])
    return values


def _check_binary(values: Array) -> None:
    if not np.isin(values, (0.0, 1.0)).all():
        raise BadSetting(
            "A logistic model forecasts 0 (kept) and 1 (forgotten) only; this matrix has other "
            "values. Use Factorization for changes of log perplexity."
        )


def _sigmoid(logits: Array) -> Array:
    bounded = np.clip(logits, -LARGEST_LOGIT, LARGEST_LOGIT)
    probabilities: Array = 1 / (1 + np.exp(-bounded))
    return probabilities
