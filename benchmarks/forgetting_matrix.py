"""A real forgetting matrix from bundled text, and how simple it is.

    python -m benchmarks.forgetting_matrix [--base smollm2-135m --out FOLDER]

Tasks: the 42 bundled ones, and the 21 relations of atlas as knowledge updates. Examples: the atlas
facts and a paraphrase of each, sentences of the neutral prose, and questions of the bundled tasks'
test splits. Every task is learned by LoRA from the base. Goes on where it was interrupted.
Forecasts are tested on it by ``benchmarks.forgetting_prediction``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import write
from unwrite import LoRA, load, methods, read_edits
from unwrite.forgetting import UpstreamExample, collect, read_examples
from unwrite.progress import Reporter, Silent
from unwrite.tasks import read_tasks
from unwrite.training import Pair

BANK, UPDATES = "bank", "atlas"
PAIRS = 48  # learned of a task at most
TUNER = LoRA(epochs=3, until="epochs")


def main() -> None:
    """Collect what is missing and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--out", default="forgetting-smollm2")
    parser.add_argument("--tasks", type=int, help="learn at most so many of each kind")
    parser.add_argument("--examples", type=int, help="watch at most so many, evenly chosen")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="learned of a task")
    options = parser.parse_args()
    result = run(
        options.base,
        Path(options.out),
        tasks_of_bundled_text(options.tasks, options.pairs),
        examples_of_bundled_text(options.examples),
        progress=_terminal(),
    )
    write("forgetting_matrix", result)


def run(
    base: str,
    out: Path,
    learned: Mapping[str, Sequence[Pair]],
    watched: Sequence[UpstreamExample],
    *,
    tuner: Any = TUNER,
    progress: Reporter | None = None,
) -> dict[str, Any]:
    """Collect into ``out`` and return everything that the result file says.

    ``learned``: pairs by task, named ``bank/...`` or ``atlas/...``."""
    model = load(base, progress=progress or Silent())
    done = collect(model, learned, watched, tuner, out, settings=methods.settings_of(tuner))
    matrix = done.matrix
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


def changed_by(task: str) -> set[str]:
    """The prompts that ask for what a knowledge update changes; none for a bundled task."""
    kind, _, relation = task.partition("/")
    facts = [edit for edit in read_edits(UPDATES) if kind == UPDATES and edit.relation == relation]
    return {prompt for fact in facts for prompt in (fact.prompt, *fact.paraphrases)}


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


def _terminal() -> Reporter:
    from unwrite.console import Terminal

    return Terminal()


if __name__ == "__main__":
    main()
