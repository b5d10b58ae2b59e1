"""Delicate Fine-Tuning: change only the weights on which old and new knowledge disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from unwrite.delta import Delta
from unwrite.edits import Edit
from unwrite.errors import BadSetting
from unwrite.methods.full_ft import FullFT
from unwrite.methods.probes import (
    Answers,
    OldAnswers,
    Tuner,
    answers,
    check_tuner,
    parts,
    run_paired,
)
from unwrite.model import Model
from unwrite.selection import Selection, select
from unwrite.training import Trained, learned


@dataclass(frozen=True)
class Delicate:
    """Repeat until the new answers are learned, at most ``rounds`` times (METHODS 3.2):

    1. ``D_old = FT{theta, K_old} - theta`` and ``D_new = FT{theta, K_new} - theta``, paired probes
       by ``tuner`` (eqs 3 and 5; ``FullFT`` gives DFT_FT, ``LoRA`` DFT_LoRA, eqs 8 to 11);
    2. ``D_core``: drop every element in which the two have the same sign, and of the rest keep the
       share ``top`` (T) with the largest difference (eq 6);
    3. ``theta <- theta + strength * D_core`` (lambda, eq 7).

    ``scope``: rank over the whole model or tensor by tensor. ``of``: ``top`` counts the elements in
    conflict ("survivors") or all. ``keep``: the core holds ``D_new`` or ``D_new - D_old``.
    ``conflict=False`` leaves out the sign filter. ``old="ask"``: the model's own sentences are the
    old data points (see ``probes.answers``), asked anew in every round.

    Memory: that of the tuner and the core so far; the first probe waits in scratch files.
    """

    top: float = 1.0
    strength: float = 1.0
    rounds: int = 8
    scope: Literal["model", "tensor"] = "model"
    of: Literal["survivors", "all"] = "survivors"
    keep: Literal["new", "difference"] = "new"
    old: OldAnswers = "data"
    conflict: bool = True
    tuner: Tuner = field(default_factory=FullFT)

    name: ClassVar[str] = "delicate"
    paper: ClassVar[str] = "Delicate Fine-Tuning (DFT)"
    advice: ClassVar[str] = "old answers known, style and neighbours to be left alone"

    def __post_init__(self) -> None:
        if not 0 < self.top <= 1:
            raise BadSetting(f"top is a fraction greater than 0 and at most 1, not {self.top}.")
        if not self.strength > 0 or self.rounds < 1:
            raise BadSetting("strength must be greater than 0 and rounds at least 1.")
        check_tuner(self.tuner)

    def delta(self, model: Model, edits: Sequence[Edit]) -> Delta:
        core, said = Delta.nothing(), _Story()
        for _ in range(self.rounds):
            with model.shifted(core):
                both = answers(model, edits, self.old)
            old, new = run_paired(self.tuner, model, both, core)
            chosen = select(
                old.delta,
                new.delta,
                self.top,
                scope=self.scope,
                of=self.of,
                keep=self.keep,
                conflict=self.conflict,
            )
            core = (core + self.strength * chosen.delta).in_memory()
            with model.shifted(core):
                right = sum(learned(model, both.new))
            said.add(both, new, chosen, right)
            if right == len(edits):
                break
        core.provenance["notes"] = said.notes(self.rounds)
        core.provenance["parts"] = parts(old=old.delta, new=new.delta)
        return core


class _Story:
    """What happened, round by round, for the record."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, Any]] = []

    def add(self, both: Answers, new: Trained, chosen: Selection, right: int) -> None:
        self.rounds.append(
            {
                "epochs": new.epochs,
                "survivors": int(chosen.survivors),
                "kept": chosen.kept,
                "parameters": chosen.parameters,
                "threshold": chosen.threshold,
                "old_answers_asked": both.asked,
                "fallbacks": both.fallbacks,
                "learned": right,
                "of": len(both.new),
            }
        )

    def notes(self, limit: int) -> dict[str, Any]:
        """Facts, and in sentences what a user should not miss."""
        last, sentences = self.rounds[-1], []
        if last["learned"] < last["of"]:
            sentences.append(
                f"After {limit} rounds, {last['of'] - last['learned']} of {last['of']} new answers "
                "are not learned in full; more rounds or a larger top may help."
            )
        if last["fallbacks"]:
            sentences.append(
                f"The model's own sentence did not contain the old answer for {last['fallbacks']} "
                f"of {last['of']} edits; the bare answers were used for those."
            )
        return {"sentences": sentences, "rounds": self.rounds}
