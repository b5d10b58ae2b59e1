"""Low rank: a task is a point in a small space, an example a direction in it.

    values[t, j] = example_j + shared_j . u_t + noise_j

Past tasks give the space (a truncated singular value decomposition of what additive effects leave
over); the few observations of a new task give its point by ridge regression, which is the posterior
mean under u ~ N(0, 1 / ridge). Forecasting 100,000 examples then takes about a millisecond. The
published way, SGD on everything anew for each task, is ``published.PublishedFactorization``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from unwrite.errors import BadSetting
from unwrite.forgetting.completion import (
    Prediction,
    additive_effects,
    checked_row,
    column_spread,
    scale_of,
    training_values,
)
from unwrite.forgetting.matrix import Array, ForgettingMatrix

RIDGES = tuple(4.0**power for power in range(-3, 4))
STRENGTHS = (0.03, 0.1, 0.3, 0.6)
REVEALED = 30  # observations of a new task for which the ridge is chosen (METHODS 5.4)
LEFT_OUT_TASKS, LEFT_OUT_EXAMPLES, DRAWS = 64, 2000, 2  # bounds the search to about a second
# Exact data leave no noise; a hundred-millionth of the scale keeps the regression well posed.
LEAST_NOISE = 1e-8


@dataclass(frozen=True)
class Factorization:
    """Additive effects and ``rank`` factors (METHODS 5.4 b), with a fixed basis and a ridge.

    ``ridge``: None chooses it by forecasting each past task from the others. The basis has the
    scale of the past tasks, so 1 is right when a new task is drawn as they were. Gaps in the past
    are filled by the same model, in turns. Costs one singular value decomposition of the matrix,
    and at most ``LEFT_OUT_TASKS`` of a part of it; holds three copies of the matrix while it fits.
    """

    rank: int = 5
    ridge: float | None = None

    def __post_init__(self) -> None:
        if self.rank < 0 or (self.ridge is not None and not self.ridge > 0):
            raise BadSetting(
                f"A factorization needs a rank of at least 0 and a ridge above 0, not "
                f"{self.rank} and {self.ridge}."
            )

    def fit(self, matrix: ForgettingMatrix) -> FittedFactorization:
        values = training_values(matrix)
        scale = scale_of(values)
        filled = fill_gaps(values / scale, self.rank)

        def spaces(rows: Array) -> list[Space]:
            return [low_rank_space(rows, self.rank)]

        known = ~np.isnan(values)
        ridges = RIDGES if self.ridge is None else (self.ridge,)
        choice = chosen_by_leaving_out(filled, known, spaces, ridges)
        space = low_rank_space(filled, self.rank, known)
        return FittedFactorization(space, choice.ridge, scale, choice.calibration)


@dataclass(frozen=True)
class NuclearNorm:
    """The row that fits with the least nuclear norm: soft-impute (Mazumder et al. 2010).

    Every singular value of what additive effects leave over is lowered by ``strength`` times the
    largest. A new row is fitted as in the alternating form of the same problem (Hastie et al.
    2015): with the factors of the past fixed, its part is a ridge regression with that penalty.
    ``strength``: None chooses it by forecasting each past task from the others.
    """

    strength: float | None = None

    def __post_init__(self) -> None:
        if self.strength is not None and not 0 < self.strength < 1:
            raise BadSetting(f"strength must lie between 0 and 1, not {self.strength}.")

    def fit(self, matrix: ForgettingMatrix) -> FittedFactorization:
        values = training_values(matrix)
        scale = scale_of(values)
        known = ~np.isnan(values)
        strengths = STRENGTHS if self.strength is None else (self.strength,)
        filled = fill_gaps(values / scale, len(values), shrink=strengths[0])

        def spaces(rows: Array) -> list[Space]:
            return soft_spaces(rows, strengths)

        choice = chosen_by_leaving_out(filled, known, spaces, (1.0,))
        (space,) = soft_spaces(filled, strengths[choice.space : choice.space + 1], known)
        return FittedFactorization(space, choice.ridge, scale, choice.calibration)


@dataclass(frozen=True, eq=False)
class Space:
    """Where tasks lie. ``centre``: (examples,); ``basis``: (examples, d), one standard deviation
    of past tasks a column; ``noise``: (examples,), what the basis leaves over; ``weights``:
    (examples,), the noise that observations are weighed by."""

    centre: Array
    basis: Array
    noise: Array
    weights: Array


@dataclass(frozen=True, eq=False)
class FittedFactorization:
    """A space fitted to values divided by ``scale``. ``calibration`` multiplies the model's own
    idea of its error, so that it is the one met when past tasks were forecast."""

    space: Space
    ridge: float
    scale: float
    calibration: float

    def predict(self, seen: npt.ArrayLike) -> Prediction:
        row, known = checked_row(seen, len(self.space.centre))
        seen_at = np.flatnonzero(known)
        centre, basis = self.space.centre, self.space.basis
        point, spread = _posterior(
            basis[seen_at],
            self.space.weights[seen_at],
            row[seen_at] / self.scale - centre[seen_at],
            self.ridge,
        )
        return Prediction(
            self.scale * (centre + basis @ point),
            self.scale * self.calibration * self.space.noise,
            basis @ (self.scale * self.calibration * spread),
        )


def low_rank_space(values: Array, rank: int, known: npt.NDArray[np.bool_] | None = None) -> Space:
    """Additive effects and the ``rank`` strongest directions of ``values`` (tasks, examples),
    which has no gaps; where ``known`` is false an entry does not count for the noise."""
    tasks = len(values)
    centre, effects, residual = _additive_parts(values)
    rank = min(rank, tasks - 1)
    left, sizes, right = np.linalg.svd(residual, full_matrices=False)
    strong = sizes[:rank, None] * right[:rank]
    noise = _noise(residual - left[:, :rank] @ strong, known, _freedom(tasks, 1 + rank))
    return Space(centre, _with_common(effects, strong / np.sqrt(tasks)), noise, noise)


def soft_spaces(
    values: Array, strengths: Sequence[float], known: npt.NDArray[np.bool_] | None = None
) -> list[Space]:
    """For each strength, additive effects and all directions, the singular values lowered by that
    part of the largest. Ridge regression with ridge 1 on such a basis is the penalty of the nuclear
    norm: min |r - b - B a|^2 + penalty |a|^2 with B = V lowered^(1/2)."""
    tasks = len(values)
    centre, effects, residual = _additive_parts(values)
    left, sizes, right = np.linalg.svd(residual, full_matrices=False)
    spaces = []
    for strength in strengths:
        penalty = max(strength * sizes[0], LEAST_NOISE**2)
        lowered = np.maximum(sizes - penalty, 0.0)
        kept = int((lowered > 0).sum())
        remainder = residual - (left[:, :kept] * lowered[:kept]) @ right[:kept]
        noise = _noise(remainder, known, _freedom(tasks, 1))
        # All observations weigh the same; the factors are scaled so that their ridge is 1.
        overall = float(np.sqrt((noise**2).mean()))
        factors = overall * np.sqrt(lowered[:kept, None] / penalty) * right[:kept]
        weights = np.full(values.shape[1], overall)
        spaces.append(Space(centre, _with_common(effects, factors), noise, weights))
    return spaces


def fill_gaps(values: Array, rank: int, shrink: float = 0.0, sweeps: int = 100) -> Array:
    """``values`` with every NaN replaced by what additive effects and ``rank`` factors fitted to
    the rest say: expectation and fit in turns, until nothing moves by a ten-thousandth of the
    spread. ``shrink`` lowers the singular values by that part of the largest (soft-impute)."""
    known = ~np.isnan(values)
    task, example = additive_effects(values)
    filled = np.where(known, values, task[:, None] + example)
    if known.all():
        return filled
    rank = min(rank, len(values) - 1)
    for _ in range(sweeps):
        effects, means = additive_effects(filled)
        additive = effects[:, None] + means
        left, sizes, right = np.linalg.svd(filled - additive, full_matrices=False)
        sizes = np.maximum(sizes - shrink * sizes[0], 0.0)
        fitted = additive + (left[:, :rank] * sizes[:rank]) @ right[:rank]
        moved = np.abs(fitted - filled)[~known].max()
        filled = np.where(known, values, fitted)
        if moved <= 1e-4 * scale_of(values):
            break
    return filled


@dataclass(frozen=True)
class Choice:
    """What forecast past tasks best: the number of the space, the ridge, and how large errors were
    in units of the stated standard deviation (root mean square)."""

    space: int
    ridge: float
    calibration: float


def chosen_by_leaving_out(
    values: Array,
    known: npt.NDArray[np.bool_],
    spaces: Callable[[Array], Sequence[Space]],
    ridges: tuple[float, ...],
) -> Choice:
    """Which of the ``spaces`` and ``ridges`` forecasts past tasks best, and how well.

    Each of up to ``LEFT_OUT_TASKS`` tasks is left out in turn and forecast from ``REVEALED`` of its
    entries by the others; the squared error on the rest decides. Uses up to ``LEFT_OUT_EXAMPLES``
    examples. With fewer than three tasks there is nothing to compare: the middle ridge is taken.
    """
    tasks, examples = values.shape
    if tasks < 3 or examples < 2:
        return Choice(0, ridges[len(ridges) // 2], 1.0)
    random = np.random.default_rng(0)
    # Drawn by the order of the examples' sums, so that the order of the columns plays no part.
    by_sum = np.argsort(values.sum(axis=0), kind="stable")
    columns = by_sum[random.permutation(examples)[:LEFT_OUT_EXAMPLES]]
    values, known = values[:, columns], known[:, columns]
    totals: Array = np.zeros(1)  # by trial: squared error, the same in units of variance, entries
    for task in random.permutation(tasks)[:LEFT_OUT_TASKS]:
        found = spaces(np.delete(values, task, axis=0))
        observed = np.flatnonzero(known[task])
        for _ in range(DRAWS):
            mixed = random.permutation(observed)
            count = min(REVEALED, len(mixed) // 2)
            seen, hidden = mixed[:count], mixed[count:]
            totals = totals + np.array(
                [
                    _errors(space, ridge, values[task], seen, hidden)
                    for space in found
                    for ridge in ridges
                ]
            )
    best = int(totals[:, 0].argmin())
    calibration = float(np.sqrt(totals[best, 1] / totals[best, 2]))
    return Choice(best // len(ridges), ridges[best % len(ridges)], calibration)


def _errors(
    space: Space,
    ridge: float,
    row: Array,
    seen: npt.NDArray[np.intp],
    hidden: npt.NDArray[np.intp],
) -> tuple[float, float, int]:
    """Sums over the hidden entries: squared error, and the same in units of its variance."""
    differences = row - space.centre
    point, spread = _posterior(space.basis[seen], space.weights[seen], differences[seen], ridge)
    squares = (differences[hidden] - space.basis[hidden] @ point) ** 2
    variance = space.noise[hidden] ** 2 + ((space.basis[hidden] @ spread) ** 2).sum(axis=1)
    return float(squares.sum()), float((squares / variance).sum()), len(hidden)


def _posterior(basis: Array, noise: Array, differences: Array, ridge: float) -> tuple[Array, Array]:
    """Mean (d,) of a task's point given its observations, and a square root (d, d) of the
    covariance: ``spread @ spread.T``."""
    size = basis.shape[1]
    # QR of the stacked system, because squaring it would lose half of the digits.
    stacked = np.vstack([basis / noise[:, None], np.sqrt(ridge) * np.eye(size)])
    orthogonal, triangle = np.linalg.qr(stacked)
    spread = np.linalg.solve(triangle, np.eye(size))
    weighed = np.concatenate([differences / noise, np.zeros(size)])
    return spread @ (orthogonal.T @ weighed), spread


def _additive_parts(values: Array) -> tuple[Array, Array, Array]:
    """Example means, task effects, and what they leave over."""
    centre = values.mean(axis=0)
    centred = values - centre
    effects = centred.mean(axis=1)
    return centre, effects, centred - effects[:, None]


def _with_common(effects: Array, factors: Array) -> Array:
    """The basis (examples, d): what tasks do to all examples alike, then the factors."""
    common = np.full(factors.shape[1], np.sqrt((effects**2).mean()))
    return np.ascontiguousarray(np.vstack([common, factors]).T)


def _noise(remainder: Array, known: npt.NDArray[np.bool_] | None, freedom: float) -> Array:
    if known is not None:
        remainder = np.where(known, remainder, np.nan)
    return np.maximum(column_spread(remainder, freedom), LEAST_NOISE)


def _freedom(tasks: int, used: int) -> float:
    return max(tasks - used, 1) / tasks
