"""Does it help to replay what is forecast to be forgotten?

    python -m benchmarks.forgetting_replay --matrix FOLDER --work FOLDER [--tasks 12]

For some tasks of a collected matrix, each new in its turn: the task is learned from the base with
nothing replayed, with examples replayed at random, with those that a forecast endangers, and with
those that the collected truth endangers (the upper bound). Forecasts know the other tasks and 30
revealed examples of this one. Half of the examples are held out: never replayed, never revealed.
They are measured after each training (METHODS 5.5). Facts that a task changes are in neither part:
to replay their old answers would undo what is learned.

A run is one line in WORK/runs.jsonl; the same command goes on where it was. The result has means
over tasks and, against random replay, an exact paired sign-flip test.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.forgetting_matrix import PAIRS, TUNER, changed_by, tasks_of_bundled_text
from benchmarks.measure import add_line, lines, write
from unwrite import load
from unwrite.forgetting import ForgettingMatrix, ReplayPolicy, UpstreamExample, measure
from unwrite.forgetting.examples import from_details
from unwrite.forgetting.fitting import MODELS
from unwrite.forgetting.matrix import Array
from unwrite.model import Model
from unwrite.training import Pair

NONE, RANDOM, TRUTH = "none", "random", "truth"
FORECASTS = ("additive", "neighbours", "factorization")
ARMS = (NONE, RANDOM, *FORECASTS, TRUTH)
REVEALED = 30
POLICY = ReplayPolicy.softmax(temperature=0.1, ratio=1 / 4)
EXACT = 16  # pairs up to which all signs are tried


def main() -> None:
    """Run what is missing and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--matrix", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--tasks", type=int, default=12)
    parser.add_argument("--measured", type=int, default=300, help="held-out examples at most")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    options = parser.parse_args()
    matrix = ForgettingMatrix.load(options.matrix)
    learned = tasks_of_bundled_text(None, options.pairs)
    names = [name for name in matrix.tasks if name in learned]
    chosen = [names[at] for at in np.linspace(0, len(names) - 1, options.tasks).round().astype(int)]
    tasks = {name: learned[name] for name in dict.fromkeys(chosen)}
    model = load(options.base)
    rows = run(model, matrix, tasks, Path(options.work), TUNER, measured=options.measured)
    write("forgetting_replay", {"tasks": len(tasks), **summary(rows)})


def run(
    model: Model,
    matrix: ForgettingMatrix,
    tasks: Mapping[str, Sequence[Pair]],
    work: Path,
    tuner: Any,
    *,
    measured: int = 300,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One row for each task and arm: ``{task, arm, replayed, held_out}``, the last being the mean
    increase of the log perplexity of what is held out."""
    file = work / "runs.jsonl"
    done = {(row["task"], row["arm"]) for row in lines(file)}
    examples = from_details(matrix.examples, matrix.example_details)
    held_out, pool = split(examples, measured, seed)
    watched = [examples[at] for at in held_out]
    before = measure(model, watched)
    for name, pairs in tasks.items():
        own = changed_by(name)
        free = [at for at in pool if examples[at].prompt not in own]
        counted = [example.prompt not in own for example in watched]
        for arm in ARMS:
            if (name, arm) in done:
                continue
            replayed = chosen(matrix, name, arm, free, POLICY.count(len(pairs)), seed)
            mixed = mix(pairs, [examples[at] for at in replayed])
            with model.shifted(tuner.delta(model, mixed)):
                after = measure(model, watched)
            change = float(np.nanmean((after - before)[counted]))
            row = {"task": name, "arm": arm, "replayed": len(replayed), "held_out": change}
            add_line(file, row)
    return lines(file)


def split(
    examples: Sequence[UpstreamExample], measured: int, seed: int
) -> tuple[list[int], list[int]]:
    """Positions that are held out (at most ``measured`` of one half), and those that may be
    replayed (of the other half, those with a prompt)."""
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    half = len(order) // 2
    pool = [at for at in order[half:] if examples[at].prompt is not None]
    return sorted(order[:half][:measured]), sorted(pool)


def chosen(
    matrix: ForgettingMatrix, task: str, arm: str, pool: Sequence[int], count: int, seed: int
) -> list[int]:
    """Positions of the examples that this arm replays."""
    if arm == NONE:
        return []
    scores = scores_of(matrix, task, arm, pool, seed)
    policy = ReplayPolicy.uniform() if arm == RANDOM else POLICY
    return [pool[at] for at in policy.choose(scores, count, seed=seed)]


def scores_of(
    matrix: ForgettingMatrix, task: str, arm: str, pool: Sequence[int], seed: int
) -> Array:
    """How endangered each example of the pool is, in standard deviations of the past."""
    row = matrix.tasks.index(task)
    here = matrix.select(examples=list(pool))
    truth = here.values[row]
    if arm == RANDOM:
        return np.zeros(len(pool))
    past = here.select(tasks=[at for at in range(len(here.tasks)) if at != row])
    scale = float(np.nanstd(past.values)) or 1.0
    if arm == TRUTH:
        return np.nan_to_num(truth) / scale
    seen = np.full(len(pool), np.nan)
    at = np.random.default_rng(seed).choice(len(pool), min(REVEALED, len(pool) // 3), replace=False)
    seen[at] = truth[at]
    return MODELS[arm].fit(past).predict(seen).values / scale


def mix(pairs: Sequence[Pair], replayed: Sequence[UpstreamExample]) -> list[Pair]:
    """The task's pairs and the replayed ones, in one stream (the tuner shuffles it)."""
    return [*pairs, *(Pair(str(one.prompt), str(one.answer)) for one in replayed)]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over tasks by arm, and each arm against random replay, task by task."""
    by_arm = {
        arm: {row["task"]: row["held_out"] for row in rows if row["arm"] == arm} for arm in ARMS
    }
    arms = {}
    for arm, found in by_arm.items():
        both = [task for task in found if task in by_arm[RANDOM]]
        differences = np.array([found[task] - by_arm[RANDOM][task] for task in both])
        arms[arm] = {
            "tasks": len(found),
            "mean": float(np.mean(list(found.values()))) if found else None,
            "minus_random": float(differences.mean()) if len(both) else None,
            "p": sign_flip(differences) if arm != RANDOM and len(both) else None,
        }
    policy = {"ratio": POLICY.ratio, "temperature": POLICY.temperature}
    return {"policy": policy, "revealed": REVEALED, "arms": arms, "runs": list(rows)}


def sign_flip(differences: Array, draws: int = 20_000) -> float:
    """Two-sided p value of a mean of paired differences, under random signs: exact up to ``EXACT``
    pairs, else by ``draws``."""
    count = len(differences)
    if count <= EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=count)))
    else:
        signs = np.random.default_rng(0).choice([1.0, -1.0], (draws, count))
    observed = abs(differences.mean())
    # Sums in another order differ by rounding: what is equal must count as equal.
    return float((np.abs(signs @ differences) / count >= observed * (1 - 1e-12)).mean())


if __name__ == "__main__":
    main()
