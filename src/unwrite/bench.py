"""A loaded model that is put into one state after another, and asked the same questions in each.

States are composed as a home composes them, ``round_once(base + deltas)``, so that what a
comparison measures is what a home would give out after the same updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from unwrite import ability
from unwrite import scores as scoring
from unwrite.base import Base
from unwrite.delta import Delta
from unwrite.edits import Edit
from unwrite.errors import TrainingFailed
from unwrite.grid import Protocol
from unwrite.model import Model
from unwrite.observe import (
    Question,
    has_chat_template,
    in_chat,
    neutral_text,
    observe,
    perplexity,
    questions,
    rivals,
)
from unwrite.scores import Row, Scores

# Characters of neutral text on which single edits are gauged: the whole, read after each of them,
# would cost more than the edits. About one chunk of tokens.
EXCERPT = 1200


class Bench:
    """One model for all cells of a comparison, and how it is observed under their protocol."""

    trust_remote_code = False

    def __init__(self, model: Model, base: Base, protocol: Protocol) -> None:
        self.model = model
        self.base = base
        self.protocol = protocol
        self._held: list[Delta] | None = []  # the network in memory is the base with these

    def become(
        self,
        deltas: Sequence[Delta],
        finish: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Make the network the state with these deltas; nothing to do if it is that already.
        ``finish``: as in ``Model.become``; what it makes is no state that is kept in mind."""
        if finish is not None:
            self._held = None
            self.model.become(deltas, finish)
            return
        if self._held is not None and list(map(id, self._held)) == list(map(id, deltas)):
            return
        self._held = None
        self.model.become(deltas)
        self._held = list(deltas)

    def distrust(self) -> None:
        """Forget what state the network is in: a method that was cut off may have left another."""
        self._held = None

    def fingerprint(self, deltas: Sequence[Delta]) -> str:
        """Fingerprint of a state, recomposed from the base and not taken from the network."""
        if not any(deltas):
            return self.base.fingerprint
        return self.base.fingerprint_with(self.model.source.folder, deltas)

    def questions(self, edits: Sequence[Edit]) -> list[Question]:
        """All probes. One edit at a time has no other edits that could change its bystanders."""
        if self.protocol.mode == "single":
            return [probe for edit in edits for probe in questions([edit])]
        return questions(edits)

    def chat(self, probes: Sequence[Question]) -> list[dict[str, Any]]:
        """Rows of the probes asked under the chat template, with the prompts as they were given."""
        rows = self.observe(in_chat(self.model, probes))
        return [{**row, "prompt": probe.prompt} for row, probe in zip(rows, probes, strict=True)]

    def rivals(self, edits: Sequence[Edit]) -> list[Question]:
        """What is forced besides, where the protocol asks for the metrics of other toolkits."""
        if not self.protocol.neighbour_metrics:
            return []
        if self.protocol.mode == "single":
            return [probe for edit in edits for probe in rivals([edit])]
        return rivals(edits)

    def ability(self, edits: Sequence[Edit]) -> dict[str, Any] | None:
        """What lm-eval finds of the network as it is; null where the protocol has no tasks."""
        tasks = self.protocol.lm_eval
        return ability.measure(self.model, tasks, edits) if tasks else None

    def check_readable(self, edits: Sequence[Edit]) -> None:
        """Tokenise everything once; ``BadEdits`` for what this model cannot read."""
        for edit in edits:
            self.model.tokens(edit.prompt, edit.new)
        for probe in (*self.questions(edits), *self.rivals(edits)):
            if probe.target is not None:
                self.model.tokens(probe.prompt, probe.target)
        if "chat" in self.protocol.robust and has_chat_template(self.model):
            for probe in in_chat(self.model, self.questions(edits)):
                self.model.tokens(probe.prompt, probe.target or ".")

    def observe(self, probes: Sequence[Question]) -> list[dict[str, Any]]:
        """Rows as of ``observe``; ``text`` is null where answers are not generated."""
        return observe(self.model, probes, free=self.protocol.exact)

    def force(self, probes: Sequence[Question]) -> list[dict[str, Any]]:
        """The same with the answers forced only, whatever the protocol says."""
        return observe(self.model, probes, free=False)

    def score(self, before: Sequence[Row], after: Sequence[Row]) -> Scores:
        """All scores; the exact form is null where answers were not generated."""
        if self.protocol.exact:
            return scoring.score(before, after)
        spoken = ([{**row, "text": ""} for row in rows] for rows in (before, after))
        return {
            role: replace(one, exact=None, exact_low=None, exact_high=None)
            for role, one in scoring.score(*spoken).items()
        }

    def perplexity(self) -> float:
        """On the neutral text (of single edits: an excerpt). ``TrainingFailed`` if it is not a
        number."""
        text = neutral_text()
        measured = perplexity(
            self.model, text[:EXCERPT] if self.protocol.mode == "single" else text
        )
        if not math.isfinite(measured):
            raise TrainingFailed(
                "The updated weights no longer give numbers on neutral text. Use a smaller lr or "
                "strength."
            )
        return measured
