"""Does the low rank persist when tasks are learned one after another?

    python -m benchmarks.forgetting_sequence --work FOLDER [--tasks 20 --seed 0] [--matrix FOLDER]

Tasks of bundled text in random order, each learned by LoRA from where the one before it ended; a
row of the matrix is what a task took away from the state right before it. Every row from the fifth
on is forecast from the rows before it and 30 of its examples. With --matrix (tasks learned from the
base, ``benchmarks.forgetting_matrix``) the same rows are also forecast from that, without the task
itself, and both rank profiles stand side by side. Goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.forgetting_matrix import (
    PAIRS,
    TUNER,
    examples_of_bundled_text,
    tasks_of_bundled_text,
)
from benchmarks.measure import write
from unwrite import load, methods
from unwrite.delta import Delta
from unwrite.forgetting import ForgettingMatrix, UpstreamExample, measure, settle
from unwrite.forgetting.fitting import MODELS
from unwrite.forgetting.matrix import is_matrix
from unwrite.forgetting.protocol import score
from unwrite.model import Model
from unwrite.training import Pair

FIRST, REVEALED = 4, 30  # tasks before the first forecast; examples revealed
FORECASTS = ("factorization", "neighbours", "additive", "example-mean", "task-mean")


def main() -> None:
    """Learn what is missing and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--work", required=True)
    parser.add_argument("--matrix")
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    everything = tasks_of_bundled_text(None, options.pairs)
    order = np.random.default_rng(options.seed).permutation(sorted(everything))[: options.tasks]
    sequence = collect_sequence(
        load(options.base),
        {str(name): everything[str(name)] for name in order},
        examples_of_bundled_text(options.examples),
        TUNER,
        Path(options.work),
    )
    apart = None if options.matrix is None else ForgettingMatrix.load(options.matrix)
    write("forgetting_sequence", {"seed": options.seed, **tested(sequence, apart, options.seed)})


def collect_sequence(
    model: Model,
    tasks: Mapping[str, Sequence[Pair]],
    examples: Sequence[UpstreamExample],
    tuner: Any,
    work: Path,
) -> ForgettingMatrix:
    """Learn the tasks in the order given, each from the end of the one before. The matrix and every
    task's delta are written to ``work`` after each; tasks that are there already are not learned
    again. The model is bitwise unchanged. Raises ``ValueError`` when ``work`` holds another
    sequence."""
    names = list(tasks)
    if is_matrix(work):
        matrix = ForgettingMatrix.load(work)
        if list(matrix.tasks) != names[: len(matrix.tasks)]:
            raise ValueError(f"{work} holds another sequence of tasks: use a new folder")
        state = json.loads((work / "state.json").read_text("utf-8"))
        settled = [UpstreamExample(*one) for one in state["examples"]]
    else:
        settled = settle(model, examples)
        provenance = {
            "base": model.fingerprint,
            "base_name": model.source.name,
            "quantity": "log-perplexity",
            "tuner": methods.settings_of(tuner),
            "sequence": True,
        }
        details = {one.name: one.details() for one in settled}
        matrix = ForgettingMatrix.empty([one.name for one in settled], provenance, details)
        work.mkdir(parents=True, exist_ok=True)
        kept = [[one.name, one.prompt, one.answer] for one in settled]
        (work / "state.json").write_text(json.dumps({"examples": kept}), "utf-8")
        matrix.save(work)
    total = Delta.nothing()
    for number in range(len(matrix.tasks)):
        total = total + Delta.open(work / f"delta-{number}")
    with model.shifted(total):
        before = measure(model, settled)
    for number in range(len(matrix.tasks), len(names)):
        with model.shifted(total):
            delta = tuner.delta(model, tasks[names[number]])
        delta.save(work / f"delta-{number}", provenance={"base": model.fingerprint})
        total = total + Delta.open(work / f"delta-{number}")
        with model.shifted(total):
            after = measure(model, settled)
        matrix = matrix.append(names[number], after - before, {"place": number})
        matrix.save(work)
        before = after
    return matrix


def tested(
    sequence: ForgettingMatrix, apart: ForgettingMatrix | None = None, seed: int = 0
) -> dict[str, Any]:
    """Rank profiles, and forecasts of every row from the rows before it (``from_before``) and from
    the tasks learned ``apart``, by model."""
    found: dict[str, Any] = {
        "tasks": len(sequence.tasks),
        "examples": len(sequence.examples),
        "rank_profile": sequence.rank_profile(),
        "spread": float(np.nanstd(sequence.values)),
        "from_before": forecasts(sequence, None, seed),
    }
    if apart is not None:
        same = [name for name in sequence.examples if name in apart.examples]
        at = {name: position for position, name in enumerate(apart.examples)}
        here = {name: position for position, name in enumerate(sequence.examples)}
        shared = apart.select(examples=[at[name] for name in same])
        part = sequence.select(examples=[here[name] for name in same])
        rows = [apart.tasks.index(name) for name in sequence.tasks if name in apart.tasks]
        found["rank_profile_apart"] = shared.select(tasks=rows).rank_profile()
        found["from_apart"] = forecasts(part, shared, seed)
    return found


def forecasts(
    sequence: ForgettingMatrix, apart: ForgettingMatrix | None, seed: int
) -> dict[str, dict[str, Any]]:
    """Scores by model, pooled over the rows from ``FIRST`` on; the same rows whatever the past."""
    random = np.random.default_rng(seed)
    size = len(sequence.examples)
    revealed = [
        random.choice(size, min(REVEALED, size // 3), replace=False) for _ in sequence.tasks
    ]
    result = {}
    for name in FORECASTS:
        truths, predictions = [], []
        for row in range(FIRST, len(sequence.tasks)):
            if apart is None:
                past = sequence.select(tasks=range(row))
            else:
                others = [n for n, task in enumerate(apart.tasks) if task != sequence.tasks[row]]
                past = apart.select(tasks=others)
            seen = np.full(size, np.nan)
            seen[revealed[row]] = sequence.values[row, revealed[row]]
            hidden = np.isnan(seen) & sequence.observed[row]
            truths.append(sequence.values[row, hidden])
            predictions.append(MODELS[name].fit(past).predict(seen).values[hidden])
        result[name] = score(np.concatenate(truths), np.concatenate(predictions))
    return result


if __name__ == "__main__":
    main()
