"""F-Learning: forget the old knowledge first, then learn the new (arXiv 2311.08011)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from unwrite.delta import Delta
from unwrite.edits import Edit
from unwrite.errors import BadSetting, TrainingFailed
from unwrite.methods.full_ft import FullFT
from unwrite.methods.probes import Tuner, answers, check_tuner, parts, run
from unwrite.model import Model
from unwrite.observe import neutral_text, perplexity
from unwrite.training import new_pairs

WORDS_READ = 600  # of the neutral text, before and after forgetting
HALVINGS = 6  # of the strength, before giving up


@dataclass(frozen=True)
class FLearning:
    """Subtract what learning the old answers does, then learn the new ones (METHODS 2.1).

    1. ``D_old = FT{theta, K_old} - theta`` with the tuner ``forget`` (of the merged weights, if it
       is LoRA), and ``theta' = theta - strength * D_old`` (strength: lambda in the paper).
    2. ``theta* = FT{theta', K_new}`` with the tuner ``learn``.

    Where an edit has no old answer, the model is asked for it. If the perplexity on neutral text
    rises beyond ``max_perplexity_ratio`` times what it was, the strength is halved until it does
    not, and the notes say so; after six halvings nothing is kept.

    Memory: that of its tuners, one at a time; the first delta waits in scratch files.
    """

    strength: float = 0.3
    forget: Tuner = field(default_factory=lambda: FullFT(epochs=3, until="epochs"))
    learn: Tuner = field(default_factory=FullFT)
    max_perplexity_ratio: float = 2.0

    name: ClassVar[str] = "f-learning"
    paper: ClassVar[str] = "Forgetting before Learning, arXiv 2311.08011"
    advice: ClassVar[str] = "facts the model holds firmly and keeps falling back to"

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise BadSetting(f"strength must be 0 or greater, not {self.strength}.")
        if not self.max_perplexity_ratio > 1:
            raise BadSetting("max_perplexity_ratio must be greater than 1 (or inf).")
        check_tuner(self.forget)
        check_tuner(self.learn)

    def delta(self, model: Model, edits: Sequence[Edit]) -> Delta:
        if self.strength == 0:  # nothing is forgotten: plain learning, bit for bit
            return run(self.learn, model, new_pairs(edits)).delta
        both = answers(model, edits, "data")
        forgetting = run(self.forget, model, both.old)
        old = forgetting.delta.stored()
        strength, sentences = self._bearable(model, old)
        forgotten = -strength * old
        learning = run(self.learn, model, both.new, forgotten)
        total = forgotten + learning.delta
        total.provenance["notes"] = {
            "sentences": sentences,
            "strength": strength,
            "old_answers_asked": both.asked,
            "epochs": {"forget": forgetting.epochs, "learn": learning.epochs},
            "learned": learning.learned,
        }
        total.provenance["parts"] = parts(old=old, new=learning.delta)
        return total

    def _bearable(self, model: Model, old: Delta) -> tuple[float, list[str]]:
        """The given strength, or the first half, quarter, ... that leaves the model a language."""
        text = neutral_text(WORDS_READ)
        bound = self.max_perplexity_ratio * perplexity(model, text)
        for halvings in range(HALVINGS + 1):
            strength = self.strength / 2**halvings
            with model.shifted(-strength * old):
                measured = perplexity(model, text)
            if measured <= bound:  # false for a not-a-number, too
                sentence = (
                    f"Forgetting at strength {self.strength:g} broke the language of the model "
                    f"(perplexity beyond {bound:.1f}); strength {strength:g} was used."
                )
                return strength, [sentence] if halvings else []
        raise TrainingFailed(
            f"Forgetting breaks the model: even at strength {strength:g} the perplexity on neutral "
            f"text is {measured:.1f}, beyond the bound of {bound:.1f}. Nothing was kept. Use fewer "
            "epochs or a smaller lr in 'forget'."
        )
