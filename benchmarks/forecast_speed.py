"""How long a forecast takes, against SVD by stochastic gradient descent as published.

    python -m benchmarks.forecast_speed [--matrix FOLDER]

Speed on a made-up matrix of low rank and noise (100 past tasks, 100,000 examples, 30 seen). The
published way fits everything anew for every task; scikit-surprise runs it for a few epochs on a
part of the examples, in an environment of its own, and its time is scaled up (every epoch visits
every entry once).

Errors side by side on a real matrix, the bundled one or another in FOLDER, with all epochs. There
our own reimplementation is checked against scikit-surprise number by number.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import peak_memory, write
from benchmarks.peers import HERE, environment
from unwrite.forgetting import (
    Factorization,
    ForgettingMatrix,
    PublishedFactorization,
)
from unwrite.forgetting.matrix import Array

PEER = "scikit-surprise==1.1.5"
EPOCHS, SEEN = 1000, 30


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=5, help="of the published way, when timed")
    parser.add_argument("--published-examples", type=int, default=10_000, help="likewise")
    parser.add_argument("--matrix", default="bundled", help="for the comparison of errors")
    parser.add_argument("--new-tasks", type=int, default=5)
    options = parser.parse_args()

    python = environment("surprise", PEER)
    past, new = made_up(options.tasks, options.examples, 1)
    matrix = labelled(past)
    started = time.perf_counter()
    fitted = Factorization(5).fit(matrix)
    fit_seconds = time.perf_counter() - started
    seen = revealed(new[0], 0)
    seconds = []
    for _ in range(options.repeats):
        started = time.perf_counter()
        prediction = fitted.predict(seen)
        seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    uncertainty = prediction.std
    assert uncertainty.shape == (options.examples,)
    result: dict[str, Any] = {
        "tasks": options.tasks,
        "examples": options.examples,
        "seen": SEEN,
        "fit_seconds": fit_seconds,
        "forecast_milliseconds": {
            "median": 1000 * statistics.median(seconds),
            "min": 1000 * min(seconds),
            "max": 1000 * max(seconds),
        },
        "uncertainty_milliseconds": 1000 * (time.perf_counter() - started),
        "peak_memory_gb": peak_memory(),
    }
    part = np.vstack([past, seen])[:, : options.published_examples]
    few, _ = surprise(python, part, options.epochs, 0)
    # The cost of a step does not depend on how many there are: every entry, every epoch.
    whole = few * (EPOCHS / options.epochs) * (options.examples / part.shape[1])
    result["published"] = {
        "examples_run": part.shape[1],
        "epochs_run": options.epochs,
        "seconds_run": few,
        "seconds_of_all_examples_and_1000_epochs": whole,
        "times_slower_than_a_forecast": whole / statistics.median(seconds),
    }
    result["errors"] = errors(options.matrix, python, options.new_tasks)
    write("forecast_speed", result)


def errors(folder: str, python: Path, new_tasks: int) -> dict[str, Any]:
    """RMSE on the hidden entries of a few new tasks, one seed, 30 seen: all ways side by side."""
    collected = ForgettingMatrix.load(folder)
    order = np.random.default_rng(0).permutation(len(collected.tasks))
    past, new = (collected.values[np.sort(part)] for part in (order[new_tasks:], order[:new_tasks]))
    rows = np.stack([revealed(row, 0) for row in new])
    hidden = np.isnan(rows) & ~np.isnan(new)
    fast_model = Factorization(5).fit(labelled(past))
    published = PublishedFactorization().fit(labelled(past))
    scaled = PublishedFactorization(scaled=True).fit(labelled(past))
    ours = np.stack([one.values for one in published.predict_all(rows)])
    forecasts = {
        "factorization": np.stack([fast_model.predict(row).values for row in rows]),
        "published": ours,
        "published_scaled": np.stack([one.values for one in scaled.predict_all(rows)]),
    }
    theirs = [surprise(python, np.vstack([past, row]), EPOCHS, 0) for row in rows]
    forecasts["surprise"] = np.stack([forecast for _, forecast in theirs])
    found: dict[str, Any] = {
        "matrix": f"{len(collected.tasks)} tasks x {len(collected.examples)} examples, collected",
        "new_tasks": len(new),
        "surprise_seconds_a_task": statistics.median(seconds for seconds, _ in theirs),
        "published_minus_surprise": float(np.abs(ours - forecasts["surprise"]).max()),
    }
    found["rmse"] = {
        name: float(np.sqrt(((forecast - new)[hidden] ** 2).mean()))
        for name, forecast in forecasts.items()
    }
    found["spread_of_the_truth"] = float(new[hidden].std())
    return found


def made_up(tasks: int, examples: int, new: int) -> tuple[Array, Array]:
    """Past and new tasks: rank 5 with falling strength, noise of different size by example."""
    random = np.random.default_rng(0)
    strength = 0.7 ** np.arange(5)
    values = (random.normal(size=(tasks + new, 5)) * strength) @ random.normal(size=(5, examples))
    noise = 0.3 * np.exp(0.7 * random.normal(size=examples))
    values += noise * random.normal(size=values.shape)
    return values[:tasks], values[tasks:]


def labelled(values: Array) -> ForgettingMatrix:
    """The values with numbers for names."""
    tasks, examples = values.shape
    return ForgettingMatrix(values, tuple(map(str, range(tasks))), tuple(map(str, range(examples))))


def revealed(row: Array, seed: int) -> Array:
    """The row with ``SEEN`` entries left."""
    at = np.random.default_rng(seed).choice(len(row), SEEN, replace=False)
    seen = np.full(len(row), np.nan)
    seen[at] = row[at]
    return seen


def surprise(python: Path, values: Array, epochs: int, seed: int) -> tuple[float, Array]:
    """Seconds and forecast of the last row by scikit-surprise."""
    with tempfile.TemporaryDirectory() as scratch:
        given, found = Path(scratch, "values.npy"), Path(scratch, "forecast.npy")
        np.save(given, values)
        words = [python, HERE / "run_surprise.py", given, str(epochs), str(seed), found]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return float(done.stdout), np.load(found)


if __name__ == "__main__":
    main()
