"""Random operations on homes beside a reference of plain tensors in memory, for as long as told.

    python -m benchmarks.soak [--minutes 120] [--seed 0]

The machine of ``tests/home_machine.py`` with long runs: hypothesis draws every step, and after each
the home must be, bit for bit, where the reference is. The result is written anew every minute,
so that a soak that is stopped leaves the true duration and count.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from benchmarks.measure import write
from tests.home_machine import HomeMachine
from unwrite.testing import toy_world

STEPS = 60  # of one home
HOMES = 25  # of one draw: the first one of a draw is the simplest there is, the same every time


def main() -> None:
    """Soak, and write what was done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    long = settings(
        max_examples=HOMES,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    started = written = time.monotonic()
    draws, divergences = 0, []
    with tempfile.TemporaryDirectory() as name:
        world = toy_world(Path(name) / "world").folder
        machine = type("Soaked", (HomeMachine,), {"world": world})
        machine.done.clear()
        while time.monotonic() - started < 60 * options.minutes:
            number = options.seed + draws
            try:
                run_state_machine_as_test(seed(number)(machine), settings=long)
            except Exception as error:  # noqa: BLE001 -- noted down, and the soak goes on
                divergences.append({"seed": number, "error": f"{type(error).__name__}: {error}"})
            draws += 1
            if time.monotonic() - written > 60:
                written = time.monotonic()
                write("soak", result(started, machine, divergences, options.seed))
        write("soak", result(started, machine, divergences, options.seed))


def result(
    started: float,
    machine: type[HomeMachine],
    divergences: list[dict[str, Any]],
    first: int,
) -> dict[str, Any]:
    """The numbers so far."""
    return {
        "seed": first,
        "minutes": (time.monotonic() - started) / 60,
        "homes": machine.done["new home"],
        "operations": sum(machine.done.values()),
        "by_kind": dict(sorted(machine.done.items())),
        "divergences": len(divergences),
        "diverged": divergences[:20],
    }


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
