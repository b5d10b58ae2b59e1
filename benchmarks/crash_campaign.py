"""Real commands killed at random moments and before every step on disk: is anything ever lost?

    python -m benchmarks.crash_campaign [--kills 300] [--minutes 60] [--resume]

Every command runs on a toy model in a process of its own and gets SIGKILL: at random, half of the
time before a step on disk (making, renaming or removing a file) and half of the time at a moment
drawn evenly from the time that the command takes; and then, where there are not many, before every
single step on disk. Then:

- a home verifies clean, and its state is bitwise the one before or the one after;
- an exported folder is whole, file by file the one of an undisturbed export, or not there;
- the next command works, and brings about what the killed one would have;
- after that no scratch is left anywhere.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import tempfile
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import unwrite
from benchmarks.measure import RESULTS, write
from tests.processes import Process, Processes
from unwrite.delta import SCRATCH
from unwrite.forgetting import ForgettingMatrix
from unwrite.testing import toy_edits, toy_world

SHORT = ("--method", "full-ft", "--set", "epochs=1", "--set", "until=epochs", "--set", "lr=1e-3")
METHOD = unwrite.FullFT(epochs=1, until="epochs", lr=1e-3)
PART = RESULTS / "crash_campaign.jsonl"
FEW = 100  # steps on disk; a command with no more is killed at each of them, too
UNSTEADY = {"seconds", "memory", "at", "command", "environment"}


class Lost(AssertionError):
    """Something that the kill destroyed, in a sentence."""


@dataclass
class Kill:
    """One kill: of which command, where, and how it was found afterwards."""

    command: str
    drawn: bool  # at random; else one of all steps in turn
    step: int | None  # before this step on disk ...
    second: float | None  # ... or at this moment
    state: str  # "before", "after" or "between" (of what can be gone on with)
    left: int  # files and folders of scratch that it left behind
    lost: str | None


class Command(ABC):
    """A command, what it works on, and what must hold after it was killed."""

    name: str

    def __init__(self, folder: Path, world: Path) -> None:
        """Make what the command works on, once, in ``folder``."""
        self.original, self.world = folder, world
        folder.mkdir()
        self.prepare()

    def prepare(self) -> None:
        """Fill ``original``; it is copied for every kill."""
        unwrite.write_edits(self.original / "edits.jsonl", toy_edits()[10:12])

    @abstractmethod
    def words(self, place: Path) -> Sequence[object]:
        """The command in ``place``, a copy of ``original``."""

    @abstractmethod
    def learn(self, place: Path) -> None:
        """Remember the result of an undisturbed command."""

    @abstractmethod
    def state(self, place: Path) -> str:
        """Which state is found after a kill. Raises ``Lost``."""

    def next(self, place: Path, state: str) -> Sequence[object]:
        """The next command, which must work; by default the same one again."""
        return self.words(place)

    def check_next(self, place: Path, state: str) -> None:
        """What must hold after the next command. Raises ``Lost``."""
        if (found := self.state(place)) != "after":
            raise Lost(f"after the same command again, the state is that {found}")


class HomeCommand(Command):
    """A command that changes a home."""

    def prepare(self) -> None:
        super().prepare()
        home = unwrite.open(self.original / "home", base=self.world)
        for number in (0, 20):
            home.update(toy_edits()[number : number + 2], METHOD)
        self.update = home.ledger.live()[0]
        self.before = _state(self.original / "home")

    def learn(self, place: Path) -> None:
        self.after = _state(place / "home")

    def state(self, place: Path) -> str:
        home = unwrite.open(place / "home")
        if problems := home.verify():
            raise Lost(f"verify: {problems[0]}")
        found = _state(place / "home")
        if found not in (self.before, self.after):
            raise Lost(f"the state {found} is neither before nor after")
        return "before" if found == self.before else "after"

    def next(self, place: Path, state: str) -> Sequence[object]:
        if state == "before":
            return self.words(place)
        live = unwrite.open(place / "home").ledger.live()
        return ("undo", place / "home", live[-1], "--no-recheck")

    def check_next(self, place: Path, state: str) -> None:
        if state == "before":
            super().check_next(place, state)
        elif problems := unwrite.open(place / "home").verify():
            raise Lost(f"verify after an undo: {problems[0]}")


class UpdateCommand(HomeCommand):
    """``unwrite update``."""

    name = "update"

    def words(self, place: Path) -> Sequence[object]:
        return ("update", place / "home", place / "edits.jsonl", *SHORT)


class ScratchUpdate(HomeCommand):
    """``unwrite update`` by a method that keeps its first change in scratch files."""

    name = "update by f-learning"

    def words(self, place: Path) -> Sequence[object]:
        settings = ("learn.epochs=1", "learn.until=epochs", "forget.epochs=1")
        given = [word for setting in settings for word in ("--set", setting)]
        home = place / "home"
        return ("update", home, place / "edits.jsonl", "--method", "f-learning", *given)


class UndoCommand(HomeCommand):
    """``unwrite undo`` of the first of two updates, with its recheck."""

    name = "undo"

    def words(self, place: Path) -> Sequence[object]:
        return ("undo", place / "home", self.update)


class ExportCommand(HomeCommand):
    """``unwrite export``; the home must stay as it was, too."""

    name = "export"

    def words(self, place: Path) -> Sequence[object]:
        return ("export", place / "home", place / "out")

    def learn(self, place: Path) -> None:
        self.after = self.before
        self.exported = _content(place / "out")

    def state(self, place: Path) -> str:
        super().state(place)
        if not (place / "out").exists():
            return "before"
        if _content(place / "out") != self.exported:
            raise Lost("the exported folder is neither whole nor absent")
        return "after"

    def next(self, place: Path, state: str) -> Sequence[object]:
        if state == "after":
            return ("export", place / "home", place / "second")
        return self.words(place)

    def check_next(self, place: Path, state: str) -> None:
        written = place / ("second" if state == "after" else "out")
        # The model card names the folder that it is in.
        cards = {"README.md"} if state == "after" else set()
        found = {name: one for name, one in _content(written).items() if name not in cards}
        if found != {name: one for name, one in self.exported.items() if name not in cards}:
            raise Lost("a second export differs from an undisturbed one")


class CompareCommand(Command):
    """``unwrite compare``; run again, it ends with the tables of an undisturbed run."""

    name = "compare"

    def words(self, place: Path) -> Sequence[object]:
        variant = "a=full-ft:epochs=1:until=epochs:lr=1e-3"
        return (
            *("compare", self.world, "--edits", self.original / "edits.jsonl"),
            *("--variant", variant),
            *("--references", "no-change,random-delta", "--token-only", "--out", place / "run"),
        )

    def learn(self, place: Path) -> None:
        self.table = _steady(place / "run" / "table.json")
        self.files = set(_content(place / "run"))

    def state(self, place: Path) -> str:
        table = place / "run" / "table.json"
        if not table.exists() or _steady(table) != self.table:
            return "between"  # of what is resumed: checked after the next command
        return "after" if set(_content(place / "run")) == self.files else "between"


class CollectCommand(Command):
    """``unwrite forgetting collect``; run again, it ends with the same matrix."""

    name = "forgetting collect"

    def prepare(self) -> None:
        super().prepare()
        unwrite.write_edits(self.original / "edits.jsonl", toy_edits()[8:12])
        examples = [{"prompt": one.prompt, "answer": one.old} for one in toy_edits()[:6]]
        lines = "".join(json.dumps(one) + "\n" for one in examples)
        (self.original / "examples.jsonl").write_text(lines)

    def words(self, place: Path) -> Sequence[object]:
        return (
            *("forgetting", "collect", place / "matrix", "--base", self.world),
            *("--edits", place / "edits.jsonl", "--examples", place / "examples.jsonl"),
            *SHORT,
        )

    def learn(self, place: Path) -> None:
        matrix = ForgettingMatrix.load(place / "matrix")
        self.values, self.tasks = matrix.values.tobytes(), matrix.tasks

    def state(self, place: Path) -> str:
        if not (place / "matrix" / "matrix.npz").exists():
            return "before"
        matrix = ForgettingMatrix.load(place / "matrix")
        rows = len(matrix.tasks)
        if matrix.tasks != self.tasks[:rows] or not self.values.startswith(matrix.values.tobytes()):
            raise Lost("the matrix is no beginning of the undisturbed one")
        return "after" if rows == len(self.tasks) else "between"


COMMANDS = (
    UpdateCommand,
    ScratchUpdate,
    UndoCommand,
    ExportCommand,
    CompareCommand,
    CollectCommand,
)


class Campaign:
    """All commands made ready in ``folder``; ``world``: the folder of a toy model."""

    def __init__(
        self, folder: Path, world: Path, commands: Sequence[type[Command]] = COMMANDS
    ) -> None:
        (folder / "processes").mkdir(parents=True)
        self.folder, self.count = folder, 0
        self.processes = Processes(folder / "processes")
        self.commands = {
            one.name: one(folder / one.name.replace(" ", "-"), world) for one in commands
        }
        self.seconds: dict[str, float] = {}
        self.steps: dict[str, int] = {}
        for name, command in self.commands.items():
            with self._place(command) as place:
                started = time.perf_counter()
                process = self.processes.run(*command.words(place), count_steps=True)
                self.seconds[name] = time.perf_counter() - started
                if process.code != 0:
                    raise Lost(f"{name} fails undisturbed: {process.err}")
                self.steps[name] = int((process.place / "steps").read_text())
                command.learn(place)

    def kill(
        self,
        name: str,
        *,
        step: int | None = None,
        second: float | None = None,
        drawn: bool = True,
    ) -> Kill:
        """Kill a command before a step, or at a second; ``state`` "" if it was done earlier."""
        command = self.commands[name]
        with self._place(command) as place:
            process = self._killed(command.words(place), step, second)
            if process.code != -signal.SIGKILL:
                return Kill(name, drawn, step, second, "", 0, None)
            left = scratch(place, process.pid)
            state, lost = "", None
            try:
                state = command.state(place)
                following = self.processes.run(*command.next(place, state))
                if following.code != 0:
                    raise Lost(f"the next command ends with {following.code}: {following.err}")
                command.check_next(place, state)
                if orphans := scratch(place, process.pid):
                    raise Lost(f"scratch is left: {orphans}")
            except (Lost, unwrite.UnwriteError, OSError) as error:
                lost = str(error)
            return Kill(name, drawn, step, second, state, len(left), lost)

    def _killed(self, words: Sequence[object], step: int | None, second: float | None) -> Process:
        if step is not None:
            return self.processes.run(*words, die_at=step)
        process = self.processes.start(*words)
        time.sleep(second or 0.0)
        process.send(signal.SIGKILL)
        return process

    def _place(self, command: Command) -> Place:
        self.count += 1
        return Place(command.original, self.folder / f"place-{self.count}")


class Place:
    """A copy of what a command works on, for the length of a block."""

    def __init__(self, original: Path, folder: Path) -> None:
        self.original, self.folder = original, folder

    def __enter__(self) -> Path:
        shutil.copytree(self.original, self.folder)
        return self.folder

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder)


def scratch(place: Path, process: int) -> list[str]:
    """Everything hidden in a place but locks, and the temporary folders of a process."""
    hidden = [
        one for one in place.rglob("*") if one.name.startswith(".") and one.name != ".lock"
    ] + list(place.rglob("partial"))
    temporary = Path(tempfile.gettempdir()).glob(f".{SCRATCH}.*.{process}.partial")
    return sorted(str(one) for one in (*hidden, *temporary))


def drawn_moments(
    campaign: Campaign, number_of_kills: int, seed: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Which command to kill, and when: commands in turns, steps and seconds in turns, at random."""
    draw = random.Random(seed)
    for number in range(number_of_kills):
        name = list(campaign.commands)[number % len(campaign.commands)]
        if (number // len(campaign.commands)) % 2 == 0:
            yield name, {"step": draw.randint(1, campaign.steps[name])}
        else:
            yield name, {"second": draw.uniform(0.0, campaign.seconds[name])}


def every_step(campaign: Campaign) -> Iterator[tuple[str, dict[str, Any]]]:
    """All steps on disk of the commands that have few enough."""
    for name, steps in campaign.steps.items():
        if steps <= FEW:
            yield from ((name, {"step": step, "drawn": False}) for step in range(1, steps + 1))


def summary(kills: Sequence[Kill]) -> dict[str, Any]:
    """The numbers of the campaign, by command and in all."""
    by_command = {}
    for name in dict.fromkeys(one.command for one in kills):
        own = [one for one in kills if one.command == name]
        by_command[name] = {
            "kills": len(own),
            "at_random": sum(one.drawn for one in own),
            "before_a_step": sum(one.step is not None for one in own),
            "at_a_moment": sum(one.second is not None for one in own),
            "found": dict(Counter(one.state for one in own)),
            "left_scratch_that_was_swept": sum(one.left > 0 for one in own),
            "lost": sum(one.lost is not None for one in own),
        }
    return {
        "kills": len(kills),
        "at_random": sum(one.drawn for one in kills),
        "lost": sum(one.lost is not None for one in kills),
        "losses": [asdict(one) for one in kills if one.lost],
        "commands": by_command,
    }


def _state(home: Path) -> tuple[tuple[str, ...], str]:
    """The live updates of a home and the fingerprint of all tensors, recomposed."""
    opened = unwrite.open(home)
    live = opened.ledger.live()
    return tuple(live), opened.fingerprint(live)


def _content(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def _steady(table: Path) -> str:
    """A table of results without what the clock decides."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(one) for key, one in value.items() if key not in UNSTEADY}
        return [without(one) for one in value] if isinstance(value, list) else value

    return json.dumps(without(json.loads(table.read_text("utf-8"))), sort_keys=True)


def main() -> None:
    """Run the campaign; every kill is noted down at once, so that it can be gone on with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300, help="drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on after what is noted down")
    parser.add_argument("--minutes", type=float, default=60.0, help="at most, then --resume")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    kills: list[Kill] = []
    if options.resume and PART.exists():
        kills = [Kill(**json.loads(line)) for line in PART.read_text("utf-8").splitlines()]
    done = sum(one.drawn for one in kills)
    known = {(one.command, one.step) for one in kills if not one.drawn}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = toy_world(folder / "world").folder
        campaign = Campaign(folder / "campaign", world)
        moments = itertools.chain(
            drawn_moments(campaign, options.kills - done, options.seed + done),
            (one for one in every_step(campaign) if (one[0], one[1]["step"]) not in known),
        )
        with PART.open("a" if kills else "w", encoding="utf-8") as notes:
            for command, moment in moments:
                if time.monotonic() > until:
                    break
                kill = campaign.kill(command, **moment)
                if not kill.state and not kill.lost:
                    continue  # the command was faster
                kills.append(kill)
                notes.write(json.dumps(asdict(kill)) + "\n")
                notes.flush()
        facts = {"seed": options.seed, "steps_on_disk": campaign.steps}
        write("crash_campaign", {**facts, **summary(kills)})


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
