"""Full fine-tuning: teach the new answers to all weights. The yardstick for everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from unwrite.delta import Delta
from unwrite.edits import Edit
from unwrite.model import Model
from unwrite.training import Pair, Recipe, Trained, fine_tune, new_pairs


@dataclass(frozen=True)
class FullFT(Recipe):
    """Fine-tune all weights on the new answers (METHODS 6.1).

    The simplest method and the strongest plain baseline once it runs until the facts are learned.
    Costs four fp32 copies of the model in memory while it trains, and its delta is as large as the
    model. It moves bystanders more than other methods do: use it for facts without close
    neighbours, or with ``protect``.
    """

    name: ClassVar[str] = "full-ft"
    paper: ClassVar[str] = "Full-FT baseline of arXiv 2311.08011 and of Delicate Fine-Tuning"
    advice: ClassVar[str] = "a few facts, enough memory, no close neighbours to protect"

    def train(self, model: Model, pairs: Sequence[Pair], start: Delta | None = None) -> Trained:
        """Fine-tune from the weights of ``model`` plus ``start``; the change from there."""
        return fine_tune(model, pairs, self, start=start)

    def delta(self, model: Model, edits: Sequence[Edit | Pair]) -> Delta:
        return self.train(model, new_pairs(edits)).delta
