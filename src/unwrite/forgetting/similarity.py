"""Baselines that know what tasks and examples are about, and nothing or little of the past.

Is what looks similar forgotten? ``Features`` hold a vector for every task and every example: of
sentence embeddings, of a model's hidden states, or of its gradients. ``Similarity`` forecasts by
their products alone; ``TwoTower`` learns from past tasks which directions count (METHODS 5.4 f and
g; arXiv 2406.14026, section 4). Both keep the protocol of ``completion``, with one step more:
which task a new row belongs to cannot be told from the row, so ``fitted.about(task)`` comes first.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from unwrite.errors import BadSetting, DamagedFile
from unwrite.files import speaking_of_disk, user_path, write_atomically
from unwrite.forgetting.completion import (
    CompletionByTask,
    Prediction,
    additive_effects,
    checked_row,
    scale_of,
    training_values,
)
from unwrite.forgetting.matrix import Array, ForgettingMatrix

SEMANTIC, HIDDEN, GRADIENT = "semantic", "hidden", "gradient"
KINDS = (SEMANTIC, HIDDEN, GRADIENT)


@dataclass(frozen=True, eq=False)
class Features:
    """A vector (d,) for every task and every example, by label. ``source`` says what made them."""

    tasks: Mapping[str, Array]
    examples: Mapping[str, Array]
    source: str

    def of_tasks(self, names: Sequence[str]) -> Array:
        """(tasks, d). Raises ``BadSetting`` naming one that has no vector."""
        return _stacked(self.tasks, names, "task")

    def of_examples(self, names: Sequence[str]) -> Array:
        """(examples, d). Raises ``BadSetting`` naming one that has no vector."""
        return _stacked(self.examples, names, "example")

    def save(self, folder: str | Path, kind: str) -> Path:
        """Write ``features-KIND.npz`` beside a matrix, in single precision."""
        path = _file(folder, kind)
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            tasks=np.array(list(self.tasks.values()), dtype=np.float32),
            examples=np.array(list(self.examples.values()), dtype=np.float32),
            labels=np.array(json.dumps([list(self.tasks), list(self.examples), self.source])),
        )
        with speaking_of_disk(f"write {path}"):
            write_atomically(path, buffer.getvalue())
        return path

    @classmethod
    def load(cls, folder: str | Path, kind: str) -> Features:
        """Read what ``save`` wrote. Raises ``DamagedFile``."""
        path = _file(folder, kind)
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                tasks, examples, source = json.loads(str(file["labels"]))
                vectors = [file[name].astype(np.float64) for name in ("tasks", "examples")]
                pairs = [
                    dict(zip(names, found, strict=True))
                    for names, found in zip((tasks, examples), vectors, strict=True)
                ]
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error):
            raise DamagedFile(f"{path} is damaged. Make it anew, or remove it.") from None
        return cls(pairs[0], pairs[1], source)


def models_beside(folder: str | Path, matrix: ForgettingMatrix) -> dict[str, CompletionByTask]:
    """The baselines for which there are features beside a matrix, by name."""
    found: dict[str, CompletionByTask] = {}
    for kind in KINDS:
        if _file(folder, kind).is_file():
            features = Features.load(folder, kind)
            features.of_tasks(matrix.tasks)
            features.of_examples(matrix.examples)
            found[f"{kind}-similarity"] = Similarity(features, cosine=kind != GRADIENT)
            if kind != GRADIENT:
                found[f"two-tower-{kind}"] = TwoTower(features)
    return found


@dataclass(frozen=True, eq=False)
class Similarity:
    """level + slope x product of the task's and the example's vectors.

    ``cosine``: of the vectors at length one, else their plain inner product. The slope is the least
    squares one over past tasks, each about its own mean (it may be negative); the level is that of
    the few observations.
    """

    features: Features
    cosine: bool = True

    def fit(self, matrix: ForgettingMatrix) -> FittedSimilarity:
        values = training_values(matrix)
        examples = self.features.of_examples(matrix.examples)
        examples = _unit(examples) if self.cosine else examples
        products = self._products(matrix.tasks, examples)
        known = ~np.isnan(values)
        apart = _centred(values, known), _centred(products, known)
        square = float((apart[1] ** 2).sum())
        slope = float((apart[0] * apart[1]).sum()) / square if square > 0 else 0.0
        left = np.where(known, values - slope * products, np.nan)
        levels = np.nanmean(left, axis=1)
        noise = float(np.sqrt(np.nanmean((left - levels[:, None]) ** 2)))
        return FittedSimilarity(self, examples, slope, float(levels.mean()), levels.std(), noise)

    def _products(self, tasks: Sequence[str], examples: Array) -> Array:
        vectors = self.features.of_tasks(tasks)
        found: Array = (_unit(vectors) if self.cosine else vectors) @ examples.T
        return found


@dataclass(frozen=True, eq=False)
class FittedSimilarity:
    """The slope, and level and spread of past tasks."""

    model: Similarity
    examples: Array
    slope: float
    level: float
    level_spread: float
    noise: float

    def about(self, task: str) -> AboutTask:
        """The forecast for one task, by its label in the features."""
        (row,) = self.model._products([task], self.examples)
        return AboutTask(
            self.slope * row, np.full(len(row), self.noise), self.level, self.level_spread
        )


@dataclass(frozen=True, eq=False)
class TwoTower:
    """Two small networks, of tasks and of examples, whose outputs' product is the forecast.

    Linear-ReLU-Linear each, taught by Adam on all entries at once (published: 5000 epochs at 1e-3).
    They learn what additive effects leave over. Deterministic for a seed on one machine.
    """

    features: Features
    epochs: int = 1000
    lr: float = 1e-3
    width: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.width < 1 or not self.lr > 0:
            raise BadSetting("epochs must be at least 0, width at least 1 and lr above 0.")

    def fit(self, matrix: ForgettingMatrix) -> FittedTwoTower:
        values = training_values(matrix)
        scale = scale_of(values)
        task, example = additive_effects(values / scale)
        target = values / scale - task[:, None] - example
        known = ~np.isnan(target)
        tasks = _tensor(self.features.of_tasks(matrix.tasks))
        examples = _tensor(self.features.of_examples(matrix.examples))
        wanted, mask = _tensor(np.where(known, target, 0.0)), torch.from_numpy(known)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            of_tasks, of_examples = (_tower(tasks.shape[1], self.width) for _ in range(2))
        both = [*of_tasks.parameters(), *of_examples.parameters()]
        optimizer = torch.optim.Adam(both, lr=self.lr)
        for _ in range(self.epochs):
            errors = (of_tasks(tasks) @ of_examples(examples).T - wanted)[mask]
            optimizer.zero_grad()
            errors.square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            vectors = of_examples(examples)
            remainder = (of_tasks(tasks) @ vectors.T - wanted)[mask]
        noise = float(remainder.square().mean().sqrt())
        return FittedTwoTower(self, of_tasks, vectors, example, task, noise, scale)


@dataclass(frozen=True, eq=False)
class FittedTwoTower:
    """Both towers' results, and additive effects, on values divided by ``scale``."""

    model: TwoTower
    tower: torch.nn.Module
    vectors: torch.Tensor
    example: Array
    task: Array
    noise: float
    scale: float

    @torch.no_grad()
    def about(self, task: str) -> AboutTask:
        """The forecast for one task, by its label in the features."""
        vector = self.tower(_tensor(self.model.features.of_tasks([task])))
        scores = (vector @ self.vectors.T)[0].double().numpy()
        return AboutTask(
            self.scale * (self.example + scores),
            np.full(len(scores), self.scale * self.noise),
            self.scale * float(self.task.mean()),
            self.scale * float(self.task.std()),
        )


@dataclass(frozen=True, eq=False)
class AboutTask:
    """A row known up to its level: ``shape`` (examples,), noise, and what levels are like."""

    shape: Array
    noise: Array
    level: float
    level_spread: float

    def predict(self, seen: npt.ArrayLike) -> Prediction:
        row, known = checked_row(seen, len(self.shape))
        count = int(known.sum())
        level = float((row - self.shape)[known].mean()) if count else self.level
        unsure = float(self.noise[0]) / math.sqrt(count) if count else self.level_spread
        return Prediction(self.shape + level, self.noise, np.full((len(row), 1), unsure))


def _stacked(vectors: Mapping[str, Array], names: Sequence[str], kind: str) -> Array:
    missing = [name for name in names if name not in vectors]
    if missing:
        raise BadSetting(
            f"The features have no vector of the {kind} {missing[0]!r}; make them anew."
        )
    return np.array([vectors[name] for name in names], dtype=np.float64)


def _unit(vectors: Array) -> Array:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    found: Array = vectors / np.where(lengths > 0, lengths, 1.0)
    return found


def _centred(values: Array, known: npt.NDArray[np.bool_]) -> Array:
    """Each row about the mean of its known entries; 0 elsewhere."""
    filled = np.where(known, values, 0.0)
    means = filled.sum(axis=1, keepdims=True) / known.sum(axis=1, keepdims=True)
    return np.where(known, filled - means, 0.0)


def _tower(inputs: int, width: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Linear(inputs, width), torch.nn.ReLU(), torch.nn.Linear(width, width)
    )


def _tensor(values: Array) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def _file(folder: str | Path, kind: str) -> Path:
    if kind not in KINDS:
        raise BadSetting(f"Features are {', '.join(KINDS)}, not {kind!r}.")
    return user_path(folder) / f"features-{kind}.npz"
