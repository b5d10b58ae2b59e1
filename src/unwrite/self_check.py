"""Whether an update did what it should, judged by prompts that are made from the edits alone.

The paraphrases and bystanders of the records are for scoring. What chooses and reports before that
reads only the edits' prompts, neutral sentences, made-up neighbours and bundled questions, none of
which anything was taught or kept on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from unwrite.delta import Delta
from unwrite.edits import Edit
from unwrite.kept import ANSWER_TOKENS_KEPT
from unwrite.model import Model, Tokens, readable
from unwrite.neighbours import neighbours
from unwrite.observe import neutral_text, perplexity
from unwrite.training import learned, neutral_contexts, new_pairs
from unwrite.wordings import other_questions

STRENGTHS = (0.5, 0.6, 0.7, 0.8, 0.9)  # tried from the least; 1 is what was trained
REWORDINGS = 4  # neutral sentences that no edit was taught behind
CHECKED = 2  # made-up neighbours of every edit that nothing protects
QUESTIONS = 3  # other questions about every subject
WORDS_READ = 600  # of the neutral text


class Found(NamedTuple):
    """What the check finds: shares of answers that are right (of all their tokens), of made-up
    neighbours that nothing protected and whose answer stayed, of other questions about the subjects
    that get the new answer (``spill``), and perplexity relative to before."""

    learned: float | None
    reworded: float | None
    neighbours_kept: float | None
    spill: float | None
    perplexity_ratio: float

    def sentence(self) -> str:
        """The check for people."""
        shares = (
            (self.learned, "of the new answers right"),
            (self.reworded, "behind sentences not met in training"),
            (self.neighbours_kept, "of made-up neighbours that nothing protected as before"),
            (self.spill, "of other questions about the subjects answered with the new answer"),
        )
        told = [f"{100 * share:.0f} % {what}" for share, what in shares if share is not None]
        return (
            f"Checked without the records' own probes: {', '.join(told)}; "
            f"perplexity x {self.perplexity_ratio:.3f}."
        )


@dataclass(frozen=True)
class SelfCheck:
    """What a candidate is judged by, made from the edits' prompts and the model as it was."""

    bare: list[Tokens]
    reworded: list[Tokens]
    neighbours: list[Tokens]
    others: list[Tokens]
    protected: list[Tokens]
    perplexity: float
    text: str = field(repr=False)

    @classmethod
    def of(
        cls,
        model: Model,
        edits: Sequence[Edit],
        *,
        taught_behind: int,
        neighbours_kept: int,
        protect: Sequence[str],
        seed: int,
    ) -> SelfCheck:
        """``taught_behind``: so many of the bundled neutral sentences stood before prompts that
        were taught; ``neighbours_kept``: made-up neighbours of every edit that are kept, drawn by
        ``seed``; ``protect``: prompts whose answers are to stay. Memory: a few prompts an edit."""
        unseen = neutral_contexts(taught_behind + REWORDINGS)[taught_behind:]
        pairs = new_pairs(edits)
        asked = [(edit.prompt, edit.subject) for edit in edits]
        protected = set(neighbours(asked, neighbours_kept, seed))
        made_up = neighbours(asked, CHECKED, seed + 1)
        prompts = [one for one in made_up if one not in protected]
        said = model.generate([*prompts, *protect], ANSWER_TOKENS_KEPT)
        answered = list(zip([*prompts, *protect], said, strict=True))
        behind = [(f"{one} {pair.prompt}", pair.answer) for pair in pairs for one in unseen]
        others = [
            (question, edit.new)
            for edit in edits
            if edit.subject
            for question in other_questions(edit.prompt, edit.subject, QUESTIONS)
        ]
        text = neutral_text(WORDS_READ)
        return cls(
            bare=readable(model, [(pair.prompt, pair.answer) for pair in pairs]),
            reworded=readable(model, behind),
            neighbours=readable(model, answered[: len(prompts)]),
            others=readable(model, others),
            protected=readable(model, answered[len(prompts) :]),
            perplexity=perplexity(model, text),
            text=text,
        )

    def nothing_wants(self, model: Model, edits: Sequence[Edit], delta: Delta) -> bool:
        """Whether every new answer is right, and every one to protect as it was."""
        with model.shifted(delta):
            return all((*learned(model, new_pairs(edits)), *_right(model, self.protected)))

    def least_strength(self, model: Model, delta: Delta) -> float:
        """The least of ``STRENGTHS`` and 1 at which all holds that holds at 1."""
        wanted = self._held(model, delta)
        for strength in STRENGTHS:
            held = self._held(model, strength * delta)
            if all(now >= then for now, then in zip(held, wanted, strict=True)):
                return strength
        return 1.0

    def _held(self, model: Model, delta: Delta) -> list[bool]:
        with model.shifted(delta):
            return _right(model, [*self.bare, *self.reworded])

    def found(self, model: Model, delta: Delta) -> Found:
        """What a candidate does; the model is left as it was."""
        with model.shifted(delta):
            return Found(
                learned=_share(_right(model, self.bare)),
                reworded=_share(_right(model, self.reworded)),
                neighbours_kept=_share(_right(model, self.neighbours)),
                spill=_share(_right(model, self.others)),
                perplexity_ratio=perplexity(model, self.text) / self.perplexity,
            )


def _right(model: Model, sequences: Sequence[Tokens]) -> list[bool]:
    return [one.matched == len(one.targets) for one in model.force(sequences)] if sequences else []


def _share(right: Sequence[bool]) -> float | None:
    """None of nothing."""
    return sum(right) / len(right) if right else None
