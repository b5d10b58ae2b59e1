"""What is no option of ``auto``, put around it for ``auto_study``: ingredients of the papers, and
edits whose subject is not told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from unwrite import Edit
from unwrite.delta import Delta
from unwrite.methods.auto import Auto
from unwrite.methods.full_ft import FullFT
from unwrite.methods.probes import answers, run
from unwrite.model import Model
from unwrite.selection import select
from unwrite.training import new_pairs


@dataclass(frozen=True)
class ForgetFirst:
    """F-Learning's first step, then ``auto``: its strength, its epochs."""

    strength: float = 0.3
    forget: FullFT = field(default_factory=lambda: FullFT(epochs=3, until="epochs"))
    then: Auto = field(default_factory=Auto)

    name: ClassVar[str] = "forget-first"

    def delta(self, model: Model, edits: Sequence[Edit]) -> Delta:
        old = run(self.forget, model, answers(model, edits, "data").old).delta
        forgotten = (-self.strength * old).in_memory()
        with model.shifted(forgotten):
            rest = self.then.delta(model, edits)
        return (forgotten + rest).in_memory()


@dataclass(frozen=True)
class InConflict:
    """Of what ``auto`` changes, what contradicts a fine-tune on the old answers: Delicate's filter,
    everything in conflict kept, one round."""

    probe: FullFT = field(default_factory=lambda: FullFT(epochs=3, until="epochs"))
    of: Auto = field(default_factory=Auto)

    name: ClassVar[str] = "in-conflict"

    def delta(self, model: Model, edits: Sequence[Edit]) -> Delta:
        old = run(self.probe, model, answers(model, edits, "data").old).delta.in_memory()
        new = self.of.delta(model, edits)
        return select(old, new, top=1.0).delta.in_memory()


@dataclass(frozen=True)
class MeanOfSeeds:
    """The mean of what ``auto`` changes under several seeds."""

    seeds: int = 3
    of: Auto = field(default_factory=Auto)

    name: ClassVar[str] = "mean-of-seeds"

    def delta(self, model: Model, edits: Sequence[Edit]) -> Delta:
        total = Delta.nothing()
        for number in range(self.seeds):
            again = replace(self.of, seed=self.of.seed + 1000 * number)
            total = (total + 1 / self.seeds * again.delta(model, edits)).in_memory()
        return total


@dataclass(frozen=True)
class MeanOfWritings:
    """The mean of what ``auto`` would write under several seeds, then its training of the rest."""

    seeds: int = 3
    of: Auto = field(default_factory=Auto)

    name: ClassVar[str] = "mean-of-writings"

    def delta(self, model: Model, edits: Sequence[Edit]) -> Delta:
        total = MeanOfSeeds(self.seeds, replace(self.of, epochs=0)).delta(model, edits)
        rest = self.of.parts[-1]
        assert isinstance(rest, FullFT)
        return (total + rest.train(model, new_pairs(edits), start=total).delta).in_memory()


@dataclass(frozen=True)
class WithoutSubjects:
    """``auto`` on edits that do not say what their subject is."""

    of: Auto = field(default_factory=Auto)

    name: ClassVar[str] = "without-subjects"

    def delta(self, model: Model, edits: Sequence[Edit]) -> Delta:
        return self.of.delta(model, [replace(edit, subject=None) for edit in edits])


INGREDIENTS: dict[
    str, ForgetFirst | InConflict | MeanOfSeeds | MeanOfWritings | WithoutSubjects
] = {
    "auto, forgetting first": ForgetFirst(),
    "auto, only what is in conflict": InConflict(),
    "auto, mean of three seeds": MeanOfSeeds(),
    "auto, mean of three writings": MeanOfWritings(),
    "auto, mean of three writings, firmly": MeanOfWritings(of=Auto(stop=0.1)),
    "auto, subjects guessed": WithoutSubjects(),
    "auto, subjects unknown": WithoutSubjects(Auto(guess_subjects=False)),
    "auto, subjects unknown, own prompts too": WithoutSubjects(
        Auto(guess_subjects=False, own_prompts=200)
    ),
}
