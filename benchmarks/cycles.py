"""Ten updates in a row, then all undone in random order: drift and retention.

    python -m benchmarks.cycles --work FOLDER [--methods full-ft,f-learning,delicate] [--base MODEL]

Known facts of the atlas (odd places: the test split) are dealt out to ten updates of one home a
method, each with facts of many relations. After every update and every undo all of them are asked:
how many of each update's new answers are given, how many of its old ones, how many bystanders
answer as the base does, and the perplexity on neutral text. Undo is exact, so the last state has to
have the base's fingerprint; what happens on the way there is the question. Every step is a line of
FOLDER/METHOD.jsonl; a run that was cut off goes on there; ``--summary`` only writes the result.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import unwrite
from benchmarks.full_ft_defaults import forced
from benchmarks.measure import add_line, lines, write
from unwrite import methods
from unwrite.edits import Edit, read_edits
from unwrite.home import Home
from unwrite.observe import Question, perplexity, questions, settle
from unwrite.scores import token_share

METHODS = ("full-ft", "f-learning", "delicate")


def main() -> None:
    """Make the steps that are missing, one method after the other, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the homes, kept")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--edits", default="atlas", help="where the facts are from")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--facts", type=int, default=8, help="of one update")
    parser.add_argument("--seed", type=int, default=0, help="of the order of undoing")
    parser.add_argument("--summary", action="store_true", help="only write the result")
    options = parser.parse_args()
    names = options.methods.split(",")
    if not options.summary:
        for name in names:
            Cycle(options, name).go()
    found = {name: lines(options.work / f"{name}.jsonl") for name in names}
    settings = {key: getattr(options, key) for key in ("base", "updates", "facts", "seed")}
    settings["base"] = Path(options.base).name
    write("cycles", {**settings, "methods": {k: summary(v) for k, v in found.items() if v}})


class Cycle:
    """One home, its updates, and the order in which they are undone."""

    def __init__(self, options: argparse.Namespace, name: str) -> None:
        self.method = methods.build(name, {})
        self.path = options.work / f"{name}.jsonl"
        self.home = unwrite.open(options.work / f"{name}-home", base=options.base)
        self.batches = dealt(self.home, options)
        everything = [edit for batch in self.batches for edit in batch]
        self.probes = settle(self.home.model("base"), questions(everything))
        self.batch_of = {
            str(edit.id): number for number, batch in enumerate(self.batches) for edit in batch
        }
        order = list(range(options.updates))
        random.Random(options.seed).shuffle(order)
        self.steps = [("update", number) for number in range(options.updates)]
        self.steps += [("undo", number) for number in order]

    def go(self) -> None:
        """Make and measure the steps that have no line yet."""
        done = len(lines(self.path))
        if done == len(self.steps):
            return
        base = forced(self.home.model("base"), self.probes)
        for what, number in self.steps[done:]:
            getattr(self, what)(number)
            add_line(self.path, {"step": what, "of": number, **self.measured(base)})

    def update(self, number: int) -> None:
        """Make an update, if it was not made before its line could be written."""
        if number not in self.made():
            self.home.update(self.batches[number], self.method, why=f"update {number}")

    def undo(self, number: int) -> None:
        """Undo an update, if that was not done."""
        name = self.made()[number]
        if name in self.home.ledger.live():
            self.home.undo(name, recheck=False)

    def made(self) -> dict[int, str]:
        """The ids of the updates in the ledger, by number."""
        applied = self.home.ledger.applied
        return {int(entry["why"].split()[1]): name for name, entry in applied.items()}

    def measured(self, base: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What the present state answers to everything."""
        model, live = self.home.model(), set(self.home.ledger.live())
        rows = forced(model, self.probes)
        names = {name: number for number, name in self.made().items()}
        return {
            "live": sorted(names[name] for name in live),
            "new": self.shares(rows, "reliability"),
            "old": self.shares(rows, "old_recall"),
            "locality": unchanged(self.probes, base, rows),
            "perplexity": perplexity(model),
            "is_base": self.home.fingerprint(self.home.ledger.live()) == self.home.base.fingerprint,
        }

    def shares(self, rows: Sequence[dict[str, Any]], role: str) -> list[float]:
        """Mean token share of one role for each update's facts, in their order."""
        return [
            mean(
                token_share(row)
                for row in rows
                if row["role"] == role and self.batch_of[row["edit"]] == number
            )
            for number in range(len(self.batches))
        ]


def dealt(home: Home, options: argparse.Namespace) -> list[list[Edit]]:
    """The facts of each update: known ones of the test split, every update with many relations."""
    known = read_edits(options.edits, known_to=home.model("base"))[1::2]
    count = options.updates * options.facts
    if len(known) < count:
        raise SystemExit(f"{count} known facts are asked for and {len(known)} are there")
    by_relation = sorted(known, key=lambda edit: edit.relation or "")
    spread = [by_relation[place * len(known) // count] for place in range(count)]
    return [spread[number :: options.updates] for number in range(options.updates)]


def unchanged(
    probes: Sequence[Question], base: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]
) -> float:
    """Share of the bystanders' tokens that are answered as the base answers them."""
    return mean(
        mean(a == b for a, b in zip(one["predicted"], two["predicted"], strict=True))
        for probe, one, two in zip(probes, base, now, strict=True)
        if probe.role == "locality"
    )


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The steps with means over the updates that are live and over those that were undone."""
    return {"steps": [step(row) for row in rows], "ends_at_base": rows[-1]["is_base"]}


def step(row: dict[str, Any]) -> dict[str, Any]:
    """One step: new answers of what is live and of what is undone, old answers likewise."""
    live = set(row["live"])
    undone = [] if row["step"] == "update" else [n for n in range(len(row["new"])) if n not in live]

    def over(values: Sequence[float], numbers: Sequence[int]) -> float | None:
        return mean(values[number] for number in numbers) if numbers else None

    return {
        "step": row["step"],
        "of": row["of"],
        "live": len(live),
        "latest": row["new"][row["of"]],
        "new_of_live": over(row["new"], sorted(live)),
        "new_of_undone": over(row["new"], undone),
        "old_of_undone": over(row["old"], undone),
        "locality": row["locality"],
        "perplexity": row["perplexity"],
    }


if __name__ == "__main__":
    main()
