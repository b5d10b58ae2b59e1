"""Which bystanders an update moves: those whose answer the model was never sure of?

    python -m benchmarks.moved_bystanders --data ../shared/data [--kinds atlas --seeds 3]

The draws of test facts of ``benchmarks.auto_study``. How *sure* a model is of a bystander's answer
is the least lead, in logits, of its first choice over its second at the answer's positions, before
the update. By quarters of the bystanders, the least sure first: their lead, and the share of their
answers' tokens that stay. ``shuffled`` is the control: the change that ``auto`` made, the elements
of every tensor in another order, so as large and without a meaning.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from benchmarks.auto_study import PLANTED, built, drawn
from benchmarks.measure import RESULTS, add_line, lines, write
from benchmarks.method_defaults import scored
from unwrite import Edit, load
from unwrite.change import Dense
from unwrite.delta import Delta
from unwrite.model import Model, length_batches, pad
from unwrite.observe import questions, settle

RUNS = RESULTS / "moved_bystanders.jsonl"
CHOSEN = ("full-ft", "memit", "auto")  # of auto_study
QUARTERS = 4


@dataclass(frozen=True)
class Given:
    """A change that is there already."""

    stored: Delta

    name: ClassVar[str] = "given"

    def delta(self, _model: Model, _edits: Sequence[Edit]) -> Delta:
        return self.stored


@dataclass
class Remembered:
    """A method whose last change is kept."""

    method: Any
    last: Delta | None = None

    name: ClassVar[str] = "remembered"

    def delta(self, model: Model, edits: Sequence[Edit]) -> Delta:
        self.last = self.method.delta(model, edits).in_memory()
        return self.last


@dataclass(frozen=True)
class Shuffled:
    """The last change of a method with the elements of every tensor in another order."""

    of: Remembered

    name: ClassVar[str] = "shuffled"

    def delta(self, _model: Model, _edits: Sequence[Edit]) -> Delta:
        assert self.of.last is not None
        draw = torch.Generator().manual_seed(0)
        return Delta.from_changes(
            {name: Dense(shuffled(self.of.last[name].dense(), draw)) for name in self.of.last}
        )


def shuffled(values: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """The same elements in another order."""
    return values.flatten()[torch.randperm(values.numel(), generator=draw)].view_as(values)


def main() -> None:
    """Run what is missing and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data slices")
    parser.add_argument("--kinds", default="atlas,counterfact")
    parser.add_argument("--facts", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--summary", action="store_true", help="only write the summary")
    options = parser.parse_args()
    options.split = "test"
    if not options.summary:
        model = load("smollm2-135m")
        there = {(one["kind"], one["facts"], one["seed"]) for one in lines(RUNS)}
        for seed in range(options.seeds):
            for kind in options.kinds.split(","):
                if (kind, options.facts, seed) not in there:
                    edits = drawn(model, kind, options, seed)
                    key = {"kind": kind, "facts": options.facts, "seed": seed}
                    add_line(RUNS, key | run(model, edits, seed, planted=kind in PLANTED))
    write("moved_bystanders", {"tables": summary(lines(RUNS))})


def run(model: Model, edits: Sequence[Edit], seed: int, *, planted: bool) -> dict[str, Any]:
    """For every bystander the lead before, and by method the share of its tokens that stay."""
    chosen: dict[str, Any] = {name: built(name, seed) for name in CHOSEN}
    chosen["auto"] = Remembered(chosen["auto"])
    chosen["shuffled"] = Shuffled(chosen["auto"])
    states = [Given(Delta.nothing()), *chosen.values()]
    probes: list[tuple[str, str]] = []

    def choices() -> dict[str, Any]:
        if not probes:  # the first state: as planted, before any update
            asked = settle(model, [one for one in questions(edits) if one.role == "locality"])
            probes.extend((one.prompt, str(one.target)) for one in asked)
        return {"choices": leads(model, probes)}

    first, *others = scored(model, edits, states, planted=planted, also=choices)
    before = first["choices"]
    return {
        "lead": [round(lead, 3) for lead, _ in before],
        "stayed": {
            name: [
                float(np.mean(np.equal(then, now)))
                for (_, then), (_, now) in zip(before, one["choices"], strict=True)
            ]
            for name, one in zip(chosen, others, strict=True)
        },
    }


@torch.no_grad()
def leads(model: Model, probes: Sequence[tuple[str, str]]) -> list[tuple[float, list[int]]]:
    """Of every (prompt, answer): the least lead of the first choice over the second at the
    answer's positions, in logits, and the first choices."""
    sequences = [model.tokens(*probe) for probe in probes]
    found: dict[int, tuple[float, list[int]]] = {}
    for batch in length_batches([len(one.ids) for one in sequences]):
        ids, rows, columns, _ = pad([sequences[index] for index in batch])
        best, at = model.logits_at(ids, rows, columns).topk(2, dim=-1)
        lead = best[:, 0] - best[:, 1]
        for row, index in enumerate(batch):
            own = rows == row
            found[index] = float(lead[own].min()), at[own, 0].tolist()
    return [found[index] for index in range(len(sequences))]


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per kind of facts, quarters of the bystanders of all draws by their lead."""
    tables = []
    for kind, facts in dict.fromkeys((one["kind"], one["facts"]) for one in runs):
        here = [one for one in runs if (one["kind"], one["facts"]) == (kind, facts)]
        lead = np.concatenate([one["lead"] for one in here])
        stayed = {
            name: np.concatenate([one["stayed"][name] for one in here])
            for name in here[0]["stayed"]
        }
        quarters = np.array_split(np.argsort(lead, kind="stable"), QUARTERS)
        tables.append(
            {
                "kind": kind,
                "facts": facts,
                "seeds": len(here),
                "bystanders": len(lead),
                "quarters": [
                    {
                        "lead": statistics.median(lead[quarter].tolist()),
                        "stayed": {n: float(one[quarter].mean()) for n, one in stayed.items()},
                    }
                    for quarter in quarters
                ],
            }
        )
    return tables


if __name__ == "__main__":
    main()
