"""A real forgetting matrix from bundled text, how simple it is, and how well it can be forecast.

    python -m benchmarks.forgetting_matrix [--base smollm2-135m --out FOLDER]

Tasks: the 42 bundled ones, and the 21 relations of atlas as knowledge updates. Examples: the atlas
facts and a paraphrase of each, sentences of the neutral prose, and questions of the bundled tasks'
test splits. Every task is learned by LoRA from the base. Goes on where it was interrupted; the
result has the tables that need the whole matrix.

Forecasts are tested twice: bundled tasks from bundled tasks (in domain, five folds), and knowledge
updates from bundled tasks (out of domain). The published models join with --published, which takes
long.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import write
from unwrite import LoRA, load, methods, read_edits
from unwrite.forgetting import (
    ForgettingMatrix,
    PublishedFactorization,
    PublishedNeighbours,
    Trial,
    UpstreamExample,
    collect,
    evaluate,
    read_examples,
)
from unwrite.forgetting.fitting import MODELS
from unwrite.forgetting.protocol import summary
from unwrite.progress import Reporter, Silent
from unwrite.tasks import read_tasks
from unwrite.training import Pair

BANK, UPDATES = "bank", "atlas"
PAIRS = 48  # learned of a task at most
TUNER = LoRA(epochs=3, until="epochs")


def main() -> None:
    """Collect what is missing, test forecasts, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--out", default="forgetting-smollm2")
    parser.add_argument("--tasks", type=int, help="learn at most so many of each kind")
    parser.add_argument("--examples", type=int, help="watch at most so many, evenly chosen")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="learned of a task")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--published", action="store_true")
    options = parser.parse_args()
    result = run(
        options.base,
        Path(options.out),
        tasks_of_bundled_text(options.tasks, options.pairs),
        examples_of_bundled_text(options.examples),
        seeds=options.seeds,
        published=options.published,
        progress=_terminal(),
    )
    write("forgetting_matrix", result)


def run(
    base: str,
    out: Path,
    learned: Mapping[str, Sequence[Pair]],
    watched: Sequence[UpstreamExample],
    *,
    seeds: int = 10,
    published: bool = False,
    tuner: Any = TUNER,
    progress: Reporter | None = None,
) -> dict[str, Any]:
    """Collect into ``out`` and return everything that the result file says.

    ``learned``: pairs by task, named ``bank/...`` or ``atlas/...`` (six or more of the first)."""
    model = load(base, progress=progress or Silent())
    done = collect(model, learned, watched, tuner, out, settings=methods.settings_of(tuner))
    matrix = done.matrix
    new_bank = [n for n, name in enumerate(matrix.tasks) if name.startswith(BANK)]
    updates = [n for n, name in enumerate(matrix.tasks) if name.startswith(UPDATES)]
    return {
        "tuner": methods.settings_of(tuner),
        "tasks": len(matrix.tasks),
        "examples": len(matrix.examples),
        "seconds": dict(done.seconds),
        "forgotten_share": float((matrix.values > 0).mean()),
        "spread": float(matrix.values.std()),
        "rank_profile": matrix.rank_profile(),
        "rank_profile_of_updates": matrix.select(tasks=updates).rank_profile(),
        "in_domain": in_domain(matrix, new_bank, seeds, published),
        "out_of_domain": tested(matrix, updates, new_bank, seeds, published),
    }


def tasks_of_bundled_text(most: int | None, pairs: int) -> dict[str, list[Pair]]:
    """Pairs by task: ``bank/NAME`` (training splits) and ``atlas/RELATION`` (the new answers)."""
    found: dict[str, list[Pair]] = {}
    for task in read_tasks(BANK)[:most]:
        questions = [Pair(one.prompt, one.answer) for one in task.train]
        found[f"{BANK}/{task.name}"] = questions[:pairs]
    edits = read_edits(UPDATES)
    for relation in sorted({str(edit.relation) for edit in edits})[:most]:
        facts = [Pair(edit.prompt, edit.new) for edit in edits if edit.relation == relation]
        found[f"{UPDATES}/{relation}"] = facts[:pairs]
    return found


def examples_of_bundled_text(
    most: int | None = None, of_each_task: int = 5
) -> list[UpstreamExample]:
    """About a thousand examples; with ``most``, so many evenly spread over them."""
    facts = read_edits(UPDATES)
    paraphrased = [
        UpstreamExample(f"{fact.id}-paraphrase", fact.paraphrases[0], fact.old)
        for fact in facts
        if fact.paraphrases
    ]
    questions = [
        UpstreamExample(f"{task.name}-{number}", one.prompt, one.answer)
        for task in read_tasks(BANK)
        for number, one in enumerate(task.test[:of_each_task], start=1)
    ]
    everything = [*read_examples(UPDATES), *paraphrased, *read_examples("neutral"), *questions]
    if most is None or most >= len(everything):
        return everything
    chosen = np.linspace(0, len(everything) - 1, most).round().astype(int)
    return [everything[at] for at in chosen]


def in_domain(
    matrix: ForgettingMatrix, bank: Sequence[int], seeds: int, published: bool, folds: int = 5
) -> dict[str, Any]:
    """Every bundled task is new once; means over the folds by model and metric."""
    order = np.random.default_rng(0).permutation(bank)
    parts = [part.tolist() for part in np.array_split(order, folds) if len(part)]
    tables = [
        tested(matrix, part, [task for task in bank if task not in part], seeds, published)
        for part in parts
    ]
    return {
        model: {
            metric: _mean([table[model][metric]["mean"] for table in tables])
            for metric in tables[0][model]
        }
        for model in tables[0]
    }


def tested(
    matrix: ForgettingMatrix,
    new: Sequence[int],
    past: Sequence[int],
    seeds: int,
    published: bool,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """The published test; "chosen" is the factorization on observations chosen D-optimally."""
    models: dict[str, Any] = dict(MODELS)
    if published:
        models |= {
            "published": PublishedFactorization(),
            "published-scaled": PublishedFactorization(scaled=True),
            "published-neighbours": PublishedNeighbours(),
        }
    revealed = min(30, len(matrix.examples) // 3)
    trial = Trial(revealed=revealed, seeds=tuple(range(seeds)))
    rows = evaluate(matrix, models, new, past, trial)
    chosen = Trial(revealed=revealed, seeds=(0,), choose="d-optimal")
    better = {"factorization, chosen": models["factorization"]}
    rows += evaluate(matrix, better, new, past, chosen)
    return summary(rows)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _terminal() -> Reporter:
    from unwrite.console import Terminal

    return Terminal()


if __name__ == "__main__":
    main()
