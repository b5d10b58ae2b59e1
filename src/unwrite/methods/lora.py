"""LoRA: teach the new answers to low-rank factors beside frozen matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from unwrite.adapters import ALL, AdapterShape
from unwrite.delta import Delta
from unwrite.edits import Edit
from unwrite.model import Model
from unwrite.training import Pair, Recipe, Trained, fine_tune_adapters, new_pairs


@dataclass(frozen=True)
class LoRA(Recipe):
    """Fine-tune ``W + alpha / rank * B A`` with the weights ``W`` frozen (METHODS 6.1).

    The delta is exactly that product, kept as factors of a few megabytes, and can be exported as a
    PEFT adapter. Training needs little memory on top of the model. ``targets``: kinds of matrices
    (q, k, v, o, gate, up, down, or all that the model has); the papers' LoRA is ``("q", "v")``.
    """

    lr: float = 5e-4
    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = (ALL,)

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "LoRA baseline of arXiv 2311.08011 and of Delicate Fine-Tuning"
    advice: ClassVar[str] = "little memory, small deltas, or an adapter to hand on"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._shape()

    def train(self, model: Model, pairs: Sequence[Pair], start: Delta | None = None) -> Trained:
        """Train adapters over the weights of ``model`` plus ``start``; the change from there."""
        courses = {"new": pairs}
        return fine_tune_adapters(model, courses, self, self._shape(), start=start)["new"]

    def train_twins(
        self, model: Model, old: Sequence[Pair], new: Sequence[Pair], start: Delta | None = None
    ) -> tuple[Trained, Trained]:
        """Two banks over one frozen model, trained side by side on the same prompts."""
        courses = {"old": old, "new": new}
        both = fine_tune_adapters(model, courses, self, self._shape(), start=start)
        return both["old"], both["new"]

    def delta(self, model: Model, edits: Sequence[Edit | Pair]) -> Delta:
        return self.train(model, new_pairs(edits)).delta

    def _shape(self) -> AdapterShape:
        return AdapterShape(self.rank, self.alpha, self.targets)
