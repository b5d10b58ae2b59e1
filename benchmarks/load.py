"""A home with a thousand updates, some of them undone: how long do its verbs take as it grows?

    python -m benchmarks.load [--updates 1000] [--seed 0]

Each update is a small change of one tensor of a toy model, so that the home is measured and not the
training. After every tenth part the verbs are timed three times (processor time of this process).
``growth`` is the exponent of the time over the lines of the ledger: 1 is linear. At the end the
home is compacted, and they are timed once more.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

import unwrite
from benchmarks.measure import exponent, write
from unwrite.change import Dense
from unwrite.delta import Delta
from unwrite.testing import toy_edits, toy_world

TENSOR = "model.layers.0.mlp.down_proj.weight"
UNDONE = 0.3  # share of the updates that are undone at some time


@dataclass(frozen=True)
class Nudge:
    """A method that moves one tensor a little, in a direction drawn from its seed."""

    seed: int = 0

    name: ClassVar[str] = "nudge"

    def delta(self, model: Any, _edits: Any) -> Delta:
        generator = torch.Generator().manual_seed(self.seed)
        shape = model.weights.shape(TENSOR)
        return Delta.from_changes({TENSOR: Dense(1e-4 * torch.randn(shape, generator=generator))})


def grow(home: Any, draw: random.Random, until: int) -> None:
    """Update and undo until so many updates were made."""
    while (made := len(home.ledger.applied)) < until:
        home.update(toy_edits()[made % 30 : made % 30 + 1], Nudge(made))
        if draw.random() < UNDONE:
            home.undo(draw.choice(home.ledger.live()), recheck=False)


def seconds(work: Callable[[], Any]) -> float:
    """Median of three runs, of the processor: what else the machine does makes them no longer."""
    found = []
    for _ in range(3):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return statistics.median(found)


def measured(folder: Path) -> dict[str, Any]:
    """The verbs on the home as it is, each on a home opened anew."""

    def fresh() -> Any:
        return unwrite.open(folder)

    lines, live = len(fresh().ledger.entries), len(fresh().ledger.live())
    times = {
        "open": seconds(lambda: fresh().ledger),
        "history": seconds(lambda: fresh().history()),
        "verify": seconds(lambda: fresh().verify()),
        "ask": seconds(lambda: fresh().ask("ada works as a", max_new_tokens=2)),
        "report": seconds(lambda: unwrite.report(folder, folder.parent / "report.html")),
    }
    return {"lines": lines, "live": live, "seconds": times}


def growth(points: list[dict[str, Any]]) -> dict[str, float]:
    """By verb, the exponent of its time over the lines of the ledger: 1 is linear."""
    lines = [float(one["lines"]) for one in points]
    return {
        verb: exponent(lines, [one["seconds"][verb] for one in points])
        for verb in points[0]["seconds"]
    }


def main() -> None:
    """Grow a home, measure on the way, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        world = toy_world(Path(name) / "world")
        home = unwrite.open(Path(name) / "home", base=world.folder)
        points = []
        for tenth in range(1, 11):
            grow(home, draw, options.updates * tenth // 10)
            points.append(measured(home.folder))
            print(points[-1])
        home.compact()
        compacted = measured(home.folder)
        print(compacted)
        problems = unwrite.open(home.folder).verify()
        for update in list(home.ledger.live()):
            home.undo(update, recheck=False)
        back = home.fingerprint(home.ledger.live()) == home.base.fingerprint
    write(
        "load",
        {
            "seed": options.seed,
            "updates": options.updates,
            "undone": points[-1]["lines"] - 1 - options.updates,
            "problems": problems,
            "all_undone_is_the_base": back,
            "points": points,
            "compacted": compacted,
            "growth": growth(points),
        },
    )


if __name__ == "__main__":
    main()
