"""Can what a knowledge update destroys be forecast? Updates as tasks, bystanders as examples.

    python -m benchmarks.forgetting_updates --data ../shared/data --work FOLDER
        [--updates 24 --edits 4 --features hidden,semantic,gradient]

Updates of a few facts each, by the default method from the base: of the atlas, and of CounterFact
test records. Examples that nobody updates: other facts of the atlas; bystanders of the updated
records of CounterFact (they share relation and answer with one of its edits), and of others. An
example counts as forgotten when its answer became less than half as probable, a token. 30 revealed,
scores on the others, seeds as in ``forgetting_prediction``: all updates from all, a fifth of them
new at a time, and those of CounterFact from those of the atlas. The matrix stays in ``--work`` and
is gone on with.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.forgetting_prediction import describe, folds, table
from benchmarks.measure import write
from benchmarks.planted_study import DATA
from unwrite import Edit, FullFT, load, methods, read_edits
from unwrite.forgetting import ForgettingMatrix, UpstreamExample, collect, read_examples
from unwrite.forgetting.fitting import MODELS
from unwrite.forgetting.similarity import models_beside
from unwrite.training import Pair

ATLAS, COUNTERFACT = "atlas", "counterfact"
HALF = math.log(2)  # of log perplexity: the answer is half as probable


def main() -> None:
    """Collect what is missing, test and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the published files")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--updates", type=int, default=24, help="of either kind")
    parser.add_argument("--edits", type=int, default=4, help="of an update")
    parser.add_argument("--others", type=int, default=104, help="bystanders of other records")
    parser.add_argument("--features", default="", metavar="KIND,...")
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    file, offset = DATA[COUNTERFACT]
    needed = options.updates * options.edits
    records = read_edits(options.data / file, offset=offset, limit=needed + options.others)
    facts, kept = read_edits(ATLAS), read_examples(ATLAS)
    order = np.random.default_rng(0).permutation(len(facts)).tolist()
    tasks = {
        **tasks_of(ATLAS, [facts[at] for at in order[:needed]], options.edits),
        **tasks_of(COUNTERFACT, records[:needed], options.edits),
    }
    examples = [*(kept[at] for at in order[needed : needed + 120]), *bystanders_of(records)]
    method = FullFT()
    matrix = collect(
        load(options.base),
        tasks,
        examples,
        method,
        options.work,
        settings=methods.settings_of(method),
    ).matrix
    kinds = [kind for kind in options.features.split(",") if kind]
    describe(options.work, matrix, kinds, options.base, tasks)
    result = run(matrix, models_beside(options.work, matrix), options.seeds)
    write("forgetting_updates", {"edits": options.edits, **result})


def tasks_of(kind: str, edits: Sequence[Edit], size: int) -> dict[str, list[Pair]]:
    """Updates of ``size`` edits each, named ``kind/number``."""
    parts = [edits[start : start + size] for start in range(0, len(edits), size)]
    return {
        f"{kind}/{number}": [Pair(edit.prompt, edit.new) for edit in part]
        for number, part in enumerate(parts)
    }


def bystanders_of(records: Sequence[Edit]) -> list[UpstreamExample]:
    """The bystander of every record, each prompt once."""
    probes = {probe.prompt: probe.answer for edit in records for probe in edit.bystanders}
    return [
        UpstreamExample(f"bystander-{number}", prompt, answer)
        for number, (prompt, answer) in enumerate(probes.items())
    ]


def run(
    matrix: ForgettingMatrix, beside: Mapping[str, Any] | None = None, seeds: int = 10
) -> dict[str, Any]:
    """Everything that the result file says."""
    of = {
        kind: [n for n, name in enumerate(matrix.tasks) if name.startswith(f"{kind}/")]
        for kind in (ATLAS, COUNTERFACT)
    }
    models = {**MODELS, **(beside or {})}
    splits = {
        "in_domain": folds([*of[ATLAS], *of[COUNTERFACT]]),
        "out_of_domain": [(of[COUNTERFACT], of[ATLAS])],
    }
    return {
        "tasks": {kind: len(rows) for kind, rows in of.items()},
        "examples": len(matrix.examples),
        "base": matrix.provenance.get("base_name"),
        "method": matrix.provenance.get("tuner"),
        "seeds": seeds,
        "forgotten_share": float((matrix.values > HALF).mean()),
        "rank_profile": matrix.rank_profile(),
        **{name: table(matrix, parts, models, seeds, HALF) for name, parts in splits.items()},
    }


if __name__ == "__main__":
    main()
